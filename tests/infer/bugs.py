"""Bugs to plant in tokenizer, streams, model, decoder, grammar and sampling, one at a time."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.doctor.plant import Plant, bugged_builder, replacing
from tidal.blocks import BlockTable, suffix_hashes
from tidal.infer import decoder as decoding
from tidal.infer import engine
from tidal.infer.grammar import Grammar
from tidal.streams import Batch, DocumentBuilder, WriterStep
from tidal.tokenizer import Block, MixedTokenizer


def in_decoding(*args: Any, **kwargs: Any) -> Plant:
    """The decoder is fed other streams than training."""
    bugged = bugged_builder(*args, **kwargs)
    return lambda patch: patch.setattr(decoding, "DocumentBuilder", bugged)


# -------------------------------------------------------------------------------- tokenizer and streams


def with_block(change: Callable[[Block], dict[str, Any]]) -> Plant:
    def wrap(encode_block: Callable[..., Block]) -> Callable[..., Block]:
        def bugged(self: MixedTokenizer, text: str) -> Block:
            right = encode_block(self, text)
            return dataclasses.replace(right, **change(right))

        return bugged

    return replacing(MixedTokenizer, "encode_block", wrap)


turned_round_twice = with_block(lambda block: {"units": block.units[::-1]})
written_forwards_in_decoding = replacing(MixedTokenizer, "write_units", lambda right: (
    lambda self, text: right(self, text)[::-1]))  # fmt: skip
not_turned_round_when_read_back = replacing(MixedTokenizer, "unreverse", lambda right: (
    lambda self, units: right(self, units[::-1])))  # fmt: skip
place_from_the_wrong_end = with_block(lambda block: {"places": block.places[::-1]})


def read_back_in_characters(retokenize: Callable[..., Block]) -> Callable[..., Block]:
    def bugged(self: MixedTokenizer, units: Sequence[int]) -> Block:
        right = retokenize(self, units)
        return dataclasses.replace(right, tokens=right.units, places=tuple(range(len(right.units)))[::-1])

    return bugged


def moved_from_second_block(position: Any) -> Any:
    return position + (position > 1.0)


def position_off_by_one(batch: Batch) -> dict[str, Tensor]:
    return {"reader_positions": moved_from_second_block(batch.reader_positions),
            "writer_positions": batch.writer_positions}  # fmt: skip


def place_without_offset(self: DocumentBuilder, written: Sequence[int], step: WriterStep) -> dict[str, Any]:
    return {"place": len(written)}


def sees_own_reader_tokens(batch: Batch) -> dict[str, Tensor]:
    last = torch.tensor([0, batch.reader_ids.shape[1]], dtype=torch.int32)
    ends = (batch.sees_reader + torch.tensor([0, 1], dtype=torch.int32)).minimum(last)
    return {"sees_reader": torch.where(batch.targets[..., None] >= 0, ends, batch.sees_reader)}


def context_after_own_token(batch: Batch) -> dict[str, Tensor]:
    return {"context": (batch.context + 1).clamp(max=batch.reader_ids.shape[1] - 1)}


def sees_previous_block(batch: Batch) -> dict[str, Tensor]:
    return {"sees_writer": (batch.sees_writer - torch.tensor([1, 0], dtype=torch.int32)).clamp(min=0)}


def sees_step_ahead(batch: Batch) -> dict[str, Tensor]:
    last = batch.targets.shape[1]
    return {"sees_writer": (batch.sees_writer + torch.tensor([0, 1], dtype=torch.int32)).clamp(max=last)}


def reader_sees_next_token(batch: Batch) -> dict[str, Tensor]:
    last = batch.reader_ids.shape[1]
    return {"reader_sees": (batch.reader_sees + torch.tensor([0, 1], dtype=torch.int32)).clamp(max=last)}


def position_from_padded_length(batch: Batch) -> dict[str, Tensor]:
    return {"writer_positions": torch.full_like(batch.writer_positions, float(batch.reader_ids.shape[1]))}


def document_start_ignored(batch: Batch) -> dict[str, Tensor]:
    from_zero = torch.tensor([0, 1], dtype=torch.int32)
    return {"reader_sees": batch.reader_sees * from_zero, "sees_reader": batch.sees_reader * from_zero}


def targets_shifted(batch: Batch) -> dict[str, Tensor]:
    return {"targets": torch.where(batch.targets >= 0, batch.targets.roll(-1, 1).clamp(min=0), -1)}


def aux_targets_shifted(batch: Batch) -> dict[str, Tensor]:
    return {"aux_targets": batch.aux_targets.roll(1, 1)}


def suffixes_forwards(self: DocumentBuilder, written: Sequence[int], step: WriterStep) -> dict[str, Any]:
    return {"suffixes": suffix_hashes(list(written)[::-1], self.tokenizer.digit_units.tolist())}


eob_dropped = replacing(BlockTable, "n_targets", lambda right: lambda self, index: right(self, index) - (index > 1))


# ------------------------------------------------------------------------------------ model and decoder


def slot_off_by_one(put: Callable[..., None]) -> Callable[..., None]:
    return lambda self, at, *rest: put(self, (at[0], (at[1] - 1).clamp(min=0)), *rest)


def context_of_another_row(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bugged(self: decoding.Decoder, *args: Any) -> Tensor:
        self.context = self.context.roll(1, 0)
        logits = step(self, *args)
        self.context = self.context.roll(-1, 0)
        return logits

    return bugged


def prompt_read_as_one_block(read: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: decoding.Decoder, rows: Sequence[int], blocks: Sequence[Sequence[Block]]) -> None:
        joined = ["".join(block.text for block in mine) for mine in blocks]
        tokens = [[t for block in mine for t in block.tokens] for mine in blocks]
        whole = [
            dataclasses.replace(self.tokenizer.encode_block(text), tokens=tuple(ids), places=(0,) * len(ids))
            if len(mine) > 1 else mine[0]
            for text, ids, mine in zip(joined, tokens, blocks, strict=True)
        ]  # fmt: skip
        read(self, rows, [[block] for block in whole])

    return bugged


def not_masked(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, states: states @ self.unit_embedding.weight.T


# --------------------------------------------------------------------------------- grammar and sampling


def eob_first(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bugged(self: Grammar, written: Sequence[int]) -> Tensor:
        mask = allowed(self, written).clone()
        if not written:
            mask[self.tokenizer.eob_id] = True
        return mask

    return bugged


def eos_anywhere(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bugged(self: Grammar, written: Sequence[int]) -> Tensor:
        mask = allowed(self, written).clone()
        mask[self.tokenizer.eos_id] = True
        return mask

    return bugged


def no_cap(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, written: allowed(self, written[-2:])


def room_ignored(can_complete: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, tail, room: can_complete(self, tail, 3)


def spells_the_alphabet_in_bytes(finishes: Callable[..., bool]) -> Callable[..., bool]:
    def bugged(self: Grammar, spelling: bytes) -> bool:
        return finishes(self, spelling) or spelling in self._alphabet

    return bugged


def no_long_characters(finishes: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, spelling: len(spelling) < 4 and finishes(self, spelling)


def grammar_ignored(choose: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda logits, allowed, *rest: choose(logits, torch.ones_like(allowed), *rest)


def logits_tempered_in_place(choose: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda logits, *rest: choose(logits.mul_(0.5), *rest)


def one_generator_for_all(patch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    random = types.SimpleNamespace(default_rng=lambda seed: generator, Generator=np.random.Generator)
    patch.setattr(engine, "np", types.SimpleNamespace(random=random))
