"""Law 6: only writable ids are ever written, and they are always valid text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import SHAPES, TOKENIZERS, short_text, tiny_copy, tokenizer_names, tokenizers
from tests.tokenizer.strategies import HOSTILE, hostile_text
from tidal.infer import grammar as grammars
from tidal.infer import sampling
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

BYTES = slice(2, 258)


def walk(tokenizer: MixedTokenizer, logits: Callable[[list[int]], torch.Tensor], seed: int) -> list[int]:
    """Units of one block as the engine would write them, `<eob>` or `<eos>` last."""
    grammar, generator, written = grammars.Grammar(tokenizer), np.random.default_rng(seed), []
    while len(written) <= tokenizer.max_block_units + 1:
        allowed = grammar.allowed(written)
        assert allowed.shape == (tokenizer.n_head,)
        assert allowed.any(), f"a dead end after {written}"
        assert not allowed[tokenizer.n_writable :].any(), "a column that is no unit is allowed"
        unit = int(sampling.choose(logits(written)[None], allowed[None], [sampling.Sampling(1.0)], [generator])[0])
        assert allowed[unit]
        written.append(unit)
        if unit in (tokenizer.eob_id, tokenizer.eos_id):
            break
    return written


def assert_is_a_block(tokenizer: MixedTokenizer, written: Sequence[int]) -> None:
    """A finished block: valid text, canonical units, not empty, not too long; or the end of the document."""
    *units, last = written
    if last == tokenizer.eos_id:
        assert not units, "<eos> inside a block"
        return
    assert last == tokenizer.eob_id, f"a block of {len(units)} units has no end"
    assert 0 < len(units) <= tokenizer.max_block_units
    text = tokenizer.unreverse(units)  # raises where it is not valid UTF-8
    assert text.encode().decode() == text
    assert tokenizer.write_units(text) == units, "units that the tokenizer would not write for this text"
    assert tokenizer.retokenize(units) == tokenizer.encode_block(text)


def check_walks(tokenizer: MixedTokenizer, seed: int, byte_bias: float = 0.0, end_bias: float = 0.0,
                favourite: int | None = None) -> None:  # fmt: skip
    """Every sequence that the grammar admits is a block, whatever the model prefers."""
    generator = torch.Generator().manual_seed(seed)

    def logits(written: list[int]) -> torch.Tensor:
        values = torch.randn(tokenizer.n_head, generator=generator)
        values[BYTES] += byte_bias
        values[[tokenizer.eob_id, tokenizer.eos_id]] += end_bias
        values[tokenizer.n_writable :] += 50  # what the head must never write
        if favourite is not None:
            values[favourite] += 100
        return values

    assert_is_a_block(tokenizer, walk(tokenizer, logits, seed))


def check_admits(tokenizer: MixedTokenizer, text: str) -> None:
    """Every block of every text can be written."""
    grammar = grammars.Grammar(tokenizer)
    for block in tokenizer.split(text):
        units = [*tokenizer.write_units(block), tokenizer.eob_id]
        for t, unit in enumerate(units):
            assert grammar.allowed(units[:t])[unit], f"{block!r} cannot be written: {units[:t]}, then {unit}"
    assert grammar.allowed([])[tokenizer.eos_id]


def check_never_unwritable(model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
    """Columns that are no unit have probability zero, with a head that favours them, at any temperature."""
    with torch.no_grad():
        favoured = torch.randn(model.config.shape.d_model, dtype=torch.float64) * 100
        model.unit_embedding.weight[tokenizer.n_writable :: 2] = favoured
        model.unit_embedding.weight[tokenizer.n_writable + 1 :: 2] = -favoured  # one of the two is huge
        probabilities = (model.head(torch.randn(9, len(favoured), dtype=torch.float64)) / 100).softmax(-1)
    assert (probabilities[:, tokenizer.n_writable :] == 0).all()
    assert (probabilities[:, : tokenizer.n_writable] > 0).all()
    for completion in generate(model, tokenizer, ["", "the", "1"], temperature=100.0, max_new_units=40):
        completion.text.encode()
        assert all(completion.blocks)
        assert np.isfinite(completion.log_prob)
        assert "\ufffd" not in completion.text
        for block in completion.blocks:
            assert_is_a_block(tokenizer, [*tokenizer.write_units(block), tokenizer.eob_id])


@settings(max_examples=150)
@given(tokenizer_names, st.integers(0, 2**32 - 1), st.sampled_from((-20.0, 0.0, 9.0)), st.sampled_from((-20.0, 0.0)))
def test_walks(name: str, seed: int, byte_bias: float, end_bias: float) -> None:
    check_walks(tokenizers()[name], seed, byte_bias, end_bias)


@settings(max_examples=150)
@given(tokenizer_names, st.integers(0, 383), st.integers(0, 99))
@example("bytes", 2 + 0x80, 0)
@example("digits", 2 + 0xF4, 0)
@example("digits", 2 + 0xBF, 0)
@example("english", 0, 0)
@example("english", 1, 0)
def test_walks_with_a_favourite(name: str, favourite: int, seed: int) -> None:
    """A model that wants one unit only: a continuation byte, `<eob>`, a padded column."""
    tokenizer = tokenizers()[name]
    check_walks(tokenizer, seed, favourite=favourite % tokenizer.n_head)


@settings(max_examples=100)
@given(tokenizer_names, hostile_text())
def test_all_text_can_be_written(name: str, text: str) -> None:
    check_admits(tokenizers()[name], text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_hostile_list_can_be_written(name: str) -> None:
    for text in HOSTILE:
        check_admits(tokenizers()[name], text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_character_is_possible_exactly_if_utf8_has_it(name: str) -> None:
    """All tails of bytes of one character, against Python's own decoder and the tokenizer's spelling."""
    tokenizer = tokenizers()[name]
    grammar = grammars.Grammar(tokenizer)
    rng = np.random.default_rng(0)
    alphabet = {spelling.decode() for spelling in tokenizer.id_bytes[258 : tokenizer.n_writable]}
    codes = {0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFF, 0x10000, 0x10FFFF, 0x3FFFF, 0x40000}
    codes |= {int(c) for c in rng.integers(0, 0xD800, 150)} | {int(c) for c in rng.integers(0xE000, 0x110000, 150)}
    for code in codes:
        units = [2 + byte for byte in reversed(chr(code).encode())]
        admitted = all(grammar.allowed(units[:t])[unit] for t, unit in enumerate(units))
        assert admitted == (chr(code) not in alphabet), hex(code)
    for code in rng.integers(0xD800, 0xE000, 40):  # surrogates are no characters
        units = [2 + byte for byte in reversed(chr(code).encode(errors="surrogatepass"))]
        assert not all(grammar.allowed(units[:t])[unit] for t, unit in enumerate(units))
    for bad in (b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80",
                b"\xf5\x80\x80\x80", b"\xff", b"\xfe", b"\x80", b"\xed\xa0\x80"):  # fmt: skip
        units = [2 + byte for byte in reversed(bad)]
        ways = [grammar.allowed(units[:t])[unit] for t, unit in enumerate(units)]
        assert not all(ways) or not grammar.allowed(units)[tokenizer.eob_id], bad


def test_the_rules_at_the_ends_of_a_block() -> None:
    tokenizer = tokenizers()["bytes"]  # four units a block
    grammar = grammars.Grammar(tokenizer)
    eob, eos, one = tokenizer.eob_id, tokenizer.eos_id, tokenizer.write_units("1")[0]
    first, later, full = (grammar.allowed(written) for written in ([], [one], [one] * 4))
    assert first[eos]
    assert not first[eob]
    assert later[eob]
    assert not later[eos]
    assert full.nonzero().flatten().tolist() == [eob]
    three_left, two_left = grammar.allowed([one]), grammar.allowed([one] * 2)
    inside = [2 + 0xBF]
    assert three_left[inside].all()
    assert two_left[inside].all()
    assert not grammar.allowed([one] * 3)[inside].any(), "no room for a first byte"
    assert not grammar.allowed([2 + 0x80])[[eob, eos, one]].any(), "inside a character"
    assert not grammar.allowed([])[2 + ord("1")], "1 is spelled as a character"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["english", "bytes"])
def test_never_unwritable(name: str, shape: str) -> None:
    check_never_unwritable(*tiny_copy(name, shape))


@settings(max_examples=10)
@given(short_text(), st.integers(0, 99))
def test_generated_text_is_text(prompt: str, seed: int) -> None:
    """A model that would rather write bytes than anything else."""
    model, tokenizer = tiny_copy("bytes", "none")
    with torch.no_grad():
        model.unit_embedding.weight[BYTES] *= 2
    for c in generate(model, tokenizer, [prompt, ""], temperature=100.0, seed=seed, max_new_units=30):
        assert tokenizer.decode(tokenizer.encode(c.text)) == c.text
        for block in c.blocks:
            assert_is_a_block(tokenizer, [*tokenizer.write_units(block), tokenizer.eob_id])
