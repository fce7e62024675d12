# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Interval attention in Triton, forward (triton_tiles.py says how it works)."""

import triton
import triton.language as tl

from tidal.kernels.triton_plan import ROW
from tidal.kernels.triton_tiles import (
    LENGTHS,
    LOWEST,
    dot,
    exponential,
    full_tiles,
    in_base,
    load_ranges,
    load_rows,
    load_some,
    logarithm,
    may_shift,
    one_range,
    partial_tiles,
    score_of,
    segment_tile,
    store_rows,
    work_of,
)


@triton.jit
def forward_tile(
    state, tile, q_md, keys, q_position, bounds, shift, origin, scale, slope,
    N: tl.constexpr, D: tl.constexpr, RANGES: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax with one tile of keys.

    state: float32 sums of weighted values [M, D], of weights [M], and the highest score + shift so far [M].
    q_position and each of the bounds (of RANGES ranges): [M, 1]; shift: [M].
    """
    MASKED: tl.constexpr = RANGES > 0
    acc, total, highest = state
    k, stride_kl, v, stride_vl, k_position, n_keys = keys
    first = tile * N
    key = first + tl.arange(0, N)
    k_nd = load_rows(k, first, stride_kl, n_keys - first, N, D, MASKED)
    k_position_n = load_some(k_position, first, n_keys - first, 0.0, N, MASKED)
    score = score_of(
        dot(q_md, tl.trans(k_nd)),
        q_position, k_position_n[None, :], key[None, :], bounds, origin, scale, slope, RANGES, SHIFTED,
    )  # fmt: skip
    if SHIFTED:
        highest_new = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - highest_new[:, None])
    else:  # the maximum is of shifted scores here too
        highest_new = tl.maximum(highest, tl.max(score, 1) + shift)
        weight = exponential(score - (highest_new - shift)[:, None], FAST)
    decay = exponential(highest - highest_new, FAST)
    v_nd = load_rows(v, first, stride_vl, n_keys - first, N, D, MASKED)
    acc = dot(weight.to(v_nd.dtype), v_nd, acc * decay[:, None])
    return acc, total * decay + tl.sum(weight, 1), highest_new


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, out, lse, ranges, q_position, k_position, slopes, rows, order,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, n_heads, group, n_queries, n_keys, n_tiles, scale,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The output of one tile of queries and head. A head's programs start with the longest (`order`).

    q and out [B, H, Lq, D], k and v [B, Hkv, Lk, D], lse float32 [B, H, Lq]; rows and order are of the plan.
    """
    slot, batch, head, first = work_of(order, n_tiles, M)
    local, n_left = tl.arange(0, M), (n_queries - first).to(tl.int32)
    row = rows + slot * ROW
    q_position += batch * n_queries + first
    ranges += (batch * n_queries + first) * 4
    lse += (batch * n_heads + head) * n_queries + first
    slope, scale = in_base(tl.load(slopes + head), FAST), in_base(scale, FAST)
    q_md = load_rows(q + batch * stride_qb + head * stride_qh, first, stride_ql, n_left, M, D, True)
    k += batch * stride_kb + head // group * stride_kh
    v += batch * stride_vb + head // group * stride_vh
    keys = (k, stride_kl, v, stride_vl, k_position + batch * n_keys, n_keys)
    state = (
        tl.zeros([M, D], dtype=tl.float32),
        tl.zeros([M], dtype=tl.float32),
        tl.full([M], LOWEST, dtype=tl.float32),
    )

    n_full, segments = full_tiles(row)
    shift, origin = tl.zeros([M], dtype=tl.float32), 0.0
    if FAST:
        q_position_m = tl.load(q_position + local, mask=local < n_left, other=0.0)
        shifts, origin = may_shift(row, slope)
        for i in range(0, tl.where(shifts, n_full, 0)):
            tile = segment_tile(i, segments)
            state = forward_tile(state, tile, q_md, keys, 0.0, 0, 0.0, origin, scale, slope, N, D, 0, True, FAST)
        n_full = tl.where(shifts, 0, n_full)
        shift = tl.where(shifts, tl.fma(q_position_m, slope, -origin), 0.0)
    q_position_m1 = tl.load(q_position + local, mask=local < n_left, other=0.0)[:, None]
    for i in range(0, n_full):
        tile = segment_tile(i, segments)
        state = forward_tile(state, tile, q_md, keys, q_position_m1, 0, 0.0, 0.0, scale, slope, N, D, 0, False, FAST)
    n_partial, n_single, segments = partial_tiles(row)
    bounds = load_ranges(ranges, local, n_left, n_keys, 1)
    for i in range(0, n_single):
        tile, bound = segment_tile(i, segments), one_range(bounds, i >= segments[1])
        state = forward_tile(
            state, tile, q_md, keys, q_position_m1, bound, shift, 0.0, scale, slope, N, D, 1, False, FAST
        )
    for i in range(n_single, n_partial):
        tile = segment_tile(i, segments)
        state = forward_tile(
            state, tile, q_md, keys, q_position_m1, bounds, shift, 0.0, scale, slope, N, D, 2, False, FAST
        )

    acc, total, highest = state
    # A query without keys has total 0: it gives zeros, and log Σ exp = +inf makes its weights 0 in the backward pass.
    blind = total == 0.0
    log_sum = tl.where(blind, float("inf"), highest - shift + logarithm(total, FAST))
    tl.store(lse + local, log_sum, mask=first + local < n_queries)
    out += batch * stride_ob + head * stride_oh
    store_rows(out, first, stride_ol, n_queries - first, acc / tl.where(blind, 1.0, total)[:, None], M, D)
