"""Beam search against an oracle without caches, greedy decoding and the packed pass; and bugs that must be caught."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import SHAPES, TOKENIZERS, random_model, short_text, tiny, tiny_copy, tokenizers
from tests.test_laws import EXACT, assert_close, packed_log_probs, passage_of, table_for
from tidal.infer import beam, engine
from tidal.infer.beam import Hypothesis, beam_search
from tidal.infer.decoder import Decoder
from tidal.infer.grammar import FIRST_BYTE, Grammar
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

PROMPTS = ["the light and", "", "1 + 2 =", "é"]


def names(hypotheses: Sequence[Hypothesis]) -> list[tuple[Any, ...]]:
    return [(h.text, h.blocks, h.stop_reason, h.units) for h in hypotheses]


def assert_same(some: Sequence[Sequence[Hypothesis]], others: Sequence[Sequence[Hypothesis]]) -> None:
    assert len(some) == len(others)
    for mine, its in zip(some, others, strict=True):
        assert names(mine) == names(its)
        assert_close([h.log_prob for h in mine], [h.log_prob for h in its], EXACT)
        assert_close([h.score for h in mine], [h.score for h in its], EXACT)


# ------------------------------------------------------------------------------------------------ oracle


@torch.inference_mode()
def oracle(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, num_beams: int, max_new_units: int,
           length_penalty: float) -> list[Hypothesis]:  # fmt: skip
    """The same search in plain Python: a new decoder for every step of every beam, and no early end."""
    grammar = Grammar(tokenizer)

    @functools.cache
    def candidates(blocks: tuple[str, ...], written: tuple[int, ...]) -> list[tuple[int, float]]:
        decoder = Decoder(model, tokenizer, 1)
        decoder.read([0], [[tokenizer.encode_block(text) for text in (*tokenizer.split(prompt), *blocks)]])
        for t in range(len(written) + 1):
            logits = decoder.step([0], [written[:t]])[0]
        allowed = [u for u in grammar.allowed(written).nonzero()[:, 0].tolist() if logits[u] > -math.inf]
        return list(zip(allowed, logits.log_softmax(-1)[allowed].tolist(), strict=True))

    def hypothesis(blocks: tuple[str, ...], reason: Any, kept: float, total: float, units: int) -> Hypothesis:
        text = "".join(blocks)
        return Hypothesis(prompt, text, prompt + text, list(blocks), reason, kept, total / n**length_penalty, units)

    live: list[Any] = [(0.0, (), (), 0.0, 0)]  # total, blocks, written, log_prob and units of the blocks
    found: list[Hypothesis] = []
    for n in range(1, max_new_units + 1):
        taken = [(total + p, unit, blocks, written, kept, units) for total, blocks, written, kept, units in live
                 for unit, p in candidates(blocks, written)]  # fmt: skip
        live = []
        for total, unit, blocks, written, kept, units in sorted(taken, key=lambda c: -c[0])[:num_beams]:
            if unit == tokenizer.eos_id:
                found.append(hypothesis(blocks, "eos", total, total, n))
            elif unit == tokenizer.eob_id:
                live.append((total, (*blocks, tokenizer.unreverse(written)), (), total, n))
            else:
                live.append((total, blocks, (*written, unit), kept, units))
    found += [hypothesis(blocks, "length", kept, total, units)
              for total, blocks, _, kept, units in sorted(live, key=lambda b: -b[0])]  # fmt: skip
    best: dict[str, Hypothesis] = {}
    for h in sorted(found, key=lambda h: -h.score):
        best.setdefault(h.text, h)
    return list(best.values())[:num_beams]


# ------------------------------------------------------------------------------------------------ checks


def check_beams(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], num_beams: int = 3,
                max_new_units: int = 12, length_penalty: float = 1.0) -> list[list[Hypothesis]]:  # fmt: skip
    """Cached, recomputed, alone and in any batch the same; with the log-probabilities of training."""
    search = functools.partial(beam_search, model, tokenizer, num_beams=num_beams, max_new_units=max_new_units,
                               length_penalty=length_penalty)  # fmt: skip
    found, table = search(prompts), table_for(model, tokenizer)
    for prompt, mine in zip(prompts, found, strict=True):
        assert 1 <= len(mine) <= num_beams
        assert len({h.text for h in mine}) == len(mine), "a text twice"
        assert [h.score for h in mine] == sorted((h.score for h in mine), reverse=True), "not best first"
        for h in mine:
            assert (h.prompt, h.text, h.completion) == (prompt, prompt + h.completion, "".join(h.blocks))
            assert all(h.blocks), "an empty block"
            ends: list[str | None] = [None] if h.stop_reason == "eos" else []
            trained = packed_log_probs(model, table, [[passage_of(table, (tokenizer.split(prompt), h.blocks + ends))]])
            assert len(trained) == h.units <= max_new_units
            assert_close(h.log_prob, trained.sum(), EXACT)
            if h.stop_reason == "eos" or h.units == max_new_units:
                assert_close(h.score, h.log_prob / h.units**length_penalty, EXACT)
            else:
                assert h.score * max_new_units**length_penalty < h.log_prob, "a dropped block counts in the score"
    assert_same(search(prompts, cached=False), found)
    assert_same(search(prompts, batch_size=1), found)
    assert_same(search(prompts[::-1], batch_size=3), found[::-1])
    return found


def check_oracle(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], num_beams: int = 3,
                 max_new_units: int = 9, length_penalty: float = 1.0) -> None:  # fmt: skip
    """The definition, written out, finds the same: nothing is dropped, and the search never ends too early."""
    found = beam_search(model, tokenizer, prompts, num_beams=num_beams, max_new_units=max_new_units,
                        length_penalty=length_penalty)  # fmt: skip
    assert_same(found, [oracle(model, tokenizer, p, num_beams, max_new_units, length_penalty) for p in prompts])


def check_greedy(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str],
                 max_new_units: int = 14, tolerance: float = EXACT) -> None:  # fmt: skip
    """One beam is greedy decoding."""
    for length_penalty in (0.0, 1.0):
        found = beam_search(model, tokenizer, prompts, num_beams=1, max_new_units=max_new_units,
                            length_penalty=length_penalty)  # fmt: skip
        for mine, greedy in zip(found, engine.generate(model, tokenizer, prompts, max_new_units=max_new_units),
                                strict=True):  # fmt: skip
            assert names(mine) == [(greedy.text, greedy.blocks, greedy.stop_reason, greedy.units)]
            assert_close(mine[0].log_prob, greedy.log_prob, tolerance)


def check_kept(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], num_beams: int = 3) -> None:
    """Going on for longer loses no finished hypothesis, unless `num_beams` better ones are found."""
    before: list[list[Hypothesis]] = [[] for _ in prompts]
    n_kept = 0
    for max_new_units in range(1, 10):
        found = beam_search(model, tokenizer, prompts, num_beams=num_beams, max_new_units=max_new_units)
        for mine, old in zip(found, before, strict=True):
            for h in old:
                if h.stop_reason == "eos":
                    kept = any(m.text == h.text and m.score >= h.score - EXACT for m in mine)
                    n_kept += kept
                    assert kept or (len(mine) == num_beams and mine[-1].score >= h.score), f"{h} was dropped"
        before = found
    assert n_kept


def few_units(seed: int = 0, shape: str = "memory deep") -> tuple[TidalTransformer, MixedTokenizer]:
    """A model that can write two characters, A as a byte, `<eob>` and `<eos>`, and nothing else.

    Short and long hypotheses compete under it.
    """
    tokenizer = tokenizers()["bytes"]
    model = random_model(tokenizer, SHAPES[shape], seed=seed)
    mask = torch.full_like(model.head_mask, -math.inf)
    first = FIRST_BYTE + 256
    mask[[tokenizer.eob_id, tokenizer.eos_id, FIRST_BYTE + ord("A"), first, first + 3]] = 0
    model.head_mask = mask
    return model, tokenizer


def check_no_padding(model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
    """Not even a head that prefers its padding gets a padded or control id written."""
    model.head_mask = torch.zeros_like(model.head_mask)
    with torch.no_grad():
        model.unit_embedding.weight[tokenizer.n_writable :] *= 50
    for cached in (True, False):
        for mine in beam_search(model, tokenizer, PROMPTS, max_new_units=8, cached=cached):
            for h in mine:
                assert [tokenizer.retokenize(tokenizer.write_units(text)).text for text in h.blocks] == h.blocks
                assert math.isfinite(h.score)


# ------------------------------------------------------------------------------------------------- tests


@settings(max_examples=8)
@given(st.sampled_from(TOKENIZERS), st.sampled_from(tuple(SHAPES)), st.lists(short_text(), min_size=1, max_size=3),
       st.sampled_from((1, 2, 5)), st.sampled_from((1, 6, 13)), st.sampled_from((0.0, 0.6, 1.0, 3.0)))  # fmt: skip
@example("english", "memory", PROMPTS, 4, 16, 1.0)
@example("english", "memory deep", PROMPTS, 3, 10, 1.0)
@example("digits", "block", PROMPTS, 3, 10, 0.0)
@example("bytes", "none", PROMPTS, 4, 10, 2.0)
def test_cached_is_recomputed(name: str, shape: str, prompts: list[str], num_beams: int, units: int,
                              penalty: float) -> None:  # fmt: skip
    check_beams(*tiny(name, shape), prompts, num_beams, units, penalty)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.5])
def test_oracle(seed: int, penalty: float) -> None:
    check_oracle(*few_units(seed), PROMPTS[1:3], 2 + seed, 8, penalty)
    check_oracle(*tiny(TOKENIZERS[seed], "memory"), PROMPTS[:1], 3, 6, penalty)


def test_the_checks_meet_all_that_they_may() -> None:
    """Several blocks, both ends, dropped blocks, bytes, and searches that end early."""
    found = [h for seed in range(3) for mine in check_beams(*few_units(seed), PROMPTS, 4, 11) for h in mine]
    assert {h.stop_reason for h in found} == {"eos", "length"}
    assert max(len(h.blocks) for h in found) > 2
    assert "A" in "".join(h.completion for h in found)
    assert any(h.stop_reason == "length" and 0 < h.units < 11 for h in found)


def test_a_search_ends_when_nothing_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(Decoder, "step", lambda self, *args, step=Decoder.step: steps.append(0) or step(self, *args))
    found = beam_search(*tiny("english", "memory"), ["the"], num_beams=2, max_new_units=1000, length_penalty=0.0)
    assert [h.stop_reason for h in found[0]] == ["eos", "eos"]
    assert len(steps) < 50


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_optimum(seed: int, penalty: float) -> None:
    model, tokenizer = few_units(seed)
    everything = oracle(model, tokenizer, "1", 10**6, 3, penalty)
    assert len(everything) > 8
    found = beam_search(model, tokenizer, ["1"], num_beams=80, max_new_units=3, length_penalty=penalty)
    assert_same(found, [everything])
    assert found[0][0].score == max(h.score for h in found[0])
    if penalty == 0:  # all that may be written, cut off or not, has probability one, less what the grammar forbids
        assert sum(math.exp(h.score) for h in everything) <= 1


@pytest.mark.parametrize(("name", "shape"), [*zip(TOKENIZERS, SHAPES, strict=True), ("digits", "memory")])
def test_one_beam_is_greedy(name: str, shape: str) -> None:
    check_greedy(*tiny(name, shape), PROMPTS)
    check_greedy(*tiny(name, shape, torch.float32), PROMPTS, tolerance=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_no_text_is_found_twice(penalty: float) -> None:
    """Not as an end and as what `max_new_units` left of a beam, nor cut into other blocks; the best one is kept."""
    model, tokenizer = tiny("english", "memory")
    for units in (1, 2, 4, 7):
        found = beam_search(model, tokenizer, ["the light", "", "\n"], num_beams=12, max_new_units=units,
                            length_penalty=penalty)  # fmt: skip
        for best in found:
            assert len({h.completion for h in best}) == len(best) > 0
            assert [h.score for h in best] == sorted((h.score for h in best), reverse=True)


def test_one_beam_is_greedy_in_ties() -> None:
    """All units are equally likely: the lowest wins, in every form."""
    model, tokenizer = tiny_copy("english", "memory")
    torch.nn.init.zeros_(model.unit_embedding.weight)
    check_greedy(model, tokenizer, PROMPTS)
    check_beams(model, tokenizer, PROMPTS)


def test_more_beams_do_better() -> None:
    """Not a law, but a search that seldom beats greedy decoding is broken."""
    better = worse = 0
    for seed in range(8):
        search = functools.partial(beam_search, *few_units(seed), PROMPTS[1:], max_new_units=9)
        for wide, narrow in zip(search(num_beams=24), search(num_beams=1), strict=True):
            better += wide[0].score > narrow[0].score + EXACT
            worse += wide[0].score < narrow[0].score - EXACT
    assert worse <= 1 < 8 < better, (worse, better)


def test_finished_hypotheses_are_kept() -> None:
    for seed in range(3):
        check_kept(*few_units(seed), PROMPTS)


def test_in_float32() -> None:
    model, tokenizer = tiny("english", "memory", torch.float32)
    some, others = (beam_search(model, tokenizer, PROMPTS, max_new_units=12, cached=c) for c in (True, False))
    for mine, its in zip(some, others, strict=True):
        assert names(mine) == names(its)
        assert_close([h.score for h in mine], [h.score for h in its], 1e-4)


def test_it_says_what_is_wrong() -> None:
    model, tokenizer = tiny("english", "memory")
    for wrong, message in (
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"max_new_units": 0}, "max_new_units is 0; it must be at least 1"),
        *(({"length_penalty": x}, f"length_penalty is {x}; it must be a number from 0 to 10")
          for x in (math.nan, math.inf, -math.inf, -0.5, 11.0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            beam_search(model, tokenizer, ["the"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate"):
        beam_search(model, tokenizer, ["the", "\ud800"])
    with pytest.raises(ValueError, match="prompts is the string 'the'; give a list"):
        beam_search(model, tokenizer, "the")
    with pytest.raises(ValueError, match="tokenizer"):
        beam_search(model, tokenizers()["bytes"], ["the"])
    assert beam_search(model, tokenizer, []) == []
    damaged, _ = tiny_copy("english", "memory")
    with torch.no_grad():
        damaged.unit_embedding.weight[5] = math.nan
    for cached in (True, False):
        with pytest.raises(RuntimeError, match="damaged"):
            beam_search(damaged, tokenizer, ["the"], cached=cached)


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    for training in (True, False):
        model.train(training)
        beam_search(model, tokenizer, ["the"], max_new_units=2)
        assert model.training is training


# -------------------------------------------------------------------------------------------------- bugs


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
    test_enough_beams_find_the_optimum(0, 1.0)


def greedy() -> None:
    check_greedy(*few_units(), PROMPTS)


def padding() -> None:
    check_no_padding(*tiny_copy("english", "memory"))


CHECKS = (beams, beams_without_attention, end_of_search, kept, optimum, greedy, padding)
CAUGHT = (AssertionError, ValueError, RuntimeError, IndexError, KeyError)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_without_a_bug_the_check_passes(check: Callable[[], None]) -> None:
    check()


Select = Callable[[Decoder, Sequence[int]], None]


def in_select(*names_: str) -> Callable[[Select], Select]:
    """What these attributes hold stays where it is."""

    def wrap(select: Select) -> Select:
        def bugged(self: Decoder, rows: Sequence[int]) -> None:
            same_size = len(rows) == len(self.builders)
            before = {name: getattr(self, name) for name in names_}
            data = [[cache.data for cache in caches] for caches in before.values() if isinstance(caches[0], CACHE)]
            select(self, rows)
            if same_size:
                for name, value in before.items():
                    setattr(self, name, value)
                caches = [v for v in before.values() if isinstance(v[0], CACHE)]
                for mine, olds in zip(caches, data, strict=True):
                    for cache, old in zip(mine, olds, strict=True):
                        cache.data = old

        return bugged

    return wrap


def only_without_copies(select: Select) -> Select:
    def bugged(self: Decoder, rows: Sequence[int]) -> None:
        if len(set(rows)) == len(rows) or len(rows) != len(self.builders):
            select(self, rows)

    return bugged


def along(axis: int) -> Callable[[Select], Select]:
    def wrap(select: Select) -> Select:
        def bugged(self: Decoder, rows: Sequence[int]) -> None:
            caches = (*self.reader_caches, *self.writer_caches)
            olds = [cache.data for cache in caches]
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
        self.beams = [dataclasses.replace(new, written=(*old.written, unit)) if new.written and old.written else new
                      for new, old, unit in zip(self.beams, before, units, strict=True)]  # fmt: skip
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

    def bugged(self: Any, slots: Sequence[int], units: Sequence[int], totals: Sequence[float], *args: Any) -> bool:
        going = go_on(self, slots, units, totals, *args)
        self.beams = [dataclasses.replace(b, total=t) for b, t in zip(self.beams, totals, strict=True)]
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


CACHE = type(Decoder(*tiny("english", "memory"), 1).reader_caches[0])
BUGS: dict[str, tuple[Any, str, Callable[..., Any], Callable[[], None]]] = {
    "caches not reordered": (Decoder, "select", in_select("reader_caches", "writer_caches"), beams),
    "reader caches not reordered": (Decoder, "select", in_select("reader_caches"), beams),
    "writer caches not reordered": (Decoder, "select", in_select("writer_caches"), beams),
    "caches reordered along the heads": (Decoder, "select", along(2), beams),
    "caches reordered along the slots": (Decoder, "select", along(3), beams),
    "builders not reordered": (Decoder, "select", in_select("builders"), beams),
    "builders shared": (Decoder, "select", cache_shared, beams),
    "positions not reordered": (Decoder, "select", in_select("positions"), beams),
    "context not reordered": (Decoder, "select", in_select("context"), beams_without_attention),
    "not reordered when beams share a parent": (Decoder, "select", only_without_copies, beams),
    "read before reordering": (beam._Cached, "go_on", ended_blocks_read_before_reordering, beams),
    "finished dropped": (beam._Search, "go_on", dropped_while_going_on, kept),
    "finished dropped, against the oracle": (beam._Search, "go_on", dropped_while_going_on, end_of_search),
    "finished written on": (beam._Search, "go_on", goes_on_for_ever, end_of_search),
    "written not reordered": (beam._Search, "go_on", written_not_reordered, beams),
    "ended too early": (beam._Search, "go_on", ended_by_its_present_length, end_of_search),
    "all beams begin alike": (beam._Search, "__post_init__", all_begin_alike, optimum),
    "padding allowed": (Grammar, "allowed", padding_allowed, padding),
    "grammar ignored": (beam, "_take", grammar_ignored, padding),
    "totals wrong": (beam, "_take", totals_forgotten, optimum),
    "another row's candidates": (beam, "_take", candidates_of_another_prompt, greedy),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_catches(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrap, check = BUGS[bug]
    right = getattr(owner, name)
    assert isinstance(right, types.FunctionType)
    monkeypatch.setattr(owner, name, wrap(right))
    with pytest.raises(CAUGHT):
        check()
