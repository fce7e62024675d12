"""Interval attention on the CPU: one dense tile for small problems, a loop over tiles for the others.

    small (Lq · Lk up to DENSE_LIMIT)    plain operations, differentiated by torch: overhead is all that counts
    otherwise                            per tile of queries, only the key slices its plan names:

        score = −slope·|distance| (−inf where hidden) + scale · q kᵀ      [B·Hkv, G·tile, keys of the slices]
        out   = softmax(score) v

    Nothing is kept for the backward pass, which recomputes the weights tile by tile (Dao et al. 2022,
    "FlashAttention", section 3). A tile holds whole rows of the softmax, so unlike on a GPU no log Σ exp is
    stored: a second softmax costs less than exp(score − lse), because torch.exp is slower than the exp inside it.

Shape letters: b batch, g key head, r query head within its group, h = g·r, q query, k key, d head dimension,
z = b·g, m = r·q rows of one batched matrix product.
"""

import torch
from torch import Tensor

from tidal.kernels.operators import operator, without_gradient
from tidal.kernels.plan import TilePlan

softmax_backward = torch.ops.aten._softmax_backward_data.default  # weight · (dweight − Σ weight · dweight), fused

DENSE_LIMIT = 2**14
"""largest Lq · Lk that is computed as one dense tile"""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    slopes: Tensor,
    scale: float,
    plan: TilePlan | None,
) -> Tensor:
    """Shapes and dtypes as in :func:`tidal.kernels.interval_attention`."""
    if q.shape[2] * k.shape[2] <= DENSE_LIMIT:
        dtype = torch.promote_types(q.dtype, torch.float32)
        geometry = dense_geometry(ranges, q_position, k_position, dtype, plan)
        return one_tile(q.to(dtype) * scale, k.to(dtype), v.to(dtype), slopes.to(dtype), *geometry).to(q.dtype)
    if plan is None:
        plan = TilePlan.build(ranges, k.shape[2])
    out: Tensor = attend_tiled(q, k, v, ranges, q_position, k_position, slopes, plan.slices, plan.tile_q, scale)
    return out


def blind_queries(ranges: Tensor, n_keys: int) -> Tensor:
    """bool [B, Lq]: the queries that see no key."""
    return (ranges[..., 1].clamp(max=n_keys) - ranges[..., 0].clamp(min=0)).amax(dim=2) <= 0


