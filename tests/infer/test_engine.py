"""The engine: rows that join and leave, limits, stop strings and streaming."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import tiny, tiny_copy, tokenizers
from tidal.infer.completion import Completion, Limits, Request
from tidal.infer.decoder import Decoder, RaggedView
from tidal.infer.engine import Engine, generate, stream
from tidal.infer.sampling import Repetition, Sampling, choose
from tidal.kernels import cpu_rows
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

PROMPTS = ["the cat", "", "a", "1 + 1 =", "the the the the the the the the dog", " ", "sat", "中文", "x" * 40, "\n\n"]


def same(one: Completion, other: Completion, tolerance: float) -> None:
    assert (one.completion, one.blocks, one.stop_reason, one.units) == (
        other.completion, other.blocks, other.stop_reason, other.units)  # fmt: skip
    assert np.abs(np.array(one.log_probs) - np.array(other.log_probs)).max(initial=0) <= tolerance


def check_batch(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], tolerance: float,
                batch_sizes: Sequence[int] = (1, 3, 64), **how: Any) -> None:  # fmt: skip
    """Alone, a few at a time with rows joining and leaving, all at once, in any order: the same.

    Eight prompts for each row of a batch are enough to have many come and go.
    """
    seeds = list(range(100, 100 + len(prompts)))
    alone = [generate(model, tokenizer, [p], seed=[s], **how)[0] for p, s in zip(prompts, seeds, strict=True)]
    for batch_size in batch_sizes:
        order = np.random.default_rng(batch_size).permutation(len(prompts)).tolist()[: 8 * batch_size]
        done = generate(model, tokenizer, [prompts[i] for i in order], seed=[seeds[i] for i in order],
                        batch_size=batch_size, **how)  # fmt: skip
        for i, completion in zip(order, done, strict=True):
            assert completion.prompt == prompts[i]
            same(completion, alone[i], tolerance)


@pytest.mark.parametrize(("temperature", "dtype", "tolerance"), [
    (1.0, torch.float64, 1e-9), (0.0, torch.float32, 1e-4),
])  # fmt: skip
def test_sixty_four_prompts_as_one_at_a_time(temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    model, tokenizer = tiny("english", "memory", dtype)
    rng = np.random.default_rng(0)
    prompts = [PROMPTS[i % len(PROMPTS)] * int(rng.integers(1, 4)) for i in range(64)]
    check_batch(model, tokenizer, prompts, tolerance, temperature=temperature, max_new_units=25)


PlantedBug = Callable[[pytest.MonkeyPatch], None]


def no_select(patch: pytest.MonkeyPatch) -> None:
    """Rows leave, their caches stay."""
    def select(self: Decoder, rows: Sequence[int]) -> None:
        self.builders = [self.builders[row] for row in rows]

    patch.setattr(Decoder, "select", select)


def tokens_in_wrong_columns(patch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths that are read together: a token attends as its neighbour."""
    original = RaggedView.attend

    def attend(self: RaggedView, *args: torch.Tensor) -> torch.Tensor:
        row, column = self.where
        return original(dataclasses.replace(self, where=(row, column.roll(1))), *args)

    patch.setattr(RaggedView, "attend", attend)


def context_not_selected(patch: pytest.MonkeyPatch) -> None:
    """The last states of other rows."""
    original = Decoder.select

    def select(self: Decoder, rows: Sequence[int]) -> None:
        context = self.context
        original(self, rows)
        self.context = context[: len(rows)]

    patch.setattr(Decoder, "select", select)


