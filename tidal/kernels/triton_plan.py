# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The tile plan on the device: which key tiles a tile of queries visits, and which query tiles a key tile.

    rows      for each tile of queries, the tiles of keys in up to four segments that need the mask and two that
              do not. No key tile is in two of them: where the two runs share one, they are merged. Where they do not,
              a tile needs the mask of one range only: the first two segments that of range 0, the others range 1's.

        keys →     ░░░░████████████████░░░░              ░░░░████████░░░░
                   └──┘└──────────────┘└──┘              └──┘└──────┘└──┘
                  partial    full    partial           partial full partial
                   └──── hull of range 0 ───┘             └ hull of range 1 ┘

    columns   for each tile of keys, the list of the query tiles that visit it: from the front partial ones that
              need one range (as 2 · tile + range), from the back full ones; and a second list of those that need both
              ranges. A tile that the last queries do not fill is partial here, so that full ones are loaded without
              a mask.

Both say how far the positions of their own tile lie apart if in every full tile the keys' positions do not exceed
the queries', so that ALiBi needs no absolute value (tidal/kernels/triton_tiles.py); else +inf. Memory is O((Lq /
tile) · (Lk / tile)), time O((Lq / tile) · Lk), and nothing waits for the device. What is planned at once, for
forward and backward, takes three launches: all rows, all columns, and the order of both.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidal.kernels.operators import operator
from tidal.kernels.plan import TilePlan

WORK, SPREAD, LOW = (tl.constexpr(x) for x in range(3))
"""where a row or column, int32, has the number of its tiles, the spread of its positions and the lowest one (bits of
float32)"""
MERGED, PARTIAL, FULL, ROW = (tl.constexpr(x) for x in (3, 4, 12, 16))
"""what a tile of queries has, too: whether its runs are merged, (start, end) of 4 partial segments and of 2 full ones;
how many numbers there are"""
N_SINGLE, N_FULL, N_BOTH, HEAD = (tl.constexpr(x) for x in range(3, 7))
"""and a tile of keys: how many query tiles need one range, no mask, both ranges; where its lists begin"""
Item = TypeVar("Item")
CHUNK, KEYS = tl.constexpr(64), tl.constexpr(4096)
"""how many tiles, and how many positions of keys, a planning kernel looks at in one step"""
LENGTHS = ("n_programs", "n_queries", "n_keys", "n_query_tiles", "n", "n_numbers", "n_more", "n_more_numbers")
"""arguments for whose values no kernel is compiled anew"""


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    ranges, q_position, k_position, rows, more, n_programs, n_queries, n_keys,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MORE_Q: tl.constexpr, MORE_K: tl.constexpr,
):  # fmt: skip
    """Plan tiles of queries: the first n_programs programs for one shape of tiles, those behind them for another.

    rows and more int32 [B, Tq, ROW].
    """
    program = tl.program_id(0)
    if program < n_programs:
        plan_row(ranges, q_position, k_position, rows, program, n_queries, n_keys, TILE_Q, TILE_K)
    else:
        plan_row(ranges, q_position, k_position, more, program - n_programs, n_queries, n_keys, MORE_Q, MORE_K)


