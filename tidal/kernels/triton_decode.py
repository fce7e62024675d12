# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Decoding: a few queries a row over long caches, split over the keys (Dao et al. 2023, "Flash-Decoding").

One program reads the keys of one key head once, for all query heads of its group and all queries of the batch row.
These queries are packed into the rows of one tile: row m = query · G + head. The key tiles to visit are those of the
hulls of both ranges. They are dealt out evenly among the splits, so that a short cache gives every split less work.

    keys         0   ░░░░████████░░░░            ░░░░██████   n          two runs of tiles, or one where they meet
    tiles              0  1  2  3                  4  5
    splits             └─ 0 ─┘└── 1 ──┘└─── 2 ───┘└ 3: none

    partial_kernel    per split   o = softmax(score) v,  lse = log2 Σ exp2(score)      float32, o = 0 without keys
    merge_kernel      out = Σ_s exp2(lse_s − lse) · o_s                                only where there are splits

Decoding reads memory and computes little, so masks and |distance| are worked out for every key. Scores are kept as
powers of two: log2(e) is folded into the scale and the slopes. How many splits there are depends on shapes alone;
nothing waits for the device.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidal.device import upload
from tidal.kernels.operators import operator, without_gradient
from tidal.kernels.triton_tiles import LOG2E, dot, load_some

MOST_QUERIES = 64
"""queries per row and head that this kernel takes; more of them are not decoding but reading"""

MOST_SPLITS = 128
LEAST_TILES = 2
"""key tiles that a split should have, if all keys were seen: fewer are not worth merging"""


class Launch(NamedTuple):
    """How the kernel is launched."""

    n: int
    """TILE_N, keys per tile"""
    warps: int
    stages: int
    per_core: int = 8
    """programs per multiprocessor, if there are enough keys to split: more than run at once, since rows differ in
    length, and the longest may start last"""