def tile_geometry(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, index_k: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Distances, and 0 or −inf for the mask, of one tile.

    Args:
        ranges: int32 [B, q, 2, 2].
        q_position: float32 [B, q].
        k_position: float32 [B, k].
        index_k: int32 [k], the key indices of the tile, or None if every query sees all of them.
        dtype: of the statistics.

    Returns:
        |distance| [B, 1, 1, q, k]; mask [B, 1, 1, q, k] or None.
    """
    distance_bqk = (q_position.to(dtype)[:, :, None] - k_position.to(dtype)[:, None, :]).abs_()
    if index_k is None:
        return distance_bqk[:, None, None], None
    start_0, end_0, start_1, end_1 = ranges.flatten(2).unsqueeze(-1).unbind(2)
    seen_bqk = (index_k >= start_0).logical_and_(index_k < end_0)
    seen_bqk.logical_or_((index_k >= start_1).logical_and_(index_k < end_1))
    mask_bqk = torch.where(seen_bqk, 0.0, float("-inf")).to(dtype)
    return distance_bqk[:, None, None], mask_bqk[:, None, None]


# ------------------------------------------------------------------------------------------ one dense tile


def one_tile(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, distance: Tensor, mask: Tensor, sighted: Tensor
) -> Tensor:
    """The whole score matrix as one tile: out [B, Hq, Lq, D].

    q [B, Hq, Lq, D] times the scale, k, v [B, Hkv, Lk, D] and slopes [Hq], in the dtype of the statistics; distance,
    mask and sighted as `dense_geometry` gives them.
    """
    (n_batch, n_heads, n_queries, head_dim), (n_kv_heads, n_keys) = q.shape, k.shape[1:3]
    n_products, n_rows = n_batch * n_kv_heads, n_heads // n_kv_heads * n_queries
    slopes_gr11 = slopes.view(n_kv_heads, -1, 1, 1)
    bias_zmk = torch.addcmul(mask, distance, slopes_gr11, value=-1).view(n_products, n_rows, n_keys)
    q_zmd = q.reshape(n_products, n_rows, head_dim)
    k_zkd, v_zkd = (x.reshape(n_products, n_keys, head_dim) for x in (k, v))
    weight_zmk = torch.baddbmm(bias_zmk, q_zmd, k_zkd.transpose(1, 2)).softmax(dim=-1)
    out = torch.bmm(weight_zmk, v_zkd).view(q.shape)
    return out * sighted if sighted.numel() else out


def dense_geometry(
    ranges: Tensor, q_position: Tensor, k_position: Tensor, dtype: torch.dtype, plan: TilePlan | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance and mask [B, 1, 1, Lq, Lk], and sighted [B, 1, Lq, 1]: 0 for queries without keys, else 1.

    Blind queries get a mask of zeros, so that no softmax is NaN. If there are none, sighted is empty (in a
    compiled graph this cannot be known, and it is always given).
    """
    compiling = torch.compiler.is_compiling()
    key = f"dense {dtype} {torch.is_inference_mode_enabled()}" if not compiling else ""
    if plan is not None and not compiling and key in plan.memo:
        q_seen, k_seen, distance, mask, sighted = plan.memo[key]
        if q_seen is q_position and k_seen is k_position:
            return distance, mask, sighted
    index_k = torch.arange(k_position.shape[1], dtype=torch.int32, device=ranges.device)
    distance, mask_or_none = tile_geometry(ranges, q_position, k_position, index_k, dtype)
    assert mask_or_none is not None
    mask = mask_or_none
    blind_bq = blind_queries(ranges, k_position.shape[1])
    if compiling or bool(blind_bq.any()):
        mask = mask.masked_fill(blind_bq[:, None, None, :, None], 0.0)
        sighted = blind_bq.logical_not()[:, None, :, None].to(dtype)
    else:
        sighted = mask.new_empty(0)
    if plan is not None and not compiling:
        plan.memo[key] = (q_position, k_position, distance, mask, sighted)
    return distance, mask, sighted


# ------------------------------------------------------------------------------------------ loop over tiles


def key_slices(slices: list[list[int]]) -> tuple[list[tuple[int, int]], bool]:
    """The non-empty (start, end) of one tile of the plan, and whether all of them are full."""
    live = [(start, end, full) for start, end, full in slices if start < end]
    return [(start, end) for start, end, _ in live], all(full for _, _, full in live)


def take(x: Tensor, slices: list[tuple[int, int]], dim: int) -> Tensor:
    """The slices of x along dim, next to each other (a view if there is only one)."""
    parts = [x.narrow(dim, start, end - start) for start, end in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Tiles:
    """Operands of both passes in the dtype of the statistics, and the scores of any one tile."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: Tensor,
        q_position: Tensor,
        k_position: Tensor,
        slopes: Tensor,
        tile_q: int,
        scale: float,
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.n_batch, self.n_heads, self.n_queries, self.head_dim = q.shape
        self.n_kv_heads, self.n_keys = k.shape[1], k.shape[2]
        self.n_products = self.n_batch * self.n_kv_heads
        self.tile_q, self.scale = tile_q, scale
        self.k_zkd = k.to(self.dtype).reshape(self.n_products, self.n_keys, self.head_dim)
        self.v_zkd = v.to(self.dtype).reshape(self.n_products, self.n_keys, self.head_dim)
        self.ranges, self.q_position, self.k_position = ranges, q_position, k_position
        self.slopes_gr11 = slopes.to(self.dtype).view(self.n_kv_heads, -1, 1, 1)
        self.index_k = torch.arange(self.n_keys, dtype=torch.int32)
        self.blind_bq = blind_queries(ranges, self.n_keys)

    def rows(self, x_bhqd: Tensor, tile: int) -> Tensor:
        """The queries of one tile of x [B, Hq, Lq, D] as [B·Hkv, G·tile, D]."""
        x_tile = x_bhqd.narrow(2, tile * self.tile_q, self.width(tile))
        return x_tile.reshape(self.n_products, -1, self.head_dim).to(self.dtype)

    def width(self, tile: int) -> int:
        """Number of queries of a tile."""
        return min(self.tile_q, self.n_queries - tile * self.tile_q)

    def unrows(self, x_zmd: Tensor) -> Tensor:
        """[B·Hkv, G·tile, D] → [B, Hq, tile, D]."""
        return x_zmd.view(self.n_batch, self.n_heads, -1, x_zmd.shape[-1])

    def weights(
        self, tile: int, slices: list[tuple[int, int]], full: bool, q_zmd: Tensor, k_zkd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """softmax(score) [B·Hkv, G·tile, k] and |distance| [B, 1, 1, tile, k]."""
        first, width = tile * self.tile_q, self.width(tile)
        distance, mask = tile_geometry(
            self.ranges.narrow(1, first, width),
            self.q_position.narrow(1, first, width),
            take(self.k_position, slices, 1),
            None if full else take(self.index_k, slices, 0),
            self.dtype,
        )
        blind = None
        if mask is None:
            bias = distance * -self.slopes_gr11
        else:
            blind_bq = self.blind_bq.narrow(1, first, width)
            if bool(blind_bq.any()):  # a row of only −inf would be NaN in the softmax
                blind = blind_bq[:, None, None, :, None]
                mask.masked_fill_(blind, 0.0)
            bias = torch.addcmul(mask, distance, self.slopes_gr11, value=-1)
        score_zmk = bias.view(*q_zmd.shape[:2], k_zkd.shape[1])
        score_zmk.baddbmm_(q_zmd, k_zkd.transpose(1, 2), alpha=self.scale)
        weight_zmk = score_zmk.softmax(dim=-1)
        if blind is not None:
            weight_zmk.view(bias.shape).masked_fill_(blind, 0.0)
        return weight_zmk, distance


@operator("tidal::interval_attention_cpu")
def attend_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    slopes: Tensor,
    slices: Tensor,
    tile_q: int,
    scale: float,
) -> Tensor:
    """Attention by tiles: out [B, Hq, Lq, D] in the dtype of q. `slices` and `tile_q` are of the TilePlan."""
    tiles = Tiles(q, k, v, ranges, q_position, k_position, slopes, tile_q, scale)
    out = torch.zeros(q.shape, dtype=q.dtype)
    for tile, bounds in enumerate(slices.tolist()):
        live, full = key_slices(bounds)
        if not live:
            continue
        k_zkd, v_zkd = take(tiles.k_zkd, live, 1), take(tiles.v_zkd, live, 1)
        weight_zmk, _ = tiles.weights(tile, live, full, tiles.rows(q, tile), k_zkd)
        out.narrow(2, tile * tile_q, tiles.width(tile)).copy_(tiles.unrows(torch.bmm(weight_zmk, v_zkd)))
    return out


@operator("tidal::interval_attention_cpu_backward")
def attend_tiled_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    slopes: Tensor,
    slices: Tensor,
    tile_q: int,
    scale: float,
    need_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and slopes, in their shapes and dtypes; that of slopes is zeros unless `need_slopes`.

    dout [B, Hq, Lq, D] is the gradient of the output.
    """
    tiles = Tiles(q, k, v, ranges, q_position, k_position, slopes, tile_q, scale)
    dq = torch.zeros(q.shape, dtype=q.dtype)
    dk_zkd = torch.zeros_like(tiles.k_zkd, memory_format=torch.contiguous_format)
    dv_zkd = torch.zeros_like(tiles.v_zkd, memory_format=torch.contiguous_format)
    dslopes_gr = torch.zeros(tiles.slopes_gr11.shape[:2], dtype=tiles.dtype)
    for tile, bounds in enumerate(slices.tolist()):
        live, full = key_slices(bounds)
        if not live:
            continue
        k_zkd, v_zkd = take(tiles.k_zkd, live, 1), take(tiles.v_zkd, live, 1)
        q_zmd, dout_zmd = tiles.rows(q, tile), tiles.rows(dout, tile)
        weight_zmk, distance = tiles.weights(tile, live, full, q_zmd, k_zkd)
        dweight_zmk = torch.bmm(dout_zmd, v_zkd.transpose(1, 2))
        dscore_zmk = softmax_backward(dweight_zmk, weight_zmk, -1, tiles.dtype)
        span = slice(tile * tile_q, tile * tile_q + tiles.width(tile))
        dq[:, :, span] = tiles.unrows(torch.bmm(dscore_zmk, k_zkd).mul_(scale))
        dk_part = torch.bmm(dscore_zmk.transpose(1, 2), q_zmd)
        dv_part = torch.bmm(weight_zmk.transpose(1, 2), dout_zmd)
        offset = 0
        for start, end in live:
            dk_zkd[:, start:end].add_(dk_part[:, offset : offset + end - start], alpha=scale)
            dv_zkd[:, start:end] += dv_part[:, offset : offset + end - start]
            offset += end - start
        if need_slopes:
            dscore = dscore_zmk.view(tiles.n_batch, tiles.n_kv_heads, -1, *distance.shape[3:])
            dslopes_gr -= (dscore * distance).sum(dim=(0, 3, 4))
    dk, dv = dk_zkd.view(k.shape).to(k.dtype), dv_zkd.view(v.shape).to(v.dtype)
    return dq, dk, dv, dslopes_gr.view(-1).to(slopes.dtype)


torch.library.register_fake(attend_tiled, lambda q, *_: q.new_empty(q.shape))
torch.library.register_fake(attend_tiled_backward, lambda _dout, q, k, v, _ranges, _qp, _kp, slopes, *_: tuple(
    x.new_empty(x.shape) for x in (q, k, v, slopes)
))  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.tile_q, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):  # type: ignore[no-untyped-def]
    need_slopes = ctx.needs_input_grad[6]
    with torch.autocast("cpu", enabled=False):  # as in the forward pass, should this one be called inside of it, too
        dq, dk, dv, dslopes = attend_tiled_backward(dout, *ctx.saved_tensors, ctx.tile_q, ctx.scale, need_slopes)
    return dq, dk, dv, None, None, None, (dslopes if need_slopes else None), None, None, None


torch.library.register_autograd(attend_tiled, _backward, setup_context=_setup_context)
without_gradient(attend_tiled_backward)
