"""The split rules that need no vocabulary: text -> blocks.

A block is about a word, with its one leading space. Joined, the blocks are the text again:

    "Don't add 54663 +\\n\\n  1."   ->   [Don't][ add][ 54663][ +][\\n\\n ][ 1][.]

Everything here is linear in the length of the text, whatever the text. Letters, marks, digits and white space are
those of Python's Unicode version; versions differ only in characters that were newly assigned.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

RULES_VERSION = 1
"""Raise this whenever any rule in this file changes: it is part of the tokenizer's fingerprint."""

_UNSPACED = (
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u302f"  # Han: radicals, iteration mark, numerals
    "\u3031-\u312f\u31a0-\u31bf\u31f0-\u31ff"  # Hiragana, Katakana, Bopomofo
    "\u3400-\u4dbf\u4e00-\ua4cf\uf900-\ufaff"  # Han, Yi, Han compatibility
    "\uff66-\uff9f"  # half-width Katakana
    "\U00016fe0-\U00018dff\U0001aff0-\U0001b2ff\U00020000-\U0003ffff"  # Tangut, Kana and Han beyond the BMP
)
UNSPACED = re.compile(f"[{_UNSPACED}]")
"""One character of a script that puts no spaces between words."""
_BY_SCRIPT = re.compile(f" ?[{_UNSPACED}]+|[^{_UNSPACED}]+")


def utf8(text: str, offset: int = 0) -> bytes:
    """UTF-8 bytes of `text`. ValueError names the offset (plus `offset`) of the first lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        what, where = f"U+{ord(text[error.start]):04X}", error.start + offset
        raise ValueError(f"lone surrogate {what} at offset {where} is not text") from None


def find_blocks(text: str) -> list[str]:
    """Blocks of `text` by character class alone: unspaced scripts and over-long runs are not cut yet."""
    return _block_pattern().findall(text)


def by_script(block: str) -> list[str]:
    """Cut a block into runs of unspaced scripts (with one leading space) and the runs between them."""
    return _BY_SCRIPT.findall(block)


def cut_to_fit(block: str, widths: Iterable[int], cap: int) -> list[str]:
    """Cut `block` between characters so that the widths (units per character) of each piece sum to <= `cap`.

    Greedy from the left, as the decoder must: it meets the cap before it knows what would have followed.
    """
    pieces, start, used = [], 0, 0
    for end, width in enumerate(widths):
        if used + width > cap:
            pieces.append(block[start:end])
            start, used = end, 0
        used += width
    return [*pieces, block[start:]]


@functools.cache
def _block_pattern() -> re.Pattern[str]:
    r"""The one pattern that `find_blocks` runs. Its alternatives cover every character: nothing is lost.

    `re` knows letters ([^\W\d_], with numerals such as ² and Ⅷ), digits (\d), white space (\s), but no \p{M}.
    """
    # A shortcut, three times faster on English: ASCII letters, then an ASCII character that ends a word.
    ascii_word = r"[A-Za-z]++(?=[\x00-&(-@\[-`{-\x7f])"
    # The number of mark groups is bounded only because `re` keeps state for each pass through a group: else
    # a hostile text, all letter-mark-letter-mark, would take gigabytes. No word has 64 such groups.
    marks = f"[{_combining_marks()}\u200c\u200d]+"  # and the joiners, which Persian and Indic words hold
    word = rf"[^\W\d_]+(?:(?:['\u2019](?=[^\W\d_])|{marks})[^\W\d_]*){{0,64}}"
    return re.compile(rf" ?{ascii_word}| ?(?:{word}|\d+|[^\s\w]+|_+)|\s+(?= \S)|\s+")


def _combining_marks() -> str:
    """Ranges of all combining marks (categories Mn, Mc, Me) for a character class.

    Only planes 0, 1 and the variation selectors of plane 14 hold any (asserted by a test).
    """
    ranges: list[list[int]] = []
    for code in [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]:
        if unicodedata.category(chr(code))[0] == "M":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
