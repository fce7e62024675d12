"""The one builder of streams: blocks in, everything the model is fed out.

    text    "5 + 7 = 12\\n"           blocks  <bos> | 5 | ' +' | ' 7' | ' =' | ' 12' | \\n | <eos>

    reader  <bos> 5 ' +' ' ' 7 ' =' ' ' 1 2 \\n        a token sees its own block and all before it
    writer                           <bob> 2 1 ' '     a step sees the reader tokens before its block
    targets                            2   1 ' ' <eob> and the steps of its block up to itself, or the
                                                       last few of them (`Steps.window`)

`DocumentBuilder` is the definition: it appends one block, and the decoder calls the very same methods after
every block and before every unit. `pack` is its vectorized twin for training; a property test holds the two
equal. No layout is computed anywhere else (law 2), and nothing here depends on the length of a block that is
still being written, of a row or of a batch (law 3).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from tidal.blocks import NOTHING, BlockTable, Ints, Passage, suffix_hashes
from tidal.config import PLAIN_STEPS, Steps
from tidal.places import moved
from tidal.recall import N_RECALLED, Recollection, recalled
from tidal.tokenizer import NO_PLACE, Block, MixedTokenizer


@dataclass(frozen=True, slots=True)
class ReaderToken:
    """One element of the reader stream; indices count in the row."""

    id: int
    position: float
    place: int
    """NO_PLACE of `<bos>`, and as the block says"""
    sees: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WriterStep:
    """What the model is fed to write one unit; `context` is the reader index of the last state before the block."""

    id: int
    position: float
    place: int
    suffixes: tuple[int, int, int]
    recalled: tuple[int, ...]
    node: int
    context: int
    sees_reader: tuple[int, int]
    sees_writer: tuple[int, int]


class DocumentBuilder:
    """Builds the streams of one document, block by block; opening it reads `<bos>`.

    Positions are multiplied by `position_scale`, and places moved by `place_offset` (in training it may be another for
    the next block): by 1 and 0 when decoding.
    `reader_start` and `writer_start` say where in the row the document's elements begin (0 when decoding).
    """

    def __init__(self, tokenizer: MixedTokenizer, *, steps: Steps = PLAIN_STEPS, place_offset: int = 0,
                 position_scale: float = 1.0, reader_start: int = 0, writer_start: int = 0) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.steps, self.place_offset, self.position_scale = steps, place_offset, position_scale
        self.reader_start, self.writer_start = reader_start, writer_start
        self.digits: list[bool] = tokenizer.digit_units.tolist()
        self.recollection = Recollection()
        self.n_read = 0
        self.opening = self._append([tokenizer.bos_id], [NO_PLACE])

    def copy(self) -> Self:
        """A builder of a document that goes on on its own."""
        other = copy.copy(self)
        other.recollection = self.recollection.copy()
        return other

    def step(self, written: Sequence[int]) -> WriterStep:
        """The step that follows `written`, the units of the current block so far, last character first."""
        t, end = len(written), self.reader_start + self.n_read
        return WriterStep(
            id=written[-1] if written else self.tokenizer.bob_id,
            position=self.position_scale * (self.n_read + self.steps.stride * t),
            place=self.place_offset + t,
            suffixes=suffix_hashes(written, self.digits),
            recalled=self.recollection.recall(written) if self.steps.recall else (NOTHING,) * N_RECALLED,
            node=self.tokenizer.spelling.node(written),
            context=end - 1,
            sees_reader=(self.reader_start, end),
            sees_writer=(self.writer_start + max(0, t + 1 - (self.steps.window or t + 1)), self.writer_start + t + 1),
        )

    def read(self, block: Block) -> list[ReaderToken]:
        """Append a finished block to the reader stream."""
        if self.steps.recall:
            self.recollection.read(block.units[::-1], self.tokenizer.eob_id)
        return self._append(block.tokens, block.places)

    def _append(self, tokens: Sequence[int], places: Sequence[int]) -> list[ReaderToken]:
        first = self.n_read
        self.n_read += len(tokens)
        sees = (self.reader_start, self.reader_start + self.n_read)
        return [
            ReaderToken(token, self.position_scale * (first + i), moved(place, self.place_offset), sees)
            for i, (token, place) in enumerate(zip(tokens, places, strict=True))
        ]

    def write(self, targets: Sequence[int]) -> list[WriterStep]:
        """All steps of a supervised block in training; the next block's steps begin after them."""
        steps = [self.step(targets[:t]) for t in range(len(targets))]
        self.writer_start += len(targets)
        return steps


