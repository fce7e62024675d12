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
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tidal.blocks import NOTHING, BlockTable, Ints, Passage, suffix_hashes
from tidal.config import PLAIN_STEPS, Steps
from tidal.device import upload
from tidal.recall import N_RECALLED, Recollection, recalled
from tidal.tokenizer import NO_PLACE, ROOT, Block, MixedTokenizer

Places = TypeVar("Places", int, Ints)


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
    """What the model is fed to write one unit."""

    id: int
    """`<bob>`, then the unit just written"""
    position: float
    place: int
    """of the unit to come"""
    suffixes: tuple[int, int, int]
    """hashes of all units written, the last two and the last three; NOTHING where there are fewer, or a digit"""
    recalled: tuple[int, ...]
    """what came next in this document, as each lookup found it, or NOTHING"""
    node: int
    """of the trie of tokens spelt backwards (`Spelling`), which the units written lead to; NO_NODE: to none"""
    context: int
    """index of the reader's last state before the block"""
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


def moved(places: Places, by: Places) -> Places:
    """Places (an int, or int64 of any shape) moved by an offset; where there is none, there is none."""
    away: Places = places + by * (places != NO_PLACE)
    return away


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
    aux_targets: torch.Tensor
    """int64 [B, R]: the last token of the next block at the last token of a block, if that block is learnt, else -1"""
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
    n_bytes: int
    """UTF-8 bytes of the supervised text."""
    n_children: tuple[int, ...]
    """Of each row: how many children the nodes of its steps have in the `Spelling`, but for those at the root."""
    steps: Steps = PLAIN_STEPS
    """What it was packed for."""
    n_units: int = field(init=False)
    """Targets: supervised units."""
    n_asked: int = field(init=False)
    """Auxiliary targets."""
    n_begun: int = field(init=False)
    """Steps at the root: first ones of a block."""

    def __post_init__(self) -> None:
        """Count here, where the batch is on the CPU: a GPU would have to be waited for."""
        for name, there in (("n_units", self.targets != NOTHING), ("n_asked", self.aux_targets != NOTHING),
                            ("n_begun", self.nodes == ROOT)):  # fmt: skip
            object.__setattr__(self, name, int(there.sum()))

    @property
    def written(self) -> torch.Tensor:
        """int64 [n_units]: where, of all rows' steps, the targets are. Nothing waits for a GPU."""
        return (self.targets != NOTHING).flatten().nonzero_static(size=self.n_units)[:, 0]

    @property
    def asked(self) -> torch.Tensor:
        """int64 [n_asked]: where, of all rows' tokens, the auxiliary targets are; likewise."""
        return (self.aux_targets != NOTHING).flatten().nonzero_static(size=self.n_asked)[:, 0]

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device, which is not waited for."""
        moved = copy.copy(self)  # counts and all
        for f in dataclasses.fields(self):
            if isinstance(value := getattr(self, f.name), torch.Tensor):
                object.__setattr__(moved, f.name, upload(value, torch.device(device)))
        return moved


def pack(rows: Sequence[Sequence[Passage]], table: BlockTable, *, steps: Steps = PLAIN_STEPS) -> Batch:
    """Lay passages out in rows: the fold of `DocumentBuilder` over all blocks of all rows, at once."""
    blocks = _Blocks(rows, table)
    writer = _writer_stream(blocks, table, steps)
    nodes = writer["nodes"].numpy()
    n_children = np.where(nodes > ROOT, table.tokenizer.spelling.n_children[nodes], 0).sum(1)
    return Batch(
        **_reader_stream(blocks, table),
        **writer,
        n_children=tuple(n_children.tolist()),
        n_bytes=int(table.n_bytes.view()[blocks.index[blocks.supervised]].sum()),
        steps=steps,
    )


class _Blocks:
    """All blocks of all rows, one after the other: what is known of each, in arrays [n]."""

    def __init__(self, rows: Sequence[Sequence[Passage]], table: BlockTable) -> None:
        passages = [p for row in rows for p in row]
        n_blocks = np.array([len(p.blocks) for p in passages], np.int64)
        first = _starts(n_blocks)
        self.n_rows = len(rows)
        self.passage = np.repeat(np.arange(len(passages)), n_blocks)
        self.row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[self.passage]
        self.index = np.concatenate([p.blocks for p in passages])
        self.rank = np.arange(len(self.index)) - first[self.passage]  # in the passage; <bos> has 0
        self.supervised: npt.NDArray[np.bool_] = np.concatenate([p.supervised for p in passages])
        self.position_scale = np.array([p.position_scale for p in passages], np.float64)[self.passage]
        offsets = np.array([(p.place_offset, p.stray_offset, p.n_stray) for p in passages], np.int64)
        own, stray, n_stray = offsets[self.passage].T
        self.place_offset = np.where(self.rank <= n_stray, stray, own)  # that of `<bos>` moves nothing
        self.n_tokens = table.n_tokens(self.index)
        self.n_targets = table.n_targets(self.index)
        self.n_steps = self.n_targets * self.supervised
        # the columns of the row where its tokens, its steps, and the tokens of its document begin
        self.token_column = self._columns(self.n_tokens)
        self.step_column = self._columns(self.n_steps)
        self.document_column = self.token_column[first][self.passage]

    def _columns(self, counts: Ints) -> Ints:
        row_starts = _starts(np.bincount(self.row, counts).astype(np.int64))
        return _starts(counts) - row_starts[self.row]


def _reader_stream(blocks: _Blocks, table: BlockTable) -> dict[str, torch.Tensor]:
    """The fields of a `Batch` that have an element a reader token."""
    b, i = _ragged(blocks.n_tokens)  # each token's block, and its index inside the block
    source = table.token_start.view()[blocks.index][b] + i
    column, start = blocks.token_column[b] + i, blocks.document_column[b]
    padded = _Padded(blocks.n_rows, blocks.row[b], column)
    asked = blocks.n_steps > 0
    aux_targets = torch.full(padded.shape, NOTHING)
    aux_targets[blocks.row[asked], blocks.token_column[asked] - 1] = torch.from_numpy(
        table.last_token.view()[blocks.index[asked]])  # fmt: skip
    return {
        "reader_ids": padded(table.tokens.view()[source]),
        "reader_positions": padded((blocks.position_scale[b] * (column - start)).astype(np.float32)),
        "reader_places": padded(moved(table.places.view()[source], blocks.place_offset[b])),
        "reader_sees": padded(np.stack([start, (blocks.token_column + blocks.n_tokens)[b]], 1).astype(np.int32)),
        "aux_targets": aux_targets,
    }


def _writer_stream(blocks: _Blocks, table: BlockTable, steps: Steps) -> dict[str, torch.Tensor]:
    """The fields of a `Batch` that have an element a writer step."""
    b, t = _ragged(blocks.n_steps)  # each step's block, and its index inside the block
    source = table.target_start.view()[blocks.index][b] + t
    targets = table.targets.view()[source]
    start, end = blocks.document_column[b], blocks.token_column[b]  # of the reader tokens before the block
    own = blocks.step_column[b]
    unseen = np.maximum(0, t + 1 - (steps.window or t + 1))
    recall = _recalled(blocks, table) if steps.recall else np.full((len(targets), N_RECALLED), NOTHING)
    padded = _Padded(blocks.n_rows, blocks.row[b], own + t)
    return {
        "writer_ids": padded(np.where(t == 0, table.tokenizer.bob_id, np.roll(targets, 1))),
        "writer_positions": padded((blocks.position_scale[b] * (end - start + steps.stride * t)).astype(np.float32)),
        "writer_places": padded(t + blocks.place_offset[b]),
        "suffixes": padded(table.hashes.view()[source], NOTHING),
        "recalled": padded(recall, NOTHING),
        "nodes": padded(table.nodes.view()[source], NOTHING),
        "context": padded(end - 1),
        "sees_reader": padded(np.stack([start, end], 1).astype(np.int32)),
        "sees_writer": padded(np.stack([own + unseen, own + t + 1], 1).astype(np.int32)),
        "targets": padded(targets, NOTHING),
    }


def _recalled(blocks: _Blocks, table: BlockTable) -> Ints:
    """What each writer step recalls [steps, N_RECALLED], of all blocks before it, also those of prompts."""
    b, t = _ragged(blocks.n_targets)
    source = table.target_start.view()[blocks.index][b] + t
    of_all: Ints = recalled(table.codes.view()[source], table.targets.view()[source], b, _starts(blocks.n_targets),
                            blocks.rank, blocks.passage)  # fmt: skip
    return of_all[blocks.supervised[b]]


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

    def __call__(self, values: npt.NDArray[np.generic], fill: int = 0) -> torch.Tensor:
        out = np.full(self.shape + values.shape[1:], fill, values.dtype)
        out[self.at] = values
        return torch.from_numpy(out)
