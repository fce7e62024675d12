"""Laws 3 to 5: causal coordinates, packed = naive, trained = decoded. Each law is a function of tests/laws.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.laws import (
    EXACT,
    assert_close,
    check_decoded,
    check_decoded_side_by_side,
    check_engine_writes,
    check_future,
    check_generation,
    check_mates,
    check_packed_is_naive,
    check_rest_of_block,
    check_row_is_documents,
    packed_log_probs,
)
from tests.strategies import SHAPES, TOKENIZERS, passages, shape_names, short_text, tiny, tokenizer_names
from tidal import streams
from tidal.blocks import BlockTable, passage
from tidal.infer import engine, score
from tidal.kernels import cpu

# ---------------------------------------------------------------------------- law 3, causal coordinates


@settings(max_examples=40)
@given(tokenizer_names, shape_names, short_text(), short_text(), short_text())
@example("english", "memory deep", "the light", "", " and the dogs were with the fox")
def test_the_future_has_no_influence(name: str, shape: str, before: str, one: str, other: str) -> None:
    check_future(*tiny(name, shape), before, one, other)


@settings(max_examples=40)
@given(tokenizer_names, shape_names, short_text(), short_text(), short_text(), st.text("t1é今", max_size=3))
@example("english", "memory", "the ", "l", "midn", "ight")
@example("digits", "memory deep", "1 + 1 =", " ", "123", "7")
def test_the_rest_of_the_block_has_no_influence(name: str, shape: str, before: str, one: str, other: str,
                                                tail: str) -> None:  # fmt: skip
    model, tokenizer = tiny(name, shape)
    tail = (tail or "a")[-1 if tokenizer.max_block_units == 4 else -3 :]
    check_rest_of_block(model, tokenizer, before, one[-4:], other[-4:], tail)


@settings(max_examples=40)
@given(st.data(), tokenizer_names, st.sampled_from(("memory deep", "memory", "block", "none")))
def test_mates_have_no_influence(data: st.DataObject, name: str, shape: str) -> None:
    model, tokenizer = tiny(name, shape)
    table = BlockTable(tokenizer)
    document = passages(table).map(lambda p: dataclasses.replace(p, place_offset=0, position_scale=1.0))
    rows = data.draw(st.lists(st.lists(document, min_size=1, max_size=2), min_size=1, max_size=3))
    check_mates(model, table, rows)


# ------------------------------------------------------------------------------- law 4, packed = naive


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12)
@given(tokenizer_names, short_text(), short_text())
@example("english", "", "the light with the dogs\n")
@example("digits", "54663 + 132 =", " 54795\n")
@example("chinese", "今天天气", "很好，\0👍")
@example("bytes", "\ufffd", "")
def test_packed_is_naive(shape: str, name: str, prompt: str, completion: str) -> None:
    check_packed_is_naive(*tiny(name, shape), prompt, completion)


@settings(max_examples=30)
@given(st.data(), tokenizer_names, shape_names)
def test_a_row_is_its_documents(data: st.DataObject, name: str, shape: str) -> None:
    model, tokenizer = tiny(name, shape)
    table = BlockTable(tokenizer)
    document = passages(table).map(lambda p: dataclasses.replace(p, place_offset=0, position_scale=1.0))
    check_row_is_documents(model, table, data.draw(st.lists(st.lists(document, min_size=1), min_size=1, max_size=2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_of_the_kernel(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold tile by tile as well; short texts take the dense path otherwise."""
    model, tokenizer = tiny("english", shape)
    table = BlockTable(tokenizer)
    text = "the light and the night with the dogs, 'tis lazy. " * 4
    rows = [[passage(table, "", text), passage(table, text[:50], text[50:99])], [passage(table, "", "fox")]]
    dense = packed_log_probs(model, table, rows)
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 0)
    assert_close(packed_log_probs(model, table, rows), dense, EXACT)
    check_row_is_documents(model, table, rows)
    check_packed_is_naive(model, tokenizer, text[:40], text[40:99])
    check_decoded(model, tokenizer, text[:40], text[40:60])


# ----------------------------------------------------------------------------- law 5, trained = decoded


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8)
@given(tokenizer_names, short_text(), short_text())
@example("english", "", "the light with the dogs\n")
@example("digits", "54663 + 132 =", " 54795\n")
@example("bytes", "\ufffd", "")
def test_trained_is_decoded(shape: str, name: str, prompt: str, completion: str) -> None:
    check_decoded(*tiny(name, shape), prompt, completion)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_trained_is_decoded_in_float32(name: str, shape: str) -> None:
    model, tokenizer = tiny(name, shape, torch.float32)
    check_decoded(model, tokenizer, "the light ", "12 + 34 = 今天é, dogs\r\n", tolerance=1e-4)


