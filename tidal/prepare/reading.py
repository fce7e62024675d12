"""Reading `--data`: files, folders, globs and datasets → parts of documents, in bounded memory."""

from __future__ import annotations

import errno
import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from tidal.cli import UserError
from tidal.prepare.tabular import hugging_face_rows, parquet_rows

OF_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", *OF_LINES, ".parquet")
MAGIC = {b"\x1f\x8b": "it is gzipped: name it .gz", b"\xff\xfe": "it is UTF-16: convert it with iconv",
         b"\xfe\xff": "it is UTF-16: convert it with iconv"}  # fmt: skip
CHUNK = 1 << 20
"""Bytes read at once."""
PART = 1 << 20
"""Characters of a part."""
LONGEST_LINE = 1 << 24
"""Bytes of the first line of .json that are looked at."""
OWN = {
    "config.json": ({"recipe", "max_steps", "optim"}, "is a run, not data; to learn what is in its files, name them"),
    "plan.json": ({"version", "tokenizer", "shard"}, "is prepared data, not text; train on it by --prepared"),
}
"""What a run and a folder of prepared data hold from their first moment on: a file, and some keys of its object; and
what is said where one is named as data."""
WANT = '{"text": "…"} or {"prompt": "…", "completion": "…"}'


class Part(NamedTuple):
    """A stretch of a document, so that a long one need not be in memory as a whole."""

    text: str
    is_prompt: bool
    """Read but not learned; the prompt of a document comes before the rest."""
    ends: bool
    """The last part of its document; never a prompt."""
    source: str


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    lenient: bool = False
    """Found in a folder that has no text files by name: skip it if it is not text."""


def read_parts(paths: Sequence[str], tell: Callable[[str], None] = lambda line: None) -> Iterator[Part]:
    """The documents of files, folders and globs, one after the other, in a fixed order, in parts of PART characters.

    A folder gives its .txt, .md, .jsonl, .ndjson and .parquet files, also below it and also gzipped, or if it has none
    of these every file that is UTF-8 text. Hidden files are left out, and so are folders below it, or found by a glob,
    that hold a run or prepared data. `tell` is given a line about each such folder, and one about files of other names.

    A line of .jsonl or .ndjson (a row of .parquet) is {"text": …} or {"prompt": …, "completion": …} (other keys are
    ignored) and is held in memory as a whole; so is a line of .json, if the first is such an object. Any other file is
    one document, with its line ends as they are, and is not. A byte order mark is dropped. What holds nothing but white
    space is no document. A file that is named twice is read once, so that no text is both learned and held out.
    `hf:NAME` streams a dataset, see `tidal.prepare.tabular.hugging_face_rows`.

    Raises:
        UserError: a path that is missing or cannot be read, a run, prepared data, a glob without a match, a binary
            file, broken JSON or gzip, wrong keys, a lone surrogate, no text at all, or a package that is missing.
    """
    seen: set[str] = set()
    for path in paths:
        found = False
        for file in [path] if path.startswith("hf:") else _files(path, tell):
            real = file if isinstance(file, str) else os.path.realpath(file.path)
            if real in seen:
                found = True
                continue
            seen.add(real)
            for part in _rows(hugging_face_rows(file), file) if isinstance(file, str) else _in_file(file):
                found = True
                yield part
        if not found and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"no text in {path!r}, which is no file: data are read more than once; write them to one")
        if not found:
            raise UserError(f"no text in {path!r}: nothing, or only white space or binary files; check the path")
    if not paths:
        raise UserError("no data: name files, folders or globs with --data")


def real_files(paths: Sequence[str]) -> set[str]:
    """The real paths of the files that `read_parts` looks at; none for datasets from elsewhere. Raises UserError."""
    return {os.path.realpath(file.path) for path in paths if not path.startswith("hf:")
            for file in _files(path, lambda line: None)}  # fmt: skip


def _files(path: str, tell: Callable[[str], None]) -> list[_File]:
    """The files a path stands for, sorted."""
    if os.path.isdir(path):
        if own := _own(Path(path)):
            raise UserError(f"{path!r} {own}")
        return _in_folder(Path(path), tell)
    if os.path.exists(path):
        return [_File(Path(path))]
    if not glob.has_magic(path):
        raise UserError(f"no such file or folder: {path!r} (looked in {os.getcwd()}); check the path")
    files: list[_File] = []
    for match in sorted(glob.glob(path, recursive=True)):
        if not os.path.isdir(match):
            files.append(_File(Path(match)))
        elif not _left_out(Path(match), tell):
            files += _in_folder(Path(match), tell)
    if not files:
        raise UserError(f"no file matches {path!r} (looked in {os.getcwd()}); check the path, and quote globs")
    return files


def _in_folder(folder: Path, tell: Callable[[str], None]) -> list[_File]:
    found: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not _left_out(Path(where, name), tell) and not name.startswith(".")]
        found += [p for name in names if not name.startswith(".") and _is_file(p := Path(where, name))]
    found.sort()
    texts = [path for path in found if path.name.lower().removesuffix(".gz").endswith(SUFFIXES)]
    if texts and (others := sorted({*found} - {*texts})):
        tell(f"{folder}: {len(others):,} file{'s' * (len(others) > 1)} passed over, not named "
             f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, such as {others[0]}; for these give a glob")  # fmt: skip
    return [_File(path) for path in texts] or [_File(path, lenient=True) for path in found]


def _left_out(folder: Path, tell: Callable[[str], None]) -> bool:
    """Whether a folder is a run's, or prepared data; that is told."""
    if own := _own(folder):
        tell(f"leaving out {folder}, which Tidal made: a run, or prepared data")
    return own is not None


def _own(folder: Path) -> str | None:
    """What to say about a folder that is a run's, or prepared data; None for all others."""
    for name, (keys, what) in OWN.items():
        try:
            values = json.loads((folder / name).read_bytes()) if os.path.isfile(folder / name) else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(values, dict) and keys <= values.keys():
            return what
    return None


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link to one. Refuses what may not be looked at; Path.is_file differs by version."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return False
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}; check the path") from error


