# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Interval attention in Triton, backward: delta, dq, and dk with dv (triton_tiles.py says how it works)."""

import triton
import triton.language as tl

from tidal.kernels.triton_plan import HEAD, N_BOTH, N_FULL, N_SINGLE, ROW
from tidal.kernels.triton_tiles import (
    LENGTHS,
    add_rows,
    dot,
    exponential,
    full_tiles,
    in_base,
    load_range,
    load_ranges,
    load_rows,
    load_some,
    may_shift,
    one_range,
    partial_tiles,
    row_numbers,
    score_of,
    segment_tile,
    store_rows,
    work_of,
)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    out, dout, delta, stride_ob, stride_oh, stride_ol, stride_gb, stride_gh, stride_gl, n_heads, n_queries,
    M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """delta = Σ_d dout · out, float32 [B, H, Lq], for one tile of queries, head and batch row."""
    slot, head, n_tiles = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.cdiv(n_queries, M)
    batch, first = slot // n_tiles, (slot % n_tiles * M).to(tl.int32)
    n_left = n_queries - first
    out_md = load_rows(out + batch * stride_ob + head * stride_oh, first, stride_ol, n_left, M, D, True)
    dout_md = load_rows(dout + batch * stride_gb + head * stride_gh, first, stride_gl, n_left, M, D, True)
    query = first + tl.arange(0, M)
    total = tl.sum(out_md.to(tl.float32) * dout_md.to(tl.float32), 1)
    tl.store(delta + (batch * n_heads + head) * n_queries + query, total, mask=query < n_queries)