def bos_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A joining prompt is read without its `<bos>`."""
    def open_(self: Decoder, rows: Sequence[int]) -> None:
        for row in rows:
            self.builders[row] = self._new_builder()

    patch.setattr(Decoder, "open", open_)


def test_a_prompt_leaves_room() -> None:
    """Caches are not copied as soon as the first block has been written; then they double."""
    model, tokenizer = tiny("english", "memory")
    with torch.inference_mode():
        decoder = Decoder(model, tokenizer, 1, room=8)
        sizes = []
        for text in ("the cat sat on the mat " * 9, " dog", " dog", " dog " * 9):
            decoder.read([0], [[tokenizer.encode_block(block) for block in tokenizer.split(text)]])
            sizes.append(decoder.reader_caches[0].data.shape[3])
    first = sizes[0]
    assert first >= 100
    assert sizes[1:] == [first, first, 2 * first]
    assert sizes[-1] == decoder.capacity >= decoder.builders[0].n_read


def test_caches_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a cache attended to where they lie, as those of long contexts are; a wrong one shows."""
    model, tokenizer = tiny("english", "memory")
    prompts, attend, used = ["the cat", "", "a dog sat", "", "x" * 40] * 2, cpu_rows.attend_rows, list[int]()

    def watched(*args: Any, rows: Sequence[int]) -> torch.Tensor:
        used.extend(rows)
        return attend(*args, rows=rows)

    monkeypatch.setattr(cpu_rows, "IN_PLACE", 0)
    monkeypatch.setattr(cpu_rows, "attend_rows", watched)
    check_batch(model, tokenizer, prompts, 1e-9, [4, 10], temperature=1.0, max_new_units=40)
    assert set(used) == set(range(10))
    monkeypatch.setattr(cpu_rows, "attend_rows", lambda *args, rows: attend(*args, rows=[0] * len(rows)))
    with pytest.raises(AssertionError):
        check_batch(model, tokenizer, prompts, 1e-9, [4], temperature=1.0, max_new_units=40)


