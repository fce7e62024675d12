"""A document of a corpus, and what is done to all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

HELD_OUT_OF = 16
"""Of documents that are split by the hash of a name, one in so many is held out."""


@dataclass(frozen=True)
class Document:
    """A book, play, page or module."""

    name: str
    """Its file's name, without .txt."""
    text: str
    held_out: bool
    """Kept from training."""


def held_out_by_hash(key: str, one_in: int = HELD_OUT_OF) -> bool:
    """The split where no list names what is held out: a function of the SHA-256 of `key` alone, the same for ever."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % one_in == 0


def tidy(text: str) -> str:
    """Text with \\n line ends, no white space at line ends, single blank lines, and one line end at its end."""
    text = re.sub(r"\r\n?", "\n", text)
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Leave out documents without text, and those whose text another one before them has."""
    seen: set[str] = set()
    for document in documents:
        if document.text.strip() and document.text not in seen:
            seen.add(document.text)
            yield document
