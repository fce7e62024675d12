"""Beam search against an oracle without caches, greedy decoding and the packed pass: the functions of beams.py."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.infer.beams import (
    PROMPTS,
    assert_same,
    check_beams,
    check_greedy,
    check_optimum,
    check_oracle,
    few_units,
    names,
)
from tests.laws import EXACT, assert_close
from tests.strategies import SHAPES, TOKENIZERS, short_text, tiny, tiny_copy, tokenizers
from tidal.infer import __main__ as command
from tidal.infer import beam
from tidal.infer.beam import Hypothesis, beam_search
from tidal.infer.decoder import Decoder


@settings(max_examples=8)
@given(st.sampled_from(TOKENIZERS), st.sampled_from(tuple(SHAPES)), st.lists(short_text(), min_size=1, max_size=3),
       st.sampled_from((1, 2, 5)), st.sampled_from((1, 6, 13)), st.sampled_from((0.0, 0.6, 1.0, 3.0)))  # fmt: skip
@example("english", "memory", PROMPTS, 4, 16, 1.0)
@example("english", "memory", ["the light", "", "\n"], 12, 4, 1.0)
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
    steps, step = list[int](), Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args, **how: steps.append(0) or step(self, *args, **how))
    found = beam_search(*tiny("english", "memory"), ["the"], num_beams=2, max_new_units=1000, length_penalty=0.0)
    assert [h.stop_reason for h in found[0]] == ["eos", "eos"]
    assert len(steps) < 50


def test_a_search_ends_when_what_is_wanted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, which would take 256 steps, are not waited for."""
    search = functools.partial(beam_search, *few_units(2), ["1 + 2 ="], max_new_units=256)
    (best, *others), = search()
    steps, step = list[int](), Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args, **how: steps.append(0) or step(self, *args, **how))
    assert search(wanted=1) == [[best]]
    assert len(steps) < 40 < 200 < max(h.units for h in others)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_fewer_wanted_are_the_first_of_all(penalty: float) -> None:
    for seed in range(3):
        search = functools.partial(beam_search, *few_units(seed), PROMPTS, max_new_units=9, length_penalty=penalty)
        found = search()
        for wanted in (1, 3):
            assert_same(search(wanted=wanted), [best[:wanted] for best in found])


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_optimum(seed: int, penalty: float) -> None:
    check_optimum(seed, penalty)


@pytest.mark.parametrize(("name", "shape"), [*zip(TOKENIZERS, SHAPES, strict=True), ("digits", "memory")])
def test_one_beam_is_greedy(name: str, shape: str) -> None:
    check_greedy(*tiny(name, shape), PROMPTS)
    check_greedy(*tiny(name, shape, torch.float32), PROMPTS, tolerance=1e-4)


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
        ({"wanted": 0}, "wanted is 0; it must be at least 1"),
        ({"num_beams": 2, "wanted": 3}, "wanted is 3; of 2 beams there are no more"),
        ({"max_new_units": 0}, "max_new_units is 0; it must be at least 1"),
        *(({"length_penalty": x}, f"length_penalty is {x}; it must be a number from 0 to 10")
          for x in (-0.5, 11.0)),
        *(({"length_penalty": x}, f"length_penalty is {x}; it must be a finite number") for x in (math.nan, math.inf)),
        ({"length_penalty": "1"}, "length_penalty is '1'; it must be a number"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            beam_search(model, tokenizer, ["the"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate"):
        beam_search(model, tokenizer, ["the", "\ud800"])
    with pytest.raises(ValueError, match="prompts is the string 'the'; give a list"):
        beam_search(model, tokenizer, "the")
    with pytest.raises(ValueError, match="a prompt is b'the'; it must be a str"):
        beam_search(model, tokenizer, [b"the"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="prompts is None; give a list of strings"):
        beam_search(model, tokenizer, None)  # type: ignore[arg-type]
    assert beam_search(model, tokenizer, ["the"], num_beams=True, max_new_units=3)
    two = beam_search(model, tokenizer, ["the", "cat"], num_beams=2, max_new_units=9)
    assert beam_search(model, tokenizer, (p for p in ("the", "cat")), num_beams=2, max_new_units=9) == two
    with pytest.raises(ValueError, match="tokenizer"):
        beam_search(model, tokenizers()["bytes"], ["the"])
    assert beam_search(model, tokenizer, []) == []
    one_of_two = torch.zeros(2, 5)
    one_of_two[1, 3] = math.nan
    with pytest.raises(RuntimeError, match="damaged"):
        beam._take(one_of_two, torch.ones(2, 5, dtype=torch.bool), [0.0, 0.0], 2)
    damaged, _ = tiny_copy("english", "memory")
    with torch.no_grad():
        damaged.unit_embedding.weight[5] = math.nan
    for cached in (True, False):
        with pytest.raises(RuntimeError, match="damaged"):
            beam_search(damaged, tokenizer, ["the"], cached=cached)


def test_no_limit_of_units_is_too_large() -> None:
    """However long a completion may be, the power of it that the penalty asks for is a number."""
    model, tokenizer = tiny("english", "memory")
    much, more = (beam_search(model, tokenizer, ["the"], num_beams=2, length_penalty=10.0, wanted=1, max_new_units=most)
                  for most in (2**31, 10**39))  # fmt: skip
    assert much == more


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    for training in (True, False):
        model.train(training)
        beam_search(model, tokenizer, ["the"], max_new_units=2)
        assert model.training is training


def test_the_command_prints_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as soon as it is found, and of each prompt as many as are asked for."""
    model, tokenizer = tiny("english", "memory")
    happened, printed, step = list[str](), dict[int, Hypothesis](), Decoder.step

    def watched(self: Decoder, rows: Sequence[int], written: Sequence[Sequence[int]], check: bool) -> torch.Tensor:
        assert len(rows) <= 6
        happened.append("step")
        return step(self, rows, written, check=check)

    def show(hypothesis: Hypothesis, i: int, settings: command.Infer) -> None:
        happened.append("print")
        printed[i] = hypothesis

    monkeypatch.setattr(Decoder, "step", watched)
    monkeypatch.setattr(command, "_print", show)
    settings = command.Infer(num_beams=3, num_samples=2, batch_size=6, max_new_units=5)
    command._search(model, tokenizer, PROMPTS[:3], settings)
    assert [what for what, _ in itertools.groupby(happened)] == ["step", "print"] * 2
    found = beam_search(model, tokenizer, PROMPTS[:3], num_beams=3, max_new_units=5, batch_size=2)
    wanted = {2 * index + rank: h for index, best in enumerate(found) for rank, h in enumerate(best[:2])}
    assert list(printed) == list(wanted)
    assert names([*printed.values()]) == names([*wanted.values()])


def test_degenerate_hypotheses_are_named() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    with torch.no_grad():  # it only ever writes "a"
        model.writer_norm.weight.zero_()
        model.head_mask[:] = -math.inf
        model.head_mask[[tokenizer.write_units("a")[0], tokenizer.eob_id]] = torch.tensor([0.0, 5.0]).double()
    for limit, name in ((2, None), (9, "repeats")):
        (best,), = beam_search(model, tokenizer, [""], num_beams=1, max_new_units=limit)
        assert best.degenerate == name
        assert best.to_dict()["degenerate"] == name


def test_probabilities_have_more_digits_than_logits() -> None:
    logits = torch.tensor([[0.25, 0.5, -1.0]])
    _, _, (found,) = beam._take(logits.bfloat16(), torch.ones(1, 3, dtype=torch.bool), [-1.0], 1)
    assert_close(found, [logits.double().log_softmax(-1).max() - 1], EXACT)
