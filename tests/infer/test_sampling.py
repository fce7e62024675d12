"""`choose` against plain numpy, draw by draw; damaged logits; refused settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import tiny
from tidal.infer.engine import generate
from tidal.infer.sampling import Sampling, choose, fetch

Floats = npt.NDArray[np.float64]
SETTINGS = (Sampling(), Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.5, top_p=0.8), Sampling(1.0, min_p=0.2),
            Sampling(1.0, repetition_penalty=2.0), Sampling(repetition_penalty=3.0),
            Sampling(2.0, top_k=9, top_p=0.9, min_p=0.01))  # fmt: skip


def distribution(logits: Floats, allowed: npt.NDArray[np.bool_], how: Sampling) -> Floats:
    """What `choose` is to sample from, by its definition."""
    scaled = np.where(allowed, logits, -np.inf)
    scaled = (scaled - scaled.max()) / how.temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = [i for i in order[: how.top_k or len(order)] if math.exp(scaled[i]) >= how.min_p]
    weights = np.zeros(len(scaled))
    weights[kept] = np.exp(scaled[kept])
    weights /= weights.sum()
    nucleus, reached = [], 0.0
    for i in order:
        if reached < how.top_p or how.top_p == 1:
            nucleus.append(i)
        reached += weights[i]
    weights[[i for i in range(len(weights)) if i not in nucleus]] = 0
    return weights / weights.sum()


class Fixed:
    """A generator that draws given numbers."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def draw(logits: Floats, allowed: npt.NDArray[np.bool_], how: Sampling, values: Sequence[float]) -> list[int]:
    """What is chosen at each of these values, all in one batch."""
    generators: list[Any] = [Fixed(value) for value in values]
    n = len(values)
    return choose(torch.tensor(logits).expand(n, -1), torch.tensor(allowed).expand(n, -1), [how] * n,
                  generators).tolist()  # fmt: skip


@settings(max_examples=100)
@given(st.lists(st.integers(-30_000, 30_000).map(lambda n: n / 1000), min_size=1, max_size=12), st.data(),
       st.sampled_from((0.05, 0.7, 1.0, 3.0, 100.0)),
       st.integers(0, 14), st.sampled_from((1e-9, 0.3, 0.9, 1.0)), st.sampled_from((0.0, 0.0137, 0.31)))  # fmt: skip
def test_choose_is_the_distribution(values: list[float], data: st.DataObject, temperature: float, top_k: int,
                                    top_p: float, min_p: float) -> None:  # fmt: skip
    logits, how = np.array(values), Sampling(temperature, top_k, top_p, min_p)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    allowed[data.draw(st.integers(0, len(values) - 1))] = True
    expected = distribution(logits, allowed, how)
    *chosen, low, high = draw(logits, allowed, how, [*(np.arange(200) + 0.5) / 200, 0.0, np.nextafter(1.0, 0.0)])
    assert all(allowed[unit] for unit in chosen)
    found = np.bincount(chosen, minlength=len(values)) / 200
    assert np.abs(found - expected).max() <= 1 / 200 + 1e-9, "inverse of the cumulative distribution on a grid"
    assert expected[low] > 0 < expected[high]


