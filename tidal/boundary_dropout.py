"""Boundary dropout: training text is cut inside words, as prompts are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tidal.blocks import EOS_BLOCK, BlockTable, Passage
from tidal.tokenizer.split import find_blocks


def cut_at_random(p: Passage, table: BlockTable, rng: np.random.Generator, probability: float) -> Passage:
    """Boundary dropout: each place between two characters of a block is a cut with this probability; of several in a
    block, one counts.

    The model thereby learns to go on from a prompt that ends inside a word. It does not learn to end its own words
    there: of a cut block only the rest is asked for, the beginning is read as a prompt is. Raises ValueError unless the
    probability lies in [0, 1].
    """
    if not 0 <= probability <= 1:  # NaN, too
        raise ValueError(f"the probability of a cut must lie in [0, 1], not {probability}")
    n_places = np.maximum(table.n_chars.view()[p.blocks] - 1, 0)  # <bos> and <eos> have no characters
    return cut_blocks(p, table, rng, 1 - (1 - probability) ** n_places)


def cut_blocks(p: Passage, table: BlockTable, rng: np.random.Generator,
               probabilities: npt.NDArray[np.float64]) -> Passage:  # fmt: skip
    """Cut each block with its probability [n] at a random character; blocks of one character stay whole.

    Before and behind a cut the text is split as a prompt and its completion are. Blocks before a cut that
    exist only because of it are read, not learnt:

        [if][ a][:][\\n   ][ return]   cut behind the last space:   [if][ a][:][\\n    ] | [return]
    """
    n_chars = table.n_chars.view()[p.blocks]
    starts = np.cumsum(n_chars) - n_chars
    chosen = np.flatnonzero((rng.random(len(p.blocks)) < probabilities) & (n_chars > 1))
    places = starts[chosen] + np.array([rng.integers(1, n) for n in n_chars[chosen]], np.int64)
    if not len(places):
        return p
    first, end = p.supervise_from, len(p.blocks) - (p.blocks[-1] == EOS_BLOCK)
    n_prompt = n_chars[:first].sum()
    prompt, _ = _cut(table, p.blocks[1:first].tolist(), places[places < n_prompt].tolist())
    completion, made = _cut(table, p.blocks[first:end].tolist(), (places[places >= n_prompt] - n_prompt).tolist())
    blocks = np.concatenate([p.blocks[:1], prompt, completion, p.blocks[end:]]).astype(np.int32)
    read_only = tuple(1 + len(prompt) + i for i in made)
    return dataclasses.replace(p, blocks=blocks, supervise_from=1 + len(prompt), read_only=read_only)


def _cut(table: BlockTable, blocks: list[int], places: Sequence[int]) -> tuple[list[int], list[int]]:
    """Blocks of a text that is cut at these characters, each part split on its own; which ones, before a cut, are only
    there because of it."""
    done, made, start = list[int](), list[int](), 0
    for place in places:
        before, n_same, blocks = _cut_once(table, blocks, place - start)
        made += range(len(done) + n_same, len(done) + len(before))
        done, start = done + before, place
    return done + blocks, made


def _cut_once(table: BlockTable, blocks: list[int], at: int) -> tuple[list[int], int, list[int]]:
    """Blocks of the first `at` characters, how many of these are as they were, and blocks of the other characters.

    Only the run of blocks that were one before `split` cut it along tokens, or because it was too long, is split again.
    """
    i = 0
    while at >= len(text := table.texts[blocks[i]]):
        at, i = at - len(text), i + 1
    beginning, rest = text[:at], text[at:]
    left, before = i, [beginning]
    while left and not _parted(earlier := table.texts[blocks[left - 1]], before[0]):
        left, before = left - 1, [earlier, *before]
    right, after = i + 1, rest
    while right < len(blocks) and not _parted(after, "".join(table.texts[j] for j in blocks[right : right + 2])):
        right, after = right + 1, after + table.texts[blocks[right]]
    again = table.tokenizer.split("".join(before))
    n_same = 0
    while n_same < i - left and again[n_same] == before[n_same]:
        n_same += 1
    return ([*blocks[:left], *table.indices(again).tolist()], left + n_same,
            [*table.indices(table.tokenizer.split(after)).tolist(), *blocks[right:]])  # fmt: skip


def _parted(before: str, after: str) -> bool:
    """Whether the rules of character classes cut between these texts. What they do to an apostrophe or a mark, which
    may be a block of its own, depends on its neighbours on both sides."""
    return len(before) in itertools.accumulate(map(len, find_blocks(before + after)))
