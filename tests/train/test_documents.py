"""Reading --data."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import SupportsIndex

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.tokenizer.strategies import hostile_text
from tidal.cli import UserError
from tidal.prepare import reading
from tidal.prepare.documents import Document, read_documents
from tidal.prepare.seams import at_seams


def texts(*paths: Path | str) -> list[str]:
    return [document.completion for document in read_documents([str(path) for path in paths])]


def complaint(*paths: Path | str) -> str:
    with pytest.raises(UserError) as raised:
        texts(*paths)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_a_plain_file_is_one_document_kept_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\r\xe2\x96\x81\xef\xbb\xbf\n")
    assert list(read_documents([str(path)])) == [Document("", "one\r\ntwo\n\r\u2581\ufeff\n", str(path))]


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress], ids=["plain", "gz"])
def test_jsonl(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    lines = [{"text": "a\r\nb\u2028\0"}, {"prompt": "1 + 1 =", "completion": " 2\n", "id": 3}, {"text": ""}]
    path = tmp_path / ("d.jsonl" if pack(b"") == b"" else "d.jsonl.gz")
    body = "\ufeff" + "".join(json.dumps(line) + "\r\n\n" for line in lines) + '{"text": "\\ud83d\\ude00"}'
    path.write_bytes(pack(body.encode()))
    assert list(read_documents([str(path)])) == [
        Document("", "a\r\nb\u2028\0", f"{path}:1"),
        Document("1 + 1 =", " 2\n", f"{path}:3"),
        Document("", "\U0001f600", f"{path}:7"),
    ]


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "first"}\nnot json\n')
    documents = read_documents([str(path)])
    assert next(documents).completion == "first"
    with pytest.raises(UserError, match=r"d\.jsonl:2 is not JSON"):
        next(documents)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile_text(max_size=12), st.integers(1, 9), st.integers(1, 9), st.booleans())
@example("\ufeff\u3000\u3000a", 1, 1, False)
def test_reading_in_pieces_changes_nothing(tmp_path: Path, text: str, chunk: int, part: int, packed: bool) -> None:
    """Pieces of a few bytes cut characters and byte order marks; parts have the size asked for."""
    text = text.replace("\0", "0")
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if packed else text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        patch.setattr(reading, "PART", part)
        parts = list(reading.read_parts([str(path)])) if text.removeprefix("\ufeff").strip() else []
    assert "".join(p.text for p in parts) == (text.removeprefix("\ufeff") if parts else "")
    assert all(len(p.text) == part for p in parts[:-1])
    assert [p.ends for p in parts] == [False] * (len(parts) - 1) + [True] * bool(parts)


def test_a_character_cut_in_two_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the incomplete end of a piece is not kept for the next one."""
    (tmp_path / "a.txt").write_text("今é" * 7)
    monkeypatch.setattr(reading, "CHUNK", 4)
    assert texts(tmp_path / "a.txt") == ["今é" * 7]
    monkeypatch.setattr(reading, "_unfinished", lambda _: 0)
    assert "is not text" in complaint(tmp_path / "a.txt")


def test_a_bad_byte_is_named_wherever_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, what in ((b"\xff", r"invalid UTF-8 \(0xff\)"), (b"\0", "NUL"), (b"\xe4\xbb", r"invalid UTF-8 \(0xe4\)")):
        (tmp_path / "a.txt").write_bytes("今é".encode() * 7 + bad)
        for chunk in (4, 5, 7, 1 << 20):
            monkeypatch.setattr(reading, "CHUNK", chunk)
            with pytest.raises(UserError, match=f"{what} at byte 35"):
                texts(tmp_path / "a.txt")


