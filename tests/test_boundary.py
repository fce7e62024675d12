"""The boundary gap is measured where it says, on pairs that differ in nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.strategies import tiny, tiny_copy, tokenizers
from tidal.blocks import BlockTable, passage
from tidal.evaluate.boundary import boundary_gap, continuation_nats, cut_pairs
from tidal.infer.score import bits_per_byte, score, unit_log_probs
from tidal.model import TidalTransformer
from tidal.streams import Batch

TEXTS = ["the fox saw the land and the other light, 12 + 345 = 357\n" * 3, "night", "", "dogs ☃ within 今天天气 said"]


def test_pairs_by_hand() -> None:
    tokenizer = tokenizers()["english"]
    text = "the other fox"  # blocks: the, ' other', ' fox'
    pairs = cut_pairs(tokenizer, [text], count=99, context_chars=5, continuation_chars=3)
    assert {(p.inside, p.boundary, p.start, p.end) for p in pairs} == {
        (2, 3, 0, 9),  # th|e other: the boundary before " other"; end of the block that is 3 characters on
        (4, 3, 0, 9),  # the | other
        (5, 3, 0, 9),
        (6, 3, 0, 9),  # as near to 3 as to 9: the left one, and one block before it
        (7, 9, 3, 13),
        (8, 9, 3, 13),
        (10, 9, 3, 13),  # the other f|ox: just enough is left
    }
    pairs = cut_pairs(tokenizer, ["a within"], count=99, context_chars=5, continuation_chars=1)
    assert {p.inside for p in pairs} == {2, 3, 4}, "nothing comes after the boundary nearest to the others"


def test_pairs_keep_their_promises() -> None:
    tokenizer = tokenizers()["english"]
    pairs = cut_pairs(tokenizer, TEXTS, count=30, context_chars=40, continuation_chars=20, seed=3)
    assert len(pairs) == len({(p.text, p.inside) for p in pairs}) == 30
    for p in pairs:
        bounds = np.cumsum([0, *map(len, tokenizer.split(p.text))]).tolist()
        assert {p.start, p.boundary, p.end} <= set(bounds)
        assert p.inside not in bounds
        assert p.start < min(p.boundary, p.inside) < max(p.boundary, p.inside) < p.end
        first, last = sorted((p.boundary, p.inside))
        assert p.start == min(*(b for b in bounds if b >= last - 40), max(b for b in bounds if b < first))
        assert p.end == min(b for b in bounds if b >= last + 20)
        assert all(abs(b - p.inside) >= abs(p.boundary - p.inside) for b in bounds)
    assert pairs == cut_pairs(tokenizer, TEXTS, count=30, context_chars=40, continuation_chars=20, seed=3)
    assert pairs != cut_pairs(tokenizer, TEXTS, count=30, context_chars=40, continuation_chars=20, seed=4)


def test_losses_are_those_of_the_decoder() -> None:
    model, tokenizer = tiny("english", "memory")
    cuts = [("the fox s", "aw the light"), ("the", " land"), ("within th", "e other"), ("", "☃")]
    nats, n_units = continuation_nats(model, tokenizer, cuts)
    for (before, after), loss, n in zip(cuts, nats, n_units, strict=True):
        decoded = score(model, tokenizer, before + after, "decode", supervise_from=len(before))[:-1]  # less <eos>
        assert len(decoded) == n == sum(len(tokenizer.write_units(b)) + 1 for b in tokenizer.split(after))
        assert loss == pytest.approx(-decoded.sum(), abs=1e-9)


def test_units_are_charged_in_any_batch() -> None:
    """In the order that they were given in, whatever is computed together."""
    model, tokenizer = tiny("english", "memory")
    table = BlockTable(tokenizer)
    passages = [passage(table, "the fox", text) for text in TEXTS]
    alone = [score(model, tokenizer, "the fox" + text, supervise_from=7) for text in TEXTS]
    for batch_tokens in (1, 20, 8192):
        together = unit_log_probs(model, passages, table, batch_tokens)
        assert [len(log_probs) for log_probs in together] == [len(log_probs) for log_probs in alone]
        assert all(np.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(together, alone, strict=True))
    assert unit_log_probs(model, [], table) == []


def test_gap_by_hand() -> None:
    model, tokenizer = tiny("english", "block")
    settings = {"count": 7, "context_chars": 30, "continuation_chars": 10, "seed": 1}
    figures = boundary_gap(model, tokenizer, TEXTS, **settings)
    gaps = []
    for p in cut_pairs(tokenizer, TEXTS, **settings):
        means = []
        for at in (p.inside, p.boundary):
            text, after = p.text[p.start : p.end], p.text[at : p.end]
            means.append(-score(model, tokenizer, text, supervise_from=at - p.start)[:-1].sum() / len(after.encode()))
        gaps.append(means[0] - means[1])
    assert figures["cuts"] == 7
    assert figures["gap_per_byte"] == pytest.approx(np.mean(gaps), abs=1e-9)
    assert figures["error_per_byte"] == pytest.approx(np.std(gaps, ddof=1) / 7**0.5, abs=1e-9)
    for unit in ("unit", "byte"):
        difference = figures[f"inside_nats_per_{unit}"] - figures[f"boundary_nats_per_{unit}"]
        assert figures[f"gap_per_{unit}"] == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize("ask", [
    lambda model, tokenizer: score(model, tokenizer, "the light"),
    lambda model, tokenizer: bits_per_byte(model, [[passage(table := BlockTable(tokenizer), "", "the light")]], table),
    lambda model, tokenizer: continuation_nats(model, tokenizer, [("the", " light")]),
], ids=["score", "bits_per_byte", "continuation_nats"])  # fmt: skip
def test_the_mode_comes_back_whatever_happens(ask: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_copy("english", "memory")
    modes = []

    def fails(self: TidalTransformer, batch: Batch) -> Tensor:
        modes.append(self.training)
        raise RuntimeError("no memory")

    monkeypatch.setattr(TidalTransformer, "log_probs", fails)
    for training in (True, False):
        with pytest.raises(RuntimeError, match="no memory"):
            ask(model.train(training), tokenizer)
        assert model.training == training
    assert modes == [False, False]


def test_refuses() -> None:
    model, tokenizer = tiny("english", "memory")
    with pytest.raises(ValueError, match="no text has a block to cut"):
        boundary_gap(model, tokenizer, ["night", "a"])
    with pytest.raises(ValueError, match="trained with tokenizer"):
        boundary_gap(model, tokenizers()["digits"], TEXTS)


def test_log_probs_are_float64() -> None:
    model, tokenizer = tiny("english", "memory", torch.float32)
    table = BlockTable(tokenizer)
    assert unit_log_probs(model, [passage(table, "", "the")], table)[0].dtype == np.float64