def context_of_the_first(patch: pytest.MonkeyPatch) -> None:
    """A step of some rows, not of all, is given the last states of the first ones."""
    original = Decoder._write

    def write(self: Decoder, some: list[int] | None, end: int, data: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return original(self, some, end, data, rest[0], self.context[: len(data), None])

    patch.setattr(Decoder, "_write", write)


@pytest.mark.parametrize(("shape", "some"), [("none", True), ("memory", False), ("block", False)])
def test_rows_that_wait_are_left_out_where_nothing_is_copied(shape: str, some: bool,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    model, tokenizer = tiny("english", shape)
    left_out, step = list[int](), Decoder.step

    def watched(self: Decoder, rows: Sequence[int], *args: Any, **how: Any) -> torch.Tensor:
        left_out.append(len(self.builders) - len(rows))
        return step(self, rows, *args, **how)

    monkeypatch.setattr(Decoder, "step", watched)
    check_batch(model, tokenizer, PROMPTS, 1e-9, [4, 10], temperature=1.0, max_new_units=40)
    assert any(left_out) == some
    if some:
        context_of_the_first(monkeypatch)
        with pytest.raises(AssertionError):
            check_batch(model, tokenizer, PROMPTS, 1e-9, [4], temperature=1.0, max_new_units=40)


@pytest.mark.parametrize("shape", ["memory", "none"])
def test_a_batch_shrinks_when_half_its_rows_are_free(shape: str) -> None:
    model, tokenizer = tiny_copy("english", shape)
    model.head_mask[tokenizer.eos_id] = -math.inf
    engine = Engine(model, tokenizer)
    for i in range(4):
        engine.submit("a dog", limits=Limits(10 * i + 3))
    sizes = {}
    while engine.unfinished:
        sizes[engine.unfinished] = len(engine._rows)
        engine.step()
    assert sizes == {4: 4, 3: 4, 2: 2, 1: 1}


@pytest.mark.parametrize("bug", [no_select, tokens_in_wrong_columns, context_not_selected, bos_forgotten])
def test_planted_bugs_are_caught(bug: PlantedBug, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("english", "memory")
    bug(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check_batch(model, tokenizer, ["the cat", "", "a dog sat", ""] * 4, 1e-9, [3, 16], temperature=1.0,
                    max_new_units=40)  # fmt: skip


def test_streaming_yields_the_blocks() -> None:
    model, tokenizer = tiny("english", "memory")
    blocks: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}
    ended: dict[int, Completion] = {}
    for i, event in stream(model, tokenizer, PROMPTS, temperature=1.0, max_new_units=30, batch_size=3):
        assert i not in ended, "nothing after the end"
        if isinstance(event, str):
            blocks[i].append(event)
        else:
            ended[i] = event
    assert [ended[i].blocks for i in blocks] == list(blocks.values())
    for i, completion in enumerate(generate(model, tokenizer, PROMPTS, temperature=1.0, max_new_units=30)):
        same(ended[i], completion, 1e-9)


def test_limits() -> None:
    model, tokenizer = tiny("english", "memory")
    for completion in generate(model, tokenizer, PROMPTS, temperature=1.0, max_new_blocks=2, max_new_units=500):
        assert completion.stop_reason in ("eos", "block_limit")
        assert len(completion.blocks) <= 2
        assert (completion.stop_reason == "block_limit") == (len(completion.blocks) == 2)
    for completion in generate(model, tokenizer, PROMPTS, temperature=1.0, max_new_units=9):
        assert completion.units <= 9
        assert completion.units == len(completion.log_probs)
        assert completion.log_prob == math.fsum(completion.log_probs)


def test_stop_strings_end_the_text_before_them() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    model.head_mask[tokenizer.eos_id] = -math.inf  # or nine texts of ten are too short
    for seed in range(9):
        how: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_new_units": 40}
        free = generate(model, tokenizer, ["the cat"], **how)[0]
        stop = free.completion[3:6]  # often across blocks
        stopped = generate(model, tokenizer, ["the cat"], stop=[stop, "never written"], **how)[0]
        assert stopped.completion == free.completion[: free.completion.index(stop)]
        assert stopped.stop_reason == "stop_string"
        assert "".join(stopped.blocks) == stopped.completion
        assert all(stopped.blocks)
        assert stopped.units == len(stopped.log_probs)
        assert (stopped.log_probs, stopped.unit_names) == (
            free.log_probs[: stopped.units], free.unit_names[: stopped.units]), "those of whole blocks"  # fmt: skip
        assert stopped.unit_names[-1] == "<eob>"


def test_names_and_log_probs_are_of_the_same_units() -> None:
    model, tokenizer = tiny("english", "memory")
    for completion in generate(model, tokenizer, PROMPTS, temperature=1.0, max_new_units=30):
        blocks: list[list[str]] = [[]]
        for name in completion.unit_names:
            blocks.append([]) if name in ("<eob>", "<eos>") else blocks[-1].append(name)
        spelt = [[tokenizer.piece_name(u) for u in tokenizer.write_units(block)] for block in completion.blocks]
        assert [block for block in blocks if block] == spelt
        assert len(completion.unit_names) == len(completion.log_probs) == completion.units
        long = {"log_probs": completion.log_probs, "unit_names": completion.unit_names}
        assert {**completion.to_dict(per_unit=False), **long} == completion.to_dict()


def test_repetition_penalty_hits_blocks_and_not_letters() -> None:
    seen = Repetition()
    seen.add([5, 6, 7])
    assert seen.units([]) == set()
    assert seen.units([5]) == {6}
    assert seen.units([5, 6]) == {7}
    assert seen.units([6]) == set()
    logits, allowed = torch.tensor([[0.0, 1.0, 0.9]]), torch.ones(1, 3, dtype=torch.bool)
    penalized = Sampling(repetition_penalty=1.2)
    assert choose(logits, allowed, [penalized], [], [{1}]).tolist() == [2]
    assert choose(logits, allowed, [penalized], [], [set()]).tolist() == [1]
    model, tokenizer = tiny_copy("english", "memory")
    with torch.no_grad():  # a model that only ever writes "ba"
        model.writer_norm.weight.zero_()
        model.head_mask[:] = -50.0
        a, b = tokenizer.write_units("ba")
        model.head_mask[[a, b, tokenizer.eob_id]] = torch.tensor([0.0, -0.1, -0.2], dtype=model.head_mask.dtype)
    free = generate(model, tokenizer, [""], max_new_blocks=6, max_new_units=999)[0]
    other = generate(model, tokenizer, [""], max_new_blocks=6, max_new_units=999, repetition_penalty=3.0)[0]
    assert len(set(free.blocks)) == 1
    assert len(set(other.blocks)) > 1


@pytest.mark.parametrize(("how", "message"), [
    ({"min_p": math.nan}, "min_p is nan"), ({"min_p": 1.5}, "min_p is 1.5"),
    ({"repetition_penalty": 0.5}, "repetition_penalty is 0.5"), ({"repetition_penalty": math.inf}, "penalty is inf"),
    ({"max_new_blocks": -1}, "max_new_blocks is -1"), ({"stop": ["a", ""]}, "a stop string is empty"),
    ({"stop": ["a", "\udcff"]}, r"stop string '\\udcff': .*surrogate"), ({"temperature": 10**400}, "temperature is 10"),
    ({"batch_size": 0}, "batch_size is 0"), ({"seed": [1, 2]}, "there are 2 seeds for 1 prompts"),
])  # fmt: skip
def test_refused(how: dict[str, Any], message: str) -> None:
    model, tokenizer = tiny("english", "memory")
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, ["a"], **how)


def test_what_prompts_and_seeds_may_be() -> None:
    model, tokenizer = tiny("english", "memory")
    with pytest.raises(ValueError, match="prompts is the string 'the light'; give a list"):
        generate(model, tokenizer, "the light")
    with pytest.raises(ValueError, match="prompts is 5; give a list of strings"):
        stream(model, tokenizer, 5)  # type: ignore[arg-type]
    listed = generate(model, tokenizer, ["a", "the"], max_new_units=9)
    assert [c.text for c in generate(model, tokenizer, (p for p in ("a", "the")), max_new_units=9)] == [
        c.text for c in listed
    ]
    texts = {generate(model, tokenizer, ["a"], temperature=1.0, seed=seed)[0].text
             for seed in (3, np.int64(3), torch.tensor(3))}  # type: ignore[arg-type]
    assert len(texts) == 1


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=8),
       st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))  # fmt: skip
