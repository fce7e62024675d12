"""The cached step-by-step decoder: what `DocumentBuilder` builds, fed to the model one element at a time."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tidal.device import upload
from tidal.infer import recorded
from tidal.infer.sampling import NOT_FINITE
from tidal.kernels import TilePlan
from tidal.layers import KeysValues, View, filled
from tidal.model import TidalTransformer
from tidal.streams import DocumentBuilder, ReaderToken
from tidal.tokenizer import Block, MixedTokenizer

ROW, SLOT, ID, PLACE, NODE = range(5)
SUFFIXES, RECALLED, SEES, SEES_OWN = slice(5, 8), slice(8, 11), slice(11, 15), slice(15, 19)
"""Columns of the numbers of a step, which go to the device as one tensor. The first writer layer sees the memory and
its own block (SEES), the others their own block and nothing (SEES_OWN): two ranges each."""


@dataclass(frozen=True, kw_only=True)
class RaggedView(View):
    """Rows of different lengths, one after the other in one row without padding; only attention spreads them.

        layers      a b c d e f 0 0   what a layer does to each token by itself, it does to these, filled up with zeros
        attention   a b ·             where    (0, 0) (0, 1) (1, 0) (2, 0) (2, 1) (2, 2)
                    c · ·
                    d e f
    """

    where: tuple[Tensor, Tensor]
    """Row and column of each token, int64 [tokens]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        """Of queries [1, H, tokens and zeros, D]."""
        n_rows, width = self.q_position.shape
        spread = q.new_zeros(n_rows, q.shape[1], width, q.shape[3])
        row, column = self.where
        spread[row, :, column] = q[0, :, : len(row)].transpose(0, 1)
        out = super().attend(spread, k, v, slopes)[row, :, column]
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[2] - len(row))).transpose(0, 1)[None]


@contextlib.contextmanager
def evaluating(model: TidalTransformer) -> Iterator[None]:
    """With the model in evaluation mode and its own precision, and afterwards, whatever happened, as it was."""
    was_training = model.training
    if was_training:
        model.eval()
    try:  # caches have the dtype of the weights, and what is written does not depend on what stands around the call
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if was_training:
            model.train()


