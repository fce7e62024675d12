"""`python -m tidal.evaluate samples`: garbage is counted."""

from __future__ import annotations

import math

import pytest
import torch

from tests.strategies import tiny, tiny_copy
from tidal.evaluate.samples import count_degenerate, prompts_from, samples
from tidal.infer.engine import generate

TEXTS = ["the light and the land, let there be light. " * 5, "", "a b"]
HOW = {"count": 12, "prompt_blocks": 4, "max_new_units": 40, "temperature": 1.0, "seed": 0}


def test_prompts_come_from_the_texts() -> None:
    tokenizer = tiny("english", "memory")[1]
    prompts = prompts_from(tokenizer, TEXTS, 200, 4, 0)
    assert all(any(prompt in text for text in TEXTS) and 1 <= len(tokenizer.split(prompt)) <= 4 for prompt in prompts)
    assert len(set(prompts)) > 5
    assert prompts == prompts_from(tokenizer, TEXTS, 200, 4, 0) != prompts_from(tokenizer, TEXTS, 200, 4, 1)
    assert set(prompts_from(tokenizer, ["a b"], 50, 1, 0)) == {"a", " b"}  # the last window, too
    with pytest.raises(ValueError, match="there is no text"):
        prompts_from(tokenizer, ["", ""], 1, 4, 0)


def test_each_kind_of_garbage_is_counted() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    biases = {"ended_at_once": [tokenizer.eos_id], "repeating": [tokenizer.eob_id, tokenizer.write_units("a")[0]]}
    for name, units in biases.items():
        mask = torch.full_like(model.head_mask, -math.inf)
        mask[units] = 0
        mask[tokenizer.eob_id] += 100  # blocks of one character
        model.head_mask = mask
        figures, done = samples(model, tokenizer, TEXTS, **{**HOW, "temperature": 0.0})  # type: ignore[arg-type]
        assert figures[name] == 1.0
        assert figures["empty"] == figures["ended_at_once"] == float(name == "ended_at_once")
        assert figures["endless"] == float(name == "repeating")
        assert len(done) == 12


def test_shares_by_hand() -> None:
    model, tokenizer = tiny("english", "memory")
    done = generate(model, tokenizer, TEXTS * 3, temperature=1.0, max_new_units=30)
    figures = count_degenerate(done)
    assert figures["endless"] == sum(c.stop_reason == "length" for c in done) / 9
    assert figures["blocks"] == sum(len(c.blocks) for c in done) / 9
    distinct = sum(len(set(c.blocks)) for c in done) / sum(len(c.blocks) for c in done)
    assert figures["distinct_blocks"] == distinct
    assert set(count_degenerate([]).values()) == {0.0}
