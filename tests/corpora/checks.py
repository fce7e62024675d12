"""The checks of what must hold, each seen failing in test_planted_bugs.py."""


from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.commands import tree
from tests.corpora.fabricated import NOTICE, pinned, tar
from tidal.cli import UserError
from tidal.corpora import archives, build, documents, fetch


def check_no_name_leads_out(tmp_path: Path) -> None:
    for name in ("/etc/passwd", "../x", "a/../../x"):
        (tmp_path / "x.tar.gz").write_bytes(tar({name: b"evil"}, mode="w:gz"))
        with pytest.raises(UserError, match="leads out of it"):
            list(archives.files(tmp_path / "x.tar.gz"))


def made(found: Iterable[documents.Document], held_out: bool) -> set[str]:
    return {line for d in found if d.held_out == held_out for line in d.text.split("\n") if len(line.encode()) >= 30}


def check_chinese(folder: Path) -> None:
    """No long line is both learnt and held out; no saying's book, page and poem is cut; both splits have some."""
    got = [folder / f"{package.name}_9.9_all.deb" for package in build.CHINESE]
    every = [fetch.Archive(package, path, "9.9", "") for package, path in zip(build.CHINESE, got, strict=True)]
    found = list(build.CORPORA["chinese"].documents(every))
    assert not made(found, True) & made(found, False)
    assert 0 < sum(d.held_out for d in found) < len(found) / 4
    assert sum(NOTICE in d.text for d in found) == 1
    assert {d.name.split("-")[0] for d in found} == {"fortunes", "man", "help"}
    assert len(found) == 63 + 40 + 40


def check_split(found: list[documents.Document]) -> None:
    """The split by hash is what it was when the figures in docs/corpora.md were measured, whatever the process."""
    tops = {d.name.split(".")[0] for d in found if d.held_out}
    always = {"calendar", "ctypes", "dataclasses", "glob", "importlib", "lzma", "mailbox", "site"}
    assert always <= tops <= always | {"_markupbase", "imghdr"} | {t for t in tops if documents.held_out_by_hash(t)}
    assert not tops & {d.name.split(".")[0] for d in found if not d.held_out}
    assert not tops & {"argparse", "ast", "json", "re", "typing", "unittest", "email", "asyncio", "tkinter", "turtle"}


def check_checksums(fabricated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = pinned(fabricated / "bible-kjv-text_9.9_all.deb")
    (got,) = fetch.fetch([good], tmp_path, fabricated)
    assert (got.version, got.sha256) == ("9.9", good.sha256)
    assert "is not" not in capsys.readouterr().err
    with pytest.raises(UserError, match=f"has SHA-256 {good.sha256}, not 0+: it is damaged or was tampered"):
        fetch.fetch([dataclasses.replace(good, sha256="0" * 64)], tmp_path, fabricated)


def check_other_folders_are_refused(fabricated: Path, tmp_path: Path) -> None:
    def refused(name: str = "kjv") -> None:
        before = tree(tmp_path)
        with pytest.raises(UserError, match=f"is there and is not the complete corpus '{name}'"):
            build.build(name, out, fabricated)
        assert tree(tmp_path) == before

    out = tmp_path / "out"
    build.build("kjv", out, fabricated)
    refused("english")
    refused("code")
    book = next((out / "train").iterdir())
    text = book.read_bytes()
    book.write_bytes(text + b"x")
    refused()
    book.unlink()
    refused()
    book.write_bytes(text)
    assert build.build("kjv", out, fabricated)[1] is False
    (out / "held-out/new.txt").write_bytes(b"x")
    refused()
    for content in (b"", b"[]", b"{}", b"\xff", b'{"format": 1, "name": "kjv"}'):
        (out / "corpus.json").write_bytes(content)
        refused()
    shutil.rmtree(out)
    out.write_bytes(b"a file")
    refused()
