"""A trace is what `generate` did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import shape_names, short_text, tiny, tiny_copy, tokenizer_names
from tidal.blocks import BlockTable, Passage, passage
from tidal.infer.decoder import Decoder
from tidal.infer.engine import generate
from tidal.infer.grammar import Grammar
from tidal.infer.score import score
from tidal.infer.trace import shown, trace, visible
from tidal.infer.trace_page import render_html
from tidal.infer.trace_text import percent, render_text
from tidal.streams import pack

PROMPTS = ("", "the light and", "12 + 345 =", " \u2581👩‍👩‍👧\0", "你好")
HOWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "seed": 5},
    "cut": {"temperature": 0.9, "top_k": 7, "top_p": 0.8, "seed": 2},
    "penalized": {"min_p": 0.02, "repetition_penalty": 1e6},
    "blocks": {"temperature": 2.0, "max_new_blocks": 2},
    "stopped": {"temperature": 1.0, "stop": ("e", "5")},
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_trace_is_what_generate_does(prompt: str, how: str) -> None:
    for model in (tiny("english", "memory"), tiny("bytes", "memory deep")):
        traced = trace(*model, prompt, max_new_units=24, **HOWS[how])
        done = generate(*model, [prompt], max_new_units=24, **HOWS[how])[0]
        assert (traced.completion, traced.stop_reason, traced.units) == (done.completion, done.stop_reason, done.units)
        assert traced.log_prob == pytest.approx(done.log_prob, abs=1e-9)
        log_probs = [step.log_prob for block in traced.blocks for step in block.steps]
        assert log_probs == pytest.approx(done.log_probs, abs=1e-9)


def test_log_probs_are_the_engines_to_the_last_digit() -> None:
    model = tiny("english", "memory", torch.float32)
    traced, [done] = trace(*model, "the", max_new_units=24), generate(*model, ["the"], max_new_units=24)
    assert traced.log_prob == done.log_prob
    assert [step.log_prob for block in traced.blocks for step in block.steps] == done.log_probs


def test_any_completion_can_be_traced() -> None:
    """Whatever number and seed it was drawn with."""
    model, tokenizer = tiny("english", "memory")
    how: dict[str, Any] = {"temperature": 2.0, "max_new_units": 40}
    prompts = ["the cat", "12 + 345 =", "the light and", "the light and"]
    traced = [trace(model, tokenizer, p, seed=(3, i), **how) for i, p in enumerate(prompts)]
    assert [t.completion for t in traced] == [c.completion for c in generate(model, tokenizer, prompts, seed=3, **how)]
    assert traced[2].completion != traced[3].completion
    of_number_0 = generate(model, tokenizer, prompts[2:], seed=3, **how)[0]
    assert trace(model, tokenizer, prompts[2], seed=3, **how).completion == of_number_0.completion
    assert "seed (3, 2)" in render_text(traced[2])
    wanted = generate(model, tokenizer, prompts[:1], seed=[(5, 7)], **how)[0].completion  # type: ignore[list-item]
    for seed in ((5, 7), [5, 7], np.random.default_rng([5, 7])):
        assert trace(model, tokenizer, prompts[0], seed=seed, **how).completion == wanted


def test_what_bfloat16_is_worth() -> None:
    """A trace has the engine's log-probabilities, with more digits than the weights; a score has as many."""
    model, tokenizer = tiny("english", "memory", torch.bfloat16)
    done = generate(model, tokenizer, ["the light"], temperature=1.0, seed=1, max_new_units=40)[0]
    assert (done.stop_reason, done.units > 9) == ("eos", True)
    traced = trace(model, tokenizer, "the light", temperature=1.0, seed=1, max_new_units=40)
    mine = [step.log_prob for block in traced.blocks for step in block.steps]
    assert mine == pytest.approx(done.log_probs, abs=1e-5)
    for how in ("packed", "naive", "decode"):
        log_probs = score(model, tokenizer, "the light", how)  # type: ignore[arg-type]
        assert (log_probs != torch.from_numpy(log_probs).bfloat16().double().numpy()).all()


