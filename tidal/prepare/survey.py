"""A first reading of the data: whether it can be used, what it is, and what is held out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from tidal.cli import UserError, note, progress
from tidal.prepare.documents import Division, apart, divide
from tidal.prepare.reading import PART, Part, read_parts
from tidal.tokenizer.mixed import TRAINED_ON

PIECE = 1 << 12
"""Characters drawn together for the tokenizer: so few that it sees a little of everything."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is, before anything is written."""

    paths: Sequence[str]
    validation: Sequence[str]
    """Paths of what is for validation, if that is no part of the others; it is read after them."""
    division: Division
    n_bytes: int
    """Of UTF-8, all that is read."""
    content: str
    """SHA-256 (hex) of all texts in their order."""
    digest: str
    """SHA-256 (hex) of that and of what is held out: equal ones, with equal tokenizers, train alike."""

    def parts(self) -> Iterator[tuple[bool, Part]]:
        """Read the data once more, parts of training (False) and held-out (True) documents in their order.

        Raises UserError at the end where the data is not what it was.
        """
        content, i, at = _Content(), 0, 0
        end: list[Part] = []  # of the document that is cut: what decides where, and all that follows
        for part in chain(read_parts(self.paths), read_parts(self.validation) if self.validation else ()):
            content.add(part)
            if i >= len(self.division.held_out):
                break
            if self.division.left_out[i]:
                pass
            elif i != self.division.cut:
                yield bool(self.division.held_out[i]), part
            elif at + len(part.text) <= self.division.reach[0]:
                yield False, part
            else:
                end.append(part)
                if part.ends:
                    yield from _divided(end, self.division)
            at += len(part.text)
            if part.ends:
                i, at = i + 1, 0
        if content.hexdigest() != self.content:
            raise UserError("the data changed while it was read; start again when it is complete")

    def training_texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on: the training documents, or where those are larger than TRAINED_ON, pieces from
        all over them, drawn by lot (of their numbers, so always the same ones).
        """
        if self.n_bytes <= TRAINED_ON:
            yield from self._training_texts()
            return
        limit = int(0.9 * TRAINED_ON / self.n_bytes * 2**64)  # not quite all: the last ones must not be one too many
        pieces = (text[i : i + PIECE] for text in self._training_texts() for i in range(0, len(text), PIECE))
        with progress(None, "draw for the tokenizer from", "characters", last_line=False) as bar:
            for number, piece in enumerate(pieces):
                bar.update(len(piece))
                if int.from_bytes(hashlib.blake2b(b"%d" % number, digest_size=8).digest()) < limit:
                    yield piece

    def _training_texts(self) -> Iterator[str]:
        """The training documents, long ones in pieces of PART characters."""
        buffer = ""
        for held_out, part in self.parts():
            if not held_out:
                buffer += part.text
                while len(buffer) >= PART or (part.ends and buffer):
                    yield buffer[:PART]
                    buffer = buffer[PART:]


def survey(paths: Sequence[str], fraction: float, seed: int, validation: Sequence[str] = ()) -> Survey:
    """Read all data, hold a `fraction` out as `divide` says, or else what is at the paths for `validation`.

    Raises UserError for whatever cannot be used.
    """
    content, sizes, prompts, digests = _Content(), array("q"), array("b"), bytearray()
    size, has_prompt, text = 0, False, hashlib.blake2b(digest_size=8)
    ends = []
    with progress(None, "look through", "characters", last_line=False) as bar:
        for side in (paths, validation) if validation else (paths,):
            for part in read_parts(side, note):
                text.update(content.add(part))
                size, has_prompt = size + len(part.text), has_prompt or part.is_prompt
                bar.update(len(part.text))
                if part.ends:
                    sizes.append(size)
                    prompts.append(has_prompt)
                    digests += text.digest()
                    size, has_prompt, text = 0, False, hashlib.blake2b(digest_size=8)
            ends.append(len(sizes))
    if validation:
        division, rule = apart(np.frombuffer(digests, "u8"), ends[0]), f"validation from {ends[0]}"
    else:
        rule = f"{fraction} {seed}"
        division = divide(np.frombuffer(sizes, np.int64), np.frombuffer(prompts, np.bool_),
                          np.frombuffer(digests, "u8"), fraction, seed)  # fmt: skip
    if division.n_copies:
        note(f"{division.n_copies:,} of {len(sizes):,} documents are copies of others; {division.left_out.sum():,} of "
             "them, copies of what is held out, are left out")  # fmt: skip
    digest = hashlib.sha256(f"{content.hexdigest()} {rule}".encode()).hexdigest()
    return Survey(paths, validation, division, content.n_bytes, content.hexdigest(), digest)


def _divided(end: Sequence[Part], division: Division) -> Iterator[tuple[bool, Part]]:
    """The last parts of the document that is cut, those of its tail as held out (True)."""
    text = "".join(part.text for part in end)
    begins = division.length - len(text)
    low, high = division.reach
    head = division.tail_start(text[low - begins : high - begins]) - begins
    for part in end:
        if 0 <= head < len(part.text):
            yield False, part._replace(text=part.text[:head], ends=True)
            yield True, part._replace(text=part.text[head:])
        else:
            yield head < 0, part
        head -= len(part.text)


class _Content:
    """A running digest of documents, however they are cut into parts."""

    def __init__(self) -> None:
        self._hash, self._sides, self.n_bytes = hashlib.sha256(), [0, 0], 0

    def add(self, part: Part) -> bytes:
        """Returns the text as UTF-8."""
        data = part.text.encode()
        self._hash.update(data)
        self.n_bytes += len(data)
        self._sides[part.is_prompt] += len(data)
        if part.ends:
            self._hash.update(b" %d %d " % (self._sides[0], self._sides[1]))
            self._sides = [0, 0]
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
