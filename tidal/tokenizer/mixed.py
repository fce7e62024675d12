"""`MixedTokenizer`: text <-> blocks <-> ids.

Ids come writable ones first, so that `id < n_writable` is the test and the model's head is a slice:

    0         <eob>  end of block        -+
    1         <eos>  end of document      |  the writable alphabet,
    2..257    the bytes 0..255            |  [0, n_writable)
    258..     single characters          -+
    n_writable, n_writable + 1            <bob>, <bos>
    n_writable + 2..                      pieces of several characters, for the reader only

A character of the alphabet is spelled as that one unit, any other character as the units of its UTF-8 bytes.
Tokens are the same, with longer pieces in addition. sentencepiece only ever sees characters of the alphabet, so
whatever else a text holds (NUL, sentencepiece's own space mark, an emoji never met) cannot confuse it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import sentencepiece

from tidal.files import atomic_write
from tidal.tokenizer.spelling import Spelling
from tidal.tokenizer.split import RULES_VERSION, UNSPACED, by_script, cut_to_fit, find_blocks, utf8
from tidal.tokenizer.training import SPACE_MARK, may_be_unit, train_model

_EOB, _EOS, _FIRST_BYTE, _FIRST_CHAR = 0, 1, 2, 258
NO_PLACE = -1
_HAS_PLACE = re.compile(rb"[0-9A-Za-z\x80-\xff]").search
_CACHE_ENTRIES = 1 << 17  # about half a kilobyte each
TRAINED_ON = 20_000_000
"""Bytes of text that a tokenizer is trained on at most."""
_MODEL_FILE, _RULES_FILE = "tokenizer.model", "tokenizer.json"

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Block:
    """About a word of text, as the reader and as the writer see it."""

    text: str
    tokens: tuple[int, ...]
    """Ids the reader reads."""
    units: tuple[int, ...]
    """Writable ids in reading order (they are *written* last first), without `<bob>` and `<eob>`."""
    places: tuple[int, ...]
    """For each token the number of units after it in the block: the last token has place 0. NO_PLACE for a token
    of white space and ASCII punctuation only, which whoever looks for a digit's place must not find."""


