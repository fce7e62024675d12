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

Both carry a flag, "past": in every full tile the keys' positions do not exceed the queries', so that ALiBi needs
no absolute value (tidal/kernels/triton_tiles.py). Memory is O((Lq / tile) · (Lk / tile)), time O((Lq / tile) · Lk), and
nothing waits for the device.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidal.kernels.operators import operator
from tidal.kernels.plan import TilePlan

ROW = tl.constexpr(16)
"""int32 numbers per tile of queries: (start, end) of 4 partial segments and of 2 full ones, flag, whether runs are
merged, 2 unused"""
HEAD = tl.constexpr(4)
"""int32 numbers before the lists of a tile of keys: how many need one range, how many are full, flag, how many need
both ranges"""
CHUNK, KEYS = tl.constexpr(64), tl.constexpr(4096)
"""how many tiles, and how many positions of keys, a planning kernel looks at in one step"""
LENGTHS = ("n_queries", "n_keys", "n_query_tiles", "n_key_tiles")
"""arguments for whose values no kernel is compiled anew"""


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    ranges, q_position, k_position, rows, q_low, work, n_queries, n_keys, n_key_tiles,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Plan one tile of queries of a batch row: what to visit, the lowest position, and the number of tiles.

    rows int32 [B, Tq, ROW], q_low float32 [B, Tq], work int32 [B, Tq].
    """
    slot, n_tiles = tl.program_id(0).to(tl.int64), tl.cdiv(n_queries, TILE_Q)
    batch, tile = slot // n_tiles, (slot % n_tiles).to(tl.int32)
    # The last tile is filled up with copies of the last query, which change nothing.
    query = batch * n_queries + tl.minimum(tile * TILE_Q + tl.arange(0, TILE_Q), n_queries - 1)
    low = tl.min(tl.load(q_position + query), 0)
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

    row = rows + slot * ROW
    tiles = put(row, lo_0, a_0)
    tiles += put(row + 2, b_0, tl.where(merged, a_1, hi_0))
    tiles += put(row + 4, tl.where(merged, b_1, lo_1), tl.where(merged, end, a_1))
    tiles += put(row + 6, b_1, tl.where(merged, b_1, hi_1))
    tiles += put(row + 8, a_0, b_0) + put(row + 10, a_1, b_1)

    k_position += batch * n_keys
    high = tl.maximum(highest(k_position, a_0 * TILE_K, b_0 * TILE_K), highest(k_position, a_1 * TILE_K, b_1 * TILE_K))
    put(row + 12, (high <= low).to(tl.int32), merged.to(tl.int32))
    put(row + 14, 0, 0)
    tl.store(q_low + slot, low)
    tl.store(work + slot, tiles)


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
def put(pointer, start, end):
    """Store the segment [start, end) and return its length."""
    tl.store(pointer, start)
    tl.store(pointer + 1, end)
    return end - start


@triton.jit(do_not_specialize=LENGTHS)
def columns_kernel(
    rows, q_low, k_position, columns, work, n_queries, n_keys, n_query_tiles,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """List the query tiles that visit one tile of keys of a batch row, as their rows say.

    rows int32 [B, Tq, ROW], q_low float32 [B, Tq]; columns int32 [B, Tk, HEAD + 2 Tq], work int32 [B, Tk].
    """
    slot, n_tiles = tl.program_id(0).to(tl.int64), tl.cdiv(n_keys, TILE_K)
    batch, tile = slot // n_tiles, (slot % n_tiles).to(tl.int32)
    key = tile * TILE_K + tl.arange(0, TILE_K)
    high = tl.max(tl.load(k_position + batch * n_keys + key, mask=key < n_keys, other=float("-inf")), 0)
    column = columns + slot * (2 * n_query_tiles + HEAD)
    n_single, n_both, n_full, n_ahead = 0, 0, 0, 0
    for first in range(0, n_query_tiles, CHUNK):
        t = first + tl.arange(0, CHUNK)
        inside = t < n_query_tiles
        row = rows + (batch * n_query_tiles + t) * ROW
        short, merged = (t + 1) * TILE_Q > n_queries, tl.load(row + 13, mask=inside, other=0) != 0
        full_0, full_1 = within(row + 8, tile, inside), within(row + 10, tile, inside)
        first_range = within(row, tile, inside) | within(row + 2, tile, inside) | (full_0 & short)
        second_range = within(row + 4, tile, inside) | within(row + 6, tile, inside) | (full_1 & short)
        single = (first_range | second_range) & ~merged
        both = (first_range | second_range) & merged
        full = (full_0 | full_1) & ~short
        low = tl.load(q_low + batch * n_query_tiles + t, mask=inside, other=0.0)
        n_ahead += tl.sum((full & (low < high)).to(tl.int32), 0)
        # cumsum counts from 1
        entry = 2 * t + second_range.to(tl.int32)
        tl.store(column + HEAD + n_single + tl.cumsum(single.to(tl.int32), 0) - 1, entry, mask=single)
        tl.store(column + HEAD + n_query_tiles - n_full - tl.cumsum(full.to(tl.int32), 0), t, mask=full)
        tl.store(column + HEAD + n_query_tiles + n_both + tl.cumsum(both.to(tl.int32), 0) - 1, t, mask=both)
        n_single += tl.sum(single.to(tl.int32), 0)
        n_both += tl.sum(both.to(tl.int32), 0)
        n_full += tl.sum(full.to(tl.int32), 0)
    put(column, n_single, n_full)
    put(column + 2, tl.where(n_ahead == 0, 1, 0), n_both)
    tl.store(work + slot, n_single + n_both + n_full)


@triton.jit
def within(segment, tile, inside):
    """bool [rows]: whether the key tile lies in the segment stored at each of these pointers; False unless `inside`."""
    start = tl.load(segment, mask=inside, other=0)
    return (start <= tile) & (tile < tl.load(segment + 1, mask=inside, other=0))


@triton.jit(do_not_specialize=("n",))
def order_kernel(work, order, n):
    """Put CHUNK indices at their places among all: the longest first, those with as much work as they come.

    work and order int32 [n]. Each is compared with every other one, of which there are few, in one launch.
    """
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mine = tl.load(work + i, mask=i < n, other=0)[:, None]
    place = tl.zeros([CHUNK], dtype=tl.int32)
    for first in range(0, n, CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = tl.load(work + j, mask=j < n, other=-1)[None, :]
        place += tl.sum(((other > mine) | ((other == mine) & (j[None, :] < i[:, None]))).to(tl.int32), 1)
    tl.store(order + place, i, mask=i < n)


@operator("tidal::interval_plan")
def interval_plan(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, tile_q: int, tile_k: int, transpose: bool
) -> tuple[Tensor, Tensor]:
    """The plan of a batch for kernels with tiles of tile_q queries and tile_k keys.

    Args:
        ranges: int32 [B, Lq, 2, 2]; ends beyond the keys are cut.
        q_position: float32 [B, Lq].
        k_position: float32 [B, Lk].
        tile_q: queries per tile, a power of two.
        tile_k: keys per tile, a power of two.
        transpose: columns instead of rows.

    Returns:
        table: int32, rows [B, Tq, ROW] or columns [B, Tk, HEAD + 2 Tq].
        order: int32 [B·Tq] or [B·Tk], the indices of the rows or columns (b · T + t), longest first.
    """
    (n_batch, n_queries), n_keys = q_position.shape, k_position.shape[1]
    n_query_tiles, n_key_tiles = -(-n_queries // tile_q), -(-n_keys // tile_k)
    rows = ranges.new_empty(n_batch, n_query_tiles, ROW.value)
    q_low = q_position.new_empty(n_batch, n_query_tiles)
    work = ranges.new_empty(n_batch * n_query_tiles)
    ranges, q_position, k_position = ranges.contiguous(), q_position.contiguous(), k_position.contiguous()
    sizes = {"TILE_Q": tile_q, "TILE_K": tile_k}
    with torch.cuda.device_of(ranges):  # type: ignore[no-untyped-call]
        rows_kernel[(n_batch * n_query_tiles,)](
            ranges, q_position, k_position, rows, q_low, work, n_queries, n_keys, n_key_tiles, **sizes
        )
        table = rows
        if transpose:
            table = ranges.new_zeros(n_batch, n_key_tiles, HEAD.value + 2 * n_query_tiles)
            work = ranges.new_empty(n_batch * n_key_tiles)
            columns_kernel[(n_batch * n_key_tiles,)](
                rows, q_low, k_position, table, work, n_queries, n_keys, n_query_tiles, **sizes
            )
        order = torch.empty_like(work)
        order_kernel[(-(-work.numel() // CHUNK.value),)](work, order, work.numel())
    return table, order


@torch.library.register_fake(interval_plan)
def _(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, tile_q: int, tile_k: int, transpose: bool
) -> tuple[Tensor, Tensor]:
    (n_batch, n_queries), n_keys = q_position.shape, k_position.shape[1]
    n_query_tiles, n_key_tiles = -(-n_queries // tile_q), -(-n_keys // tile_k)
    n_tiles, width = (n_key_tiles, HEAD.value + 2 * n_query_tiles) if transpose else (n_query_tiles, ROW.value)
    return ranges.new_empty(n_batch, n_tiles, width), ranges.new_empty(n_batch * n_tiles)


def tables(
    plan: TilePlan | None, ranges: Tensor, q_position: Tensor, k_position: Tensor, wanted: list[tuple[int, int, bool]]
) -> list[Tensor]:
    """Table and order of :func:`interval_plan` for each (tile_q, tile_k, transpose), unless the plan remembers them.

    A compiled graph reads what a plan remembers, but adds nothing to it: equal calls are one in the graph.
    """
    memo = plan.memo if plan is not None else {}
    compiling = torch.compiler.is_compiling()
    new: dict[str, tuple[Tensor, ...]] = {} if compiling else memo
    found: list[Tensor] = []
    for tile_q, tile_k, transpose in wanted:
        key = f"triton {tile_q} {tile_k} {transpose}"
        known = new.get(key) or memo.get(key)
        if known is None or known[0] is not q_position or known[1] is not k_position:
            with nullcontext() if compiling else torch.inference_mode(False):  # else no later layer could learn with it
                table, order = interval_plan(ranges, q_position, k_position, tile_q, tile_k, transpose)
            known = new[key] = (q_position, k_position, table, order)
        found += known[2:]
    return found