def test_nothing_is_sorted_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows that are cut at the likeliest units, and these whatever their batch mates are."""
    logits, allowed = torch.arange(150.0).view(3, 50).sin(), torch.ones(3, 50, dtype=torch.bool)
    how, generators = [Sampling(1.0), Sampling(), Sampling(0.7, min_p=0.1)], [np.random.default_rng(0)] * 3
    sorted_rows, sort = list[int](), torch.Tensor.sort

    def watched(self: torch.Tensor, *args: Any, **how: Any) -> Any:
        sorted_rows.append(len(self))
        return sort(self, *args, **how)

    monkeypatch.setattr(torch.Tensor, "sort", watched)
    choose(logits, allowed, how, generators)
    assert not sorted_rows
    choose(logits, allowed, [Sampling(1.0, top_k=3), *how[1:]], generators)
    assert sorted_rows == [1]


@given(st.lists(st.floats(-30, 30).map(lambda x: round(x, 3)), min_size=1, max_size=12), st.integers(0, 11))
def test_greedy_takes_the_first_likeliest_that_is_allowed(values: list[float], which: int) -> None:
    logits, allowed = np.array(values), np.ones(len(values), np.bool_)
    allowed[which % len(values)] = len(values) == 1
    best = np.flatnonzero(allowed)[logits[allowed].argmax()]
    assert draw(logits, allowed, Sampling(), [0.9]) == [best]
    assert draw(logits, allowed, Sampling(1.0, top_k=1), [0.9]) == [best]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    logits, allowed = np.array([300.0, 1.0, 301.0, -np.inf, 500.0]), np.array([True] * 4 + [False])
    assert draw(logits, allowed, Sampling(temperature), [0.0, 0.5, np.nextafter(1.0, 0.0)]) == [2, 2, 2]


def test_each_row_has_its_own_generator() -> None:
    logits, allowed = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    generators: list[Any] = [Fixed(0.1), Fixed(0.9)]
    assert choose(logits, allowed, [Sampling(1.0)] * 2, generators).tolist() == [0, 3]


@pytest.mark.parametrize("how", [
    {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.1}, {"top_p": math.nan},
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(how: dict[str, Any]) -> None:
    name = next(iter(how))
    with pytest.raises(ValueError, match=name):
        Sampling(**how)
    with pytest.raises(ValueError, match=name):
        generate(*tiny("english", "none"), ["the"], **how)


def test_more_than_all_units_are_all() -> None:
    """However much more: a number that no tensor holds would end all requests."""
    one, other = (generate(*tiny("english", "none"), ["the"], temperature=1.0, top_k=k, max_new_units=20)
                  for k in (10**3, 10**30))  # fmt: skip
    assert one[0].log_probs == other[0].log_probs


@pytest.mark.parametrize("how", [{"max_new_units": 0}, {"batch_size": 0}])
def test_sizes_that_make_no_sense_are_refused(how: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(how))):
        generate(*tiny("english", "none"), ["the"], **how)


def test_a_lone_surrogate_in_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        generate(*tiny("english", "none"), ["the", "\ud800"])


def test_seeds() -> None:
    model, tokenizer = tiny("english", "none")

    def blocks(seed: int) -> list[list[str]]:
        done = generate(model, tokenizer, ["the"] * 8, temperature=2.0, seed=seed, max_new_units=20)
        return [c.blocks for c in done]

    assert blocks(1) == blocks(1)
    assert blocks(1) != blocks(2)
    assert len({tuple(b) for b in blocks(1)}) > 2, "prompts alike, samples not"


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits, allowed = np.array([5.0, 4.0, 1.0]), np.ones(3, np.bool_)
    assert draw(logits, allowed, Sampling(1.0, min_p=0.3), [0.0, np.nextafter(1.0, 0.0)]) == [0, 1]
    logits[1] = logits[0]
    assert draw(logits, allowed, Sampling(1.0, min_p=1.0), [0.0, np.nextafter(1.0, 0.0)]) == [0, 1], "as many as it"


def test_of_equally_likely_units_the_first_are_kept() -> None:
    logits, allowed, most = np.zeros(400), np.ones(400, np.bool_), np.nextafter(1.0, 0.0)
    assert draw(logits, allowed, Sampling(1.0, top_k=3), [0.0, 0.5, most]) == [0, 1, 2]
    assert draw(logits[:4], allowed[:4], Sampling(1.0, top_p=0.5), [0.0, most]) == [0, 1], "which reach 0.5"


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.0), Sampling(1.0, 3, 0.5, 0.1)])
def test_nothing_can_follow(how: Sampling) -> None:
    logits, allowed = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    logits[1, :2], allowed[1, 2:] = -math.inf, False
    generators = [np.random.default_rng(0)] * 2
    assert choose(logits[:1], allowed[:1], [how], generators[:1]).item() >= 0
    chosen = choose(logits, allowed, [how, how], generators)
    assert chosen[1] == -1
    with pytest.raises(RuntimeError, match="no unit that may follow has a probability above zero"):
        fetch(chosen, logits)


def test_rows_of_a_choice_do_not_look_at_each_other() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = torch.tensor(rng.normal(0, 3, (len(SETTINGS), 40)))
        allowed = torch.tensor(rng.random((len(SETTINGS), 40)) < 0.8)
        repeated = [set(np.flatnonzero(rng.random(40) < 0.2).tolist()) for _ in SETTINGS]
        order = rng.permutation(len(SETTINGS)).tolist()

        def units(rows: list[int], logits: torch.Tensor = logits, allowed: torch.Tensor = allowed,
                  repeated: list[set[int]] = repeated) -> list[int]:  # fmt: skip
            return choose(logits[rows], allowed[rows], [SETTINGS[i] for i in rows],
                          [np.random.default_rng(i) for i in rows], [repeated[i] for i in rows]).tolist()  # fmt: skip

        assert units(order) == [units([i])[0] for i in order]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_said(bad: float) -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, bad, 1.0]])
    assert fetch([2], logits[:1])[0] == [2], "padded columns are −inf"
    with pytest.raises(RuntimeError, match="NaN or infinite: the weights are damaged"):
        fetch([2, 1], logits)
