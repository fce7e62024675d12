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
    texts: list[str] = []  # since the last seam, of `last` and parts before it
    length, enough = 0, size
    last: Part | None = None
    for part in parts:
        if last is not None and last.is_prompt and not part.is_prompt:
            yield last._replace(text="".join(texts))
            texts, length, enough = [], 0, size
        texts.append(part.text)
        length += len(part.text)
        while not part.ends and length >= enough:
            text = "".join(texts)
            if cut := seam(text[:enough], cap):
                yield part._replace(text=text[:cut], ends=False)
                text, enough = text[cut:], size
            else:
                enough *= 2  # so that the time stays linear
            texts, length = [text], len(text)
        last = part
        if part.ends:
            yield part._replace(text="".join(texts))
            texts, length, enough, last = [], 0, size, None