@example(["a", "bab", "b"], ["bb", "ab"])
def test_stop_strings_are_found_in_the_block_that_completes_them(blocks: list[str], stop: list[str]) -> None:
    """And of several the first in the text."""
    tokenizer = tokenizers()["english"]
    request = Request(0, "", [], Sampling(), Limits(10**6, stop=stop), np.random.default_rng(0))
    text = ""
    for block in blocks:
        for unit in (*tokenizer.write_units(block), tokenizer.eob_id):
            request.write(unit, -1.0, tokenizer)
        text += block
        found = [text.index(string) for string in stop if string in text]
        wanted = text[: min(found, default=len(text))]
        assert ("".join(request.blocks), request.stop_reason) == (wanted, "stop_string" if found else None)
        assert all(request.blocks)
        if found:
            break


def test_a_stop_string_may_begin_the_text() -> None:
    """It ends the text at once, though nothing as long was written before."""
    model, tokenizer = tiny_copy("english", "memory")
    model.head_mask[tokenizer.eos_id] = -math.inf
    for seed in range(3):
        how: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_new_units": 40}
        free = generate(model, tokenizer, ["the cat"], **how)[0]
        stopped = generate(model, tokenizer, ["the cat"], stop=[free.blocks[0]], **how)[0]
        assert (stopped.blocks, stopped.stop_reason) == ([], "stop_string")
        assert stopped.units == free.unit_names.index("<eob>") + 1, "another block was written"
