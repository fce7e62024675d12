"""Prepared documents as rows of passages: planned from counts, read only when they are asked for."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from tidal.blocks import BOS_BLOCK, EOS_BLOCK, BlockTable, Ints, Passage, row_starts, spans, too_early
from tidal.prepare.shards import Shard

READ_BLOCKS = 1 << 20
"""Blocks of a long document looked at together."""
OPEN = 64
"""Shards mapped at once: each has three file descriptors, of which a process often has 1024."""


class Corpus:
    """Documents of several shards, one after the other."""

    def __init__(self, shards: Sequence[Shard | Path]) -> None:
        """Open shards, in memory or folders. Raises UserError where one is damaged."""
        self._shards, self._open = shards, functools.lru_cache(OPEN)(Shard.open)
        parts, blocks, text = [np.zeros((0, 6), np.int32)], [0], [0]
        for k in range(len(shards)):
            shard = self._shard(k)
            parts.append(np.array(shard.parts))
            blocks.append(len(shard.blocks))
            text.append(len(shard.text))
        self._starts = {"blocks": list(accumulate(blocks)), "text": list(accumulate(text))}
        together = np.concatenate(parts)
        first = np.flatnonzero(np.concatenate([[1], together[:-1, 5]]))
        self.documents: Ints = np.add.reduceat(together[:, :5], first, 0, np.int64)
        """int64 [documents, 5]: blocks, blocks of the prompt, bytes, tokens, learnt steps (without `<eos>`)"""

    def _shard(self, k: int) -> Shard:
        shard = self._shards[k]
        return shard if isinstance(shard, Shard) else self._open(shard)

    def read(self, column: Literal["blocks", "text"], start: int, end: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Blocks ([n, 3]: bytes, tokens, steps) or bytes ([n]) of the corpus from `start` to `end`."""
        starts = self._starts[column]
        k = min(bisect_right(starts, start), len(self._shards)) - 1
        pieces = [getattr(self._shard(k), column)[start - starts[k] : end - starts[k]]]
        while end > starts[k + 1]:
            k += 1
            pieces.append(getattr(self._shard(k), column)[: end - starts[k]])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Prompt and completion of each document."""
        block = byte = 0
        for n_blocks, n_prompt, n_bytes, *_ in self.documents.tolist():
            cut = int(self.read("blocks", block, block + n_prompt)[:, 0].sum())
            text = self.read("text", byte, byte + n_bytes).tobytes()
            yield text[:cut].decode(), text[cut:].decode()
            block, byte = block + n_blocks, byte + n_bytes


class Rows(Sequence[list[Passage]]):
    """Rows of passages, each made when it is asked for: the twin of `windows` and `row_starts` that needs no memory.

    The blocks of a row count in `table`, which must not be emptied while the row is in use.
    """

    def __init__(self, corpus: Corpus, order: npt.NDArray[np.int64], table: BlockTable, reader_budget: int,
                 writer_budget: int) -> None:  # fmt: skip
        """Plan rows over the documents of `order` ([n], indices); budgets as in `row_starts`."""
        self.corpus, self.table = corpus, table
        counts = corpus.documents
        first_block, first_byte = (np.cumsum(counts[:, i]) - counts[:, i] for i in (0, 2))
        fits = (1 + counts[:, 3] <= reader_budget) & (counts[:, 4] + 1 <= writer_budget)
        # of each window: first block, first byte, blocks, of these prompt, whether it ends; tokens, steps
        whole = np.stack([first_block, first_byte, counts[:, 0], counts[:, 1], np.ones_like(first_block),
                          1 + counts[:, 3], counts[:, 4] + 1], 1)  # fmt: skip
        pieces, run = [], 0
        for n in [*np.flatnonzero(~fits[order]).tolist(), len(order)]:
            pieces.append(whole[order[run:n]])
            if n < len(order):
                i = order[n]
                pieces += self._cut(first_block[i], first_byte[i], counts[i], reader_budget, writer_budget)
            run = n + 1
        found = np.concatenate(pieces)
        sizes = ((int(a), int(b)) for a, b in found[:, 5:])
        self._starts = np.array([*row_starts(sizes, reader_budget, writer_budget), len(found)])
        self._windows = found[:, :5].copy()

    def _cut(self, block: int, byte: int, counts: Ints, reader_budget: int, writer_budget: int) -> list[Ints]:
        """The windows of one document that is over a budget, in the form of `_windows`, with their sizes."""
        n, n_prompt = int(counts[0]), int(counts[1])
        if n_prompt:
            sizes = self.corpus.read("blocks", block, block + min(n, n_prompt + reader_budget)).astype(np.int64)
            left_out = too_early(sizes[:, 1], n_prompt, reader_budget)
            n, n_prompt, block = n - left_out, n_prompt - left_out, block + left_out
            byte += int(sizes[:left_out, 0].sum())
        windows, done = [], 0
        while done <= n:  # block n is <eos>
            end = min(done + max(READ_BLOCKS, 2 * reader_budget), n)
            sizes = self.corpus.read("blocks", block + done, block + end).astype(np.int64)
            sizes[: max(0, n_prompt - done), 2] = 0
            if end == n:
                sizes = np.concatenate([sizes, [[0, 0, 1]]])
            cut = [last for _, _, last in spans(sizes[:, 1], sizes[:, 2], reader_budget, writer_budget)]
            if end < n:
                cut.pop()  # more may fit into it
            up_to = np.concatenate([[[0, 0, 0]], np.cumsum(sizes, 0)])
            for first, last in pairwise([0, *cut]):
                prompt = max(0, min(n_prompt - done, last) - first)
                ends = done + last == n + 1
                n_bytes, n_tokens, n_steps = up_to[last] - up_to[first]
                if last - first > prompt:
                    here = (block + done + first, byte, last - first - ends)
                    windows.append((*here, prompt, ends, 1 + n_tokens, n_steps))
                byte += n_bytes
            done += cut[-1]
        return [np.array(windows, np.int64)]

    def of_document(self, i: int) -> Iterator[Passage]:
        """The windows of document `i` of the corpus, in their order; each made when it is asked for."""
        n_blocks = self.corpus.documents[:, 0]
        first = int(n_blocks[:i].sum())
        begins = self._windows[:, 0]
        for k in np.flatnonzero((begins >= first) & (begins < first + n_blocks[i])).tolist():
            yield self._passage(*self._windows[k].tolist())

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, i: int) -> list[Passage]: ...
    @overload
    def __getitem__(self, i: slice) -> list[list[Passage]]: ...
    def __getitem__(self, i: int | slice) -> list[Passage] | list[list[Passage]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return [self._passage(*window) for window in self._windows[self._starts[i] : self._starts[i + 1]].tolist()]

    def _passage(self, block: int, byte: int, n: int, n_prompt: int, ends: int) -> Passage:
        up_to = list(accumulate(self.corpus.read("blocks", block, block + n)[:, 0].tolist(), initial=0))
        text = self.corpus.read("text", byte, byte + up_to[-1]).tobytes()
        blocks = np.empty(1 + n + ends, np.int32)
        blocks[1 : 1 + n] = self.table.indices([text[start:end].decode() for start, end in pairwise(up_to)])
        blocks[0], blocks[1 + n :] = BOS_BLOCK, EOS_BLOCK
        return Passage(blocks, 1 + n_prompt)
