"""Rows of a cache attended to one by one: where they lie, and each up to its own end.

    row 0   q · ·   k k k k k k k k k k k k k k k k k        one product for each row, of its q with its k
    row 2   q q q   k k k . . . . . . . . . . . . . .        nothing is copied, and no · or . is multiplied
    row 3   q · ·   k k k k k . . . . . . . . . . . .

Shape letters as in cpu.py.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tidal.kernels.cpu import blind_queries, dense_geometry, one_tile
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


def query_ends(ranges: Tensor, n_keys: int) -> Tensor:
    """int64 [B]: the end of the last query of a row that sees a key; those of shorter rows are padding behind it."""
    sighted_bq = blind_queries(ranges, n_keys).logical_not()
    return (sighted_bq * torch.arange(1, ranges.shape[1] + 1)).amax(1)


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
    """A tile for each row of the batch, of its queries up to the last one that sees anything, over the keys of its row
    of k and v up to the last one that is seen.

    Nothing of these is copied, and a row does not pay for others that are longer.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    geometries = rows_geometry(ranges, q_position, k_position, dtype, plan)
    scaled, slopes, out = q.to(dtype) * scale, slopes.to(dtype), q.new_zeros(q.shape)
    for i, (row, geometry) in enumerate(zip(rows, geometries, strict=True)):
        n_queries, end = geometry[0].shape[-2:]
        k_row, v_row = (x[row : row + 1, :, :end].to(dtype) for x in (k, v))
        out[i, :, :n_queries] = one_tile(scaled[i : i + 1, :, :n_queries], k_row, v_row, slopes, *geometry)[0]
    return out


def rows_geometry(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, dtype: torch.dtype, plan: TilePlan | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`dense_geometry` of each row by itself, of its queries over its keys; kept in the plan for the next layer."""
    key = f"rows {dtype} {torch.is_inference_mode_enabled()}"
    if plan is not None and key in plan.memo:
        q_seen, k_seen, *kept = plan.memo[key]
        if q_seen is q_position and k_seen is k_position:
            return list(zip(kept[::3], kept[1::3], kept[2::3], strict=True))
    n_keys = k_position.shape[1]
    sizes = zip(query_ends(ranges, n_keys).tolist(), row_ends(ranges, n_keys).tolist(), strict=True)
    geometries = [
        dense_geometry(ranges[i : i + 1, :n], q_position[i : i + 1, :n], k_position[i : i + 1, :end], dtype, None)
        for i, (n, end) in enumerate(sizes)
    ]
    if plan is not None:
        plan.memo[key] = (q_position, k_position, *itertools.chain.from_iterable(geometries))
    return geometries
