"""Prepared documents as rows of passages: planned from counts, read only when they are asked for."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tidal.blocks import BOS_BLOCK, EOS_BLOCK, BlockTable, Ints, Passage, share_rows
from tidal.prepare.shards import Shard

READ_BLOCKS = 1 << 20
"""Blocks of long documents looked at together."""
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


class Rows:
    """Rows of passages, each made when it is asked for: the twin of `windows` and `share_rows` that needs no memory.

    The blocks of a row count in `table`, which must not be emptied while the row is in use.
    """

    def __init__(self, corpus: Corpus, order: Ints, table: BlockTable, reader_budget: int, writer_budget: int) -> None:
        """Plan rows over the documents in the `order` ([documents], a permutation); budgets as in `share_rows`."""
        self.corpus, self.table = corpus, table
        counts = corpus.documents
        first_block, first_byte = (np.cumsum(counts[:, i]) - counts[:, i] for i in (0, 2))
        fits = (1 + counts[:, 3] <= reader_budget) & (counts[:, 4] + 1 <= writer_budget)
        # of each window: first block, first byte, blocks, of these prompt, whether it ends; tokens, steps
        whole = np.stack([first_block, first_byte, counts[:, 0], counts[:, 1], np.ones_like(first_block),
                          1 + counts[:, 3], counts[:, 4] + 1], 1)  # fmt: skip
        which, windows = [np.flatnonzero(fits)], [whole[fits]]
        for documents, cut in self._cut_all(np.flatnonzero(~fits), whole[~fits, :5], reader_budget, writer_budget):
            which.append(documents)
            windows.append(cut)
        found = np.concatenate(windows)[np.argsort(np.argsort(order)[np.concatenate(which)], kind="stable")]
        packed, starts = share_rows(found[:, 5:], reader_budget, writer_budget)
        self._windows, self._starts = found[packed, :5], np.append(starts, len(found))
        self.fill = float(found[:, 5].sum()) / (reader_budget * max(1, len(self)))
        """The part of the rows' reader tokens that is no padding."""

    def _cut_all(self, which: Ints, documents: Ints, reader_budget: int,
                 writer_budget: int) -> Iterator[tuple[Ints, Ints]]:  # fmt: skip
        """What `_cut` gives for documents anywhere, in the order of the corpus, so that each shard is opened once.

        `which` are their indices ([n]). They are cut in groups that are near each other, very long ones in stretches.
        """
        ends = documents[:, 0] + documents[:, 2]
        start = 0
        while start < len(which):
            end = max(int(np.searchsorted(ends, documents[start, 0] + READ_BLOCKS, "right")), start + 1)
            some, at = documents[start:end], which[start:end]
            longest = max(READ_BLOCKS, int(some[0, 3]) + 2 * reader_budget)
            while some[0, 2] > longest:  # it is alone
                block, byte, n, n_prompt, _ = some[0]
                found, cut = self._cut(np.array([[block, byte, longest, n_prompt, 0]]), reader_budget, writer_budget)
                yield at[found[:-1]], cut[:-1]  # more may fit into the last one
                some = np.array([[*cut[-1, :2], block + n - cut[-1, 0], 0, 1]])
            found, cut = self._cut(some, reader_budget, writer_budget)
            yield at[found], cut
            start = end

    def _cut(self, documents: Ints, reader_budget: int, writer_budget: int) -> tuple[Ints, Ints]:
        """The windows that `windows` makes of documents near each other, in their order.

        Documents ([n, 5]) and windows ([windows, 7], with their sizes) are as in `__init__`; before the windows comes
        which document each is of ([windows], from 0).
        """
        block, byte, n, n_prompt, ends = documents.T
        stored = np.asarray(self.corpus.read("blocks", block[0], block[-1] + n[-1]))
        last = np.cumsum(n + ends)  # with an <eos> each
        first = last - n - ends
        sizes = np.zeros((3, last[-1]), np.int64)
        for to, start, length, prompt in np.stack([first, block - block[0], n, n_prompt], 1).tolist():
            sizes[:, to : to + length] = stored[start : start + length].T
            sizes[2, to : to + prompt] = 0
        sizes[2, last[ends == 1] - 1] = 1
        n_bytes, n_tokens, n_steps = np.concatenate([np.zeros((3, 1), np.int64), np.cumsum(sizes, 1)], 1)
        # where the rest of a prompt begins, as `too_early` says
        learnt = first + n_prompt
        after = n_tokens[np.minimum(learnt + reader_budget, last - ends)] - n_tokens[learnt]
        room = np.maximum(reader_budget - 1 - after, reader_budget // 2)
        at = np.maximum(np.searchsorted(n_tokens, n_tokens[learnt] - room), first)
        # as in `spans`, one window of each document at a time
        which = np.arange(len(documents))
        found: list[Ints] = []
        while len(which):
            by_reader = np.searchsorted(n_tokens, n_tokens[at] - 1 + reader_budget, "right") - 1
            by_writer = np.searchsorted(n_steps, n_steps[at] + writer_budget, "right") - 1
            end = np.minimum(np.maximum(np.minimum(by_reader, by_writer), at + 1), last[which])
            found.append(np.stack([which, at, end]))
            more = end < last[which]
            which, at = which[more], end[more]
        together = np.concatenate(found, 1)
        which, at, end = together[:, np.argsort(together[0], kind="stable")]
        prompt = np.clip(learnt[which] - at, 0, end - at)
        ended = ends[which] * (end == last[which])
        windows = np.stack([block[which] + at - first[which], byte[which] + n_bytes[at] - n_bytes[first[which]],
                            end - at - ended, prompt, ended, 1 + n_tokens[end] - n_tokens[at],
                            n_steps[end] - n_steps[at]], 1)  # fmt: skip
        learns = end - at > prompt
        return which[learns], windows[learns]

    def of_document(self, i: int) -> Iterator[Passage]:
        """The windows of document `i` of the corpus, in their order; each made when it is asked for."""
        n_blocks = self.corpus.documents[:, 0]
        first = int(n_blocks[:i].sum())
        begins, lengths = self._windows[:, 0], self._windows[:, 2]
        within = begins - (lengths == 0)  # one that has nothing but `<eos>` begins where the next document does
        which = np.flatnonzero((within >= first) & (within < first + n_blocks[i]))
        for k in which[np.argsort(begins[which])].tolist():
            yield self._passage(*self._windows[k].tolist())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[list[Passage]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> list[Passage]:
        i = range(len(self))[i]
        return [self._passage(*window) for window in self._windows[self._starts[i] : self._starts[i + 1]].tolist()]

    def _passage(self, block: int, byte: int, n: int, n_prompt: int, ends: int) -> Passage:
        up_to = list(accumulate(self.corpus.read("blocks", block, block + n)[:, 0].tolist(), initial=0))
        text = self.corpus.read("text", byte, byte + up_to[-1]).tobytes()
        blocks = np.empty(1 + n + ends, np.int32)
        blocks[1 : 1 + n] = self.table.indices([text[start:end].decode() for start, end in pairwise(up_to)])
        blocks[0], blocks[1 + n :] = BOS_BLOCK, EOS_BLOCK
        return Passage(blocks, 1 + n_prompt)