def _in_file(file: _File) -> Iterator[Part]:
    name, source = file.path.name.lower(), str(file.path)
    if name.endswith(".parquet"):
        yield from _rows(parquet_rows(file.path), source)
        return
    try:
        opener = gzip.open if name.endswith(".gz") else open
        with cast(BinaryIO, opener(file.path, "rb")) as data:
            name = name.removesuffix(".gz")
            if name.endswith(OF_LINES) or (name.endswith(".json") and _begins_with_row(data)):
                yield from _lines(data, source)
            elif not file.lenient or _is_text(data, source):
                yield from _parts("", _decoded(data, source), source)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file.path} is not intact gzip: {error}; pack it again, or fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}; check the path") from error


def _begins_with_row(data: BinaryIO) -> bool:
    """Whether the first line of a file is a document by itself, as in .jsonl; leaves it at its beginning."""
    try:
        first = json.loads(data.readline(LONGEST_LINE))
    except (ValueError, RecursionError):
        first = None
    data.seek(0)
    return isinstance(first, dict) and ("text" in first or {"prompt", "completion"} <= first.keys())


def _is_text(data: BinaryIO, source: str) -> bool:
    """Whether all of a file can be decoded; leaves it at its beginning. Gzip that is cut off is left as an error."""
    try:
        for _ in _decoded(data, source):
            pass
    except (UserError, gzip.BadGzipFile):
        return False
    data.seek(0)
    return True


def _parts(prompt: str, completion: Iterable[str], source: str) -> Iterator[Part]:
    """The parts of one document; none where there is nothing but white space."""
    held: list[Part] = []
    blank = True
    sides = ((True, [prompt] if prompt else ()), (False, completion))
    for part in (Part(text, is_prompt, last and not is_prompt, source)
                 for is_prompt, texts in sides if texts or not is_prompt for text, last in _sized(texts)):  # fmt: skip
        held.append(part)
        blank = blank and not part.text.strip()
        if not blank:
            yield from held
            held.clear()


def _sized(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A text that comes in pieces, cut anew into PART characters each, the last one less; whether it is the last."""
    buffer = ""
    for text in texts:
        buffer += text
        ends = range(PART, len(buffer), PART)
        yield from ((buffer[end - PART : end], False) for end in ends)
        buffer = buffer[len(ends) * PART :]
    yield buffer, True


def _decoded(data: BinaryIO, source: str) -> Iterator[str]:
    """The text of a file, read in pieces; a character that a piece ends in goes to the next one."""
    offset, rest = 0, b""
    while chunk := data.read(CHUNK):
        piece = rest + chunk
        end = len(piece) - _unfinished(piece)
        if end:
            yield _decode(piece[:end], source, offset)
        offset, rest = offset + end, piece[end:]
    if rest:
        yield _decode(rest, source, offset)


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character whose other bytes are still to come."""
    for back, byte in enumerate(data[: -4 : -1], start=1):
        if byte >= 0xC0:
            return back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0


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


def _lines(data: BinaryIO, path: str) -> Iterator[Part]:
    offset = 0
    for number, line in enumerate(data, start=1):
        source = f"{path}:{number}"
        text = _decode(line, source, offset)
        offset += len(line)
        if text.strip():
            yield from _from_values(from_json(text, source), source, "\\u" in text)


def _rows(rows: Iterable[dict[str, Any]], path: str) -> Iterator[Part]:
    for number, values in enumerate(rows, start=1):
        yield from _from_values(values, f"{path}:{number}")


def from_json(line: str, source: str) -> Any:
    """What a line of .jsonl holds. Raises UserError, which begins with `source`."""
    try:
        return json.loads(line.rstrip())  # else the column is that of the next line
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise UserError(f"{source} is not JSON: {what}; every line must be one object") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON that can be read: {error}; every line must be one object") from error


def _from_values(value: Any, source: str, escaped: bool = True) -> Iterator[Part]:
    """The parts of a document that is given by name; `escaped` text may hold lone surrogates."""
    if not isinstance(value, dict):
        raise UserError(f"{source} holds a {type(value).__name__}, not an object; a line is {WANT}")
    keys = value.keys() & {"text", "prompt", "completion"}
    if keys not in ({"text"}, {"prompt", "completion"}):
        shown = ", ".join(map(repr, list(value)[:6])) or "none"
        raise UserError(f"{source} has the wrong keys ({shown}); it must have {WANT}")
    for key in sorted(keys):
        if not isinstance(value[key], str):
            raise UserError(f"{source}: {key!r} is a {type(value[key]).__name__}, not a string; it must be {WANT}")
        if escaped:
            try:
                value[key].encode("utf-8")
            except UnicodeEncodeError as error:
                found = f"\\u{ord(value[key][error.start]):04x}"
                raise UserError(
                    f"{source}: {key!r} has a lone surrogate ({found}) at character {error.start}, "
                    "which is no text; remove it"
                ) from error
    yield from _parts(value.get("prompt", ""), [value["text"] if "text" in keys else value["completion"]], source)
