"""Bugs in beam search that its checks must catch, and the checks without a bug."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.doctor.mutants import MUTANTS
from tests.doctor.plant import Plant, replacing
from tests.infer.beams import (
    PROMPTS,
    check_beams,
    check_greedy,
    check_kept,
    check_no_padding,
    check_optimum,
    check_oracle,
    few_units,
)
from tests.strategies import tiny, tiny_copy
from tidal.infer import beam
from tidal.infer.decoder import Decoder
from tidal.infer.grammar import Grammar
from tidal.tokenizer import MixedTokenizer


def beams(shape: str = "memory") -> None:
    check_beams(*tiny("english", shape), PROMPTS, 4, 10)
    for seed in range(2):  # short blocks: beams go on from different ones, read back
        check_beams(*few_units(seed, shape), PROMPTS, 4, 11)


def beams_without_attention() -> None:
    beams("none")


def end_of_search() -> None:
    for seed in range(6):
        check_oracle(*few_units(seed), PROMPTS[1:], 2, 7)


def kept() -> None:
    for seed in range(3):
        check_kept(*few_units(seed), PROMPTS)


def optimum() -> None:
    check_optimum(0, 1.0)


def greedy() -> None:
    check_greedy(*few_units(), PROMPTS)


def padding() -> None:
    check_no_padding(*tiny_copy("english", "memory"))


CHECKS = (beams, beams_without_attention, end_of_search, kept, optimum, greedy, padding)
CAUGHT = (AssertionError, ValueError, RuntimeError, IndexError, KeyError)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_without_a_bug_the_check_passes(check: Callable[[], None]) -> None:
    check()


# -------------------------------------------------------------------------------------------------- bugs

Select = Callable[[Decoder, Sequence[int]], None]


def in_select(*names_: str) -> Callable[[Select], Select]:
    """What these attributes hold stays where it is."""

    def wrap(select: Select) -> Select:
        def bugged(self: Decoder, rows: Sequence[int]) -> None:
            same_size = len(rows) == len(self.builders)
            before = {name: copy.copy(value) if name == "builders" else copy.deepcopy(value)
                      for name in names_ for value in [getattr(self, name)]}  # fmt: skip
            select(self, rows)
            if same_size:
                for name, value in before.items():
                    setattr(self, name, value)

        return bugged

    return wrap


def along(axis: int) -> Callable[[Select], Select]:
    def wrap(select: Select) -> Select:
        def bugged(self: Decoder, rows: Sequence[int]) -> None:
            caches = (*self.reader_caches, *self.writer_caches)
            olds = [cache.data.clone() for cache in caches]
            same_size, moved = len(rows) == len(self.builders), list(rows) != list(range(len(rows)))
            select(self, rows)
            if same_size and moved:
                for cache, old in zip(caches, olds, strict=True):
                    n = old.shape[axis]
                    index = torch.arange(n)
                    index[: len(rows)] = torch.tensor(rows)[:n] % n
                    cache.data = old.index_select(axis, index)

        return bugged

    return wrap


def cache_shared(select: Select) -> Select:
    """Builders of copied rows are one and the same object."""

    def bugged(self: Decoder, rows: Sequence[int]) -> None:
        builders = self.builders
        select(self, rows)
        self.builders = [builders[row] for row in rows]

    return bugged


def dropped_while_going_on(go_on: Callable[..., bool]) -> Callable[..., bool]:
    def bugged(self: Any, *args: Any) -> bool:
        going = go_on(self, *args)
        if going:
            self.finished.clear()
        return going

    return bugged


def written_not_reordered(go_on: Callable[..., bool]) -> Callable[..., bool]:
    def bugged(self: Any, slots: Sequence[int], units: Sequence[int], *args: Any) -> bool:
        before = self.beams
        going = go_on(self, slots, units, *args)
        for i, (new, old) in enumerate(zip(self.beams, before, strict=True)):
            if new.written and old.written:
                self.beams[i] = dataclasses.replace(new, written=(*old.written, new.written[-1]))
        return going

    return bugged


def ended_by_its_present_length(go_on: Callable[..., bool]) -> Callable[..., bool]:
    def bugged(self: Any, *args: Any) -> bool:
        if not go_on(self, *args):
            return False
        best = max(b.total for b in self.beams) / self.n_units**self.length_penalty
        return len(self.finished) < self.num_beams or best > self.finished[-1].score

    return bugged


def goes_on_for_ever(go_on: Callable[..., bool]) -> Callable[..., bool]:
    """A finished hypothesis is written on."""

    def bugged(self: Any, slots: Sequence[int], units: Sequence[int], totals: Sequence[float],
               tokenizer: MixedTokenizer) -> bool:  # fmt: skip
        before = self.beams
        going = go_on(self, slots, units, totals, tokenizer)
        free = iter([i for i, b in enumerate(self.beams) if b.total == -math.inf])
        for slot, unit, total in zip(slots, units, totals, strict=True):
            if unit == tokenizer.eos_id and total > -math.inf:
                i = next(free)
                self.sources[i], self.beams[i] = slot, dataclasses.replace(before[slot], total=total, ended=None)
        return going or self.n_units < self.max_new_units

    return bugged


def all_begin_alike(post_init: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: Any) -> None:
        post_init(self)
        self.beams = [self.beams[0]] * self.num_beams

    return bugged


def padding_allowed(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bugged(self: Grammar, written: Sequence[int]) -> Tensor:
        mask = allowed(self, written).clone()
        mask[self.tokenizer.n_writable :] = True
        return mask

    return bugged


def grammar_ignored(take: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, allowed, *rest: take(logits, torch.ones_like(allowed), *rest)


def totals_forgotten(take: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, allowed, totals, n: take(logits, allowed, [min(t, 0.0) and t / 2 for t in totals], n)


def candidates_of_another_prompt(take: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, *rest: take(logits.roll(1, 0), *rest)


def ended_blocks_read_before_reordering(go_on: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: Any, rows: Sequence[int], ended: Sequence[Any]) -> None:
        if len(rows) != len(self.decoder.builders):
            return go_on(self, rows, ended)
        if read := {row: [block] for row, block in enumerate(ended) if block}:
            self.decoder.read(list(read), list(read.values()))
        return self.decoder.select(rows)

    return bugged


PARENTS = "caches are not reordered when two beams share a parent"
"""A bug that the doctor finds, too."""
BUGS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "reader caches not reordered": (replacing(Decoder, "select", in_select("reader_caches")), beams),
    "writer caches not reordered": (replacing(Decoder, "select", in_select("writer_caches")), beams),
    "caches reordered along the heads": (replacing(Decoder, "select", along(2)), beams),
    "caches reordered along the slots": (replacing(Decoder, "select", along(3)), beams),
    "builders not reordered": (replacing(Decoder, "select", in_select("builders")), beams),
    "builders shared": (replacing(Decoder, "select", cache_shared), beams),
    "positions not reordered": (replacing(Decoder, "select", in_select("positions")), beams),
    "context not reordered": (replacing(Decoder, "select", in_select("context")), beams_without_attention),
    PARENTS: (next(mutant.plant for mutant in MUTANTS if mutant.name == PARENTS), beams),
    "read before reordering": (replacing(beam._Cached, "go_on", ended_blocks_read_before_reordering), beams),
    "finished dropped": (replacing(beam._Search, "go_on", dropped_while_going_on), kept),
    "finished dropped, against the oracle": (replacing(beam._Search, "go_on", dropped_while_going_on), end_of_search),
    "finished written on": (replacing(beam._Search, "go_on", goes_on_for_ever), end_of_search),
    "written not reordered": (replacing(beam._Search, "go_on", written_not_reordered), beams),
    "ended too early": (replacing(beam._Search, "go_on", ended_by_its_present_length), end_of_search),
    "all beams begin alike": (replacing(beam._Search, "__post_init__", all_begin_alike), optimum),
    "padding allowed": (replacing(Grammar, "allowed", padding_allowed), padding),
    "grammar ignored": (replacing(beam, "_take", grammar_ignored), padding),
    "totals wrong": (replacing(beam, "_take", totals_forgotten), optimum),
    "another row's candidates": (replacing(beam, "_take", candidates_of_another_prompt), greedy),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_catches(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(CAUGHT):
        check()
