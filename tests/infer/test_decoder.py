"""The decoder's rows: what is copied where they move, join and are cut off, and what is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.infer.test_engine import same
from tests.strategies import SHAPES, tiny, tiny_copy
from tidal.infer.beam import beam_search
from tidal.infer.completion import Completion, Limits
from tidal.infer.decoder import Decoder
from tidal.infer.engine import Engine, generate
from tidal.infer.sampling import Sampling
from tidal.infer.score import score
from tidal.kernels import cpu_rows
from tidal.recall import Recollection

shapes = pytest.mark.parametrize("shape", SHAPES)


@shapes
@torch.inference_mode()
def test_rows_that_stay_are_not_copied(shape: str) -> None:
    """Of those that move what they hold is, and not what lies behind it."""
    model, tokenizer = tiny("english", shape)
    decoder = Decoder(model, tokenizer, 4, room=64)
    texts = ["the light and the land", "", "a dog", "the"]
    decoder.read(range(4), [[tokenizer.encode_block(block) for block in tokenizer.split(text)] for text in texts])
    decoder.step(range(4), [[]] * 4)
    caches = [*decoder.reader_caches, *decoder.writer_caches]
    for rows in ([0, 0, 2, 3], [1, 0, 2, 3], [3, 3, 2, 1]):
        ends = [decoder.n_block + builder.n_read for builder in decoder.builders]
        for cache in caches:
            cache.data[:, :, :, max(ends) :] = torch.arange(4.0).view(4, 1, 1, 1)  # poison
        olds = [cache.data.clone() for cache in caches]
        held, places = [x.clone() for x in (decoder.positions, decoder.context, decoder.sums)], [
            cache.data.data_ptr() for cache in caches]  # fmt: skip
        builders = decoder.builders
        decoder.select(rows)
        assert [cache.data.data_ptr() for cache in caches] == places
        for cache, old in zip(caches, olds, strict=True):
            for new, source in enumerate(rows):
                assert torch.equal(cache.data[:, new, :, : ends[source]], old[:, source, :, : ends[source]])
            assert torch.equal(cache.data[:, :, :, max(ends) :], old[:, :, :, max(ends) :])
        for now, before in zip((decoder.positions, decoder.context, decoder.sums), held, strict=True):
            assert torch.equal(now, before[rows])
        assert [b.n_read for b in decoder.builders] == [builders[row].n_read for row in rows]
        assert len({id(builder.recollection) for builder in decoder.builders}) == 4


@shapes
@pytest.mark.parametrize("in_place", [0, 2**60])
@pytest.mark.parametrize("rows", [[2, 0, 3, 1], [3, 1], [2]], ids=str)
@torch.inference_mode()
def test_rows_are_read_in_any_order(rows: list[int], in_place: int, shape: str,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """All, half or one of them, of one length or of several: as each alone."""
    monkeypatch.setattr(cpu_rows, "IN_PLACE", in_place)
    model, tokenizer = tiny("english", shape)
    begun = [[tokenizer.encode_block(b) for b in tokenizer.split(t)] for t in ("the light", "a", "", "the land and")]
    for texts in ([" dog"] * 4, [" dog", " light", " the", " xyz xy"]):
        blocks = [[tokenizer.encode_block(text) for text in tokenizer.split(it)] for it in texts]
        decoder = Decoder(model, tokenizer, 4, room=64)
        decoder.read(range(4), begun)
        decoder.read(rows, [blocks[row] for row in rows])
        found = decoder.step(range(4), [[]] * 4)
        torch.testing.assert_close(decoder.step(rows, [[]] * len(rows)), found[rows], rtol=0, atol=1e-9)
        for row in range(4):
            alone = Decoder(model, tokenizer, 1)
            alone.read([0], [begun[row] + (blocks[row] if row in rows else [])])
            torch.testing.assert_close(found[row], alone.step([0], [[]])[0], rtol=0, atol=1e-9)


@shapes
@pytest.mark.parametrize("rows", [[3, 1, 0, 0], [1, 2, 1]], ids=str)
@torch.inference_mode()
def test_rows_move_before_they_are_read(rows: list[int], shape: str) -> None:
    """What a row has still to read, its `<bos>`, goes with it."""
    model, tokenizer = tiny("english", shape)
    decoder, block = Decoder(model, tokenizer, 4), tokenizer.encode_block(" dog")
    decoder.read([0, 2], [[block]] * 2)
    decoder.select(rows)
    found = decoder.step(range(len(rows)), [[]] * len(rows))
    for row, old in enumerate(rows):
        alone = Decoder(model, tokenizer, 1)
        alone.read([0], [[block] if old in (0, 2) else []])
        torch.testing.assert_close(found[row], alone.step([0], [[]])[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    """That of torch, which a notebook may have set."""
    def all_of_it() -> list[object]:
        model, tokenizer = tiny("english", "memory")
        completions = generate(model, tokenizer, ["the", "a cat"], max_new_units=20, temperature=1.0)
        return [*((c.text, c.log_probs) for c in completions), beam_search(model, tokenizer, ["the"], max_new_units=20),
                *(score(model, tokenizer, "the light", how).tolist() for how in ("packed", "naive", "decode"))]

    wanted, usual = all_of_it(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert all_of_it() == wanted
    finally:
        torch.set_default_dtype(usual)


def test_one_logit_that_is_not_finite_is_said() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    with torch.no_grad():
        model.unit_embedding.weight[5] = math.nan
    for how in ("packed", "naive", "decode"):
        with pytest.raises(RuntimeError, match="the weights are damaged"):
            score(model, tokenizer, "the", how)


@shapes
def test_a_batch_that_grows_copies_no_row(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = list[int](), Recollection.copy
    monkeypatch.setattr(Recollection, "copy", lambda self: copies.append(0) or copy(self))
    model, tokenizer = tiny("english", shape)
    engine, sizes, done = Engine(model, tokenizer), list[int](), dict[int, Any]()
    engine.submit("the light and", Sampling(1.0), Limits(30))
    while engine.unfinished:
        done.update(engine.step())
        sizes.append(len(engine._rows))
        if len(sizes) == 3:
            for i in range(7):
                engine.submit(["the", "", "a dog"][i % 3], Sampling(1.0), Limits(30))
    assert sizes[0] == 1
    assert max(sizes) == 8
    assert not copies
    prompts = ["the light and", *(["the", "", "a dog"][i % 3] for i in range(7))]
    for i, prompt in enumerate(prompts):
        alone = generate(model, tokenizer, [prompt], temperature=1.0, max_new_units=30, seed=[(0, i)])[0]  # type: ignore[list-item]
        same(done[i], alone, 1e-9)


def test_a_writer_that_does_not_attend_has_no_cache() -> None:
    for shape, attends in (("none", False), ("block", True), ("memory", True)):
        model, tokenizer = tiny("english", shape)
        decoder = Decoder(model, tokenizer, 3)
        assert [cache.data.nbytes > 0 for cache in decoder.writer_caches] == [attends] * len(model.writer)


@pytest.mark.parametrize("shape", ["memory", "none"])
def test_autocast_around_it_changes_nothing(shape: str) -> None:
    model, tokenizer = tiny("english", shape, torch.float32)
    prompts = ["the cat", "", "a"]

    def everything() -> tuple[list[Completion], list[Any], list[list[float]]]:
        done = generate(model, tokenizer, prompts, temperature=1.0, max_new_units=20)
        scores = [score(model, tokenizer, "the light", how).tolist() for how in ("decode", "packed", "naive")]
        return done, beam_search(model, tokenizer, prompts, num_beams=2, max_new_units=6), scores

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything()
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(inside[0], plain[0], strict=True):
        same(one, other, 0.0)
    assert inside[1:] == plain[1:]