class MixedTokenizer:
    """Reads tokens, writes characters. Immutable but for its caches; picklable."""

    def __init__(self, model: bytes, max_block_units: int = 32) -> None:
        """Tokenizer over a serialized sentencepiece `model`. ValueError if it cannot serve as one."""
        if max_block_units < 4:  # one character may need four byte units
            raise ValueError(f"max_block_units must be at least 4, not {max_block_units}")
        self._model_bytes = model
        self._processor = _processor(model)
        self.max_block_units = max_block_units
        self._lay_out_ids()
        self.fingerprint = _fingerprint(model, _rules(max_block_units))
        """SHA-256 (hex) of the sentencepiece model and the split rules. Equal ones treat every text the same, but for
        characters that only one of two Pythons knows, see `tidal.tokenizer.split`."""
        self._blocks: dict[str, Block] = {}
        self._cuts: dict[str, list[str]] = {}

    def _lay_out_ids(self) -> None:
        """Set all id attributes and tables from the sentencepiece vocabulary."""
        pieces: dict[int, str] = {}  # sentencepiece id -> text
        for index in range(self._processor.get_piece_size()):
            if not (self._processor.is_unknown(index) or self._processor.is_byte(index)):
                pieces[index] = self._processor.id_to_piece(index).replace(SPACE_MARK, " ")
        alphabet = sorted(piece for piece in pieces.values() if len(piece) == 1)
        longer = [piece for piece in pieces.values() if len(piece) > 1]
        strays = set().union(*longer).difference(alphabet).union(c for c in alphabet if not may_be_unit(c))
        if strays:
            raise ValueError(f"not a model of MixedTokenizer: its pieces hold {sorted(strays)}")
        known = "".join(reversed(alphabet))  # a space comes last: a prefix would make good a first one that is dropped
        if "".join(pieces.get(index, "") for index in self._processor.encode(known)) != known:
            raise ValueError("not a model of MixedTokenizer: it changes text; train one with normalization_rule_name "
                             "identity, without add_dummy_prefix and remove_extra_whitespaces")  # fmt: skip

        self.eob_id, self.eos_id = _EOB, _EOS
        self.n_writable = _FIRST_CHAR + len(alphabet)
        self.bob_id, self.bos_id = self.n_writable, self.n_writable + 1
        self.n_head = -(-(self.n_writable + 1) // 64) * 64
        texts = ["", "", *[""] * 256, *alphabet, "", "", *longer]  # controls and bytes have no text
        self.vocab_size = len(texts)
        self.id_bytes: list[bytes] = [piece.encode() for piece in texts]
        """UTF-8 bytes of every id; control ids have none."""
        self.id_bytes[_FIRST_BYTE:_FIRST_CHAR] = [bytes([byte]) for byte in range(256)]
        self._texts = texts
        self._placed = [_HAS_PLACE(data) is not None for data in self.id_bytes]
        self._unit_of = {char: unit for unit, char in enumerate(alphabet, start=_FIRST_CHAR)}
        ids = {piece: index for index, piece in enumerate(texts) if piece}
        self._from_processor = {index: ids[piece] for index, piece in pieces.items()}
        self.digit_units: npt.NDArray[np.bool_] = np.zeros(self.n_writable, dtype=np.bool_)
        """bool [n_writable]: the unit is a decimal digit, as a character or as the byte of an ASCII digit."""
        for unit in range(_FIRST_BYTE, self.n_writable):
            self.digit_units[unit] = self.id_bytes[unit].decode(errors="replace").isdecimal()

    @functools.cached_property
    def spelling(self) -> Spelling:
        """How the tokens are spelled, `<eos>` among them; single bytes, of which nobody writes words, are not."""
        written: list[tuple[int, tuple[int, ...]]] = [(self.eos_id, (self.eos_id,))]
        for token in (*range(_FIRST_CHAR, self.n_writable), *range(self.bos_id + 1, self.vocab_size)):
            written.append((token, tuple(self._unit_of[char] for char in reversed(self._texts[token]))))
        return Spelling(written, self.eob_id, self.eos_id)

    # ------------------------------------------------------------------ making, saving, loading

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 2048,
        *,
        max_block_units: int = 32,
        character_coverage: float = 0.9999,
        max_bytes: int = TRAINED_ON,
    ) -> MixedTokenizer:
        """Train on the first `max_bytes` UTF-8 bytes of `texts`; nothing after them is read.

        `vocab_size` (at least 288) bounds the number of all ids; a small corpus yields fewer. Printable ASCII
        is in the alphabet wherever there is room, so an empty corpus works too. The same texts give the same
        fingerprint. ValueError for settings out of range and for lone surrogates.
        """
        model = train_model(texts, vocab_size, max_block_units, character_coverage, max_bytes)
        return cls(model, max_block_units)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.model and tokenizer.json; each appears whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        description = {**_rules(self.max_block_units), "fingerprint": self.fingerprint}
        atomic_write(directory / _MODEL_FILE, self._model_bytes)
        atomic_write(directory / _RULES_FILE, json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> MixedTokenizer:
        """Tokenizer that `save` wrote. ValueError if a file is missing, corrupt, or of another fingerprint."""
        path = Path(directory) / _RULES_FILE
        try:
            description = json.loads(path.read_bytes())
            version, cap = int(description["rules_version"]), int(description["max_block_units"])
            claimed = str(description["fingerprint"])
            model = (path := Path(directory) / _MODEL_FILE).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is corrupt: {type(error).__name__}: {error}") from None
        if version != RULES_VERSION:
            raise ValueError(f"{path.parent} has split rules {version}, but this code has {RULES_VERSION}")
        found = _fingerprint(model, _rules(cap))
        if found != claimed:
            raise ValueError(
                f"tokenizer fingerprint differs in {directory}: {_RULES_FILE} says {claimed}, "
                f"but {_MODEL_FILE} with its rules has {found}"
            )
        return cls(model, cap)

    def __reduce__(self) -> tuple[type[MixedTokenizer], tuple[bytes, int]]:
        return type(self), (self._model_bytes, self.max_block_units)

    # ------------------------------------------------------------------ text -> blocks

    def split(self, text: str) -> list[str]:
        """Blocks of `text`, none empty or of more than `max_block_units` units. They join to `text`.

        ValueError for lone surrogates.
        """
        if not text.isascii():
            utf8(text)
        blocks = find_blocks(text)
        cap = self.max_block_units
        # Of text with spaces nearly all blocks fit: an ASCII character is one unit and no unspaced script.
        if len(text) > cap or not text.isascii():
            cuts = {b: c for b in set(blocks) if len(b) > cap or not b.isascii() if len(c := self._cut(b)) > 1}
            blocks = [piece for block in blocks for piece in cuts.get(block, (block,))] if cuts else blocks
        return blocks

    def _cut(self, block: str) -> list[str]:
        """Cut a block along tokens where its script has no spaces, and wherever it is over the cap."""
        pieces = self._cuts.get(block)
        if pieces is None:
            parts: Iterable[str] = [block]
            if UNSPACED.search(block) and not block[-1].isdecimal():  # a Thai number is a number
                parts = itertools.chain.from_iterable(map(self._words, by_script(block)))
            cap = self.max_block_units
            pieces = [piece for part in parts for piece in cut_to_fit(part, map(self._width, part), cap)]
            _remember(self._cuts, block, pieces)
        return pieces

    def _words(self, run: str) -> list[str]:
        """Cut a run of one unspaced script along its tokens; a leading space stays with the first."""
        if not UNSPACED.search(run):
            return [run]
        body = run.removeprefix(" ")
        words: list[str] = []
        for known, part in self._by_alphabet(body):
            words += map(self._texts.__getitem__, self._piece_ids(part)) if known else part
        return [run[: len(run) - len(body)] + words[0], *words[1:]]

    def _width(self, char: str) -> int:
        return 1 if char in self._unit_of else len(char.encode())

    # ------------------------------------------------------------------ text <-> ids

    def encode(self, text: str) -> list[int]:
        """Tokens of all blocks of `text`. ValueError for lone surrogates."""
        return [token for block in self.split(text) for token in self.encode_block(block).tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens or units in reading order.

        ValueError names index and value of the first id that is out of range, a control id, or a byte where
        valid UTF-8 ends.
        """
        return self._text(ids, range(len(ids)))

    def encode_block(self, text: str) -> Block:
        """The block of this text, tokenized on its own. ValueError for lone surrogates and for no text."""
        block = self._blocks.get(text)
        if block is None:
            block = self._make_block(text)
            _remember(self._blocks, text, block)
        return block

    def write_units(self, block_text: str) -> list[int]:
        """Units as the writer writes them, LAST first, without `<bob>` and `<eob>`. Errors: `encode_block`."""
        return list(self.encode_block(block_text).units[::-1])

    def unreverse(self, units: Sequence[int]) -> str:
        """Text of units as written, last first. ValueError as `decode`, and for tokens that are no units."""
        for index, unit in enumerate(units):
            if not _FIRST_BYTE <= unit < self.n_writable:
                valid = f"[{_FIRST_BYTE}, {self.n_writable})"
                raise ValueError(f"id {unit} at index {index} is not a unit of text, in {valid}")
        return self._text(units, range(len(units) - 1, -1, -1))

    def retokenize(self, units: Sequence[int]) -> Block:
        """The block that was written, last unit first, as the reader will read it."""
        return self.encode_block(self.unreverse(units))

    def piece_name(self, index: int, /) -> str:
        """Display name of an id: `<eob>`, `<0x0A>`, or its text with spaces shown as U+2581."""
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"id {index} is not in [0, {self.vocab_size})")
        controls = {_EOB: "<eob>", _EOS: "<eos>", self.bob_id: "<bob>", self.bos_id: "<bos>"}
        if index in controls:
            return controls[index]
        return self._texts[index].replace(" ", SPACE_MARK) or f"<0x{index - _FIRST_BYTE:02X}>"

    def _text(self, ids: Sequence[int], order: range) -> str:
        """Text of the ids at the indices `order`, in that order."""
        parts = []
        for index in order:
            value = ids[index]
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"id {value} at index {index} is not in [0, {self.vocab_size})")
            if not self.id_bytes[value]:
                raise ValueError(f"control id {value} at index {index}, {self.piece_name(value)}, is not text")
            parts.append(self.id_bytes[value])
        try:
            return b"".join(parts).decode()
        except UnicodeDecodeError as error:
            ends = list(itertools.accumulate(map(len, parts)))
            index = order[bisect.bisect_right(ends, error.start)]
            raise ValueError(f"id {ids[index]} at index {index} is not valid UTF-8: {error.reason}") from None

    def _make_block(self, text: str) -> Block:
        if not text:
            raise ValueError("a block holds at least one character")
        data = utf8(text)
        tokens: list[int] = []
        units: list[int] = []
        for known, part in self._by_alphabet(text):
            spelled = [_FIRST_BYTE + byte for byte in part.encode()]
            tokens += self._piece_ids(part) if known else spelled
            units += [self._unit_of[char] for char in part] if known else spelled
        if b"".join(map(self.id_bytes.__getitem__, tokens)) != data:
            raise RuntimeError(f"sentencepiece changed {text!r} into tokens {tokens}")
        after = len(units)
        counts = [after := after - (len(self._texts[token]) or 1) for token in tokens]
        places = tuple(n if self._placed[token] else NO_PLACE for n, token in zip(counts, tokens, strict=True))
        return Block(text, tuple(tokens), tuple(units), places)

    def _by_alphabet(self, text: str) -> Iterator[tuple[bool, str]]:
        """Longest runs of characters that are (True) or are not (False) in the alphabet."""
        for known, chars in itertools.groupby(text, self._unit_of.__contains__):
            yield known, "".join(chars)

    def _piece_ids(self, known: str) -> list[int]:
        """Tokens of a text that holds only characters of the alphabet."""
        return [self._from_processor[index] for index in self._processor.encode(known)]


def _remember(cache: dict[str, Value], text: str, value: Value) -> None:
    """Add to a bounded cache. To empty it now and then is cheaper than to keep track of what was used when."""
    if len(text) > 256:  # runs may be megabytes long
        return
    if len(cache) >= _CACHE_ENTRIES:
        cache.clear()
    cache[text] = value


def _rules(max_block_units: int) -> dict[str, int]:
    return {"rules_version": RULES_VERSION, "max_block_units": max_block_units}


def _fingerprint(model: bytes, rules: dict[str, int]) -> str:
    return hashlib.sha256(model + json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise ValueError(f"not a sentencepiece model: {error}") from None
    return processor
