"""Bugs in streams, masks, model, decoder, beams, kernels and files: checks 7 to 10 and 13 to 19."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.doctor.plant import INT32, Plant, replacing
from tidal.blocks import Ints, suffix_hashes
from tidal.foretold import Foretold
from tidal.infer import decoder as decoding
from tidal.model import TidalTransformer
from tidal.recall import Recollection
from tidal.streams import Batch, DocumentBuilder, WriterStep
from tidal.tokenizer import Block, MixedTokenizer

# ---------------------------------------------------------------------------------- 7 to 10, what is seen


def context_after_own_token(batch: Batch) -> dict[str, Tensor]:
    return {"context": (batch.context + 1).clamp(max=batch.reader_ids.shape[1] - 1)}


def end_inclusive(right: Callable[..., Any], ranges: Tensor, *rest: Any) -> Any:
    wider = ranges + torch.tensor([0, 1], dtype=INT32)
    return right(torch.where(ranges[..., :1] < ranges[..., 1:], wider, ranges), *rest)


def window_of_eight(batch: Batch) -> dict[str, Tensor]:
    start, end = batch.reader_sees.unbind(-1)
    return {"reader_sees": torch.stack([torch.maximum(start, end - 8), end], -1)}


def causal_in_blocks(batch: Batch) -> dict[str, Tensor]:
    start, end = batch.reader_sees.unbind(-1)
    index = torch.arange(batch.reader_ids.shape[1], dtype=INT32) + 1
    return {"reader_sees": torch.stack([start, torch.minimum(index.expand_as(end), end)], -1)}


def suffixes_forwards(self: DocumentBuilder, written: Sequence[int], step: WriterStep) -> dict[str, Any]:
    return {"suffixes": suffix_hashes(list(written)[::-1], self.tokenizer.digit_units.tolist())}


def moved_from_second_block(position: Any) -> Any:
    return position + (position > 1.0)


def places_from_wrong_end(self: MixedTokenizer, block: Block) -> dict[str, Any]:
    """Only in blocks that are spelt in bytes."""
    return {"places": block.places[::-1]} if any(2 <= unit < 258 for unit in block.units) else {}


def place_of_what_is_left(batch: Batch) -> dict[str, Tensor]:
    """Counted from the block's first character: known in training, unknown to a decoder."""
    start = batch.sees_writer[..., 0]
    length = (start[..., None] == start[:, None, :]).sum(-1)
    return {"writer_places": (length - 1 - batch.writer_places).clamp(min=0) * (batch.targets >= 0)}


def origin_of_the_row(batch: Batch) -> dict[str, Tensor]:
    n = batch.reader_ids.shape[1]
    return {"reader_positions": torch.arange(n, dtype=torch.float32).expand(len(batch.reader_ids), n).clone()}


def distance_anew_in_every_block(batch: Batch) -> dict[str, Tensor]:
    starts = batch.sees_writer[..., 0]
    return {"writer_positions": (torch.arange(starts.shape[1]) - starts).float()}


