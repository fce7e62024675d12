"""Errors, blocks, saving and loading."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tidal.tokenizer import Block, MixedTokenizer, mixed

from . import laws


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    laws.tokenizer("mixed").save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_block_of_the_design() -> None:
    tokenizer = laws.tokenizer("digits")
    block = tokenizer.encode_block("132")
    assert [tokenizer.piece_name(unit) for unit in tokenizer.write_units("132")] == ["2", "3", "1"]
    assert block.tokens == block.units  # digits are split
    assert block.places == (2, 1, 0)
    assert block is tokenizer.encode_block("132")
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.text = "133"  # type: ignore[misc]
    assert not hasattr(Block, "__dict__") or "__dict__" not in Block.__slots__


def test_places_of_a_long_token() -> None:
    tokenizer = laws.tokenizer("mixed")
    block = tokenizer.encode_block(" cat\u2581s")
    assert [tokenizer.piece_name(token) for token in block.tokens][-4:] == ["<0xE2>", "<0x96>", "<0x81>", "s"]
    assert block.places[-5:] == (4, 3, 2, 1, 0)
    assert len(block.tokens) < len(block.units)


@pytest.mark.parametrize("method", ["split", "encode", "encode_block", "write_units"])
@pytest.mark.parametrize(("text", "offset"), [("ab\ud800", 2), ("\udfff", 0), ("é\udc80é", 1)])
def test_lone_surrogates_are_refused(method: str, text: str, offset: int) -> None:
    with pytest.raises(ValueError, match=rf"surrogate U\+D[0-9A-F]{{3}} at offset {offset} "):
        getattr(laws.tokenizer("mixed"), method)(text)


def test_surrogates_are_refused_in_training() -> None:
    with pytest.raises(ValueError, match="offset 1500000 "):
        MixedTokenizer.train(["fine", "a" * 1_500_000 + "\ud800"])


def test_invalid_ids_are_named() -> None:
    t = laws.tokenizer("mixed")
    a = t.encode_block("a").units[0]
    for decode in (t.decode, t.unreverse):
        for bad in (-1, t.vocab_size, t.eob_id, t.eos_id, t.bob_id, t.bos_id):
            with pytest.raises(ValueError, match=rf"id {bad} at index 2\b"):
                decode([a, a, bad, a])
    with pytest.raises(ValueError, match=rf"id {t.vocab_size - 1} at index 1\b"):
        t.unreverse([a, t.vocab_size - 1])  # a token, but not a unit
    euro = [2 + byte for byte in "€".encode()]
    with pytest.raises(ValueError, match=rf"id {euro[0]} at index 1\b.*UTF-8"):
        t.decode([a, euro[0], euro[1], a])
    with pytest.raises(ValueError, match=rf"id {euro[0]} at index 2\b.*UTF-8"):
        t.unreverse([a, euro[1], euro[0], a])
    with pytest.raises(ValueError, match=rf"id {euro[2]} at index 3\b.*UTF-8"):
        t.unreverse([a, a, a, euro[2]])


def test_ids_may_be_numpy() -> None:
    t = laws.tokenizer("mixed")
    assert t.decode(np.array(t.encode("the café"), dtype=np.int32)) == "the café"  # type: ignore[arg-type]
    assert t.unreverse(np.array(t.write_units("né"))) == "né"  # type: ignore[arg-type]


def test_nothing_is_not_a_block() -> None:
    t = laws.tokenizer("mixed")
    for make in (lambda: t.encode_block(""), lambda: t.write_units(""), lambda: t.retokenize([])):
        with pytest.raises(ValueError, match="at least one character"):
            make()
    assert t.split("") == t.encode("") == []
    assert t.decode([]) == t.unreverse([]) == ""


def test_names_for_display() -> None:
    t = laws.tokenizer("mixed")
    assert [t.piece_name(i) for i in (0, 1, 2, 257, t.bob_id, t.bos_id)] == [
        *("<eob>", "<eos>", "<0x00>", "<0xFF>", "<bob>", "<bos>")
    ]
    assert t.piece_name(t.encode_block(" ").units[0]) == "\u2581"
    with pytest.raises(ValueError, match=r"id -1 is not in \[0, "):
        t.piece_name(-1)


def test_the_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "_CACHE_ENTRIES", 10)
    t = copy.deepcopy(laws.tokenizer("mixed"))
    for number in range(100):
        assert t.decode(t.encode(f"é{number} " + "x" * 1000)) == f"é{number} " + "x" * 1000
        assert max(len(t._blocks), len(t._cuts)) <= 10


def test_save_and_load(saved: Path) -> None:
    t, back = laws.tokenizer("mixed"), MixedTokenizer.load(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.json", "tokenizer.model"]
    text = "".join(laws.CORPUS)
    assert back.fingerprint == t.fingerprint
    assert (back.id_bytes, back.split(text), back.encode(text)) == (t.id_bytes, t.split(text), t.encode(text))
    assert json.loads((saved / "tokenizer.json").read_text())["fingerprint"] == t.fingerprint
    laws.tokenizer("cap4").save(saved)  # over an existing one
    assert MixedTokenizer.load(saved).max_block_units == 4


def test_saving_is_durable(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        laws.tokenizer("cap4").save(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.json", "tokenizer.model"]
    assert MixedTokenizer.load(saved).fingerprint == laws.tokenizer("mixed").fingerprint


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])  # noqa: S301
def test_copies_are_equal(duplicate: Callable[[MixedTokenizer], MixedTokenizer]) -> None:
    t = laws.tokenizer("cap4")
    assert duplicate(t).fingerprint == t.fingerprint


def test_the_fingerprint_covers_model_and_rules() -> None:
    model = laws.tokenizer("mixed")._model_bytes
    prints = {MixedTokenizer(model, cap).fingerprint for cap in (4, 32, 33)}
    prints |= {laws.tokenizer(name).fingerprint for name in laws.NAMES}
    assert len(prints) == 3 + len(laws.NAMES) - 1  # "mixed" is among the first three


def test_another_fingerprint_is_refused_naming_both(saved: Path) -> None:
    ours, other = laws.tokenizer("mixed"), laws.tokenizer("digits")
    (saved / "tokenizer.model").write_bytes(other._model_bytes)
    with pytest.raises(ValueError, match=f"{ours.fingerprint}.*{other.fingerprint}"):
        MixedTokenizer.load(saved)


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def flip_a_byte(directory: Path) -> None:
    data = bytearray((directory / "tokenizer.model").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "tokenizer.model").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), r"cannot read .*tokenizer\.json"),
        (lambda d: (d / "tokenizer.model").unlink(), r"cannot read .*tokenizer\.model"),
        (lambda d: (d / "tokenizer.json").write_text('{"rules'), r"tokenizer\.json is corrupt"),
        (lambda d: (d / "tokenizer.json").write_text("[]"), r"tokenizer\.json is corrupt"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json is corrupt"),
        (lambda d: (d / "tokenizer.json").write_bytes(b"\xff\xfe"), r"tokenizer\.json is corrupt"),
        (lambda d: (d / "tokenizer.model").write_bytes(b""), "fingerprint differs"),
        (flip_a_byte, "fingerprint differs"),
        (edit(max_block_units=16), "fingerprint differs"),
        (edit(fingerprint="0" * 64), "fingerprint differs"),
        (edit(max_block_units="many"), r"tokenizer\.json is corrupt"),
        (edit(max_block_units=float("inf")), r"tokenizer\.json is corrupt"),
        (lambda d: (d / "tokenizer.json").write_text("[" * 100_000), r"tokenizer\.json is corrupt"),
        (edit(rules_version=99), "split rules 99"),
    ],
)
def test_damage_is_refused_in_one_line(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        MixedTokenizer.load(saved)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_other_models_are_refused() -> None:
    for data in (b"", b"not a model"):
        with pytest.raises(ValueError, match="sentencepiece"):
            MixedTokenizer(data)
    with pytest.raises(ValueError, match="max_block_units must be at least 4, not 3"):
        MixedTokenizer(laws.tokenizer("mixed")._model_bytes, 3)


@pytest.mark.parametrize("wrong", [(), ("add_dummy_prefix",), ("remove_extra_whitespaces",),
                                   ("add_dummy_prefix", "remove_extra_whitespaces")], ids=str)  # fmt: skip
def test_models_that_change_text_are_refused(wrong: tuple[str, ...]) -> None:
    """Both together are what sentencepiece does unless told otherwise."""
    lines, model = [line for text in laws.CORPUS for line in text.splitlines()] * 20, io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, hard_vocab_limit=False, minloglevel=2,
        bos_id=-1, eos_id=-1, normalization_rule_name="identity",
        **{name: name in wrong for name in ("add_dummy_prefix", "remove_extra_whitespaces")},
    )  # fmt: skip
    if not wrong:
        for law in laws.TEXT_LAWS:
            law(MixedTokenizer(model.getvalue()), "  the cat\n " + laws.CORPUS[2])
        return
    with pytest.raises(ValueError, match="not a model of MixedTokenizer: it changes text"):
        MixedTokenizer(model.getvalue())
