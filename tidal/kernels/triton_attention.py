"""The ``triton`` backend: tile configurations, launches, and the operators that torch sees.

    tidal::interval_plan                       triton_plan.py     once per batch and tile shape, kept in the plan
    tidal::interval_attention_triton           out, lse           forward
    tidal::interval_attention_triton_backward  dq, dk, dv, dslopes

The backward pass is deterministic: every gradient is summed by one program or, over the heads of a group and for
the slopes, by torch from partial sums. The backend ``triton-atomic``, which must be asked for by name, is not: its
programs add up dq as they come, which spares two of seven matrix products. Runs on NVIDIA GPUs from sm_80 on; with
TRITON_INTERPRET=1 also on the CPU, slowly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tidal.kernels import triton_backward, triton_decode, triton_forward
from tidal.kernels.operators import learning, operator, without_gradient
from tidal.kernels.plan import TilePlan
from tidal.kernels.triton_plan import HEAD, tables
from tidal.kernels.triton_tiles import DTYPES, HEAD_DIMS, INTERPRETED

DEVICES = ("cuda", "cpu") if INTERPRETED.value else ("cuda",)


class Tile(NamedTuple):
    """How a kernel is launched."""

    m: int
    """queries per tile"""
    n: int
    """keys per tile"""
    warps: int
    stages: int
    """tiles in flight from global to shared memory"""


class Config(NamedTuple):
    """The tiles of the kernels of both passes, for one dtype, head dimension and architecture."""

    forward: Tile
    dq: Tile
    dq_slopes: Tile
    """for dq where the slopes are learned, too"""
    dkdv: Tile
    dkdv_atomic: Tile
    """for dkdv where it adds up dq, too"""


TILES: dict[tuple[int, int, int], tuple[tuple[int, int, int, int], ...]] = {
    # (bytes per element, head dimension, architecture): forward, dq, dq_slopes, dkdv, dkdv_atomic
    (2, 32, 80): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
    (2, 32, 90): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
    (2, 32, 100): ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
    (2, 64, 80): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3)),
    (2, 64, 90): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3)),
    (2, 64, 100): ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3)),
    (2, 128, 80): ((128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2), (32, 64, 8, 3)),
    (2, 128, 90): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3)),
    (2, 128, 100): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3)),
    (4, 32, 80): ((64, 32, 8, 1), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    (4, 64, 80): ((64, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    (4, 128, 80): ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 2), (16, 16, 8, 1)),
}
"""No spills; the next tile is on its way while one is computed, for which Triton needs three stages; of what is left
the fewest instructions a score. As compiled ahead of time (`python -m benchmarks.kernel_resources`); not yet timed on a
GPU (`python -m benchmarks.attention_tiles` is for that). With one or two stages (float32, and where three spill or pass
the 99 KB of shared memory that small GPUs have) a tile is waited for as soon as it is asked for."""

CONFIGS = {kind: Config(*(Tile(*tile) for tile in tiles)) for kind, tiles in TILES.items()}

INTERPRETER = Config(*[Tile(32, 32, 4, 1)] * 5)
DELTA = Tile(32, 0, 4, 1)


def configuration(dtype: torch.dtype, head_dim: int, arch: int) -> Config:
    """The tiles for an architecture (compute capability × 10; 0 for the interpreter).

    float32 has one for all. GPUs not listed get the tiles of sm_80, which need less than 99 KB of shared memory.
    """
    if arch == 0:
        return INTERPRETER
    family = arch // 10 * 10
    return CONFIGS.get((dtype.itemsize, head_dim, family)) or CONFIGS[dtype.itemsize, head_dim, 80]


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel for this dtype and head dimension. There is none for float64."""
    return dtype in DTYPES and head_dim in HEAD_DIMS


def architecture(device: torch.device) -> int:
    """Compute capability × 10 of a GPU; 0 in the interpreter."""
    if INTERPRETED.value:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# What torch.compiler.assume_constant_result does; to import that takes longer than all of torch.
architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, q_position: Tensor, k_position: Tensor, slopes: Tensor,
           scale: float, plan: TilePlan | None, config: Config | None = None, atomic: bool = False,
           rows: Sequence[int] | None = None) -> Tensor:  # fmt: skip
    """Shapes and dtypes as in :func:`tidal.kernels.interval_attention`; `config` replaces the tiles chosen by device.

    Without gradients, up to 64 queries go to the decode kernel, unless a config is given; only that one takes `rows`.

    Raises:
        ValueError: `atomic`, and slopes need a gradient, which is made by the kernel that is left out.
    """
    if atomic and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("backend 'triton-atomic' has no gradient of slopes; take 'triton'")
    if config is None:
        if decodes(q, k, v, slopes):
            kv_rows = None if rows is None else triton_decode.on_device(tuple(rows), q.device)
            decoded: Tensor = triton_decode.decode(q, k, v, ranges, q_position, k_position, slopes, scale, kv_rows)
            return decoded
        config = configuration(q.dtype, q.shape[-1], architecture(q.device))
    dq, dkdv = backward_tiles(config, atomic, slopes.requires_grad)
    wanted = needed(config.forward, dq, dkdv, learning(q, k, v, slopes))
    table, order, *backward_plan = tables(plan, ranges, q_position, k_position, wanted)
    tiles = [*config.forward, *dq, *dkdv]
    out: Tensor = attend_fused(
        q, k, v, ranges, q_position, k_position, slopes, table, order, backward_plan, scale, tiles, atomic
    )[0]
    return out


def decodes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> bool:
    """Whether :func:`attend` hands these to the decode kernel, which reads rows of a cache where they lie."""
    return not learning(q, k, v, slopes) and q.shape[2] <= triton_decode.MOST_QUERIES


def backward_tiles(config: Config, atomic: bool, slopes: bool) -> tuple[Tile, Tile]:
    """The tiles of dq and dkdv. In the atomic form, which has no kernel for dq, that of the forward pass stands for it:
    its table is there anyway."""
    if atomic:
        return config.forward, config.dkdv_atomic
    return config.dq_slopes if slopes else config.dq, config.dkdv


def needed(forward: Tile, dq: Tile, dkdv: Tile, learning: bool) -> list[tuple[int, int, bool]]:
    """The tables of the plan that these kernels read, each as (tile_q, tile_k, transpose)."""
    wanted = [(forward, False), (dq, False), (dkdv, True)] if learning else [(forward, False)]
    return [(tile.m, tile.n, transpose) for tile, transpose in wanted]


def prepare(
    plan: TilePlan, ranges: Tensor, q_position: Tensor, k_position: Tensor, dtype: torch.dtype, head_dim: int,
    atomic: bool = False,
) -> None:  # fmt: skip
    """Fill the plan with the tables that :func:`attend` will ask it for if slopes have no gradient.

    `head_dim` and `dtype` are those of the queries to come.
    """
    config = configuration(dtype, head_dim, architecture(ranges.device))
    wanted = needed(config.forward, *backward_tiles(config, atomic, slopes=False), torch.is_grad_enabled())
    tables(plan, ranges, q_position, k_position, wanted)


def constants(q: Tensor, tile: Tile) -> dict[str, int]:
    """Keyword arguments of a launch: the constants an attention kernel is compiled for, warps and stages."""
    fast = q.dtype != torch.float32
    return {
        "M": tile.m, "N": tile.n, "D": q.shape[-1], "FAST": fast, "num_warps": tile.warps, "num_stages": tile.stages
    }  # fmt: skip


def with_rows(x: Tensor) -> Tensor:
    """x, copied unless its last dimension is contiguous, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor shaped like x [B, H, L, D] that lies in memory as [B, L, H, D], as the model wants it."""
    n_batch, n_heads, length, head_dim = x.shape
    return x.new_empty(n_batch, length, n_heads, head_dim, dtype=dtype).transpose(1, 2)


def strides(*tensors: Tensor) -> list[int]:
    """The strides of batch, head and row of every tensor [B, H, L, D], one after another."""
    return [stride for x in tensors for stride in x.stride()[:3]]