@settings(max_examples=25)
@given(tokenizer_names, shape_names, st.lists(st.tuples(short_text(), short_text()), min_size=1, max_size=4),
       st.sampled_from((1, 7, 256)))  # fmt: skip
@example("english", "memory deep", [("", "the light"), ("and the fox,", ""), ("", "dogs and god"), ("'", "a")], 1)
def test_decoded_side_by_side(name: str, shape: str, texts: list[tuple[str, str]], capacity: int) -> None:
    check_decoded_side_by_side(*tiny(name, shape), texts, capacity)


@settings(max_examples=20)
@given(tokenizer_names, shape_names, st.lists(short_text(), min_size=1, max_size=3),
       st.sampled_from(({}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 40, "seed": 3},
                        {"temperature": 0.7, "top_p": 0.8, "seed": 1}, {"temperature": 100.0})),
       st.sampled_from((1, 5, 24)))  # fmt: skip
@example("english", "memory", ["the", "", "and the light"], {"temperature": 1.0, "seed": 7}, 24)
def test_generation(name: str, shape: str, prompts: list[str], how: dict[str, float], units: int) -> None:
    check_generation(*tiny(name, shape), prompts, units, **how)


@settings(max_examples=15)
@given(tokenizer_names, shape_names, st.lists(st.tuples(short_text(), short_text()), min_size=1, max_size=3))
@example("english", "memory", [("the light", " and the night\n"), ("", ""), ("fox", "")])
@example("chinese", "block", [("今天", "天气很好"), ("", "明天👍去公园")])
def test_the_engine_writes_any_text(name: str, shape: str, texts: list[tuple[str, str]]) -> None:
    check_engine_writes(*tiny(name, shape), texts)


def test_generation_meets_all_that_it_may() -> None:
    """So that the test above is not empty: several blocks, both ends, byte units."""
    done = [c for name in TOKENIZERS
            for c in check_generation(*tiny(name, "memory"), ["", "the ", "1 +"], 60, temperature=1.0)]  # fmt: skip
    assert {c.stop_reason for c in done} == {"eos", "length"}
    assert max(len(c.blocks) for c in done) > 3
    assert not "".join(c.text for c in done).isascii()


def test_no_prompts() -> None:
    assert engine.generate(*tiny("english", "memory"), []) == []


def test_score_of_parts() -> None:
    """Offsets and refusals; the text of a prompt is not scored."""
    model, tokenizer = tiny("english", "memory")
    whole = score.score(model, tokenizer, "the light")
    assert len(whole) == len(tokenizer.split("the light")) + len("the light") + 1
    assert (whole < 0).all()
    assert_close(score.score(model, tokenizer, "the light", supervise_from=3), whole[4:], EXACT)
    assert len(score.score(model, tokenizer, "the", supervise_from=3)) == 1
    assert len(score.score(model, tokenizer, "")) == 1
    with pytest.raises(ValueError, match="choose packed, naive or decode"):
        score.score(model, tokenizer, "the", "padded")  # type: ignore[arg-type]
    for offset in (-1, 4):
        with pytest.raises(ValueError, match="3 characters"):
            score.score(model, tokenizer, "the", supervise_from=offset)
    for offset in ("2", 1.0):
        with pytest.raises(ValueError, match=f"supervise_from is {offset!r}; it must be an integer"):
            score.score(model, tokenizer, "the", supervise_from=offset)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text is \['the'\]; it must be a str"):
        score.score(model, tokenizer, ["the"])  # type: ignore[arg-type]
    for how in ("packed", "naive", "decode"):
        with pytest.raises(ValueError, match="surrogate"):
            score.score(model, tokenizer, "\ud800", how)


def test_bits_per_byte_charge_every_unit() -> None:
    model, tokenizer = tiny("english", "memory")
    table = BlockTable(tokenizer)
    rows = [[passage(table, "", "the light é")], [passage(table, "the", " dogs"), passage(table, "", "fox")]]
    nats = -sum(packed_log_probs(model, table, [[p]]).sum().item() for row in rows for p in row)
    bits, n_units, n_bytes = score.bits_per_byte(model, rows, table, rows_per_batch=1)
    assert n_bytes == len("the light é".encode()) + len(" dogs") + len("fox")
    assert n_units == sum(streams.pack([row], table).n_units for row in rows)
    assert bits == pytest.approx(nats / np.log(2) / n_bytes, abs=1e-12)
    assert np.isnan(score.bits_per_byte(model, [[passage(table, "the", "", ends=False)]], table)[0])
    nothing, n_units, n_bytes = score.bits_per_byte(model, [[passage(table, "", "")]], table)
    assert (np.isnan(nothing), n_units, n_bytes) == (True, 1, 0), "<eos> alone"
