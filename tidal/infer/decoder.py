"""The cached step-by-step decoder: the streams of `DocumentBuilder`, fed to the model one element at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tidal.model import KeysValues, TidalTransformer, View
from tidal.streams import DocumentBuilder, ReaderToken
from tidal.tokenizer import Block, MixedTokenizer


class KeyValueCache:
    """Keys and values [B, H, slots, D] of one layer; `put` stores new ones and gives back all up to `used`."""

    def __init__(self, model: TidalTransformer, n_rows: int, n_slots: int) -> None:
        shape, weight = model.config.shape, model.unit_embedding.weight
        size = (2, n_rows, shape.n_kv_heads, n_slots, shape.d_model // shape.n_heads)
        self.data = torch.zeros(size, dtype=weight.dtype, device=weight.device)

    def put(self, at: tuple[Tensor, Tensor], valid: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [r, H, L, D], as far as `valid` [r, L], at row and slot indices [n]."""
        for side, new in zip(self.data, (k, v), strict=True):
            side[at[0], :, at[1]] = new.transpose(1, 2)[valid]

    def get(self, rows: Tensor | slice, start: int, end: int) -> KeysValues:
        """Keys and values of these rows and slots."""
        k, v = self.data[:, rows, :, start:end]
        return k, v

    def grow(self, n_slots: int) -> None:
        """Make room for `n_slots` slots."""
        size = list(self.data.shape)
        size[3] = n_slots - size[3]
        self.data = torch.cat([self.data, self.data.new_zeros(size)], 3)