@triton.jit
def dq_tile(
    state, tile, q_md, dout_md, keys, q_position, bounds, lse, delta, origin, scale, slope,
    N: tl.constexpr, D: tl.constexpr, RANGES: tl.constexpr, SHIFTED: tl.constexpr, SLOPES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys contributes to dq [M, D] and, if SLOPES, to three sums [M] for the slopes' gradient.

    q_position, each of the bounds (of RANGES ranges), lse (shifted as the scores are) and delta: [M, 1].
    """
    MASKED: tl.constexpr = RANGES > 0
    dq, slope_sums = state
    k, stride_kl, v, stride_vl, k_position, n_keys = keys
    first = tile * N
    key = first + tl.arange(0, N)
    k_nd = load_rows(k, first, stride_kl, n_keys - first, N, D, MASKED)
    v_nd = load_rows(v, first, stride_vl, n_keys - first, N, D, MASKED)
    k_position_n = load_some(k_position, first, n_keys - first, 0.0, N, MASKED)
    score = score_of(
        dot(q_md, tl.trans(k_nd)),
        q_position, k_position_n[None, :], key[None, :], bounds, origin, scale, slope, RANGES, SHIFTED,
    )  # fmt: skip
    dweight = dot(dout_md, tl.trans(v_nd))
    weight = exponential(score - lse, FAST)
    dscore = weight * (dweight - delta)
    if SLOPES:
        of_both, of_scores, of_weights = slope_sums
        distance = tl.abs(q_position - k_position_n[None, :])
        of_both += tl.sum(dscore * distance, 1)
        of_scores += tl.sum(dscore, 1)
        of_weights += tl.sum(weight * distance, 1)
        slope_sums = (of_both, of_scores, of_weights)
    return dot(dscore.to(k_nd.dtype), k_nd, dq), slope_sums


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, dout, lse, delta, dq, dslopes, ranges, q_position, k_position, slopes, rows, order,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_ob, stride_oh, stride_ol, n_heads, group, n_queries, n_keys, n_tiles, scale,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """dq for one tile of queries and head. A head's programs start with the longest (`order`).

    q, dout and dq [B, H, Lq, D], k and v [B, Hkv, Lk, D], lse and delta float32 [B, H, Lq]. If SLOPES, also the tile's
    part of the slopes' gradient, dslopes float32 [B · n_tiles, H].
    """
    slot, batch, head, first = work_of(order, n_tiles, M)
    local, n_left = tl.arange(0, M), (n_queries - first).to(tl.int32)
    inside = local < n_left
    row = rows + slot * ROW
    q_position += batch * n_queries + first
    ranges += (batch * n_queries + first) * 4
    lse += (batch * n_heads + head) * n_queries + first
    delta += (batch * n_heads + head) * n_queries + first
    slope, scale_in = in_base(tl.load(slopes + head), FAST), in_base(scale, FAST)
    q_md = load_rows(q + batch * stride_qb + head * stride_qh, first, stride_ql, n_left, M, D, True)
    dout_md = load_rows(dout + batch * stride_gb + head * stride_gh, first, stride_gl, n_left, M, D, True)
    lse_m1 = tl.load(lse + local, mask=inside, other=float("inf"))[:, None]
    delta_m1 = tl.load(delta + local, mask=inside, other=0.0)[:, None]
    k += batch * stride_kb + head // group * stride_kh
    v += batch * stride_vb + head // group * stride_vh
    keys = (k, stride_kl, v, stride_vl, k_position + batch * n_keys, n_keys)
    zeros = tl.zeros([M], dtype=tl.float32)
    state = (tl.zeros([M, D], dtype=tl.float32), (zeros, zeros, zeros))

    n_full, segments = full_tiles(row)
    if FAST and not SLOPES:  # the slopes' gradient needs distances anyway
        q_position_m = tl.load(q_position + local, mask=inside, other=0.0)
        shifts, origin = may_shift(row, slope)
        lse_shifted = lse_m1 + tl.fma(q_position_m, slope, -origin)[:, None]
        for i in range(0, tl.where(shifts, n_full, 0)):
            tile = segment_tile(i, segments)
            state = dq_tile(
                state, tile, q_md, dout_md, keys, 0.0, 0, lse_shifted, delta_m1, origin, scale_in, slope,
                N, D, 0, True, SLOPES, FAST,
            )  # fmt: skip
        n_full = tl.where(shifts, 0, n_full)
    q_position_m1 = tl.load(q_position + local, mask=inside, other=0.0)[:, None]
    for i in range(0, n_full):
        tile = segment_tile(i, segments)
        state = dq_tile(
            state, tile, q_md, dout_md, keys, q_position_m1, 0, lse_m1, delta_m1, 0.0, scale_in, slope,
            N, D, 0, False, SLOPES, FAST,
        )  # fmt: skip
    n_partial, n_single, segments = partial_tiles(row)
    bounds = load_ranges(ranges, local, n_left, n_keys, 1)
    for i in range(0, n_single):
        tile, bound = segment_tile(i, segments), one_range(bounds, i >= segments[1])
        state = dq_tile(
            state, tile, q_md, dout_md, keys, q_position_m1, bound, lse_m1, delta_m1, 0.0, scale_in, slope,
            N, D, 1, False, SLOPES, FAST,
        )  # fmt: skip
    for i in range(n_single, n_partial):
        tile = segment_tile(i, segments)
        state = dq_tile(
            state, tile, q_md, dout_md, keys, q_position_m1, bounds, lse_m1, delta_m1, 0.0, scale_in, slope,
            N, D, 2, False, SLOPES, FAST,
        )  # fmt: skip
    dq += batch * stride_ob + head * stride_oh
    store_rows(dq, first, stride_ol, n_queries - first, state[0] * scale, M, D)
    if SLOPES:
        # −Σ dscore · distance. Σ dscore should be 0 but for the rounding of delta, whose error cancels if distances
        # are taken from their mean.
        of_both, of_scores, of_weights = state[1]
        tl.store(dslopes + slot * n_heads + head, tl.sum(of_scores * of_weights - of_both, 0))


@triton.jit
def dkdv_tile(
    state, tile, k_nd, v_nd, queries, added, second, key, k_position, origin, scale, slope,
    M: tl.constexpr, D: tl.constexpr, RANGES: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries contributes to dk and dv, both [N, D]. The score matrix is transposed: [N, M].

    key and k_position: [N, 1]. RANGES: 2 for the mask of both ranges, 1 for that of range `second`, 0 for none, where
    the tile is full of queries, too. If ATOMIC, the keys' share of dq is added to memory; `added` is the pointer, the
    stride of its rows, and the factor of q·k in the scores.
    """
    MASKED: tl.constexpr = RANGES > 0
    dk, dv = state
    q, stride_ql, dout, stride_gl, lse, delta, q_position, ranges, n_queries, n_keys = queries
    first = tile * M
    local, n_left = row_numbers(M), n_queries - first
    q_md = load_rows(q, first, stride_ql, n_left, M, D, MASKED)
    q_position_m = load_some(q_position, first, n_left, 0.0, M, MASKED)
    lse_m = load_some(lse, first, n_left, float("inf"), M, MASKED)
    bounds = 0
    if RANGES == 1:
        bounds = load_range(ranges + first.to(tl.int64) * 4 + second * 2, local, n_left, n_keys, 0)
    if RANGES == 2:
        bounds = load_ranges(ranges + first.to(tl.int64) * 4, local, n_left, n_keys, 0)
    if SHIFTED:
        lse_m += tl.fma(q_position_m, slope, -origin)
    # float32 wants the same rounding as in the forward pass
    product = dot(k_nd, tl.trans(q_md)) if FAST else tl.trans(dot(q_md, tl.trans(k_nd)))
    score = score_of(
        product,
        q_position_m[None, :], k_position, key, bounds, origin, scale, slope, RANGES, SHIFTED,
    )  # fmt: skip
    weight = exponential(score - lse_m[None, :], FAST)
    dout_md = load_rows(dout, first, stride_gl, n_left, M, D, MASKED)
    dv = dot(weight.to(dout_md.dtype), dout_md, dv)
    dweight = dot(v_nd, tl.trans(dout_md))
    dscore = weight * (dweight - load_some(delta, first, n_left, 0.0, M, MASKED)[None, :])
    dscore = dscore.to(q_md.dtype)
    if ATOMIC:
        dq, stride_dql, factor = added
        add_rows(dq, first, stride_dql, n_left, dot(tl.trans(dscore), k_nd) * factor, M, D)
    return dot(dscore, q_md, dk), dv


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, dq, ranges, q_position, k_position, slopes, columns, order,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_ob, stride_oh, stride_ol, stride_dqb, stride_dqh, stride_dql,
    n_heads, group, n_queries, n_keys, n_tiles, n_query_tiles, scale,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """dk and dv for one tile of keys and query head. A head's programs start with the longest (`order`).

    q and dout [B, H, Lq, D], k and v [B, Hkv, Lk, D], lse and delta float32 [B, H, Lq]. dk and dv [B, H, Lk, D] are of
    query heads: where a group shares a key head, they are added up later. If ATOMIC, the program also adds its part
    to dq, float32 [B, H, Lq, D], which must begin as zeros. That takes five products a tile instead of seven, but
    programs come in any order, so the last bits differ from run to run.
    """
    slot, batch, head, first = work_of(order, n_tiles, N)
    key, n_left = first.to(tl.int32) + tl.arange(0, N), (n_keys - first).to(tl.int32)
    slope, scale_in = in_base(tl.load(slopes + head), FAST), in_base(scale, FAST)
    k += batch * stride_kb + head // group * stride_kh
    v += batch * stride_vb + head // group * stride_vh
    k_nd = load_rows(k, first, stride_kl, n_left, N, D, True)
    v_nd = load_rows(v, first, stride_vl, n_left, N, D, True)
    k_position_n = tl.load(k_position + batch * n_keys + key, mask=key < n_keys, other=0.0)
    k_position_n1, key_n1 = k_position_n[:, None], key[:, None]
    statistics = (batch * n_heads + head) * n_queries
    queries = (
        q + batch * stride_qb + head * stride_qh, stride_ql, dout + batch * stride_gb + head * stride_gh, stride_gl,
        lse + statistics, delta + statistics, q_position + batch * n_queries,
        ranges + batch * n_queries * 4, n_queries, n_keys,
    )  # fmt: skip
    added = (dq + batch * stride_dqb + head * stride_dqh, stride_dql, scale)
    state = (tl.zeros([N, D], dtype=tl.float32), tl.zeros([N, D], dtype=tl.float32))

    # Lists of tiles, each read one turn ahead: what is loaded by an index that the same turn loads is not prefetched.
    # Of an empty list the first entry is read, too; there is always room for one.
    column = columns + slot * (2 * n_query_tiles + HEAD)
    n_full, last = tl.load(column + N_FULL), column + HEAD + n_query_tiles - 1
    if FAST:
        shifts, origin = may_shift(column, slope)
        n_shifted, tile = tl.where(shifts, n_full, 0), tl.load(last)
        for i in range(0, n_shifted):
            following = tl.load(last - tl.minimum(i + 1, n_shifted - 1))
            state = dkdv_tile(
                state, tile, k_nd, v_nd, queries, added, 0, key_n1, k_position_n1, origin,
                scale_in, slope, M, D, 0, True, FAST, ATOMIC,
            )  # fmt: skip
            tile = following
        n_full = tl.where(shifts, 0, n_full)
    tile = tl.load(last)
    for i in range(0, n_full):
        following = tl.load(last - tl.minimum(i + 1, n_full - 1))
        state = dkdv_tile(
            state, tile, k_nd, v_nd, queries, added, 0, key_n1, k_position_n1, 0.0, scale_in, slope,
            M, D, 0, False, FAST, ATOMIC,
        )  # fmt: skip
        tile = following
    n_single, entries = tl.load(column + N_SINGLE), column + HEAD
    entry = tl.load(entries)
    for i in range(0, n_single):
        following = tl.load(entries + tl.minimum(i + 1, n_single - 1))
        state = dkdv_tile(
            state, entry >> 1, k_nd, v_nd, queries, added, entry & 1, key_n1, k_position_n1, 0.0, scale_in, slope,
            M, D, 1, False, FAST, ATOMIC,
        )  # fmt: skip
        entry = following
    n_both, entries = tl.load(column + N_BOTH), column + HEAD + n_query_tiles
    tile = tl.load(entries)
    for i in range(0, n_both):
        following = tl.load(entries + tl.minimum(i + 1, n_both - 1))
        state = dkdv_tile(
            state, tile, k_nd, v_nd, queries, added, 0, key_n1, k_position_n1, 0.0, scale_in, slope,
            M, D, 2, False, FAST, ATOMIC,
        )  # fmt: skip
        tile = following
    _, batch, head, first = work_of(order, n_tiles, N, True)
    offset = batch * stride_ob + head * stride_oh
    store_rows(dk + offset, first, stride_ol, n_keys - first, state[0] * scale, N, D)
    store_rows(dv + offset, first, stride_ol, n_keys - first, state[1], N, D)