@settings(max_examples=8)
@given(tokenizer_names, shape_names, short_text(), st.integers(0, 99), st.sampled_from((0.0, 1.0, 30.0)))
def test_log_probs_are_those_of_training(tokenizer: str, shape: str, prompt: str, seed: int, heat: float) -> None:
    model, its_tokenizer = tiny(tokenizer, shape)
    traced = trace(model, its_tokenizer, prompt, seed=seed, temperature=heat, max_new_units=25)
    table = BlockTable(its_tokenizer)
    before = passage(table, prompt, "", ends=False)
    after = table.indices([block.text for block in traced.blocks if block.text])
    end = passage(table, "", "", ends=traced.stop_reason == "eos").blocks[1:]
    whole = Passage(torch.cat([torch.from_numpy(a) for a in (before.blocks, after, end)]).numpy(), len(before.blocks))
    if not traced.blocks:
        return
    with torch.inference_mode():
        packed = model.log_probs(pack([[whole]], table, steps=model.config.shape.steps))
    mine = [step.log_prob for block in traced.blocks for step in block.steps]
    assert mine == pytest.approx(packed.tolist(), abs=1e-9)


@settings(max_examples=8)
@given(tokenizer_names, shape_names, short_text(), st.integers(0, 4))
def test_runners_up_are_the_likeliest_others(tokenizer: str, shape: str, prompt: str, n: int) -> None:
    model, its_tokenizer = tiny(tokenizer, shape)
    traced = trace(model, its_tokenizer, prompt, temperature=1.5, max_new_units=20, runners_up=n)
    decoder, grammar = Decoder(model, its_tokenizer, 1), Grammar(its_tokenizer)
    blocks = [its_tokenizer.encode_block(text) for text in its_tokenizer.split(prompt)]
    for steps, text in [*((b.steps, b.text) for b in traced.blocks), (traced.dropped, "")]:
        with torch.inference_mode():
            decoder.read([0], [blocks])
        written: list[int] = []
        for t, step in enumerate(steps):
            with torch.inference_mode():
                p = decoder.step([0], [written])[0].double().softmax(-1)
            allowed = grammar.allowed(written)
            others = [i for i in range(its_tokenizer.n_writable) if i != step.unit]
            others.sort(key=lambda i: -p[i].item())
            assert step.t == step.place == t
            assert step.fed == shown(its_tokenizer, written[-1] if written else its_tokenizer.bob_id)
            assert step.name == shown(its_tokenizer, step.unit)
            assert step.probability == pytest.approx(p[step.unit].item(), abs=1e-9)
            assert step.rank == 1 + sum(q > p[step.unit] for q in p)
            assert [r.name for r in step.runners_up] == [shown(its_tokenizer, i) for i in others[:n]]
            assert [r.allowed for r in step.runners_up] == allowed[others[:n]].tolist()
            assert [r.probability for r in step.runners_up] == pytest.approx(p[others[:n]].tolist(), abs=1e-9)
            assert step.forbidden == pytest.approx(p[~allowed].sum().item(), abs=1e-9)
            assert step.forced == (allowed.sum() == 1)
            written.append(step.unit)
        blocks = [its_tokenizer.encode_block(text)] if text else []


def test_blocks_are_told_as_they_are_read() -> None:
    model, tokenizer = tiny("english", "memory")
    traced = trace(model, tokenizer, "the light", temperature=1.0, max_new_units=60)
    position = len([token for _, names in traced.prompt_blocks for token in names]) + 1.0
    for block in traced.blocks:
        assert {step.position for step in block.steps} == {position}
        if block.text:
            read = tokenizer.encode_block(block.text)
            assert (block.tokens, block.places) == (read.tokens, read.places)
            assert block.names == tuple(shown(tokenizer, token) for token in read.tokens)
        position += len(block.tokens)
    assert "".join(text for text, _ in traced.prompt_blocks) == "the light"
    assert "".join(block.text for block in traced.blocks) == traced.completion


