"""What followed, the last time in this document, what is written now.

    read    … class Traversable ( …           a block that was written   e l b a s r e v a r T ␣ <eob>
    now     … class ?                         of its next block written  e l b a                      told: s

A cache of the document itself (Kuhn & De Mori 1990, "A cache-based natural language model for speech recognition"), in
units: the reader foretells the last token of the next block, and the rest of a word that has been met before is a
lookup. A step asks three times what came next: the last time a block had the ending written so far, the last time one
did after the same preceding block, and after the same two. The model learns what to make of the answers;
docs/design.md says what they are worth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tidal.blocks import FACTOR, NOTHING, NOTHING_WRITTEN, Ints, codes_along, fold

N_RECALLED: Final = 3
"""Units that a step is told: the first from among all blocks, the second and the third from among those that came after
the same one, and the same two."""


class Recollection:
    """The definition: what a document that grows block by block recalls. Units are those written, last first."""

    def __init__(self) -> None:
        self._followed: dict[int, int] = {}
        self._blocks: tuple[int, ...] = (NOTHING_WRITTEN,)  # codes of the last two, the very last first; now `<bos>`

    def copy(self) -> Recollection:
        """One that grows on its own."""
        other = Recollection()
        other._followed, other._blocks = self._followed.copy(), self._blocks
        return other

    def read(self, units: Sequence[int], eob_id: int) -> None:
        """Remember a finished block."""
        codes = codes_along(units)
        for order, before in self._contexts():  # of order 0, a first step has nothing to look up
            for code, unit in zip(codes[not order :], (*units, eob_id)[not order :], strict=True):
                self._followed[_key(before, code)] = unit
        self._blocks = (codes[-1], *self._blocks)[: N_RECALLED - 1]

    def recall(self, written: Sequence[int]) -> tuple[int, ...]:
        """The N_RECALLED units that followed, NOTHING for those that are not there."""
        code = functools.reduce(fold, written, NOTHING_WRITTEN)
        found = [self._followed.get(_key(before, code), NOTHING) for _, before in self._contexts()]
        return (*found, *[NOTHING] * (N_RECALLED - len(found)))

    def _contexts(self) -> Iterator[tuple[int, int]]:
        """(order, code of the last `order` blocks), for every order that the document is long enough for."""
        before = 0
        for order in range(len(self._blocks) + 1):
            before = _key(before, self._blocks[order - 1]) if order else before
            yield order, before


def _key(before: int, code: int) -> int:
    return fold(before, code - 1)  # (before ^ code) * FACTOR, in 64 bits


def recalled(codes: Ints, units: Ints, block: Ints, first: Ints, rank: Ints, passage: Ints) -> Ints:
    """The vectorized twin, for all steps of all blocks of a batch, in order: [n, 3].

    Of each step [n] the code of what is written, the unit that follows, and its block; of each block [m] its first
    step, its number in its passage (0: `<bos>`, without steps), and the passage.
    """
    codes = codes.view(np.uint64)
    ends = np.append(first[1:], len(codes))
    whole = np.where(ends > first, codes[np.maximum(ends - 1, 0)] if len(codes) else 0, np.uint64(NOTHING_WRITTEN))
    before = np.zeros(len(first), np.uint64)
    found = np.full((len(codes), N_RECALLED), NOTHING)
    for order in range(N_RECALLED):
        if order:
            before = (before ^ np.roll(whole, order)) * np.uint64(FACTOR)
        keys = (before[block] ^ codes) * np.uint64(FACTOR)
        usable = np.flatnonzero(rank[block] >= order if order else codes != NOTHING_WRITTEN)
        last, now = repeats(keys, passage[block], usable)
        found[now, order] = units[last]
    return found


def repeats(keys: npt.NDArray[np.integer], document: Ints, usable: Ints) -> tuple[Ints, Ints]:
    """Pairs (earlier, later) of elements with the same key in the same document, nothing between them having it.

    Of all elements [n], in order, their keys and documents; `usable` are the indices of those that count, rising.
    """
    by_key = usable[np.argsort(keys[usable], kind="stable")]  # of equal keys, earlier ones stay before later ones
    last, now = by_key[:-1], by_key[1:]
    same = (keys[last] == keys[now]) & (document[last] == document[now])
    return last[same], now[same]