UNSPECIALIZED = ("n_queries", "n_keys", "n_splits", "n_kv_heads", "n_rows", "stride_pb")
"""vary from step to step, or when a cache grows: a kernel must not be compiled anew for those that are 1 or multiples
of 16"""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def partial_kernel(
    q, k, v, ranges, q_position, k_position, slopes, kv_rows, out, lse,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb,
    n_queries, n_keys, n_splits, n_kv_heads, scale_log2e,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The attention of one tile of rows to one split of the keys.

    Program (tile, split): the tile is one of a key head of a batch row. q [B, Hq, Lq, D], k and v [R, Hkv, Lk, D], of
    whose rows batch row b attends to kv_rows[b], or, where that is None, to b; out [S, B, Hq, Lq, D] in float32, or in
    the dtype of q where there is one split; lse float32 [S, B, Hq, Lq].
    """
    n_rows = n_queries * GROUP
    n_row_tiles = tl.cdiv(n_rows, TILE_M)
    batch = (tl.program_id(0) // n_row_tiles // n_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // n_row_tiles % n_kv_heads).to(tl.int64)
    split = tl.program_id(1)

    row_m = tl.program_id(0) % n_row_tiles * TILE_M + tl.arange(0, TILE_M)
    live_m = row_m < n_rows
    query_m, head_m = row_m // GROUP, kv_head * GROUP + row_m % GROUP
    d = tl.arange(0, HEAD_DIM)
    ranges_m = ranges + (batch * n_queries + query_m) * 4
    start_0m, end_0m, first_0, stop_0 = hull(ranges_m, live_m, n_keys, TILE_N)
    start_1m, end_1m, first_1, stop_1 = hull(ranges_m + 2, live_m, n_keys, TILE_N)
    if (first_0 < stop_0) & (first_1 < stop_1) & (first_0 <= stop_1) & (first_1 <= stop_0):
        first_0, stop_0 = tl.minimum(first_0, first_1), tl.maximum(stop_0, stop_1)
        first_1, stop_1 = 0, 0  # runs that meet are one, so no tile is visited twice
    n_first = stop_0 - first_0
    n_tiles = n_first + stop_1 - first_1
    share = tl.cdiv(n_tiles, n_splits)

    at_q = batch * stride_qb + head_m * stride_qh + query_m.to(tl.int64) * stride_qm
    q_md = tl.load(q + at_q[:, None] + d[None, :], mask=live_m[:, None], other=0.0)
    q_position_m = tl.load(q_position + batch * n_queries + query_m, mask=live_m, other=0.0)
    slope_m = tl.load(slopes + head_m, mask=live_m, other=0.0).to(tl.float32) * LOG2E
    n = tl.arange(0, TILE_N)
    kv_row = batch if kv_rows is None else tl.load(kv_rows + batch).to(tl.int64)
    k_nd = k + kv_row * stride_kb + kv_head * stride_kh + n.to(tl.int64)[:, None] * stride_kn + d[None, :]
    v_nd = v + kv_row * stride_vb + kv_head * stride_vh + n.to(tl.int64)[:, None] * stride_vn + d[None, :]

    top_m = tl.full([TILE_M], float("-inf"), tl.float32)
    sum_m = tl.zeros([TILE_M], tl.float32)
    out_md = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
    for t in range(split * share, tl.minimum(split * share + share, n_tiles)):
        first_key = tl.where(t < n_first, first_0 + t, first_1 + t - n_first) * TILE_N
        key_n = first_key + n
        there_n = key_n < n_keys
        k_tile = tl.load(k_nd + first_key.to(tl.int64) * stride_kn, mask=there_n[:, None], other=0.0)
        v_tile = tl.load(v_nd + first_key.to(tl.int64) * stride_vn, mask=there_n[:, None], other=0.0)
        k_position_n = load_some(k_position + batch * stride_pb, first_key, n_keys - first_key, 0.0, TILE_N, True)

        score_mn = dot(q_md, tl.trans(k_tile)) * scale_log2e
        score_mn -= slope_m[:, None] * tl.abs(q_position_m[:, None] - k_position_n[None, :])
        seen_0mn = (key_n[None, :] >= start_0m[:, None]) & (key_n[None, :] < end_0m[:, None])
        seen_1mn = (key_n[None, :] >= start_1m[:, None]) & (key_n[None, :] < end_1m[:, None])
        score_mn = tl.where(seen_0mn | seen_1mn, score_mn, float("-inf"))

        new_top_m = tl.maximum(top_m, tl.max(score_mn, 1))
        base_m = tl.where(new_top_m == float("-inf"), 0.0, new_top_m)  # −inf − −inf would be NaN
        weight_mn = tl.exp2(score_mn - base_m[:, None])
        shrink_m = tl.exp2(top_m - base_m)
        sum_m = sum_m * shrink_m + tl.sum(weight_mn, 1)
        out_md = dot(weight_mn.to(v_tile.dtype), v_tile, out_md * shrink_m[:, None])
        top_m = new_top_m

    blind_m = sum_m == 0.0
    sum_m = tl.where(blind_m, 1.0, sum_m)
    n_batch = tl.num_programs(0) // n_row_tiles // n_kv_heads
    place_m = ((split * n_batch + batch) * n_kv_heads * GROUP + head_m) * n_queries + query_m
    tl.store(lse + place_m, tl.where(blind_m, float("-inf"), top_m + tl.log2(sum_m)), mask=live_m)
    out_md = (out_md / sum_m[:, None]).to(out.dtype.element_ty)
    tl.store(out + place_m[:, None] * HEAD_DIM + d[None, :], out_md, mask=live_m[:, None])


@triton.jit
def hull(ranges_m, live_m, n_keys, TILE_N: tl.constexpr):
    """Load one of the two ranges of every row, and find the key tiles that they reach.

    Returns int32 start [M] and end [M], cut to the keys, and first and stop: every range lies within the key tiles
    [first, stop). Where all ranges are empty, first = stop = 0.
    """
    start_m = tl.maximum(tl.load(ranges_m, mask=live_m, other=0), 0)
    end_m = tl.minimum(tl.load(ranges_m + 1, mask=live_m, other=0), n_keys)
    some_m = start_m < end_m
    first = tl.min(tl.where(some_m, start_m, n_keys)) // TILE_N
    stop = tl.cdiv(tl.max(tl.where(some_m, end_m, 0)), TILE_N)
    return start_m, end_m, tl.minimum(first, stop), stop


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(part, lse, out, n_rows, n_splits, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Add up the outputs of all splits, each weighted by the sum of its exponentiated scores.

    One program per row. part float32 [S, rows, D], lse float32 [S, rows], out [rows, D], where rows = B · Hq · Lq.
    """
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, CHUNK), tl.arange(0, HEAD_DIM)
    top = -float("inf")
    total = 0.0
    out_d = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, n_splits, CHUNK):
        there_s = first + s < n_splits
        row_s = (first + s).to(tl.int64) * n_rows + row
        lse_s = tl.load(lse + row_s, mask=there_s, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse_s))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight_s = tl.exp2(lse_s - base)
        shrink = tl.exp2(top - base)
        part_sd = tl.load(part + row_s[:, None] * HEAD_DIM + d[None, :], mask=there_s[:, None], other=0.0)
        out_d = out_d * shrink + tl.sum(weight_s[:, None] * part_sd, 0)
        total = total * shrink + tl.sum(weight_s)
        top = new_top
    out_d = out_d / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + d, out_d.to(out.dtype.element_ty))


