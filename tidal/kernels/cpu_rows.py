"""Rows of a cache attended to one by one: where they lie, and each up to its own end.

    row 0   k k k k k k k k k k k k k k k k k k k k k        one product for each row, over its k
    row 2   k k k . . . . . . . . . . . . . . . . . .        nothing is copied, and no . is multiplied
    row 3   k k k k k . . . . . . . . . . . . . . . .

Shape letters as in cpu.py.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tidal.kernels.cpu import dense_geometry, weighted
from tidal.kernels.plan import TilePlan

LIMIT = 2**17
"""largest Lq · Lk of a row that is computed as one dense tile"""
IN_PLACE = 2**16
"""elements that a row's keys have at least, where rows of a cache are attended to one by one; docs/decoding.md"""
SEEN = 0.75
"""share of the keys that rows see, each up to its last, below which all of them are attended to one by one"""


def in_place(q: Tensor, k: Tensor, ranges: Tensor, rows: Sequence[int]) -> bool:
    """Whether to attend to rows of a cache one by one: few queries, and many keys that would be copied or seen by
    none."""
    n_keys = k.shape[2]
    if q.shape[2] * n_keys > LIMIT or k[0].numel() < IN_PLACE:
        return False
    return not all_in_order(rows, k) or int(row_ends(ranges, n_keys).sum()) < SEEN * len(rows) * n_keys


def all_in_order(rows: Sequence[int], k: Tensor) -> bool:
    """Whether these are simply all rows of k."""
    return list(rows) == list(range(len(k)))


def row_ends(ranges: Tensor, n_keys: int) -> Tensor:
    """int32 [B]: the end of the last key that any query of a row sees; 1 at least."""
    return ranges[..., 1].amax(dim=(1, 2)).clamp(1, n_keys)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    slopes: Tensor,
    scale: float,
    plan: TilePlan | None,
    *,
    rows: Sequence[int],
) -> Tensor:
    """A tile for each row of the batch, over the keys of its row of k and v up to the last one that it sees.

    Nothing of these is copied, and a row does not pay for others that are longer.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (n_batch, n_heads, n_queries, head_dim), n_kv_heads = q.shape, k.shape[1]
    n_rows = n_heads // n_kv_heads * n_queries
    slopes_gr11 = slopes.to(dtype).view(n_kv_heads, -1, 1, 1)
    q_bgmd = (q.to(dtype) * scale).reshape(n_batch, n_kv_heads, n_rows, head_dim)
    geometries, out = rows_geometry(ranges, q_position, k_position, dtype, plan), q.new_empty(q.shape)
    for i, (row, (distance, mask, sighted)) in enumerate(zip(rows, geometries, strict=True)):
        end = mask.shape[-1]
        bias_gmk = torch.addcmul(mask[0], distance[0], slopes_gr11, value=-1).view(n_kv_heads, n_rows, end)
        out_gmd = weighted(bias_gmk, q_bgmd[i], k[row, :, :end].to(dtype), v[row, :, :end].to(dtype))
        out_hqd = out_gmd.view(n_heads, n_queries, head_dim)
        out[i] = out_hqd * sighted[0] if sighted.numel() else out_hqd
    return out


def rows_geometry(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, dtype: torch.dtype, plan: TilePlan | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`dense_geometry` of each row by itself, over its own keys; kept in the plan for the next layer."""
    key = f"rows {dtype} {torch.is_inference_mode_enabled()}"
    if plan is not None and key in plan.memo:
        q_seen, k_seen, *kept = plan.memo[key]
        if q_seen is q_position and k_seen is k_position:
            return list(zip(kept[::3], kept[1::3], kept[2::3], strict=True))
    geometries = [
        dense_geometry(ranges[i : i + 1], q_position[i : i + 1], k_position[i : i + 1, :end], dtype, None)
        for i, end in enumerate(row_ends(ranges, k_position.shape[1]).tolist())
    ]
    if plan is not None:
        plan.memo[key] = (q_position, k_position, *itertools.chain.from_iterable(geometries))
    return geometries