@dataclass(frozen=True, slots=True)
class Batch:
    """The streams of B rows: R reader tokens, W writer steps, padded at the end with elements that see nothing."""

    reader_ids: torch.Tensor
    """int64 [B, R]"""
    reader_positions: torch.Tensor
    """float32 [B, R], counted in the document"""
    reader_places: torch.Tensor
    """int64 [B, R], NO_PLACE where there is none"""
    reader_sees: torch.Tensor
    """int32 [B, R, 2], half-open range of reader indices in the row"""
    next_tokens: torch.Tensor
    """int64 [B, R]: the last token of the next block at the last token of a block, else -1"""
    writer_ids: torch.Tensor
    """int64 [B, W]"""
    writer_positions: torch.Tensor
    """float32 [B, W]"""
    writer_places: torch.Tensor
    """int64 [B, W]"""
    suffixes: torch.Tensor
    """int64 [B, W, 3], hashes, -1 where there is none"""
    recalled: torch.Tensor
    """int64 [B, W, 3], units that followed what is written, the last times; -1 where there is none"""
    nodes: torch.Tensor
    """int64 [B, W], nodes of the tokenizer's `Spelling`, -1 where what is written ends no token"""
    context: torch.Tensor
    """int64 [B, W], reader index of the last state before the block"""
    sees_reader: torch.Tensor
    """int32 [B, W, 2]"""
    sees_writer: torch.Tensor
    """int32 [B, W, 2], half-open range of writer indices in the row"""
    targets: torch.Tensor
    """int64 [B, W], -1 in the padding"""
    n_units: int
    """Supervised units."""
    n_bytes: int
    """UTF-8 bytes of the supervised text."""
    steps: Steps = PLAIN_STEPS
    """What it was packed for."""

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device."""
        tensors: dict[str, Any] = {f.name: value.to(device, non_blocking=True) for f in dataclasses.fields(self)
                   if isinstance(value := getattr(self, f.name), torch.Tensor)}  # fmt: skip
        return dataclasses.replace(self, **tensors)


def pack(rows: Sequence[Sequence[Passage]], table: BlockTable, *, steps: Steps = PLAIN_STEPS) -> Batch:
    """Lay passages out in rows: the fold of `DocumentBuilder` over all blocks of all rows, at once.

    Names: `b` counts blocks, `i` reader tokens, `s` writer steps, all over the whole batch.
    """
    passages = [p for row in rows for p in row]
    row_of_p = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    n_blocks = np.array([len(p.blocks) for p in passages], np.int64)
    p_of_b = np.repeat(np.arange(len(passages)), n_blocks)
    index_b = np.concatenate([p.blocks for p in passages])
    rank_b = np.arange(len(index_b)) - _starts(n_blocks)[p_of_b]
    supervised_b = np.concatenate([p.supervised for p in passages])
    row_b = row_of_p[p_of_b]
    n_stray_p, stray_p, own_p = np.array([(p.n_stray, p.stray_offset, p.place_offset) for p in passages],
                                         np.int64).reshape(-1, 3).T  # fmt: skip
    offset_b = np.where((rank_b > 0) & (rank_b <= n_stray_p[p_of_b]), stray_p[p_of_b], own_p[p_of_b])
    scale_p = np.array([p.position_scale for p in passages], np.float64)

    tokens_b = table.n_tokens(index_b)
    n_targets_b = table.n_targets(index_b)
    steps_b = n_targets_b * supervised_b
    first_i_b, first_s_b = _starts(tokens_b), _starts(steps_b)
    # where a row, and a passage, begin among all tokens and all steps
    row_start_i = _starts(np.bincount(row_b, tokens_b, len(rows)).astype(np.int64))
    row_start_s = _starts(np.bincount(row_b, steps_b, len(rows)).astype(np.int64))
    passage_start_b = first_i_b[_starts(n_blocks)][p_of_b]

    b_of_i, within_i = _ragged(tokens_b)
    source_i = table.token_start.view()[index_b][b_of_i] + within_i
    row_i, p_i = row_b[b_of_i], p_of_b[b_of_i]
    index_i = np.arange(len(b_of_i))
    document_start_b, block_end_b = passage_start_b - row_start_i[row_b], first_i_b + tokens_b - row_start_i[row_b]
    reader = _Padded(len(rows), row_i, index_i - row_start_i[row_i])

    b_of_s, t_s = _ragged(steps_b)
    source_s = table.target_start.view()[index_b][b_of_s] + t_s
    row_s, p_s = row_b[b_of_s], p_of_b[b_of_s]
    targets_s = table.targets.view()[source_s]
    previous_s = np.where(t_s == 0, table.tokenizer.bob_id, np.roll(targets_s, 1))
    n_before_b = first_i_b - passage_start_b
    context_b = first_i_b - 1 - row_start_i[row_b]
    own_start_s = (first_s_b - row_start_s[row_b])[b_of_s]
    unseen_s = np.maximum(0, t_s + 1 - (steps.window or t_s + 1))
    recalled_s = np.full((len(targets_s), N_RECALLED), NOTHING)
    if steps.recall:  # of prompts, too
        b_of_all, t_all = _ragged(n_targets_b)
        source = table.target_start.view()[index_b][b_of_all] + t_all
        recalled_s = recalled(table.codes.view()[source], table.targets.view()[source], b_of_all, _starts(n_targets_b),
                              rank_b, p_of_b)[supervised_b[b_of_all]]  # fmt: skip
    writer = _Padded(len(rows), row_s, np.arange(len(b_of_s)) - row_start_s[row_s])

    next_tokens = torch.full((len(rows), reader.width), NOTHING)
    asked = supervised_b & (steps_b > 0)
    next_tokens[row_b[asked], context_b[asked]] = torch.from_numpy(table.last_token.view()[index_b[asked]])
    return Batch(
        reader_ids=reader(table.tokens.view()[source_i]),
        reader_positions=reader((scale_p[p_i] * (index_i - passage_start_b[b_of_i])).astype(np.float32)),
        reader_places=reader(moved(table.places.view()[source_i], offset_b[b_of_i])),
        reader_sees=reader(np.stack([document_start_b, block_end_b], 1)[b_of_i].astype(np.int32)),
        next_tokens=next_tokens,
        writer_ids=writer(previous_s),
        writer_positions=writer((scale_p[p_s] * (n_before_b[b_of_s] + steps.stride * t_s)).astype(np.float32)),
        writer_places=writer(t_s + offset_b[b_of_s]),
        suffixes=writer(table.hashes.view()[source_s], NOTHING),
        recalled=writer(recalled_s, NOTHING),
        nodes=writer(table.nodes.view()[source_s], NOTHING),
        context=writer(context_b[b_of_s]),
        sees_reader=writer(np.stack([document_start_b, context_b + 1], 1)[b_of_s].astype(np.int32)),
        sees_writer=writer(np.stack([own_start_s + unseen_s, own_start_s + t_s + 1], 1).astype(np.int32)),
        targets=writer(targets_s, NOTHING),
        n_units=len(targets_s),
        n_bytes=int(table.n_bytes.view()[index_b[supervised_b]].sum()),
        steps=steps,
    )


def _starts(counts: Ints) -> Ints:
    """Exclusive cumulative sum: where each group begins."""
    return np.cumsum(counts) - counts


def _ragged(counts: Ints) -> tuple[Ints, Ints]:
    """For groups of `counts` elements: each element's group, and its index inside the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - _starts(counts)[group]


class _Padded:
    """Spreads values, given one after the other, over rows of equal width."""

    def __init__(self, n_rows: int, row: Ints, column: Ints) -> None:
        self.shape, self.at = (n_rows, int(column.max(initial=-1)) + 1), (row, column)
        self.width = self.shape[1]

    def __call__(self, values: npt.NDArray[np.generic], fill: int = 0) -> torch.Tensor:
        out = np.full(self.shape + values.shape[1:], fill, values.dtype)
        out[self.at] = values
        return torch.from_numpy(out)
