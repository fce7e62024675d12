"""What may be written next: a small state machine over units, so that output is always valid text (law 6).

    first unit of a block       a character, a byte, <eos>           never <eob>: there are no empty blocks
    after that                  a character, a byte, <eob>           never <eos>
    inside a character's bytes  bytes only, last byte first          0x94 0x80 0xE2  reads  E2 80 94
    block full                  <eob>

Bytes spell only characters outside the alphabet, as the tokenizer does, and only where enough room is left
in the block to finish the character.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from tidal.tokenizer import MixedTokenizer

FIRST_BYTE = 2  # the id of the byte 0x00
LEADS = (range(0), range(0xC2, 0xE0), range(0xE0, 0xF0), range(0xF0, 0xF5))
"""First bytes of characters, by how many continuation bytes follow (the Unicode Standard, table 3-7)."""


class Grammar:
    """Masks of allowed units for one tokenizer. A state is all units written so far in the block."""

    def __init__(self, tokenizer: MixedTokenizer) -> None:
        self.tokenizer = tokenizer
        self._spelling = tokenizer.id_bytes
        self._alphabet = frozenset(tokenizer.id_bytes[FIRST_BYTE + 256 : tokenizer.n_writable])
        self._tail_mask = functools.lru_cache(maxsize=4096)(self._mask)
        self._completable = functools.lru_cache(maxsize=65536)(self._can_complete)

    def allowed(self, written: Sequence[int]) -> torch.Tensor:
        """Bool [n_head]: the units that may follow `written` (last character first). Not to be written to."""
        tail = b""
        for unit in reversed(written):  # the byte written last stands first in reading order
            byte = self._spelling[unit]
            if not 0x80 <= byte[0] < 0xC0:  # whole characters begin with none of these
                break
            tail += byte
        room = self.tokenizer.max_block_units - len(written)
        return self._tail_mask(tail, min(room, 4), not written)

    def _mask(self, tail: bytes, room: int, first: bool) -> torch.Tensor:
        tokenizer = self.tokenizer
        mask = torch.zeros(tokenizer.n_head, dtype=torch.bool)
        mask[FIRST_BYTE : FIRST_BYTE + 256] = torch.tensor([
            room > 0 and (self._finishes(spelling) or self._completable(spelling, room - 1))
            for spelling in (bytes([byte]) + tail for byte in range(256))
        ])  # fmt: skip
        if not tail:
            mask[FIRST_BYTE + 256 : tokenizer.n_writable] = room > 0
            mask[tokenizer.eos_id if first else tokenizer.eob_id] = True
        return mask

    def _finishes(self, spelling: bytes) -> bool:
        """Whether the bytes are exactly one character, and one that is spelt in bytes."""
        try:
            return len(spelling.decode()) == 1 and spelling not in self._alphabet
        except UnicodeDecodeError:
            return False

    def _can_complete(self, tail: bytes, room: int) -> bool:
        """Whether up to `room` more bytes in front of `tail` (continuation bytes) make a character."""
        if room < 1 or len(tail) > 3 or not all(0x80 <= byte < 0xC0 for byte in tail):
            return False
        if any(self._finishes(bytes([lead]) + tail) for lead in LEADS[len(tail)]):
            return True
        return any(self._completable(bytes([byte]) + tail, room - 1) for byte in range(0x80, 0xC0))