def test_folders_and_globs_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in (
        "b.txt",
        "a.MD",
        "sub/c.txt.gz",
        "sub/.hidden.txt",
        "sub/.git/x.txt",
        "x.png",
        "sub/empty.txt",
    ):
        data = b"" if "empty" in name else b"\x89PNG" if "png" in name else name.encode()
        (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert texts(tmp_path) == ["a.MD", "b.txt", "sub/c.txt.gz"]
    assert texts(tmp_path / "*.txt", tmp_path) == ["b.txt", "a.MD", "sub/c.txt.gz"]  # nothing is read twice
    assert texts(tmp_path / "**" / "*.txt*") == ["b.txt", "sub/c.txt.gz"]
    assert texts(tmp_path / "s*") == ["sub/c.txt.gz"]
    assert texts(tmp_path / "b.txt", tmp_path / "sub" / ".." / "b.txt") == ["b.txt"]


def test_a_folder_without_known_names_gives_whatever_is_text(tmp_path: Path) -> None:
    (tmp_path / "poem").write_text("a")
    (tmp_path / "code.py").write_text("b")
    (tmp_path / "code.gz").write_bytes(b"not gzip")
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    (tmp_path / ".hidden").write_text("c")
    assert texts(tmp_path) == ["b", "a"]
    whole = gzip.compress(b"abcdefgh" * 99, mtime=0)
    for bad in (whole[:-9], whole[:12] + b"\xff" + whole[13:]):  # text that is lost, and would be missed
        (tmp_path / "cut.gz").write_bytes(bad)
        assert re.match(r".*cut\.gz is not intact gzip: .*; pack it again, or fetch it again$", complaint(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSON.gz"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_documents_by_lines_whatever_the_name(name: str, in_folder: bool, tmp_path: Path) -> None:
    data = b'{"text": "one\\n", "id": 1}\n{"prompt": "two", "completion": " three"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert texts(tmp_path if in_folder else tmp_path / name) == ["one\n", " three"]


@pytest.mark.parametrize("text", ['{\n"text": "one"\n}\n', '[{"text": "one"}]\n', '{"name": "one"}',
                                  '{"prompt": "one"}', "{"])  # fmt: skip
def test_other_json_is_text_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert texts(tmp_path / "a.json") == [text]


def test_files_passed_over_for_their_names_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", ".hidden", "b.py", "a.py"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["README.md"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: 2 files passed over, not named .txt, .md, .jsonl, .ndjson or .parquet, "
        f"such as {tmp_path / 'a.py'}; for these give a glob\n"
    )
    assert texts(tmp_path / "*.py", tmp_path / "README.md") == ["a.py", "b.py", "README.md"]
    assert capsys.readouterr().err == ""


def test_a_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert texts(tmp_path / "a[1].txt") == ["x"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("e.txt", b"", ["no text in", "e.txt"]),
        ("e.txt", b" \r\n\t", ["no text in", "e.txt"]),
        ("e.jsonl", b'{"text": ""}\n\n', ["no text in", "e.jsonl"]),
        ("b.txt", b"abc\0def", ["b.txt is not text: NUL at byte 3"]),
        ("b.txt", b"abc\xff\n", ["b.txt is not text: invalid UTF-8 (0xff) at byte 3"]),
        ("b.txt", "ab".encode("utf-16"), ["b.txt", "UTF-16"]),
        ("b.txt", gzip.compress(b"ab", mtime=0), ["b.txt", "name it .gz"]),
        ("b.txt", b"\xed\xa0\x80", ["b.txt", "at byte 0"]),
        ("b.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["b.jsonl:2", "byte 24"]),
        ("b.jsonl", b'{"text": "a"}\n{"text": "a\n', ["b.jsonl:2 is not JSON", "column"]),
        ("b.jsonl", b"[" * 100_000, ["b.jsonl:1 is not JSON"]),
        ("b.jsonl", b'["a"]', ["b.jsonl:1 holds a list", '{"text"']),
        ("b.jsonl", b'{"txt": "a", "id\\n": 1}', ["b.jsonl:1 has the wrong keys ('txt', 'id\\n')"]),
        ("b.jsonl", b"{}", ["b.jsonl:1 has the wrong keys (none)"]),
        ("b.jsonl", b'{"prompt": "a"}', ["b.jsonl:1 has the wrong keys ('prompt')"]),
        ("b.jsonl", b'{"text": "a", "prompt": "b", "completion": "c"}', ["b.jsonl:1 has the wrong keys"]),
        ("b.jsonl", b'{"text": 3}', ["b.jsonl:1: 'text' is a int, not a string"]),
        ("b.jsonl", b'{"prompt": "a", "completion": null}', ["b.jsonl:1: 'completion' is a NoneType"]),
        ("b.jsonl", b'{"text": "ab\\ud800"}', ["b.jsonl:1: 'text'", "\\ud800", "character 2"]),
        ("b.jsonl", b'{"prompt": "\\udc00x", "completion": ""}', ["b.jsonl:1: 'prompt'", "\\udc00"]),
        ("b.gz", b"not gzip", ["b.gz is not intact gzip"]),
        ("b.gz", gzip.compress(bytes(range(1, 100)) * 9, mtime=0)[:-9], ["b.gz is not intact gzip"]),
        ("b.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:30], ["b.jsonl.gz is not intact gzip"]),
        (
            "b.gz",
            gzip.compress(b"abcdefgh", mtime=0)[:12] + b"\xff\xff" + gzip.compress(b"abcdefgh", mtime=0)[14:],
            ["b.gz is not"],
        ),
        ("bad\nname.txt", b"\0", ["bad name.txt is not text"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    said = complaint(tmp_path / name)
    assert all(word in said for word in words), said


def test_missing_things(tmp_path: Path) -> None:
    assert "no such file or folder" in complaint(tmp_path / "missing.txt")
    assert "no file matches" in complaint(tmp_path / "*.txt")
    assert "no text in" in complaint(tmp_path)
    assert "no data" in complaint()
    (tmp_path / "link.txt").symlink_to("nowhere")
    assert "no such file or folder" in complaint(tmp_path / "link.txt")


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.txt").write_text("some text")
    real = os.scandir

    def scandir(path: object) -> object:
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        assert re.match(r"cannot read .*secret: Permission denied; check the path", complaint(tmp_path))
    (tmp_path / "secret" / "b.txt").write_text("more text")
    known = os.stat

    def stat(path: object, **options: bool) -> os.stat_result:
        if str(path).endswith("b.txt"):  # its folder may be listed, but not entered
            raise PermissionError(13, "Permission denied", str(path))
        return known(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    assert re.match(r"cannot read .*b\.txt: Permission denied; check the path", complaint(tmp_path))


class Counted(str):
    """A text that counts what is copied of it."""

    copied = 0

    def __add__(self, other: str) -> Counted:
        return self._count(str.__add__(self, other))

    def __radd__(self, other: str) -> Counted:
        return self._count(str.__add__(other, self))

    def __getitem__(self, key: SupportsIndex | slice) -> Counted:
        return self._count(str.__getitem__(self, key))

    @classmethod
    def _count(cls, text: str) -> Counted:
        cls.copied += len(text)
        return cls(text)


def test_long_texts_are_not_copied_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PART", 100)
    monkeypatch.setattr(Counted, "copied", 0)
    text = "字" * 9_950
    assert [len(piece) for piece, _ in reading._sized([Counted(text)])] == [100] * 99 + [50]
    assert Counted.copied < 3 * len(text)
    monkeypatch.setattr(Counted, "copied", 0)
    parts = [reading.Part(Counted(text[:100]), False, i == 99, "f") for i in range(100)]
    assert [len(part.text) for part in at_seams(parts, 32, 100)] == [10_000]
    assert Counted.copied < 3 * len(text)