# ------------------------------------------------------------------------------------------ launching


@operator("tidal::interval_attention_decode")
def decode(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, q_position: Tensor, k_position: Tensor, slopes: Tensor,
           scale: float, kv_rows: Tensor | None = None, launch: Sequence[int] | None = None) -> Tensor:  # fmt: skip
    """Interval attention without gradients, for up to MOST_QUERIES queries in a dtype and head dimension of the others.

    Shapes and dtypes as in :func:`tidal.kernels.interval_attention`, none of them checked here; kv_rows is its `rows`,
    int32 [B] on the device, and k and v then have any number of rows. Slices of a cache, ``k[:, :, :n]``, are read
    where they are; only the head dimension must be contiguous, else there is a copy.
    `launch` has the fields of a :class:`Launch`, in place of those that :func:`launch_of` chooses.

    Returns:
        [B, Hq, Lq, D], contiguous, in the dtype of q.
    """
    (n_batch, n_heads, n_queries, head_dim), (n_kv_heads, n_keys) = q.shape, k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or n_keys == 0:
        return out.zero_()
    q, k, v, k_position = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, k_position))
    group, n_rows = n_heads // n_kv_heads, n_batch * n_heads * n_queries
    tile_m = rows_of_tile(group * n_queries, q.dtype)
    tile_n, num_warps, num_stages, per_core = launch or launch_of(tile_m, head_dim, q.dtype)
    n_programs = n_batch * n_kv_heads * -(-group * n_queries // tile_m)
    n_splits = count_splits(n_programs, -(-n_keys // tile_n), per_core * n_cores(q.device))
    lse = torch.empty(n_splits * n_rows, dtype=torch.float32, device=q.device)
    part = out if n_splits == 1 else torch.empty(n_splits * n_rows * head_dim, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        partial_kernel[(n_programs, n_splits)](
            q, k, v, ranges.contiguous(), q_position.contiguous(), k_position, slopes.contiguous(), kv_rows, part, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], k_position.stride(0),
            n_queries, n_keys, n_splits, n_kv_heads, scale * LOG2E.value,
            GROUP=group, HEAD_DIM=head_dim, TILE_M=tile_m, TILE_N=tile_n,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        if n_splits > 1:
            merge_kernel[(n_rows,)](part, lse, out, n_rows, n_splits, HEAD_DIM=head_dim, CHUNK=16, num_warps=1)
    return out


@torch.library.register_fake(decode)
def _(q, *_):
    return q.new_empty(q.shape)


without_gradient(decode)


@functools.lru_cache(maxsize=16)
def on_device(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """kv_rows for these rows: copied to the device once for all layers of a step, without waiting for it."""
    with torch.inference_mode(False):
        return upload(rows, device, torch.int32)


def rows_of_tile(n_rows: int, dtype: torch.dtype) -> int:
    """TILE_M for `n_rows` packed rows (query heads of a group × queries). A product of tensor cores has at least 16."""
    return 16 if n_rows <= 16 else 32 if n_rows <= 32 or dtype == torch.float32 else 64


def launch_of(tile_m: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """How the kernel is launched for tiles of TILE_M rows.

    float32 is multiplied without tensor cores, which would round to tf32. A product then holds more in registers, so
    float32 has smaller tiles and, from head dimension 64 on, more threads.
    """
    if dtype == torch.float32:
        return Launch(16 if head_dim == 128 else 32, 4 if head_dim == 32 else 8, 2)
    if head_dim == 128:  # of 64 rows, twice the keys or a third stage spill on sm_80
        return Launch(32, 4, 2) if tile_m == 64 else Launch(64, 4, 3)
    return Launch(64 if tile_m == 64 else 128, 4, 3)


def count_splits(n_programs: int, n_tiles: int, n_wanted: int) -> int:
    """How many programs share the keys of one tile of rows, so that all multiprocessors are busy.

    Args:
        n_programs: tiles of rows, of all heads and batch rows.
        n_tiles: tiles of keys, if all keys were seen.
        n_wanted: programs that keep the GPU busy.
    """
    wanted = -(-n_wanted // n_programs)
    return max(1, min(wanted, n_tiles // LEAST_TILES, MOST_SPLITS))


@functools.cache
def n_cores(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 elsewhere, for the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 8
