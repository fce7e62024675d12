"""`python -m tidal.evaluate samples`: garbage is counted."""

from __future__ import annotations

import math

import pytest
import torch

from tests.strategies import tiny, tiny_copy
from tidal.evaluate.samples import count_degenerate, prompts_from, samples, within
from tidal.infer.completion import Completion
from tidal.infer.engine import generate

TEXTS = ["the light and the land, let there be light. " * 5, "", "a b"]
HOW = {"count": 12, "prompt_blocks": 4, "max_new_units": 40, "temperature": 1.0, "seed": 0}


def test_prompts_come_from_the_texts() -> None:
    tokenizer = tiny("english", "memory")[1]
    found = prompts_from(tokenizer, TEXTS, 200, 4, 0, follow=3)
    assert all(any(prompt in text for text in TEXTS) and 1 <= len(tokenizer.split(prompt)) <= 4 for prompt, _ in found)
    assert all(any(prompt + "".join(rest) in text for text in TEXTS) for prompt, rest in found)
    assert {len(rest) for _, rest in found} == {0, 1, 2, 3}  # fewer at the end of a text
    assert len({prompt for prompt, _ in found}) > 5
    assert 0 < sum(prompt == "a b" for prompt, _ in found) < 30, "the shorter text, of 2 blocks in 58"
    assert found == prompts_from(tokenizer, TEXTS, 200, 4, 0, 3) != prompts_from(tokenizer, TEXTS, 200, 4, 1, 3)
    last = prompts_from(tokenizer, ["a b"], 50, 1, 0, follow=9)  # the last window, too
    assert {(prompt, *rest) for prompt, rest in last} == {("a", " b"), (" b",)}
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
    ended = [c.blocks for c in done if c.stop_reason == "eos"]
    assert figures["ended_at_once"] == sum(not blocks for blocks in ended) / 9 < len(ended) / 9
    distinct = sum(len(set(c.blocks)) for c in done) / sum(len(c.blocks) for c in done)
    assert figures["distinct_blocks"] == distinct
    assert set(count_degenerate([]).values()) == {0.0}


@pytest.mark.parametrize(("blocks", "share"), [
    (["x", *[" a", " b"] * 10], 1.0), ([" said", *[" the"] * 60], 1.0), ([" the", " king"] * 30, 1.0),
    ([" a", " b", " c"] * 4, 1.0), ([" a"] * 4, 1.0), ([" a"] * 3, 0.0), ([*[" a"] * 9, *"wholly different text"], 0.0),
    ([], 0.0), ([" a", " b", " c", " d"] * 9, 0.0),
])  # fmt: skip
def test_loops_are_counted(blocks: list[str], share: float) -> None:
    """Of one block, and of two or three in turn, also behind other text."""
    figures = count_degenerate([Completion.of("", blocks, "length", [], [], 0.1)])
    assert (figures["repeating"], figures["ended_at_once"]) == (share, 0.0)


def test_the_data_are_counted_as_well() -> None:
    """Where nothing in the data ends in so many units, a model's output need not either."""
    model, tokenizer = tiny("english", "memory")
    for text, endless, repeating in (("the light and the land, let there be. " * 9, True, False), ("a b", False, False),
                                     (" the" * 99, True, True)):  # fmt: skip
        figures, _ = samples(model, tokenizer, [text], **HOW)  # type: ignore[arg-type]
        for name, many in (("endless", endless), ("repeating", repeating)):  # at the very end of a text all is other
            share = figures[f"{name}_in_data"]
            assert share > 0.6 if many else share == 0, (text, name)
    units = [len(tokenizer.write_units(block)) + 1 for block in ("a", " b")]
    assert within(tokenizer, ["a", " b"], sum(units)) == ["a", " b"]
    assert within(tokenizer, ["a", " b"], sum(units) - 1) == ["a"]
    assert within(tokenizer, ["a", " b"], 1) == within(tokenizer, [], 9) == []
    for room, endless in ((4, False), (3, True)):  # " b" takes three units, and <eos> one; nothing follows " b"
        figures, done = samples(model, tokenizer, ["a b"], **{**HOW, "prompt_blocks": 1, "max_new_units": room})  # type: ignore[arg-type]
        assert figures["endless_in_data"] == endless * sum(c.prompt == "a" for c in done) / len(done)
