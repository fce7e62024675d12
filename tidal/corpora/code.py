"""Code: the standard library of the Python that is running, module by module."""

from __future__ import annotations

import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tidal.cli import UserError
from tidal.corpora.documents import Document, held_out_by_hash

TESTS = {"test", "tests", "idle_test"}
GENERATED = re.compile(r"_sysconfigdata|pydoc_data")
"""Modules that differ from machine to machine, or hold the reference manual as one string."""


def standard_library(folder: Path | None = None) -> Iterator[Document]:
    """The modules below `folder` (None: the running Python's library), sorted; one document each, as UTF-8.

    Left out are tests, what is installed beside the library, and generated tables (the character maps of
    `encodings`). Modules of one top-level package are held out together, for they share texts.

    Raises:
        UserError: there are no modules.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).with_suffix("").parts):
        parts = path.relative_to(root).with_suffix("").parts
        if not all(part.isidentifier() for part in parts) or TESTS & set(parts) or GENERATED.match(parts[0]):
            continue  # site-packages and __pycache__'s like are no identifiers
        text = _source(path.read_bytes(), path)
        if "generated from" in text[:400]:
            continue
        found = True
        module = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        yield Document(module, text, held_out_by_hash(parts[0]))
    if not found:
        raise UserError(f"no Python modules in {root}; the standard library is packed away or not installed")


def _source(data: bytes, path: Path) -> str:
    """A module's text, by the encoding it declares, with \\n line ends."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no Python module: {error}; install Python again") from error
