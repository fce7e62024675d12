"""Reading `--data`: files, folders and globs → documents; and keeping some of them for validation."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tidal.cli import UserError

SUFFIXES = (".txt", ".md", ".jsonl")
MAGIC = {b"\x1f\x8b": "it is gzipped: name it .gz", b"\xff\xfe": "it is UTF-16: convert it with iconv",
         b"\xfe\xff": "it is UTF-16: convert it with iconv"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn: all of it, or (where there is a prompt) the completion given the prompt."""

    prompt: str
    """Read but not learned; "" for plain text."""
    completion: str
    """Read and learned."""
    source: str
    """Where it comes from: a file, or FILE:LINE."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    lenient: bool = False
    """Found in a folder that has no text files by name: skip it if it is not text."""


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """The documents of files, folders and globs, one after the other, in a fixed order.

    A folder gives its .txt, .md and .jsonl files, also below it and also gzipped, or if it has none of these
    every file that is UTF-8 text. Hidden files are left out. A line of .jsonl is {"text": …} or
    {"prompt": …, "completion": …} (other keys are ignored); any other file is one document, with its line
    ends as they are. A byte order mark is dropped. What holds nothing but white space is no document. A file
    that is named twice is read once, so that no text is both learned and held out.

    Raises:
        UserError: a path that is missing or cannot be read, a glob without a match, a binary file, broken
            JSON or gzip, wrong keys, a lone surrogate, or no text at all.
    """
    seen: set[str] = set()
    for path in paths:
        found = False
        for file in _files(path):
            real = os.path.realpath(file.path)
            if real in seen:
                found = True
                continue
            seen.add(real)
            for document in _documents(file):
                found = True
                yield document
        if not found:
            raise UserError(f"no text in {path!r}: nothing, or only white space or binary files; check --data")
    if not paths:
        raise UserError("no data: name files, folders or globs with --data")


def _files(path: str) -> list[_File]:
    """The files a path stands for, sorted."""
    if os.path.isdir(path):
        return _in_folder(Path(path))
    if os.path.exists(path):
        return [_File(Path(path))]
    if not glob.has_magic(path):
        raise UserError(f"no such file or folder: {path!r} (looked in {os.getcwd()}); check --data")
    files: list[_File] = []
    for match in sorted(glob.glob(path, recursive=True)):
        files += _in_folder(Path(match)) if os.path.isdir(match) else [_File(Path(match))]
    if not files:
        raise UserError(f"no file matches {path!r} (looked in {os.getcwd()}); check --data, and quote globs")
    return files


def _in_folder(folder: Path) -> list[_File]:
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [p for name in names if not name.startswith(".") and (p := Path(where, name)).is_file()]
    found.sort()
    texts = [path for path in found if path.name.lower().removesuffix(".gz").endswith(SUFFIXES)]
    return [_File(path) for path in texts] or [_File(path, lenient=True) for path in found]


def _documents(file: _File) -> Iterator[Document]:
    name = file.path.name.lower()
    try:
        opener = gzip.open if name.endswith(".gz") else open
        with cast(BinaryIO, opener(file.path, "rb")) as data:
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from _lines(data, str(file.path))
            else:
                try:
                    text = _decode(data.read(), str(file.path))
                except UserError:
                    if not file.lenient:
                        raise
                    return
                if text.strip():
                    yield Document("", text, str(file.path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file.path} is not intact gzip: {error}; pack it again, or fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}; check --data") from error


def _decode(data: bytes, source: str, offset: int = 0) -> str:
    """UTF-8 bytes that begin at `offset` of their file, as text without a byte order mark."""
    hint = MAGIC.get(b"" if offset else data[:2], "only UTF-8 text can be learned")
    if (zero := data.find(0)) >= 0:
        raise UserError(f"{source} is not text: NUL at byte {offset + zero}; {hint}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8 (0x{data[error.start]:02x}) at byte {offset + error.start}"
        raise UserError(f"{source} is not text: {what}; {hint}") from error
    return text if offset else text.removeprefix("\ufeff")


def _lines(data: BinaryIO, path: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(data, start=1):
        source = f"{path}:{number}"
        text = _decode(line, source, offset)
        offset += len(line)
        if text.strip():
            document = _from_json(text, source)
            if document.prompt.strip() or document.completion.strip():
                yield document


def _from_json(line: str, source: str) -> Document:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise UserError(f"{source} is not JSON: {what}; every line must be one object") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON that can be read: {error}; every line must be one object") from error
    want = 'a line is {"text": "…"} or {"prompt": "…", "completion": "…"}'
    if not isinstance(value, dict):
        raise UserError(f"{source} holds a {type(value).__name__}, not an object; {want}")
    keys = value.keys() & {"text", "prompt", "completion"}
    if keys not in ({"text"}, {"prompt", "completion"}):
        shown = ", ".join(map(repr, list(value)[:6])) or "none"
        raise UserError(f"{source} has the wrong keys ({shown}); {want}")
    for key in sorted(keys):
        if not isinstance(value[key], str):
            raise UserError(f"{source}: {key!r} is a {type(value[key]).__name__}, not a string; {want}")
        if "\\u" in line:
            try:
                value[key].encode("utf-8")
            except UnicodeEncodeError as error:
                found = f"\\u{ord(value[key][error.start]):04x}"
                raise UserError(
                    f"{source}: {key!r} has a lone surrogate ({found}) at character {error.start}, "
                    "which is no text; remove it"
                ) from error
    return Document(value.get("prompt", ""), value["text"] if "text" in keys else value["completion"], source)


def hold_out(
    documents: Iterable[Document], fraction: float = 0.05, seed: int = 0, cap: int = 1_000_000
) -> tuple[list[Document], list[Document]]:
    """Divide documents into training and validation, by document and never by line; both keep their order.

    Validation is about `fraction` of the characters, but at most about `cap`. Which documents it gets depends
    only on `seed` and their numbers. Where no choice of whole documents comes near that (there is only one,
    or one of them is nearly everything), the *tail* of the longest plain document, cut at the end of a
    paragraph, line or word, becomes the only validation document, and training keeps the rest of it. A
    document with a prompt is never cut.

    Raises:
        UserError: a `fraction` outside (0, 1), no documents, or a single one that cannot be divided.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held out part must lie between 0 and 1, not {fraction}; try 0.05")
    everything = list(documents)
    sizes = [len(document) for document in everything]
    target = min(fraction * sum(sizes), cap)
    order = sorted(range(len(sizes)), key=lambda i: _hash(seed, i))
    chosen: set[int] = set()
    taken = 0
    for i in order:
        if taken >= 0.99 * target:
            break
        if taken + sizes[i] <= target:
            chosen.add(i)
            taken += sizes[i]
    if taken < target / 2:
        limit = min(max(2 * target, min(0.2 * sum(sizes), cap)), sum(sizes) - 1)
        rather_long = [i for i in order if target < sizes[i] <= limit]
        divisible = [i for i in order if sizes[i] > max(target, 1) and not everything[i].prompt]
        if rather_long:
            chosen = {min(rather_long, key=sizes.__getitem__)}
        elif divisible:
            return _cut(everything, max(divisible, key=sizes.__getitem__), target)
        elif not chosen and len(sizes) > 1:
            chosen = {min(order, key=sizes.__getitem__)}
    if not chosen:
        raise UserError(f"too little data to hold some out for validation (documents: {len(sizes)}); add more")
    training = [document for i, document in enumerate(everything) if i not in chosen]
    return training, [everything[i] for i in sorted(chosen)]


def _hash(seed: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()


def _cut(documents: list[Document], i: int, target: float) -> tuple[list[Document], list[Document]]:
    """Divide document `i` about `target` characters before its end (a short one earlier: a fifth)."""
    whole = documents[i]
    text = whole.completion
    size = min(max(1, round(target), min(1000, len(text) // 5)), len(text) - 1)
    at = _boundary(text, len(text) - size, size // 2)
    head = Document("", text[:at], whole.source)
    tail = Document("", text[at:], f"{whole.source} (tail)")
    return [*documents[:i], head, *documents[i + 1 :]], [tail]


def _boundary(text: str, at: int, reach: int) -> int:
    """The end of a paragraph, else line, else word, nearest to `at` and at most `reach` from it; or `at`."""
    low, high = max(at - reach, 0), min(at + reach, len(text) - 1)
    for end in ("\n\n", "\n\r\n", "\n", " "):
        found = text.rfind(end, low, at), text.find(end, max(at - len(end) + 1, 0), high)
        if cuts := [start + len(end) for start in found if start >= 0]:
            return min(cuts, key=lambda cut: abs(cut - at))
    return at