class KeyValueCache:
    """Keys and values of one layer: `data` [2, B, H, slots, D]."""

    def __init__(self, model: TidalTransformer, n_rows: int, n_slots: int) -> None:
        shape = model.config.shape
        size = (2, n_rows, shape.n_kv_heads, n_slots, shape.d_model // shape.n_heads)
        self.data = torch.zeros(size, dtype=model.unit_embedding.weight.dtype, device=model.device)

    def put(self, at: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """Store k, v [r, H, L, D] at row and slot indices [r·L], or [n] for the first n of them."""
        for side, new in zip(self.data, (k, v), strict=True):
            side[at[0], :, at[1]] = new.transpose(1, 2).flatten(0, 1)[: len(at[0])]

    def get(self, end: int) -> KeysValues:
        """Keys and values [B, H, end, D] of all rows, not copied."""
        k, v = self.data[:, :, :, :end]
        return k, v

    def resize(self, n_slots: int) -> None:
        """Make room for `n_slots` slots, or cut off those behind them."""
        self.data = F.pad(self.data, (0, 0, 0, n_slots - self.data.shape[3]))


def _with_more(held: Tensor, more: int, dim: int = 0) -> Tensor:
    """`held` with `more` zeros behind it along `dim`; PyTorch 2.9 does not pad a tensor without elements."""
    return torch.cat([held, held.new_zeros(*held.shape[:dim], more, *held.shape[dim + 1 :])], dim)


class Decoder:
    """Documents being written side by side, each with its builder and its part of the caches.

    A row reads finished blocks with `read` and is asked for the next unit with `step`; `open` starts a new document
    in it, `clear` leaves it free, `select` keeps, drops, reorders and copies rows, `grow` adds some. The cache of the
    first writer layer holds the block being written in its first slots and the memory behind them, so that both are one
    stretch of keys and the memory is never copied:

        slot   0 … max_block_units │ n_block …
               own block           │ keys and values of the reader's states

    Caches hold `room` tokens, or those of a long prompt and `room` more, and double when they are full; `trim` makes
    them smaller. To be used without gradients. With `cuda_graphs`, steps of all rows are recorded once and replayed,
    over all that the caches have room for, until their size or the number of rows changes; `recorded.check` says
    whether a device has them.
    """

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, n_rows: int, room: int = 256,
                 cuda_graphs: bool = False) -> None:  # fmt: skip
        model.config.check_tokenizer(tokenizer.fingerprint)
        self.model, self.tokenizer = model, tokenizer
        self.device, dtype = model.device, model.unit_embedding.weight.dtype
        self.cuda_graphs = cuda_graphs
        self.recording: recorded.Recorded | None = None
        """knows this decoder: set to None by who is done with it, else caches live until Python finds the cycle"""
        self.n_block = tokenizer.max_block_units + 1
        self.capacity = self.room = room
        self.reader_caches = [KeyValueCache(model, n_rows, room) for _ in model.reader]
        self.writer_attends = model.config.shape.writer_attention != "none"
        self.steps_some = not (self.writer_attends or cuda_graphs or self.device.type != "cpu")
        """Whether a step of some rows costs less than one of all: where the writer has caches, it would copy them;
        recorded steps are of all rows; and on a GPU the host would wait for the list of rows."""
        own = self.n_block if self.writer_attends else 0
        self.writer_caches = [
            KeyValueCache(model, n_rows, own + (room if model.has_memory and i == 0 else 0))
            for i in range(len(model.writer))
        ]
        self.positions = torch.zeros(n_rows, self.n_block + room, device=self.device, dtype=torch.float32)
        self.context = torch.zeros(n_rows, model.config.shape.d_model, device=self.device, dtype=dtype)
        n_sums = model.foretold.n_sums if model.foretold else ()
        self.sums = torch.zeros(n_rows, *n_sums, device=self.device, dtype=torch.float64)
        self.builders: list[DocumentBuilder] = [self._new_builder() for _ in range(n_rows)]
        self._unread = set(range(n_rows))  # rows whose <bos> the model has not seen yet

    def open(self, rows: Iterable[int]) -> None:
        """Start new documents in these rows; what they held is forgotten."""
        for row in rows:
            self.builders[row] = self._new_builder()
            self._unread.add(row)

    def clear(self, rows: Iterable[int]) -> None:
        """Forget what these rows held. Until they are opened, what their steps give means nothing, and costs little."""
        for row in rows:
            self.builders[row] = self._new_builder()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a row named twice is copied. As many rows as before stay where
        they lie, but for those that are another's now."""
        if len(rows) == len(self.builders):
            self._overwrite([new for new, old in enumerate(rows) if new != old], rows)
        else:
            self.recording = None
            index = upload(rows, self.device, torch.int64)
            for cache in self._caches():
                cache.data = cache.data.index_select(1, index)
            self.positions, self.context = self.positions[index], self.context[index]
            self.sums = self.sums[index]
        self._unread = {new for new, old in enumerate(rows) if old in self._unread}
        first = {row: new for new, row in reversed(list(enumerate(rows)))}  # keeps its builder, others get copies
        self.builders = [self.builders[row] if first[row] == new else self.builders[row].copy()
                         for new, row in enumerate(rows)]  # fmt: skip

    def _overwrite(self, moved: Sequence[int], rows: Sequence[int]) -> None:
        """Put what `rows[i]` held before in the place of row i, for those that have moved."""
        if not moved:
            return
        sources = [rows[new] for new in moved]
        end = self.n_block + max(self.builders[old].n_read for old in sources)
        to, source = upload([moved, sources], self.device)
        for cache in self._caches():
            cache.data[:, to, :, :end] = cache.data[:, source, :, :end]
        for held in (self.positions, self.context, self.sums):
            held[to] = held[source]

    def grow(self, more: int) -> None:
        """Add so many rows behind the others; they are free, as after `clear`."""
        self.recording = None
        for cache in self._caches():
            cache.data = _with_more(cache.data, more, 1)
        self.positions, self.context, self.sums = (
            _with_more(held, more) for held in (self.positions, self.context, self.sums)
        )
        self.builders += [self._new_builder() for _ in range(more)]

    def _caches(self) -> Iterator[KeyValueCache]:
        return itertools.chain(self.reader_caches, self.writer_caches)

    def read(self, rows: Sequence[int], blocks: Sequence[Sequence[Block]]) -> None:
        """Append finished blocks to each of these rows, in one reader pass."""
        news = []
        for row, mine in zip(rows, blocks, strict=True):
            builder = self.builders[row]
            opening = builder.opening if row in self._unread else []
            news.append([*opening, *(token for block in mine for token in builder.read(block))])
        self._unread.difference_update(rows)
        if any(news):
            self._append(rows, news)

    def _append(self, rows: Sequence[int], news: list[list[ReaderToken]]) -> None:
        lengths, ends = [len(new) for new in news], [self.builders[r].n_read for r in rows]
        width, end, n = max(lengths), max(ends), sum(lengths)
        self._reserve(end)
        lines = self._lines(rows, width)
        # row of the caches and slot in it, line of this pass and column in it, id, place; what it sees, an empty range
        data = upload([(r, end_r - len(new) + i, line, i, t.id, t.place, *t.sees, 0, 0)
                       for r, line, end_r, new in zip(rows, map(lines.index, rows), ends, news, strict=True)
                       for i, t in enumerate(new)], self.device)  # fmt: skip
        row, slot, line, column, ids, places = data[:, :6].unbind(1)
        position = upload([t.position for new in news for t in new], self.device, torch.float32)
        self.positions[row, self.n_block + slot] = position
        ranges = data.new_zeros(len(lines), width, 2, 2, dtype=torch.int32)
        ranges[line, column] = data[:, 6:].to(torch.int32).view(-1, 2, 2)
        q_position = position.new_zeros(len(lines), width)
        q_position[line, column] = position
        some = self._some(lines)
        here = slice(None) if some is None else upload(some, self.device)
        k_position = self.positions[here, self.n_block : self.n_block + end]
        plan = TilePlan.build(ranges, end)  # remembers distances and mask for all layers
        ragged = n < len(lines) * width or list(rows) != list(lines)

        def view(cache: KeyValueCache) -> View:
            def extend(k: Tensor, v: Tensor) -> KeysValues:
                cache.put((row, slot), k, v)
                return cache.get(end)

            seen = ranges, q_position, k_position, extend, plan, lines
            return RaggedView(*seen, where=(line, column)) if ragged else View(*seen)

        if ragged:
            ids, places = (F.pad(x, (0, filled(n) - n))[None] for x in (ids, places))
        else:
            ids, places = (x.view(len(rows), width) for x in (ids, places))
        lasts = [i - 1 for i, new in zip(itertools.accumulate(lengths), news, strict=True) if new]
        n_grown = len(lasts)
        lasts += lasts[:1] * (filled(n_grown) - n_grown)
        last_of = upload(lasts, self.device, torch.int64)  # before the pass: an upload behind it would wait for its end
        states = self.model.read(ids, places, [view(c) for c in self.reader_caches])
        if self.model.has_memory:
            self.writer_caches[0].put((row, self.n_block + slot), *self.model.memory(states, places))
        last, grown = states.flatten(0, 1)[last_of], row[last_of[:n_grown]]
        self.context[grown] = self.model.context(last)[:n_grown]
        if self.model.foretold:
            self.sums[grown] = self.model.foretold.sums(self.model.foretell(last)[:n_grown])

    def _lines(self, rows: Sequence[int], width: int) -> Sequence[int]:
        """Which rows of the caches attention goes over, where these read up to `width` tokens each: all, if at least
        half of them read a block. The others then see nothing; to put the keys of those together would take longer."""
        n_rows = len(self.builders)
        return range(n_rows) if width <= self.n_block and n_rows <= 2 * len(rows) else rows

    def step(self, rows: Sequence[int], written: Sequence[Sequence[int]], *, check: bool = True) -> Tensor:
        """Logits [rows, n_head] for the unit that follows those `written` so far in each row's block.

        Raises RuntimeError where they are NaN or infinite, for which the host waits; `check=False` leaves that to
        whoever fetches what comes of them.
        """
        if unread := sorted(self._unread.intersection(rows)):
            self.read(unread, [[]] * len(unread))
        steps = [self.builders[r].step(w) for r, w in zip(rows, written, strict=True)]
        n, n_rows = self.n_block, len(rows)
        if self.steps_some and (more := filled(n_rows) - n_rows):  # the first once more, for quicker products
            rows, written, steps = ([*x, *[x[0]] * more] for x in (rows, written, steps))
        some = self._some(rows)
        data = upload(
            [[(r, len(w), s.id, s.place, s.node, *s.suffixes, *s.recalled,
               s.sees_reader[0] + n, s.sees_reader[1] + n, *s.sees_writer, *s.sees_writer, 0, 0)]
             for r, w, s in zip(rows, written, steps, strict=True)], self.device,
        )  # fmt: skip
        q_position = upload([[s.position] for s in steps], self.device, torch.float32)
        context = self.context[slice(None) if some is None else some][:, None]
        if self.cuda_graphs and some is None:
            everything = functools.partial(self._write, None, n + self.capacity)
            self.recording = self.recording or recorded.Recorded(everything)
            logits = self.recording(data, q_position, context)
        else:
            logits = self._write(some, n + max(s.sees_reader[1] for s in steps), data, q_position, context)
        return self._checked(logits, len(rows), check)[:n_rows]

    def _write(self, some: list[int] | None, memory_end: int, data: Tensor, q_position: Tensor,
               context: Tensor) -> Tensor:  # fmt: skip
        """A step on the device, the same work whatever `data` holds; the first layer looks at its first `memory_end`
        slots."""
        n, here = self.n_block, slice(None) if some is None else some
        at = data[:, 0, ROW], data[:, 0, SLOT]

        def sees(columns: slice) -> Tensor:
            return data[..., columns].to(torch.int32).view(len(data), 1, 2, 2)

        def view(cache: KeyValueCache, memory: bool) -> View:
            end = memory_end if memory else n

            def extend(k: Tensor, v: Tensor) -> KeysValues:
                cache.put(at, k, v)
                return cache.get(end)

            return View(sees(SEES if memory else SEES_OWN), q_position, self.positions[here, :end], extend,
                        rows=range(len(data)) if some is None else some)  # fmt: skip

        if self.writer_attends:
            self.positions[at] = q_position[:, 0]
            views = [view(c, self.model.has_memory and i == 0) for i, c in enumerate(self.writer_caches)]
        else:  # nobody looks
            views = [View(sees(SEES_OWN), q_position, q_position)] * len(self.writer_caches)
        hints = None
        if foretold := self.model.foretold:
            tell = foretold.fixed if self.cuda_graphs or data.is_cuda else foretold
            hints = tell(self.sums, data[..., ROW], data[..., NODE])
        states = self.model.write(data[..., ID], data[..., PLACE], data[..., SUFFIXES], data[..., RECALLED], context,
                                  views, hints)  # fmt: skip
        return self.model.head(states[:, 0])

    def _checked(self, logits: Tensor, n_rows: int, finite: bool) -> Tensor:
        expected = (n_rows, self.model.config.n_head)
        if logits.shape != expected:
            raise RuntimeError(
                f"{type(self.model).__name__}: the logits of a decoding step are {tuple(logits.shape)}, "
                f"not [rows, n_head] = {expected}"
            )
        if finite and not (logits < torch.inf).all():  # NaN neither
            raise RuntimeError(NOT_FINITE)
        return logits

    def _new_builder(self) -> DocumentBuilder:
        return DocumentBuilder(self.tokenizer, steps=self.model.config.shape.steps)

    def _some(self, rows: Sequence[int]) -> list[int] | None:
        """These rows, if they are not simply all."""
        return None if list(rows) == list(range(len(self.builders))) else list(rows)

    def _reserve(self, n_tokens: int) -> None:
        if n_tokens > self.capacity:
            self._resize(max(n_tokens + self.room, 2 * self.capacity))

    def trim(self) -> None:
        """Give memory back where the longest row, and room behind it, fill less than a quarter of the caches."""
        needed = max(builder.n_read for builder in self.builders) + self.room
        if 4 * needed < self.capacity:
            self._resize(needed)

    def _resize(self, capacity: int) -> None:
        self.recording, self.capacity = None, capacity
        for cache in self.reader_caches:
            cache.resize(capacity)
        if self.model.has_memory:
            self.writer_caches[0].resize(self.n_block + capacity)
        self.positions = F.pad(self.positions, (0, self.n_block + capacity - self.positions.shape[1]))