def slopes_from_one(slopes: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    return lambda n: slopes(n) * 2 ** (8 / n)


def slope_reversed(slopes: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    return lambda n: slopes(n).flip(0)


# ----------------------------------------------------------------------------- 13 to 16, decoding and beams


def suffix_row_zero(write: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without the row that is kept for "no suffix": in training and decoding alike."""
    return lambda self, ids, places, suffixes, *rest: write(
        self, ids, places, torch.where(suffixes < 0, suffixes, suffixes - 1), *rest)  # fmt: skip


def recalled_from_the_future(right: Callable[..., Ints]) -> Callable[..., Ints]:
    """The next block that begins like this one, in place of the last."""

    def bugged(codes: Ints, units: Ints, block: Ints, first: Ints, rank: Ints, passage: Ints) -> Ints:
        found, later = right(codes, units, block, first, rank, passage), dict[tuple[int, int], int]()
        for i in reversed(range(len(codes))):
            key = int(passage[block[i]]), int(codes[i])
            found[i, 0], later[key] = later.get(key, -1), int(units[i])
        return found

    return bugged


def recalled_from_other_documents(right: Callable[..., Ints]) -> Callable[..., Ints]:
    return lambda *args: right(*args[:-1], np.zeros_like(args[-1]))


def first_is_recalled(read: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: Recollection, *args: Any) -> None:
        before = self._followed.copy()
        read(self, *args)
        self._followed |= before

    return bugged


def keys_not_normed(memory: Callable[..., Any]) -> Callable[..., Any]:
    def bugged(self: TidalTransformer, *args: Tensor) -> Any:
        first: Any = self.writer[0]
        k, v = memory(self, *args)
        return k / (1e-9 + first.norm_key.weight), v

    return bugged


def keys_not_turned(memory: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, states, places: memory(self, states, torch.full_like(places, -1))


def turned_by_place_zero(placed: Callable[..., Any]) -> Callable[..., Any]:
    """What has no place, too: in training and decoding alike."""
    return lambda self, x, places: placed(self, x, places.clamp(min=0))


def slot_off_by_one(put: Callable[..., None]) -> Callable[..., None]:
    return lambda self, at, *rest: put(self, (at[0], (at[1] - 1).clamp(min=0)), *rest)


def stale_slots(self: DocumentBuilder, written: Sequence[int], step: WriterStep) -> dict[str, Any]:
    start, end = step.sees_writer
    return {"sees_writer": (start, min(end + 1, self.tokenizer.max_block_units + 1))}


def memory_of_first_block_only(put: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: Any, at: Any, k: Tensor, v: Tensor) -> None:
        put(self, at, k, v * 0 if int(at[1].min()) > 24 else v)

    return bugged


def prompt_as_one_block(read: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: decoding.Decoder, rows: Sequence[int], news: Sequence[Sequence[Block]]) -> None:
        def whole(mine: Sequence[Block]) -> list[Block]:
            if len(mine) < 2:
                return list(mine)
            tokens = tuple(t for block in mine for t in block.tokens)
            places = tuple(p for block in mine for p in block.places)
            return [dataclasses.replace(mine[0], tokens=tokens, places=places)]

        read(self, rows, [whole(mine) for mine in news])

    return bugged


def logits_tempered_in_place(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, *rest: choose(logits.mul_(0.5), *rest)


def of_another_row(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A step is given what the decoder keeps under this name, [rows, …], of the row before."""

    def wrap(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def bugged(self: decoding.Decoder, *args: Any, **how: Any) -> Tensor:
            setattr(self, name, getattr(self, name).roll(1, 0))
            logits = step(self, *args, **how)
            setattr(self, name, getattr(self, name).roll(-1, 0))
            return logits

        return bugged

    return wrap


def foretold_once(sums: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What was foretold before the first block is told before all of them."""

    def bugged(self: Foretold, next_nv: Tensor) -> Tensor:
        return sums(self, next_nv[:1].expand_as(next_nv))

    return bugged


def positions_lost(reserve: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: decoding.Decoder, n_tokens: int) -> None:
        grows = n_tokens > self.capacity
        reserve(self, n_tokens)
        if grows:
            self.positions = torch.zeros_like(self.positions)

    return bugged


def position_from_padded_length(batch: Batch) -> dict[str, Tensor]:
    return {"writer_positions": batch.writer_positions + batch.reader_ids.shape[1] - 60.0}


def padding_is_seen(batch: Batch) -> dict[str, Tensor]:
    """The memory of a padded row ends where the longest row does."""
    width, last = batch.reader_ids.shape[1], batch.sees_reader[..., 1]
    ends = torch.where(last == batch.sees_reader[..., 1].amax(1, keepdim=True), width, last)
    return {"sees_reader": torch.stack([batch.sees_reader[..., 0], ends.to(INT32)], -1)}


def one_generator(right: Callable[..., Any]) -> Callable[..., Any]:
    """The rows of a batch draw from one generator."""
    return lambda logits, allowed, how, generators, *rest: right(
        logits, allowed, how, [generators[0]] * len(generators), *rest)  # fmt: skip


def first_sampling(right: Callable[..., Any]) -> Callable[..., Any]:
    """The rows of a batch are chosen as the first one asks for."""
    return lambda logits, allowed, how, *rest: right(logits, allowed, [how[0]] * len(how), *rest)


def select(reorder: Callable[[decoding.Decoder, Sequence[int]], bool], context: bool = True) -> Plant:
    """Rows are reordered, the caches only where `reorder` says so."""

    def wrap(right: Callable[..., None]) -> Callable[..., None]:
        def bugged(self: decoding.Decoder, rows: Sequence[int]) -> None:
            data = [cache.data.clone() for cache in (*self.reader_caches, *self.writer_caches)]
            states, same = self.context.clone(), len(rows) == len(self.builders)
            wanted = reorder(self, rows)
            right(self, rows)
            if same and not wanted:
                for cache, kept in zip((*self.reader_caches, *self.writer_caches), data, strict=True):
                    cache.data = kept
            if same and not context:
                self.context = states

        return bugged

    return replacing(decoding.Decoder, "select", wrap)


def beams_count_in_writable(take: Callable[..., Any]) -> Callable[..., Any]:
    """The index of a candidate is taken apart with the wrong number of columns."""

    def bugged(logits: Tensor, allowed: Tensor, totals: Sequence[float], num_beams: int) -> Any:
        slots, units, scores = take(logits, allowed, totals, num_beams)
        n = logits.shape[1]
        flat = [[s * n + u for s, u in zip(*pair, strict=True)] for pair in zip(slots, units, strict=True)]
        wrong = n - 1
        return ([[min(i // wrong, num_beams - 1) for i in row] for row in flat],
                [[i % wrong for i in row] for row in flat], scores)  # fmt: skip

    return bugged


def not_read_in_beams(go_on: Callable[..., None]) -> Callable[..., None]:
    return lambda self, rows, ended: go_on(self, rows, [None if i % 2 else block for i, block in enumerate(ended)])


# ------------------------------------------------------------------------------------ 17 to 19, the rest


def half_gradient(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: right(*args) * 0.5


def rows_in_order(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, rows: right(*args, rows=sorted(rows))


def first_slice_only(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda slices: right(slices[:1])


def every_tile_full(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda slices: (right(slices)[0], True)


def dropout_left_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *args: F.dropout(forward(self, *args), 0.1, training=True)


def some_not_loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, tensors, **how: load(
        self, {name: value for name, value in tensors.items() if "writer.1" not in name}, strict=False)  # fmt: skip


def rounded_when_saved(storable: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensors: {name: t.to(torch.bfloat16).to(t.dtype) for name, t in storable(tensors).items()}


def square_transposed(storable: Callable[..., Any]) -> Callable[..., Any]:
    def bugged(tensors: Any) -> Any:
        return {name: t.T.contiguous() if t.ndim == 2 and t.shape[0] == t.shape[1] else t
                for name, t in storable(tensors).items()}  # fmt: skip

    return bugged


def not_finite(model: TidalTransformer) -> None:
    with torch.no_grad():
        model.token_embedding.weight[-1, 0] = torch.inf


def other_tokenizer(model: TidalTransformer) -> None:
    model.config = dataclasses.replace(model.config, fingerprint="0" * 64)
