"""Where a text may be cut so that the blocks of the pieces are the blocks of the whole.

`MixedTokenizer.split` reads from left to right, and at the beginning of a block all it needs is the text that follows.
So a boundary of blocks is a seam if it is sure to be one whatever stands on the far sides:

    "the sea"      a character that is no white space, then one that is: blocks hold white space only in front
    "f(x);y=1"     an ASCII mark of punctuation (but no apostrophe, which words hold), then an ASCII letter or digit
    "ACGTACGT…"    a run of one kind that is all the text so far: it is cut at `max_block_units`, from the left
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tidal.prepare.reading import Part

_PUNCTUATION = r"!-&(-/:-@\[-^`{-~"
_AFTER_PUNCTUATION = re.compile(rf"[{_PUNCTUATION}](?=[0-9A-Za-z])")
_RUN = re.compile(rf" ?(?:[A-Za-z]+|[0-9]+|_+|[{_PUNCTUATION}]+)|[\t-\r ]+")


def seam(text: str, cap: int) -> int:
    """The last known seam inside `text`, which begins at one; 0 where none is known. `cap` is `max_block_units`."""
    end = len(text.rstrip())
    if 0 < end < len(text):
        return end
    if end and len(halves := text.rsplit(None, 1)) == 2:
        return len(halves[0])
    last = 0
    for last_match in _AFTER_PUNCTUATION.finditer(text):
        last = last_match.end()
    if last:
        return last
    # At least one more character of the run must follow; of white space two, the last may belong to a word.
    return (len(text) - 2) // cap * cap if len(text) > cap + 1 and _RUN.fullmatch(text) else 0


def at_seams(parts: Iterable[Part], cap: int, size: int) -> Iterator[Part]:
    """The same documents, in parts of about `size` characters that begin and end at seams.

    A text without a seam is held until there is one: unspaced script without any white space or punctuation, say.
    """
    kept: Part | None = None
    enough = size
    for part in parts:
        if kept is not None and kept.is_prompt and not part.is_prompt:
            yield kept
            kept, enough = None, size
        text = part.text if kept is None else kept.text + part.text
        while not part.ends and len(text) >= enough:
            if not (cut := seam(text[:enough], cap)):
                enough *= 2  # so that the time stays linear
                continue
            yield part._replace(text=text[:cut], ends=False)
            text, enough = text[cut:], size
        kept = part._replace(text=text)
        if part.ends:
            yield kept
            kept, enough = None, size
