"""Rows of a cache attended to one by one: where they lie, and each up to its own end.

    row 0   q · ·   k k k k k k k k k k k k k k k k k        one product for each row, of its q with its k
    row 2   q q q   k k k . . . . . . . . . . . . . .        nothing is copied, and no · or . is multiplied
    row 3   q · ·   k k k k k . . . . . . . . . . . .

Shape letters as in cpu.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tidal.kernels.cpu import blind_queries, dense_geometry
from tidal.kernels.plan import TilePlan

LIMIT = 2**17
"""largest Lq · Lk of a row that is computed as one dense tile"""
IN_PLACE = 2**16
"""elements that a row's keys have at least, where rows of a cache are attended to one by one; docs/decoding.md"""
SEEN = 0.75
"""share of the keys that rows see, each up to its last, below which all of them are attended to one by one"""


def in_place(q: Tensor, k: Tensor, ranges: Tensor, rows: Sequence[int], plan: TilePlan | None) -> bool:
    """Whether to attend to rows of a cache one by one: few queries, and many keys that would be copied or seen by
    none. The plan remembers the answer for the next layer."""
    n_keys = k.shape[2]
    if q.shape[2] * n_keys > LIMIT or k[0].numel() < IN_PLACE:
        return False
    if not all_in_order(rows, k):
        return True
    memo = {} if plan is None else plan.memo
    if "in place" not in memo:
        memo["in place"] = (row_ends(ranges, n_keys).sum() < SEEN * len(rows) * n_keys,)
    return bool(memo["in place"][0])


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
    """Attention of each row of the batch by itself: of its queries up to the last one that sees anything, over the keys
    of its row of k and v up to the last one that is seen. Without gradients.

    Nothing of these is copied, and a row does not pay for others that are longer.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    n_heads, n_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[3]
    sighted, biases = rows_bias(ranges, q_position, k_position, slopes.to(dtype).view(n_kv_heads, -1, 1, 1), plan)
    out, queries = q.new_zeros(q.shape), (q.to(dtype) * scale).unbind()
    keys, values = k.transpose(2, 3).unbind(), v.unbind()  # one call: a row then takes as long as its two products
    for i, (row, q_hqd, bias_gmk) in enumerate(zip(rows, queries, biases, strict=True)):
        n_queries, n_keys = bias_gmk.shape[1] * n_kv_heads // n_heads, bias_gmk.shape[2]
        if not n_queries:
            continue
        q_gmd = q_hqd[:, :n_queries].reshape(n_kv_heads, -1, head_dim)
        weight_gmk = torch.baddbmm(bias_gmk, q_gmd, keys[row][:, :, :n_keys].to(dtype)).softmax(dim=-1)
        out_gmd = torch.bmm(weight_gmk, values[row][:, :n_keys].to(dtype))
        out[i, :, :n_queries] = out_gmd.view(n_heads, n_queries, head_dim)
    return out * sighted.to(q.dtype) if sighted.numel() else out


def rows_bias(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, slopes_gr11: Tensor, plan: TilePlan | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`sighted` [B, 1, Lq, 1] as `dense_geometry` has it, empty if padding alone is blind; and of each row the bias
    [Hkv, G·q, k] of its queries over its keys. Kept in the plan for the next layer, whose slopes are the same as a
    rule.
    """
    key = f"rows {slopes_gr11.dtype}"
    if plan is not None and key in plan.memo:
        q_seen, k_seen, slopes_seen, sighted, *kept = plan.memo[key]
        if q_seen is q_position and k_seen is k_position and torch.equal(slopes_seen, slopes_gr11):
            return sighted, tuple(kept)
    n_keys, dtype = k_position.shape[1], slopes_gr11.dtype
    blind_bq = blind_queries(ranges, n_keys)
    # up to the last query of a row that sees a key; those of shorter rows are padding behind it
    n_queries = (blind_bq.logical_not() * torch.arange(1, blind_bq.shape[1] + 1)).amax(1)
    sighted = slopes_gr11.new_empty(0)
    if bool((blind_bq.sum(1) + n_queries > blind_bq.shape[1]).any()):
        sighted = blind_bq.logical_not()[:, None, :, None].to(dtype)
    biases = []
    for i, (n, end) in enumerate(zip(n_queries.tolist(), row_ends(ranges, n_keys).tolist(), strict=True)):
        here = ranges[i : i + 1, :n], q_position[i : i + 1, :n], k_position[i : i + 1, :end]
        distance, mask, _ = dense_geometry(*here, dtype, None)
        biases.append(torch.addcmul(mask[0], distance[0], slopes_gr11, value=-1).view(len(slopes_gr11), -1, end))
    if plan is not None:
        plan.memo[key] = (q_position, k_position, slopes_gr11, sighted, *biases)
    return sighted, tuple(biases)
