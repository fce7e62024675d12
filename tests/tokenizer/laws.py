"""The laws of the tokenizer as plain functions, for hypothesis and for the planted bugs alike."""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

from tidal.tokenizer import MixedTokenizer
from tidal.tokenizer.split import find_blocks

CORPUS = (
    "The cat sat on the mat, and the running dog didn't care. It's 12:30, or 54663 + 132 = 54795\n",
    "    def running(self):\n        return self.cat + ' ' + the_dog\n\n",
    "Le café naïf; cafe\u0301 in NFD. Привет, мир! Привет, кот. हिन्दी में 한국어 👍\n",
    "你好世界，你好中国。ありがとう、カタカナ ภาษาไทย ภาษา\n",
)


@functools.cache
def tokenizer(name: str) -> MixedTokenizer:
    """Shared tokenizers; use `copy.deepcopy` before breaking one."""
    if name == "mixed":
        return MixedTokenizer.train(CORPUS * 20, 600)
    if name == "cap4":
        return MixedTokenizer.train(CORPUS * 20, 600, max_block_units=4)
    if name == "digits":
        return MixedTokenizer.train(["12+34= 46\n", "5 + 6 = 11\n"] * 20, 300)
    assert name == "empty"
    return MixedTokenizer.train([])


NAMES = ("mixed", "cap4", "digits", "empty")


def alphabet(t: MixedTokenizer) -> dict[str, int]:
    return {t.id_bytes[unit].decode(): unit for unit in range(258, t.n_writable)}


def spell(t: MixedTokenizer, text: str) -> list[int]:
    """Canonical units in reading order, worked out from the id table alone."""
    known = alphabet(t)
    return [u for c in text for u in ([known[c]] if c in known else [2 + byte for byte in c.encode()])]


def check_split(t: MixedTokenizer, text: str) -> None:
    blocks = t.split(text)
    assert "".join(blocks) == text
    assert all(blocks)
    assert blocks == t.split(text)


def check_ids(t: MixedTokenizer, text: str) -> None:
    ids = t.encode(text)
    assert not {t.eob_id, t.eos_id, t.bob_id, t.bos_id}.intersection(ids)
    assert t.decode(ids) == text
    assert ids == [token for block in t.split(text) for token in t.encode_block(block).tokens]


def check_writer(t: MixedTokenizer, text: str) -> None:
    """Also for a whole text as one block: nothing but `split` may depend on the cap."""
    for block in {*t.split(text), text} - {""}:
        written = t.write_units(block)
        assert written == spell(t, block)[::-1]
        assert t.unreverse(written) == block
        assert t.retokenize(written) == t.encode_block(block)
        assert t.encode_block(block).text == block


def check_cap(t: MixedTokenizer, text: str) -> None:
    for block in t.split(text):
        units = t.encode_block(block).units
        assert len(units) <= t.max_block_units
        assert all(2 <= unit < t.n_writable for unit in units)


def check_canonical(t: MixedTokenizer, text: str) -> None:
    """One spelling per text, and the tokens, taken apart into characters and bytes, are that spelling."""
    for block in map(t.encode_block, t.split(text)):
        apart = [u for i in block.tokens for u in ([i] if i < t.n_writable else spell(t, t.id_bytes[i].decode()))]
        assert list(block.units) == spell(t, block.text) == apart


def check_places(t: MixedTokenizer, text: str) -> None:
    """Look for each place by trying all: the number of last units whose bytes are those of the tokens after."""
    for block in map(t.encode_block, t.split(text)):
        assert len(block.places) == len(block.tokens)
        for index, place in enumerate(block.places):
            after = b"".join(t.id_bytes[token] for token in block.tokens[index + 1 :])
            counts = range(len(block.units) + 1)
            tails = [b"".join(t.id_bytes[u] for u in block.units[len(block.units) - n :]) for n in counts]
            spoken = any(byte > 127 or chr(byte).isalnum() for byte in t.id_bytes[block.tokens[index]])
            assert place == (tails.index(after) if spoken else -1)


def check_rules(_: MixedTokenizer, text: str) -> None:
    """`find_blocks` against the rules read out slowly, one character at a time."""
    blocks, at = [], 0
    while at < len(text):
        end = _end_of_block(text, at)
        blocks.append(text[at:end])
        at = end
    assert find_blocks(text) == blocks


def _kind(text: str, at: int) -> str:
    char = text[at] if at < len(text) else ""
    if char.isspace():
        return "space"
    if char.isdecimal():
        return "digit"
    if char == "_":
        return "underscore"
    if char.isalnum():
        return "letter"
    if char and (unicodedata.category(char)[0] == "M" or char in "\u200c\u200d"):
        return "mark"
    return "other" if char else "end"


def _end_of_block(text: str, at: int) -> int:
    if text[at] == " " and _kind(text, at + 1) not in ("space", "end"):
        at += 1
    kind, end = _kind(text, at), at + 1
    if kind == "letter":
        return _end_of_word(text, end)
    same = ("mark", "other") if kind in ("mark", "other") else (kind,)
    while _kind(text, end) in same:
        end += 1
    if kind == "space" and end - at > 1 and text[end - 1] == " " and end < len(text):
        end -= 1  # the last space belongs to what follows
    return end


def _end_of_word(text: str, end: int) -> int:
    groups = 0
    while True:
        while _kind(text, end) == "letter":
            end += 1
        joins = end < len(text) and text[end] in "'’" and _kind(text, end + 1) == "letter"
        if groups == 64 or not (joins or _kind(text, end) == "mark"):
            return end
        groups += 1
        end += 1
        while not joins and _kind(text, end) == "mark":
            end += 1


def check_layout(t: MixedTokenizer) -> None:
    assert (t.eob_id, t.eos_id, t.bob_id, t.bos_id) == (0, 1, t.n_writable, t.n_writable + 1)
    assert len(t.id_bytes) == t.vocab_size
    assert t.id_bytes[2:258] == [bytes([byte]) for byte in range(256)]
    assert [i for i in range(t.vocab_size) if not t.id_bytes[i]] == [0, 1, t.bob_id, t.bos_id]
    assert t.n_head % 64 == 0
    assert t.n_writable + 1 <= t.n_head < t.n_writable + 65

    chars = [piece.decode() for piece in t.id_bytes[258 : t.n_writable]]
    assert all(len(c) == 1 and ord(c) < 0x40000 and c not in "\u2581\u2585\ufffd" for c in chars)
    assert chars == sorted(set(chars))
    longer = [piece.decode() for piece in t.id_bytes[t.bos_id + 1 :]]
    assert all(len(piece) > 1 and set(piece) <= set(chars) for piece in longer)
    assert len(set(longer)) == len(longer)

    assert t.digit_units.shape == (t.n_writable,)
    assert t.digit_units.dtype == np.bool_
    digits = {u for u in range(258, t.n_writable) if unicodedata.decimal(chars[u - 258], None) is not None}
    assert {int(u) for u in np.flatnonzero(t.digit_units)} == digits | {2 + b for b in b"0123456789"}
    names = [t.piece_name(i) for i in range(t.vocab_size)]
    assert all(names)
    assert (names[0], names[1], names[t.bob_id], names[t.bos_id]) == ("<eob>", "<eos>", "<bob>", "<bos>")


TEXT_LAWS = (
    check_split,
    check_ids,
    check_writer,
    check_cap,
    check_canonical,
    check_places,
    check_rules,
)
