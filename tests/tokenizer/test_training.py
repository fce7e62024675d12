"""Training: deterministic, quiet, bounded, and possible on any corpus."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tidal.tokenizer import MixedTokenizer
from tidal.tokenizer.training import may_be_unit

from . import laws
from .strategies import HOSTILE

SCRIPT = """
from tests.tokenizer import laws
print(laws.tokenizer("mixed").fingerprint)
"""


def test_what_may_be_a_unit() -> None:
    """No control characters, no marks of sentencepiece (space, unknown, invalid), no surrogates, no plane from 4 on."""
    assert not [char for char in "\0\x1f\x7f\u2581\u2585\ufffd\ud800\udfff\U00040000" if may_be_unit(char)]
    assert all(map(may_be_unit, "a ~\u2580\u2582\ud7ff\ue000\ufffc\U0003ffff"))


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_same_texts_give_the_same_fingerprint_quietly(hash_seed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == laws.tokenizer("mixed").fingerprint
    assert done.stderr == ""


def test_the_order_of_texts_does_not_matter() -> None:
    texts = laws.CORPUS * 20
    assert MixedTokenizer.train(texts[::-1], 600).fingerprint == laws.tokenizer("mixed").fingerprint


@pytest.mark.parametrize(
    "texts",
    [[], [""], ["", "\n", " \n\t "], ["\0"], ["\u2581\u2585\ufffd"], ["7"], ["a"], HOSTILE, ["".join(HOSTILE)] * 9],
)
@pytest.mark.parametrize("vocab_size", [288, 2048])
def test_any_corpus_will_do(texts: list[str], vocab_size: int) -> None:
    tokenizer = MixedTokenizer.train(texts, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    laws.check_layout(tokenizer)
    for text in (*texts, laws.CORPUS[2], " ".join(HOSTILE)):
        for law in laws.TEXT_LAWS:
            law(tokenizer, text)


def test_printable_ascii_is_in_the_alphabet() -> None:
    for name in ("mixed", "empty", "cap4"):
        assert set(map(chr, range(32, 127))) <= set(laws.alphabet(laws.tokenizer(name)))
    assert set("0123456789+= ") <= set(laws.alphabet(laws.tokenizer("digits")))  # no room for all of it


def test_a_large_alphabet_leaves_room_for_pieces() -> None:
    texts = ["".join(map(chr, range(0x4E00, 0x5E00)))] + ["你好世界 running"] * 1000
    tokenizer = MixedTokenizer.train(texts, 1000)
    room = 1000 - 260
    assert tokenizer.n_writable - 258 == room // 2
    assert set("你好世界") <= set(laws.alphabet(tokenizer))
    assert tokenizer.encode_block(" running").tokens[0] > tokenizer.bos_id


def test_digits_are_read_one_by_one_and_indentation_at_once() -> None:
    """However often a number comes: else nobody could know the place of each digit."""
    lines = [f"{indent * ' '}{word} = {year}\n"
             for indent in (4, 8, 12) for word in ("the", "cat", "ran") for year in range(1900, 2000)]  # fmt: skip
    tokenizer = MixedTokenizer.train(["".join(lines) * 3], 700)
    assert [tokenizer.piece_name(token) for token in tokenizer.encode_block(" 1984").tokens] == list("▁1984")
    assert len(tokenizer.encode_block("\n" + 7 * " ").tokens) == 2


def test_coverage_leaves_rare_characters_to_bytes() -> None:
    texts = ["a" * 9990 + "é" * 9 + "ж"]
    assert {"é", "ж"} <= set(laws.alphabet(MixedTokenizer.train(texts, character_coverage=1.0)))
    covered = set(laws.alphabet(MixedTokenizer.train(texts, character_coverage=0.9999)))
    assert "é" in covered
    assert "ж" not in covered


def test_training_reads_no_more_than_it_may() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "the cat sat "

    assert MixedTokenizer.train(endless(), max_bytes=10_000).encode_block(" cat").tokens
    tokenizer = MixedTokenizer.train(["ab\u00e9", "ж"], max_bytes=3)  # ends inside é
    assert not {"é", "ж"} & set(laws.alphabet(tokenizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 287}, "at least 288"),
        ({"vocab_size": 3_000_000_000}, "at most 1000000000, not 3000000000"),
        ({"max_block_units": 3}, "max_block_units must be at least 4, not 3"),
        ({"character_coverage": 0.0}, "character_coverage"),
        ({"character_coverage": 1.1}, "character_coverage"),
        ({"max_bytes": 0}, "max_bytes"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedTokenizer.train(["text"], **settings)


def test_what_a_signal_raises_is_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a RuntimeError of sentencepiece, which reads its sentences from an iterator when the signal comes."""
    train = sentencepiece.SentencePieceTrainer.train

    def interrupted(**settings: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        train(**settings)

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", interrupted)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            MixedTokenizer.train([" ".join(map(str, range(20_000)))], 512)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_where_sentencepiece_gives_up_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**settings: Any) -> None:
        raise RuntimeError("INTERNAL: no")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", broken)
    with pytest.raises(ValueError, match="no tokenizer of 512 ids on these texts: INTERNAL: no"):
        MixedTokenizer.train(["text"], 512)


def test_one_string_is_not_an_iterable_of_texts() -> None:
    with pytest.raises(TypeError, match="not one string"):
        MixedTokenizer.train("text")


@pytest.mark.parametrize("n", range(28, 38))
def test_the_head_has_room_for_any_alphabet(n: int) -> None:
    """Of 381 to 390 units: 384 is a multiple of 64."""
    tokenizer = MixedTokenizer.train(["".join(chr(0x4E00 + i) for i in range(n))], 600)
    assert tokenizer.n_writable == 353 + n
    laws.check_layout(tokenizer)
