"""The public function: checks the arguments, chooses a backend, calls it."""

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidal.kernels import cpu, cpu_rows, reference
from tidal.kernels.operators import learning, moving
from tidal.kernels.plan import TilePlan

BACKEND_VARIABLE = "TIDAL_ATTENTION_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to compute interval attention."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, TilePlan | None], Tensor]
    """function(q, k, v, ranges, q_position, k_position, slopes, scale, plan)"""
    devices: tuple[str, ...] | None = None
    """device types it runs on; None: all"""
    preferred_on: tuple[str, ...] = ()
    """device types where it is taken when no backend is asked for"""
    takes_rows: Callable[[Tensor, Tensor, Tensor, Tensor], bool] = lambda q, k, v, slopes: False
    """function(q, k, v, slopes): whether `attend` takes `rows`, too, and reads those of k and v where they lie"""
    supports: Callable[[torch.dtype, int], bool] = lambda dtype, head_dim: True
    """function(dtype, head_dim): whether it has a kernel for them"""
    prepare: Callable[[TilePlan, Tensor, Tensor, Tensor, torch.dtype, int], None] | None = None
    """function(plan, ranges, q_position, k_position, dtype, head_dim): what :func:`prepare` does; None: nothing"""
    learns_slopes: bool = True
    """whether slopes get a gradient"""


BACKENDS = {
    "reference": Backend(reference.attend),
    "cpu": Backend(cpu.attend, devices=("cpu",), preferred_on=("cpu",)),
}
"""by name; where several are preferred, the first that supports the tensors, and the reference where none does"""