class Decoder:
    """Documents being written side by side, each with its builder and its part of the caches.

    A row reads finished blocks with `read` and is asked for the next unit with `step`. The cache of the first
    writer layer holds the block being written in its first slots and the memory behind them, so that both are
    one stretch of keys and the memory is never copied.
    """

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, n_rows: int, capacity: int = 256) -> None:
        model.config.check_tokenizer(tokenizer.fingerprint)
        self.model, self.tokenizer = model, tokenizer
        self.device = model.unit_embedding.weight.device
        self.builders = [DocumentBuilder(tokenizer, step_stride=model.config.shape.step_stride) for _ in range(n_rows)]
        self.n_block = tokenizer.max_block_units + 1
        self.capacity = capacity
        self.reader_caches = [KeyValueCache(model, n_rows, capacity) for _ in model.reader]
        self.writer_caches = [
            KeyValueCache(model, n_rows, self.n_block + (capacity if model.has_memory and i == 0 else 0))
            for i in range(len(model.writer))
        ]
        self.positions = torch.zeros(n_rows, self.n_block + capacity, device=self.device)
        self.context = torch.zeros(n_rows, model.config.shape.d_model, device=self.device,
                                   dtype=model.unit_embedding.weight.dtype)  # fmt: skip
        self._append(range(n_rows), [builder.opening for builder in self.builders])

    def read(self, rows: Sequence[int], blocks: Sequence[Sequence[Block]]) -> None:
        """Append finished blocks, at least one, to each of these rows, in one reader pass."""
        self._append(rows, [[token for block in mine for token in self.builders[row].read(block.tokens, block.places)]
                            for row, mine in zip(rows, blocks, strict=True)])  # fmt: skip

    def _append(self, rows: Sequence[int], news: list[list[ReaderToken]]) -> None:
        width, end = max(map(len, news)), max(self.builders[r].n_read for r in rows)
        self._reserve(end)
        valid = torch.tensor([[i < len(n) for i in range(width)] for n in news], device=self.device)
        first = [self.builders[r].n_read - len(n) for r, n in zip(rows, news, strict=True)]
        padding = ReaderToken(0, 0.0, 0, (0, 0))
        news = [n + [padding] * (width - len(n)) for n in news]
        row = torch.tensor(rows, device=self.device)
        slots = torch.tensor(first, device=self.device)[:, None] + torch.arange(width, device=self.device)
        at = row[:, None].expand(-1, width)[valid], slots[valid]
        q_position = self._tensor([[t.position for t in n] for n in news])
        self.positions[at[0], self.n_block + at[1]] = q_position[valid]
        ranges = torch.tensor([[(t.sees, (0, 0)) for t in n] for n in news], dtype=torch.int32, device=self.device)
        here = self._rows(rows)

        def view(cache: KeyValueCache) -> View:
            def extend(k: Tensor, v: Tensor) -> KeysValues:
                cache.put(at, valid, k, v)
                return cache.get(here, 0, end)

            return View(ranges, q_position, self.positions[here, self.n_block : self.n_block + end], extend)

        ids = torch.tensor([[t.id for t in n] for n in news], device=self.device)
        places = torch.tensor([[t.place for t in n] for n in news], device=self.device)
        states = self.model.read(ids, places, [view(c) for c in self.reader_caches])
        self.context[row] = states[torch.arange(len(rows), device=self.device), valid.sum(1) - 1]
        if self.model.has_memory:
            self.writer_caches[0].put((at[0], self.n_block + at[1]), valid, *self.model.memory(states))

    def step(self, rows: Sequence[int], written: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, n_head] for the unit that follows those `written` so far in each row's block."""
        steps = [self.builders[r].step(w) for r, w in zip(rows, written, strict=True)]
        row, here = torch.tensor(rows, device=self.device), self._rows(rows)
        slot = torch.tensor([len(w) for w in written], device=self.device)
        valid = torch.ones(len(rows), 1, dtype=torch.bool, device=self.device)
        q_position = self._tensor([[s.position] for s in steps])
        self.positions[row, slot] = q_position[:, 0]
        end = self.n_block + max(s.sees_reader[1] for s in steps)
        n = self.n_block
        with_memory = [[((s.sees_reader[0] + n, s.sees_reader[1] + n), s.sees_writer)] for s in steps]
        own = [[(s.sees_writer, (0, 0))] for s in steps]

        def view(i: int, cache: KeyValueCache) -> View:
            memory = self.model.has_memory and i == 0
            k_end = end if memory else n

            def extend(k: Tensor, v: Tensor) -> KeysValues:
                cache.put((row, slot), valid, k, v)
                return cache.get(here, 0, k_end)

            ranges = torch.tensor(with_memory if memory else own, dtype=torch.int32, device=self.device)
            return View(ranges, q_position, self.positions[here, :k_end], extend)

        states = self.model.write(
            torch.tensor([[s.id] for s in steps], device=self.device),
            torch.tensor([[s.place] for s in steps], device=self.device),
            torch.tensor([[s.suffixes] for s in steps], device=self.device),
            self.context[row][:, None],
            [view(i, c) for i, c in enumerate(self.writer_caches)],
        )
        logits = self.model.head(states[:, 0])
        expected = (len(rows), self.model.config.n_head)
        if logits.shape != expected:
            raise RuntimeError(f"the logits of a step are {tuple(logits.shape)}, not [rows, n_head] = {expected}")
        if logits.isnan().any():
            raise RuntimeError("the logits of a step are NaN: the weights are damaged")
        return logits

    def _rows(self, rows: Sequence[int]) -> Tensor | slice:
        """All rows as a slice, which copies nothing; some of them as indices."""
        return slice(None) if list(rows) == list(range(len(self.builders))) else torch.tensor(rows, device=self.device)

    def _tensor(self, values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _reserve(self, n_tokens: int) -> None:
        if n_tokens <= self.capacity:
            return
        self.capacity = max(n_tokens, 2 * self.capacity)
        for cache in self.reader_caches:
            cache.grow(self.capacity)
        if self.model.has_memory:
            self.writer_caches[0].grow(self.n_block + self.capacity)
        positions = torch.zeros(len(self.builders), self.n_block + self.capacity, device=self.device)
        positions[:, : self.positions.shape[1]] = self.positions
        self.positions = positions