@triton.jit
def plan_row(
    ranges, q_position, k_position, rows, slot, n_queries, n_keys, TILE_Q: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    """Plan one tile of queries of a batch row, number `slot` of all."""
    n_tiles, n_key_tiles = tl.cdiv(n_queries, TILE_Q), tl.cdiv(n_keys, TILE_K)
    batch, tile = (slot // n_tiles).to(tl.int64), slot % n_tiles
    # The last tile is filled up with copies of the last query, which change nothing.
    query = batch * n_queries + tl.minimum(tile * TILE_Q + tl.arange(0, TILE_Q), n_queries - 1)
    position = tl.load(q_position + query)
    low = tl.min(position, 0)
    lo_0, a_0, b_0, hi_0 = hull_and_core(ranges + query * 4, n_keys, n_key_tiles, TILE_K)
    lo_1, a_1, b_1, hi_1 = hull_and_core(ranges + query * 4 + 2, n_keys, n_key_tiles, TILE_K)

    # Runs that share a tile become one, with the cores in order; a core that is missing stands at its end.
    merged = (lo_0 < hi_1) & (lo_1 < hi_0)
    end = tl.maximum(hi_0, hi_1)
    lo_0 = tl.where(merged, tl.minimum(lo_0, lo_1), lo_0)
    none_0, none_1 = a_0 >= b_0, a_1 >= b_1
    end_0, end_1 = tl.where(merged, end, hi_0), tl.where(merged, end, hi_1)
    a_0, b_0 = tl.where(none_0, end_0, a_0), tl.where(none_0, end_0, b_0)
    a_1, b_1 = tl.where(none_1, end_1, a_1), tl.where(none_1, end_1, b_1)
    swap = merged & (a_1 < a_0)
    a_0, a_1 = tl.where(swap, a_1, a_0), tl.where(swap, a_0, a_1)
    b_0, b_1 = tl.where(swap, b_1, b_0), tl.where(swap, b_0, b_1)
    meet = merged & (a_1 <= b_0)
    b_0 = tl.where(meet, tl.maximum(b_0, b_1), b_0)
    a_1, b_1 = tl.where(meet, end, a_1), tl.where(meet, end, b_1)

    row = rows + slot.to(tl.int64) * ROW
    tiles = put(row + PARTIAL, lo_0, a_0)
    tiles += put(row + PARTIAL + 2, b_0, tl.where(merged, a_1, hi_0))
    tiles += put(row + PARTIAL + 4, tl.where(merged, b_1, lo_1), tl.where(merged, end, a_1))
    tiles += put(row + PARTIAL + 6, b_1, tl.where(merged, b_1, hi_1))
    tiles += put(row + FULL, a_0, b_0) + put(row + FULL + 2, a_1, b_1)

    k_position += batch * n_keys
    high = tl.maximum(highest(k_position, a_0 * TILE_K, b_0 * TILE_K), highest(k_position, a_1 * TILE_K, b_1 * TILE_K))
    tl.store(row + WORK, tiles)
    put_positions(row, high <= low, low, tl.max(position, 0))
    tl.store(row + MERGED, merged.to(tl.int32))


@triton.jit
def hull_and_core(ranges, n_keys, n_key_tiles, TILE_K: tl.constexpr):
    """Load one of the two ranges of some queries [TILE_Q], and find the key tiles that they reach.

    Returns lo, a, b, hi: no query sees anything outside of the tiles [lo, hi), and all see the tiles [a, b) whole (none
    where a >= b). Where all ranges are empty, lo = hi = n_key_tiles.
    """
    start = tl.minimum(tl.maximum(tl.load(ranges), 0), n_keys)
    end = tl.minimum(tl.load(ranges + 1), n_keys)
    seen = start < end
    lo = tl.min(tl.where(seen, start, n_keys), 0) // TILE_K
    hi = tl.cdiv(tl.max(tl.where(seen, end, 0), 0), TILE_K)
    a, b = tl.cdiv(tl.max(start, 0), TILE_K), tl.maximum(tl.min(end, 0), 0) // TILE_K
    blind = hi == 0
    return tl.where(blind, n_key_tiles, lo), a, b, tl.where(blind, n_key_tiles, hi)


@triton.jit
def highest(position, start, end):
    """The highest of position[start:end], float32; −inf where there are none."""
    high = tl.full([KEYS], float("-inf"), dtype=tl.float32)
    for first in range(start, end, KEYS):
        key = first + tl.arange(0, KEYS)
        high = tl.maximum(high, tl.load(position + key, mask=key < end, other=float("-inf")))
    return tl.max(high, 0)


@triton.jit
def put_positions(entry, past, low, high):
    """Store what a row or column says of its positions, which lie between low and high."""
    spread = tl.where(past, high - low, float("inf"))
    tl.store(entry + SPREAD, spread.to(tl.int32, bitcast=True))
    tl.store(entry + LOW, low.to(tl.int32, bitcast=True))


@triton.jit
def put(pointer, start, end):
    """Store the segment [start, end) and return its length."""
    tl.store(pointer, start)
    tl.store(pointer + 1, end)
    return end - start


@triton.jit(do_not_specialize=LENGTHS)
def columns_kernel(
    rows, k_position, columns, n_queries, n_keys, n_query_tiles, TILE_Q: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    """List the query tiles that visit one tile of keys of a batch row, as their rows say; zeros in what is left over.

    rows int32 [B, Tq, ROW], columns int32 [B, Tk, HEAD + 2 Tq].
    """
    slot, n_tiles = tl.program_id(0).to(tl.int64), tl.cdiv(n_keys, TILE_K)
    batch, tile = slot // n_tiles, (slot % n_tiles).to(tl.int32)
    key = tile * TILE_K + tl.arange(0, TILE_K)
    position = tl.load(k_position + batch * n_keys + tl.minimum(key, n_keys - 1))
    high = tl.max(position, 0)
    column = columns + slot * (2 * n_query_tiles + HEAD)
    single_list, both_list = column + HEAD, column + HEAD + n_query_tiles
    n_single, n_both, n_full, n_ahead = 0, 0, 0, 0
    for first in range(0, n_query_tiles, CHUNK):
        t = first + tl.arange(0, CHUNK)
        inside = t < n_query_tiles
        row = rows + (batch * n_query_tiles + t) * ROW
        short, merged = (t + 1) * TILE_Q > n_queries, tl.load(row + MERGED, mask=inside, other=0) != 0
        part = row + PARTIAL
        full_0, full_1 = within(row + FULL, tile, inside), within(row + FULL + 2, tile, inside)
        first_range = within(part, tile, inside) | within(part + 2, tile, inside) | (full_0 & short)
        second_range = within(part + 4, tile, inside) | within(part + 6, tile, inside) | (full_1 & short)
        single = (first_range | second_range) & ~merged
        both = (first_range | second_range) & merged
        full = (full_0 | full_1) & ~short
        low = tl.load(row + LOW, mask=inside, other=0).to(tl.float32, bitcast=True)
        n_ahead += tl.sum((full & (low < high)).to(tl.int32), 0)
        # cumsum counts from 1
        entry = 2 * t + second_range.to(tl.int32)
        tl.store(single_list + n_single + tl.cumsum(single.to(tl.int32), 0) - 1, entry, mask=single)
        tl.store(both_list - n_full - tl.cumsum(full.to(tl.int32), 0), t, mask=full)
        tl.store(both_list + n_both + tl.cumsum(both.to(tl.int32), 0) - 1, t, mask=both)
        n_single += tl.sum(single.to(tl.int32), 0)
        n_both += tl.sum(both.to(tl.int32), 0)
        n_full += tl.sum(full.to(tl.int32), 0)
    clear(single_list, n_single, n_query_tiles - n_full)
    clear(both_list, n_both, n_query_tiles)
    tl.store(column + WORK, n_single + n_both + n_full)
    put_positions(column, n_ahead == 0, tl.min(position, 0), high)
    tl.store(column + N_SINGLE, n_single)
    tl.store(column + N_FULL, n_full)
    tl.store(column + N_BOTH, n_both)


@triton.jit
def clear(pointer, start, end):
    """Store zeros in pointer[start:end]."""
    for first in range(start, end, CHUNK):
        i = first + tl.arange(0, CHUNK)
        tl.store(pointer + i, tl.zeros([CHUNK], tl.int32), mask=i < end)


@triton.jit
def within(segment, tile, inside):
    """bool [rows]: whether the key tile lies in the segment stored at each of these pointers; False unless `inside`."""
    start = tl.load(segment, mask=inside, other=0)
    return (start <= tile) & (tile < tl.load(segment + 1, mask=inside, other=0))


@triton.jit(do_not_specialize=LENGTHS)
def order_kernel(table, order, more, more_order, n, n_numbers, n_more, n_more_numbers):
    """Put CHUNK indices of rows or columns at their places among all: the longest first, those with as much work as
    they come. The first programs do so for one table [n, n_numbers], those behind them for another.

    order int32 [n]. Each is compared with every other one, of which there are few, in one launch.
    """
    program, n_programs = tl.program_id(0), tl.cdiv(n, CHUNK)
    if program < n_programs:
        put_in_order(table, order, program, n, n_numbers)
    else:
        put_in_order(more, more_order, program - n_programs, n_more, n_more_numbers)


@triton.jit
def put_in_order(table, order, chunk, n, n_numbers):
    """The places of one chunk."""
    work = table + WORK
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = tl.load(work + i.to(tl.int64) * n_numbers, mask=i < n, other=0)[:, None]
    place = tl.zeros([CHUNK], dtype=tl.int32)
    for first in range(0, n, CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = tl.load(work + j.to(tl.int64) * n_numbers, mask=j < n, other=-1)[None, :]
        place += tl.sum(((other > mine) | ((other == mine) & (j[None, :] < i[:, None]))).to(tl.int32), 1)
    tl.store(order + place, i, mask=i < n)


@operator("tidal::interval_plan")
def interval_plan(ranges: Tensor, q_position: Tensor, k_position: Tensor, tiles: Sequence[int]) -> list[Tensor]:
    """What a batch's plan says to kernels with such tiles.

    Args:
        ranges: int32 [B, Lq, 2, 2]; ends beyond the keys are cut.
        q_position: float32 [B, Lq].
        k_position: float32 [B, Lk].
        tiles: tile_q, tile_k, transpose, one after the other for each table wanted, no two alike: tiles of tile_q
            queries and tile_k keys, both powers of two; columns instead of rows where transpose is not 0.

    Returns:
        Two tensors for each table wanted:
        table: int32, rows [B, Tq, ROW] or columns [B, Tk, HEAD + 2 Tq].
        order: int32 [B·Tq] or [B·Tk], the indices of the rows or columns (b · T + t), longest first.
    """
    n_batch, n_queries, n_keys, wanted = *q_position.shape, k_position.shape[1], _by_three(tiles)
    ranges, q_position, k_position = ranges.contiguous(), q_position.contiguous(), k_position.contiguous()
    found = _uninitialised(ranges, n_keys, wanted)
    rows = {one[:2]: table for one, table in zip(wanted, found[::2], strict=True) if not one[2]}
    for size in sizes_of_rows(wanted):
        if size not in rows:  # for columns to be made of
            rows[size] = ranges.new_empty(n_batch, -(-n_queries // size[0]), ROW.value)
    with torch.cuda.device_of(ranges):  # type: ignore[no-untyped-call]
        for size, more in in_pairs(sizes_of_rows(wanted)):
            n, n_more = (n_batch * rows[one].shape[1] if one else 0 for one in (size, more))
            more = more or size
            rows_kernel[(n + n_more,)](
                ranges, q_position, k_position, rows[size], rows[more], n, n_queries, n_keys,
                TILE_Q=size[0], TILE_K=size[1], MORE_Q=more[0], MORE_K=more[1],
            )  # fmt: skip
        for (tile_q, tile_k, transpose), table in zip(wanted, found[::2], strict=True):
            if transpose:
                its_rows = rows[tile_q, tile_k]
                columns_kernel[(n_batch * table.shape[1],)](
                    its_rows, k_position, table, n_queries, n_keys, its_rows.shape[1], TILE_Q=tile_q, TILE_K=tile_k
                )
        for first, second in in_pairs(list(zip(found[::2], found[1::2], strict=True))):
            (table, order), (other, other_order) = first, second or first
            n_chunks = sum(-(-one[1].numel() // CHUNK.value) for one in (first, second) if one)
            order_kernel[(n_chunks,)](
                table, order, other, other_order, order.numel(), table.shape[2], other_order.numel(), other.shape[2]
            )
    return found


torch.library.register_fake(interval_plan, lambda ranges, _, k_position, tiles: (
    _uninitialised(ranges, k_position.shape[1], _by_three(tiles))
))  # fmt: skip


def _by_three(tiles: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(tiles[::3], tiles[1::3], tiles[2::3], strict=True))


def _uninitialised(ranges: Tensor, n_keys: int, wanted: list[tuple[int, int, int]]) -> list[Tensor]:
    """What :func:`interval_plan` returns."""
    n_batch, n_queries = ranges.shape[:2]
    found = []
    for tile_q, tile_k, transpose in wanted:
        n_query_tiles, n_key_tiles = -(-n_queries // tile_q), -(-n_keys // tile_k)
        n_tiles, n_numbers = (n_key_tiles, HEAD.value + 2 * n_query_tiles) if transpose else (n_query_tiles, ROW.value)
        found += [ranges.new_empty(n_batch, n_tiles, n_numbers), ranges.new_empty(n_batch * n_tiles)]
    return found


def sizes_of_rows(wanted: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(tile_q, tile_k) of all rows that are planned: columns are made of rows, too."""
    return list(dict.fromkeys((tile_q, tile_k) for tile_q, tile_k, _ in wanted))


def in_pairs(items: list[Item]) -> list[tuple[Item, Item | None]]:
    """Two at a time, as they are launched; the last may be alone."""
    return list(zip_longest(items[::2], items[1::2]))


def tables(
    plan: TilePlan | None, ranges: Tensor, q_position: Tensor, k_position: Tensor, wanted: list[tuple[int, int, bool]]
) -> list[Tensor]:
    """Table and order of :func:`interval_plan` for each (tile_q, tile_k, transpose), unless the plan remembers them.

    A compiled graph reads what a plan remembers, but adds nothing to it: equal calls are one in the graph.
    """
    memo = plan.memo if plan is not None else {}
    different = list(dict.fromkeys(wanted))
    tiles = [int(x) for one in different for x in one]
    key = f"triton {tiles}"
    known = memo.get(key)
    if known is None or known[0] is not q_position or known[1] is not k_position:
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else torch.inference_mode(False):  # else no later layer could learn with it
            known = (q_position, k_position, *interval_plan(ranges, q_position, k_position, tiles))
        if not compiling:
            memo[key] = known
    return [x for one in wanted for x in known[2 + 2 * different.index(one) :][:2]]