if importlib.util.find_spec("triton"):  # operators are registered here, before anything is traced
    from tidal.kernels import triton_attention

    BACKENDS["triton"] = Backend(
        triton_attention.attend, devices=triton_attention.DEVICES, preferred_on=("cuda",),
        takes_rows=triton_attention.decodes, supports=triton_attention.supports, prepare=triton_attention.prepare,
    )  # fmt: skip
    BACKENDS["triton-atomic"] = dataclasses.replace(
        BACKENDS["triton"], attend=functools.partial(triton_attention.attend, atomic=True), preferred_on=(),
        prepare=functools.partial(triton_attention.prepare, atomic=True), learns_slopes=False,
    )  # fmt: skip

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` and TIDAL_ATTENTION_BACKEND accept here."""
    return tuple(BACKENDS)


def alibi_slopes(n_heads: int) -> Tensor:
    """Slopes of ALiBi (Press, Smith & Lewis, "Train Short, Test Long", ICLR 2022, section 3 and its code).

    For a power of two the geometric sequence (2^(−8/n))^(i+1), i = 0 … n−1. Otherwise the slopes of the next
    lower power of two, then every second one of the sequence for twice as many heads.

    Returns:
        float32 [n_heads].
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")

    def sequence(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(math.log2(n_heads))
    slopes = sequence(lower) + sequence(2 * lower)[0::2][: n_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
    plan: TilePlan | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Attention in which query i sees the keys in the union of its two ranges.

    ::

        score[i, j] = scale · q_i·k_j − slope_h · |q_position_i − k_position_j|      j in the ranges of i
        out[i]      = Σ_j softmax_j(score[i, j]) · v_j                               0 if i sees no key

    Args:
        q: [B, Hq, Lq, D] in float32, float64, bfloat16 or float16. Statistics are kept in float32 (float64 for
            float64).
        k: [B, Hkv, Lk, D], same dtype; Hq is a multiple of Hkv, query head h uses key head h // (Hq / Hkv).
        v: [B, Hkv, Lk, D], same dtype.
        ranges: int32 [B, Lq, 2, 2], two half-open ranges [start, end) of key indices per query. Empty where
            end <= start; where they overlap, a key counts once.
        q_position: float32 [B, Lq].
        k_position: float32 [B, Lk].
        slopes: floating point [Hq]; may require a gradient.
        scale: D ** -0.5 unless given.
        backend: a name from :func:`available_backends`; otherwise the environment variable
            TIDAL_ATTENTION_BACKEND, otherwise by device (on a GPU the fused kernels, where they have the dtype and
            the head dimension).
        plan: ``TilePlan.build(ranges, Lk)``, to be shared by all layers that use these ranges and positions;
            built inside when missing.
        rows: for each row of q, the row of k and v that it attends to. k and v may then have any number of rows: those
            of a cache are attended to where they lie, if that is cheaper than copying them (on a GPU for up to 64
            queries) and no gradients are wanted. On a CPU each row then ends at the last key that it sees, where
            lengths differ much. If missing, row i of q attends to row i.

    Keys that no range names have no influence as long as they are finite (an empty cache may hold anything
    that does not overflow).

    Returns:
        [B, Hq, Lq, D] in the dtype of q. Differentiable in q, k, v and slopes: once and backwards, but with
        `backend="reference"` as often and in whatever way torch can.

    Raises:
        ValueError: shapes, dtypes, rows or devices that do not fit, positions or a scale that are to learn, a
            forward-mode derivative, a backend that does not exist or cannot run here.
    """
    check_arguments(q, k, v, ranges, q_position, k_position, slopes, plan, rows)
    name = choose_backend(q.device, q.dtype, q.shape[-1], backend)
    if name != "reference" and moving(q, k, v, slopes):
        raise ValueError(f"there is no forward-mode derivative in backend {name!r}; backend='reference' has one")
    attend: Callable[..., Tensor] = BACKENDS[name].attend
    if rows is not None:
        if name == "cpu" and not learning(q, k, v, slopes) and cpu_rows.in_place(q, k, ranges, rows, plan):
            attend = functools.partial(cpu_rows.attend_rows, rows=rows)
        elif cpu_rows.all_in_order(rows, k):
            pass
        elif BACKENDS[name].takes_rows(q, k, v, slopes):
            attend = functools.partial(attend, rows=rows)
        else:  # whole stretches: a half to a quarter of the time of indexing
            k, v = (torch.stack([x[row] for row in rows]) for x in (k, v))
    if isinstance(scale, Tensor):
        raise ValueError(f"scale is {scale!r}; it must be a number (multiply q by a learned one)")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.is_autocast_enabled(q.device.type):  # a backend says itself what it computes in which precision
        with torch.autocast(q.device.type, enabled=False):
            return attend(q, k, v, ranges, q_position, k_position, slopes, scale, plan)
    return attend(q, k, v, ranges, q_position, k_position, slopes, scale, plan)


def prepare(
    plan: TilePlan, ranges: Tensor, q_position: Tensor, k_position: Tensor, dtype: torch.dtype, head_dim: int
) -> None:
    """Fill the plan with what all layers need of the ranges and positions, before layers that are compiled one by one.

    A compiled graph reads what a plan remembers, but cannot add to it: each layer would compute it anew.

    Args:
        plan: the plan that the layers will be given.
        ranges: int32 [B, Lq, 2, 2], what they will be given with it.
        q_position: float32 [B, Lq], the same.
        k_position: float32 [B, Lk], the same.
        dtype: of their q; under autocast, autocast's is taken.
        head_dim: of their q.
    """
    if torch.is_autocast_enabled(ranges.device.type):
        dtype = torch.get_autocast_dtype(ranges.device.type)
    chosen = BACKENDS[choose_backend(ranges.device, dtype, head_dim, None)]
    if chosen.prepare is not None:
        chosen.prepare(plan, ranges, q_position, k_position, dtype, head_dim)


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, asked: str | None) -> str:
    """The backend asked for, else the environment's, else the preferred one for the device, dtype and head dimension.

    Only the last of these has alternatives: on a GPU, float64 and head dimensions that the kernels do not have go to
    the reference. What was asked for either runs or stops.

    Raises:
        ValueError: the backend asked for does not exist, or does not run with such tensors.
    """
    source = "backend="
    if asked is None:
        asked, source = os.environ.get(BACKEND_VARIABLE) or None, BACKEND_VARIABLE + "="
    if asked is None:
        usable = (x for x, b in BACKENDS.items() if device.type in b.preferred_on and b.supports(dtype, head_dim))
        return next(usable, "reference")
    if asked not in BACKENDS:
        raise ValueError(f"{source}{asked!r}: no such attention backend, available: {', '.join(BACKENDS)}")
    backend = BACKENDS[asked]
    if backend.devices is not None and device.type not in backend.devices:
        raise ValueError(f"{source}{asked!r}: runs on {', '.join(backend.devices)}, the tensors are on {device.type}")
    if not backend.supports(dtype, head_dim):
        raise ValueError(f"{source}{asked!r}: has no kernel for {dtype} with head dimension {head_dim}")
    return asked


def check_arguments(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, q_position: Tensor, k_position: Tensor,
                    slopes: Tensor, plan: TilePlan | None, rows: Sequence[int] | None = None) -> None:  # fmt: skip
    """Raise a ValueError of one line unless shapes, dtypes and devices fit together."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must be [B, H, L, D], got {list(q.shape)} and {list(k.shape)}")
    n_batch, n_heads, n_queries, head_dim = q.shape
    n_kv_rows, n_kv_heads, n_keys, _ = k.shape
    if rows is None:
        n_kv_rows = n_batch
    elif len(rows) != n_batch or not all(0 <= row < n_kv_rows for row in rows):
        raise ValueError(f"rows must name {n_batch} of the {n_kv_rows} rows of k, one for each of q, got {list(rows)}")
    expected: tuple[tuple[str, Tensor, tuple[int, ...]], ...] = (
        ("k", k, (n_kv_rows, n_kv_heads, n_keys, head_dim)),
        ("v", v, (n_kv_rows, n_kv_heads, n_keys, head_dim)),
        ("ranges", ranges, (n_batch, n_queries, 2, 2)),
        ("q_position", q_position, (n_batch, n_queries)),
        ("k_position", k_position, (n_batch, n_keys)),
        ("slopes", slopes, (n_heads,)),
    )
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit q {list(q.shape)}, got {list(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got {n_heads} and {n_kv_heads}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must share a floating point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if ranges.dtype != torch.int32:
        raise ValueError(f"ranges must be torch.int32, got {ranges.dtype}")
    if q_position.dtype != torch.float32 or k_position.dtype != torch.float32:
        raise ValueError(f"positions must be torch.float32, got {q_position.dtype} and {k_position.dtype}")
    if learning(q_position, k_position):  # short rows would give them one, computed another way than long ones
        raise ValueError("positions get no gradient; detach them")
    if not slopes.dtype.is_floating_point:
        raise ValueError(f"slopes must be floating point, got {slopes.dtype}")
    if plan is not None and plan.shape != (n_batch, n_queries, n_keys):
        built, here = plan.shape, (n_batch, n_queries, n_keys)
        raise ValueError(f"plan was built for (B, Lq, Lk) = {built}, the tensors have {here}")