def test_what_the_writer_is_told_besides() -> None:
    """Recalled units as training packs them, and the reader's own distribution over the block's last token."""
    model, tokenizer = tiny("english", "none")
    traced = trace(model, tokenizer, "the light and the light and the", temperature=1.0, max_new_units=60, runners_up=4)
    table = BlockTable(tokenizer)
    before = passage(table, traced.prompt, "", ends=False).blocks
    written = table.indices([block.text for block in traced.blocks if block.text])
    whole = Passage(np.concatenate([before, written]), len(before))
    batch = pack([[whole]], table, steps=model.config.shape.steps)
    steps = [step for block in traced.blocks for step in block.steps if block.text]
    recalled = batch.recalled[0].tolist()
    names = [tuple("" if unit < 0 else shown(tokenizer, unit) for unit in units) for units in recalled]
    assert [step.recalled for step in steps] == names
    assert any(any(name) for name in names)
    with torch.inference_mode():
        p = model.foretell(model.states(batch)[0][0]).exp()
    first = [n for n, step in enumerate(steps) if step.t == 0]
    assert first
    for n, block in zip(first, traced.blocks, strict=False):
        wanted = p[batch.context[0, n], tokenizer.spelling.order].topk(4)
        tokens = tokenizer.spelling.order[wanted.indices.numpy()].tolist()
        byte = 1 - p[batch.context[0, n], tokenizer.spelling.order].sum().item()
        assert [r.name for r in block.foretold] == [*(shown(tokenizer, token) for token in tokens), "a single byte"]
        assert [r.probability for r in block.foretold] == pytest.approx([*wanted.values.tolist(), byte], abs=1e-9)
    text, page = render_text(traced), render_html(traced)
    told = block.foretold[0]
    assert f"last token foretold  {told.name} {percent(told.probability)}" in text
    assert page.count("last token foretold") == len(traced.blocks)


def test_more_runners_up_than_there_are_units() -> None:
    model, tokenizer = tiny("english", "none")
    [block, *_] = trace(model, tokenizer, "the", max_new_units=30, max_new_blocks=1, runners_up=10**6).blocks
    assert {len(step.runners_up) for step in block.steps} == {tokenizer.n_writable - 1}
    assert len(block.foretold) == len(tokenizer.spelling.order) + 1


def test_a_forced_end_is_told() -> None:
    model, tokenizer = tiny_copy("bytes", "memory")
    with torch.no_grad():
        model.unit_embedding.weight[tokenizer.eob_id] = 0
    traces = [trace(model, tokenizer, "1", temperature=50.0, seed=seed, max_new_units=30) for seed in range(5)]
    steps = [s for t in traces for b in t.blocks for s in b.steps if s.t == tokenizer.max_block_units]
    assert steps
    for step in steps:
        assert step.forced
        assert step.name == "<eob>"
        assert step.forbidden == pytest.approx(1 - step.probability)


@pytest.mark.parametrize(("bad", "named"), [
    ({"temperature": -1.0}, "temperature"), ({"runners_up": -1}, "runners_up"),
    ({"max_new_units": 0}, "max_new_units"), ({"prompt": "\ud800"}, "surrog"), ({"seed": -1}, "seed is -1"),
    ({"seed": (0, 1.5)}, "seed is 1.5"), ({"seed": "7"}, "seed is '7'"),
])  # fmt: skip
def test_senseless_settings_are_refused(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        trace(*tiny("english", "none"), **{"prompt": "the", **bad})


def test_names_and_percentages() -> None:
    tokenizer = tiny("english", "memory")[1]
    assert [shown(tokenizer, i) for i in (0, 1, 2, 2 + 0x0A, 2 + 0xE2)] == ["<eob>", "<eos>", "0x00", "↵", "0xE2"]
    assert shown(tokenizer, tokenizer.bob_id) == "<bob>"
    assert shown(tokenizer, tokenizer.write_units(" ")[0]) == "␣"
    names = [shown(tokenizer, i) for i in range(tokenizer.n_writable)]
    assert len(set(names)) == len(names)
    assert visible("a \n\t\0\u200d\u202e␣▁") == "a␣↵⇥⟨U+0000⟩⟨U+200D⟩⟨U+202E⟩⟨U+2423⟩▁"
    assert visible("\u00a0\u2028\ue000\ufe0f") == "⟨U+00A0⟩⟨U+2028⟩⟨U+E000⟩⟨U+FE0F⟩"
    assert [percent(p) for p in (0.0, 1e-9, 0.00006, 0.5, 0.999949, 0.99999, 1.0)] == [
        "0%", "<0.01%", "0.01%", "50.00%", "99.99%", ">99.99%", "100%"]  # fmt: skip