@operator("tidal::interval_attention_triton")
def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, q_position: Tensor, k_position: Tensor, slopes: Tensor,
    rows: Tensor, order: Tensor, backward_plan: Sequence[Tensor], scale: float, tiles: Sequence[int], atomic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward pass.

    Args:
        rows, order: what :func:`interval_plan` returns for the forward tile.
        backward_plan: what it returns for dq's tile, and transposed for dkdv's; empty where nothing is learned.
        tiles: the fields of three :class:`Tile`: forward, dq, dkdv.
        atomic: whether dkdv will add up dq, too.

    Returns:
        out [B, Hq, Lq, D] in the dtype of q; lse float32 [B, Hq, Lq], log Σ exp(score), to base 2 unless q is float32;
        +inf for queries without keys.
    """
    out, lse = heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("inf"))
    q, k, v = with_rows(q), with_rows(k), with_rows(v)
    (n_batch, n_heads, n_queries, _), (n_kv_heads, n_keys) = q.shape, k.shape[1:3]
    n_tiles = rows.shape[1]
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        triton_forward.forward_kernel[(n_batch * n_tiles, n_heads)](
            q, k, v, out, lse, ranges.contiguous(), q_position.contiguous(), k_position.contiguous(),
            slopes.float().contiguous(), rows, order, *strides(q, k, v, out),
            n_heads, n_heads // n_kv_heads, n_queries, n_keys, n_tiles, scale, **constants(q, Tile(*tiles[:4])),
        )  # fmt: skip
    return out, lse


@operator("tidal::interval_attention_triton_backward")
def attend_fused_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, q_position: Tensor, k_position: Tensor,
    slopes: Tensor, out: Tensor, lse: Tensor, backward_plan: Sequence[Tensor], scale: float, tiles: Sequence[int],
    atomic: bool, need_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and slopes, in their shapes and dtypes; that of slopes is zeros unless `need_slopes`.

    dout [B, Hq, Lq, D] is the gradient of `out`; the other arguments are the forward pass's and its results.
    """
    dq, dk, dv, dslopes = heads_last(q), heads_last(k), heads_last(v), torch.zeros_like(slopes)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dslopes
    rows, rows_order, columns, columns_order = backward_plan
    dout, q, k, v = with_rows(dout), with_rows(q), with_rows(k), with_rows(v)
    ranges, q_position, k_position = ranges.contiguous(), q_position.contiguous(), k_position.contiguous()
    (n_batch, n_heads, n_queries, head_dim), (n_kv_heads, n_keys) = q.shape, k.shape[1:3]
    group, (n_query_tiles, n_key_tiles) = n_heads // n_kv_heads, (rows.shape[1], columns.shape[1])
    delta, slopes_float = torch.empty_like(lse), slopes.float().contiguous()
    partial = lse.new_empty(n_batch * n_query_tiles, n_heads)
    # The heads of a group are separate programs: each writes its share, in float32, for torch to add up.
    dk_part, dv_part = dk, dv
    if group > 1:
        dk_part, dv_part = lse.new_empty(2, n_batch, n_heads, n_keys, head_dim).unbind(0)
    dq_sum = heads_last(q, torch.float32).zero_() if atomic else dq
    tile_q, tile_k = Tile(*tiles[4:8]), Tile(*tiles[8:12])
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        triton_backward.delta_kernel[(n_batch * -(-n_queries // DELTA.m), n_heads)](
            out, dout, delta, *strides(out, dout), n_heads, n_queries, M=DELTA.m, D=head_dim, num_warps=DELTA.warps
        )
        if not atomic:
            triton_backward.dq_kernel[(n_batch * n_query_tiles, n_heads)](
                q, k, v, dout, lse, delta, dq, partial, ranges, q_position, k_position, slopes_float, rows, rows_order,
                *strides(q, k, v, dout, dq), n_heads, group, n_queries, n_keys, n_query_tiles, scale,
                SLOPES=need_slopes, **constants(q, tile_q),
            )  # fmt: skip
        triton_backward.dkdv_kernel[(n_batch * n_key_tiles, n_heads)](
            q, k, v, dout, lse, delta, dk_part, dv_part, dq_sum, ranges, q_position, k_position, slopes_float, columns,
            columns_order, *strides(q, k, v, dout, dk_part, dq_sum), n_heads, group, n_queries, n_keys, n_key_tiles,
            (columns.shape[2] - HEAD.value) // 2, scale, ATOMIC=atomic, **constants(q, tile_k),
        )  # fmt: skip
    if atomic:
        dq.copy_(dq_sum)
    if group > 1:
        by_group = (n_batch, n_kv_heads, group, n_keys, head_dim)
        dk.copy_(dk_part.view(by_group).sum(2))
        dv.copy_(dv_part.view(by_group).sum(2))
    if need_slopes:
        dslopes.copy_(partial.sum(0))
    return dq, dk, dv, dslopes


torch.library.register_fake(attend_fused, lambda q, *_: (
    heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
))  # fmt: skip
torch.library.register_fake(attend_fused_backward, lambda _dout, q, k, v, _ranges, _qp, _kp, slopes, *_: (
    heads_last(q), heads_last(k), heads_last(v), torch.zeros_like(slopes)
))  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _rows, _order, backward_plan, ctx.scale, ctx.tiles, ctx.atomic = inputs
    ctx.save_for_backward(*tensors, *output, *backward_plan)


def _backward(ctx, dout, _dlse):  # type: ignore[no-untyped-def]
    tensors, backward_plan = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    need_slopes = ctx.needs_input_grad[6]
    dq, dk, dv, dslopes = attend_fused_backward(
        dout, *tensors, backward_plan, ctx.scale, ctx.tiles, ctx.atomic, need_slopes
    )
    dslopes = dslopes if need_slopes else None
    return dq, dk, dv, None, None, None, dslopes, None, None, [None] * len(backward_plan), None, None, None


torch.library.register_autograd(attend_fused, _backward, setup_context=_setup_context)
without_gradient(attend_fused_backward)
