"""Boundary dropout: what is before and behind a cut is split as a prompt and its completion are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import _HAN, tokenizer_names, tokenizers
from tests.test_blocks import texts_of
from tests.tokenizer.strategies import hostile_text
from tidal.blocks import BOS_BLOCK, EOS_BLOCK, BlockTable, Passage, passage
from tidal.boundary_dropout import cut_at_random, cut_blocks

Cut = Callable[[Passage, BlockTable, np.random.Generator, float], Passage]


class Recorder:
    """A generator of random numbers that remembers what it gave."""

    def __init__(self, seed: int) -> None:
        self.rng, self.chosen, self.offsets = np.random.default_rng(seed), np.zeros(0), list[int]()

    def random(self, n: int) -> npt.NDArray[np.float64]:
        self.chosen = self.rng.random(n)
        return self.chosen

    def integers(self, low: int, high: int) -> int:
        self.offsets.append(int(self.rng.integers(low, high)))
        return self.offsets[-1]


def parts_of(text: str, split: list[str], chosen: list[bool], offsets: list[int]) -> list[str]:
    """The text cut where these numbers say."""
    starts = itertools.accumulate(map(len, split), initial=0)
    cut = [start for start, block, yes in zip(starts, split, chosen, strict=False) if yes and len(block) > 1]
    places = [0, *(start + offset for start, offset in zip(cut, offsets, strict=True)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


def check_dropout(cut_at_random: Cut, table: BlockTable, prompt: str, completion: str, chance: float,
                  seed: int) -> None:  # fmt: skip
    """Every part between cuts is split on its own; what would not be there without the cut behind it is not learnt."""
    whole = passage(table, prompt, completion, place_offset=2)
    rng: Any = Recorder(seed)
    cut = cut_at_random(whole, table, rng, chance)
    again = cut_at_random(whole, table, np.random.default_rng(seed), chance)
    assert (again.blocks.tolist(), again.read_only) == (cut.blocks.tolist(), cut.read_only)
    assert cut.blocks.dtype == np.int32
    assert (cut.blocks[0], cut.blocks[-1], cut.place_offset) == (BOS_BLOCK, EOS_BLOCK, 2)

    split = table.tokenizer.split
    before, after = split(prompt), split(completion)
    n_places = np.array([0, *(len(block) - 1 for block in (*before, *after)), 0])
    chosen = (rng.chosen < 1 - (1 - chance) ** n_places).tolist()[1:-1]
    n_cut = sum(yes and len(block) > 1 for yes, block in zip(chosen, before, strict=False))
    of_prompt = parts_of(prompt, before, chosen[: len(before)], rng.offsets[:n_cut])
    of_completion = parts_of(completion, after, chosen[len(before) :], rng.offsets[n_cut:])
    prompt_blocks = [block for part in of_prompt for block in split(part)]
    assert texts_of(cut, table)[1:-1] == [*prompt_blocks, *(b for part in of_completion for b in split(part))]
    learnt = [False] * (1 + len(prompt_blocks))
    for i, part in enumerate(of_completion):
        rest = "".join(of_completion[i:])
        same = [a == b for a, b in zip(split(part), split(rest), strict=False)]
        n_same = [*same, False].index(False)
        learnt += [j < n_same for j in range(len(split(part)))]
    assert cut.supervised.tolist() == [*learnt, True]


@settings(max_examples=80)
@given(tokenizer_names, hostile_text(), hostile_text(), st.floats(0, 1), st.integers(0, 5))
@example("english", "", ".l a't", 0.6, 62)  # "'t" is no block by class alone; <eos> behind it stays its own
def test_boundary_dropout(name: str, prompt: str, completion: str, chance: float, seed: int) -> None:
    check_dropout(cut_at_random, BlockTable(tokenizers()[name]), prompt, completion, chance, seed)


pieces_in_context = st.text("a b’'中ก²́‍1", min_size=1, max_size=30)
"""Of runs that are too long for one block: an apostrophe is part of a word by what stands beside it, a mark, too."""


@settings(max_examples=300)
@given(st.sampled_from(("digits", "bytes")), pieces_in_context, st.floats(0, 0.5), st.integers(0, 5))
@example("bytes", "a" * 8 + "’中", 0.1, 4)
def test_boundary_dropout_of_pieces_in_context(name: str, text: str, chance: float, seed: int) -> None:
    check_dropout(cut_at_random, BlockTable(tokenizers()[name]), "", text, chance, seed)


unspaced_text = st.text("今天气很好我们去公园玩，。 a", min_size=1, max_size=20)


@settings(max_examples=150)
@given(tokenizer_names, unspaced_text, unspaced_text, st.floats(0, 0.5), st.integers(0, 5))
def test_boundary_dropout_without_spaces(name: str, prompt: str, completion: str, chance: float, seed: int) -> None:
    check_dropout(cut_at_random, BlockTable(tokenizers()[name]), prompt, completion, chance, seed)


def is_two_blocks(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    """The beginning and the rest of a block as blocks of their own, as this was once."""
    with mock.patch.object(type(table.tokenizer), "split", lambda self, text: [text] if text else []):
        return cut_at_random(p, table, rng, chance)


def looks_at_one_block(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    with mock.patch("tidal.boundary_dropout._parted", return_value=True):
        return cut_at_random(p, table, rng, chance)


@pytest.mark.parametrize(("bug", "name", "text"), [
    (is_two_blocks, "english", "the light's on"),
    (looks_at_one_block, "english", "light:\n    the dogs"),
    (looks_at_one_block, "english", "thelightandthedogsandthenight"),
    (looks_at_one_block, "chinese", _HAN),
])  # fmt: skip
def test_planted_bug_in_what_is_split_at_a_cut_is_found(bug: Cut, name: str, text: str) -> None:
    table = BlockTable(tokenizers()[name])
    for seed in range(200):
        try:
            check_dropout(bug, table, "", text, 0.1, seed)
        except AssertionError:
            return
    pytest.fail("not found")


def cuts_off_nothing(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    inner = type("Inner", (), {"random": rng.random, "integers": lambda self, low, high: rng.integers(low, high) - 1})
    return cut_at_random(p, table, inner(), chance)


def of_itself(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    return cut_at_random(p, table, np.random.default_rng(), chance)


def loses_the_end(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    return cut_at_random(dataclasses.replace(p, blocks=p.blocks[:-1]), table, rng, chance)


def learns_beginnings(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    return dataclasses.replace(cut_at_random(p, table, rng, chance), read_only=())


def learns_no_ends(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    cut = cut_at_random(p, table, rng, chance)
    return dataclasses.replace(cut, read_only=tuple(i + 1 for i in cut.read_only))


def prompt_stays(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    return dataclasses.replace(cut_at_random(p, table, rng, chance), supervise_from=p.supervise_from)


@pytest.mark.parametrize("bug", [cuts_off_nothing, of_itself, loses_the_end, learns_beginnings, learns_no_ends,
                                 prompt_stays])  # fmt: skip
def test_planted_bug_in_boundary_dropout_is_found(bug: Cut) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_dropout(bug, BlockTable(tokenizers()["english"]), "the light and the", " night with the dogs", 1, 0)


def check_places(cut_at_random: Cut) -> None:
    """Every place inside a block is as likely to be where it is cut; a block of more of them is cut more often."""
    table = BlockTable(tokenizers()["english"])
    n = 4000
    for block in (" abcde", " a"):
        whole = passage(table, "", block * n)
        assert len(whole.blocks) == n + 2
        cut = cut_at_random(whole, table, np.random.default_rng(1), 0.2)
        heads = Counter(len(table.texts[cut.blocks[i]]) for i in cut.read_only)
        places = len(block) - 1
        expected = n * (1 - 0.8**places) / places
        assert sorted(heads) == list(range(1, places + 1))
        assert all(abs(count - expected) < 4.5 * math.sqrt(expected) for count in heads.values())


def test_dropout_cuts_at_every_place_inside_a_block_alike() -> None:
    check_places(cut_at_random)


def long_as_often_as_short(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    return cut_blocks(p, table, rng, np.full(len(p.blocks), chance))


def counts_ends_as_places(p: Passage, table: BlockTable, rng: np.random.Generator, chance: float) -> Passage:
    n_chars = np.array([len(table.texts[i]) for i in p.blocks])
    return cut_blocks(p, table, rng, 1 - (1 - chance) ** n_chars)


@pytest.mark.parametrize("bug", [long_as_often_as_short, counts_ends_as_places])
def test_planted_bug_in_how_often_blocks_are_cut_is_found(bug: Cut) -> None:
    with pytest.raises(AssertionError):
        check_places(bug)


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_dropout_wants_a_probability(probability: float) -> None:
    table = BlockTable(tokenizers()["english"])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        cut_at_random(passage(table, "", "text"), table, np.random.default_rng(1), probability)
