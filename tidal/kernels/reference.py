"""The oracle: interval attention written densely in plain torch operations.

Shape letters: b batch, h query head, g key head, q query, k key, d head dimension.
"""

import torch
from torch import Tensor

from tidal.kernels.plan import TilePlan


def visible_keys(ranges: Tensor, n_keys: int) -> Tensor:
    """Which keys each query sees.

    Args:
        ranges: int32 [B, Lq, 2, 2], two half-open ranges [start, end) per query.
        n_keys: Lk.

    Returns:
        bool [B, Lq, Lk], the union of the two ranges.
    """
    index_k = torch.arange(n_keys, device=ranges.device)
    start_bqr1, end_bqr1 = ranges[..., 0, None], ranges[..., 1, None]
    return ((index_k >= start_bqr1) & (index_k < end_bqr1)).any(dim=2)


def alibi_bias(q_position: Tensor, k_position: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi, −slope · |distance|: [B, Lq], [B, Lk], [Hq] → [B, Hq, Lq, Lk]."""
    distance_b1qk = (q_position[:, None, :, None] - k_position[:, None, None, :]).abs()
    return -slopes[:, None, None] * distance_b1qk


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, ranges: Tensor, q_position: Tensor, k_position: Tensor,
           slopes: Tensor, scale: float, plan: TilePlan | None = None) -> Tensor:  # fmt: skip
    """Dense attention; shapes as in :func:`tidal.kernels.interval_attention`, the plan is not needed."""
    del plan
    dtype = torch.promote_types(q_bhqd.dtype, torch.float32)
    group = q_bhqd.shape[1] // k_bgkd.shape[1]
    k_bhkd = k_bgkd.to(dtype).repeat_interleave(group, dim=1)
    v_bhkd = v_bgkd.to(dtype).repeat_interleave(group, dim=1)

    score_bhqk = scale * (q_bhqd.to(dtype) @ k_bhkd.transpose(-1, -2))
    score_bhqk = score_bhqk + alibi_bias(q_position.to(dtype), k_position.to(dtype), slopes.to(dtype))

    visible_b1qk = visible_keys(ranges, k_bgkd.shape[2])[:, None]
    blind_b1q1 = ~visible_b1qk.any(dim=-1, keepdim=True)
    # A row of only −inf would be NaN in the softmax: give blind queries equal scores, then no weight.
    score_bhqk = score_bhqk.masked_fill(~visible_b1qk, float("-inf")).masked_fill(blind_b1q1, 0.0)
    weight_bhqk = score_bhqk.softmax(dim=-1).masked_fill(~visible_b1qk, 0.0)
    return (weight_bhqk @ v_bhkd).to(q_bhqd.dtype)
