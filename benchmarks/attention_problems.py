"""What benchmarks.attention measures: masks with random inputs, the contestants, and the check of their results."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from benchmarks.clock import cuda_is_lost
from tidal.kernels import TilePlan, alibi_slopes, interval_attention
from tidal.kernels.reference import visible_keys

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Modifier = Callable[..., Tensor]
MASKS = ("causal", "packed", "block-causal", "two-stream")
RIVALS = ("tidal-atomic", "flex", "flex-max-autotune", "sdpa", "flash-attention-2", "create_block_mask-compiled")
"""the last one builds block masks for flex, compiled; without it they are built as by default"""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
CHECKED = 64  # queries compared with the reference
FLEX_BLOCK = 128  # queries and keys in a block of FlexAttention's mask
FAILURES: tuple[type[BaseException], ...] = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, OSError,
    subprocess.SubprocessError, SystemExit,
)  # fmt: skip
"""what compilers, launches, rivals and the check of results raise: no reason to lose what others measured"""
if importlib.util.find_spec("triton"):
    from triton.errors import TritonError

    FAILURES += (TritonError,)


@dataclass(frozen=True)
class Form:
    """What all problems of a run share."""

    heads: int
    kv_heads: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Problem:
    """One attention call with ALiBi, and how FlexAttention is told of it."""

    mask: str
    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor
    q_position: Tensor
    k_position: Tensor
    slopes: Tensor
    sees: Modifier
    """FlexAttention's mask_mod: batch row, head, query, key → bool"""
    bias: Modifier
    """FlexAttention's score_mod: score, batch row, head, query, key → score"""

    @property
    def rest(self) -> tuple[Tensor, ...]:
        """What follows q, k, v in `interval_attention`."""
        return self.ranges, self.q_position, self.k_position, self.slopes

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations of a forward pass: two products over the pairs that are seen, nothing else. A
        backward pass has 2.5 times as many."""
        (start_0, end_0), (start_1, end_1) = (r.long().clamp(min=0).unbind(-1) for r in self.ranges.unbind(2))
        pairs = (end_0 - start_0).clamp(min=0) + (end_1 - start_1).clamp(min=0)  # they never overlap here
        return 4 * self.q.shape[1] * self.q.shape[3] * int(pairs.sum())


def problem(mask: str, n_keys: int, n_batch: int, head_dim: int, form: Form) -> Problem:
    """Random inputs for a mask; the layout of each batch row is its own.

    two-stream is the first writer layer's call: keys = [reader tokens ; writer steps], queries = the steps; a block
    has one to three tokens and three to eight steps, as words have.
    """
    g = torch.Generator().manual_seed(n_keys)

    def lengths(low: int, high: int) -> Tensor:  # of blocks or documents, more than enough of them
        return torch.randint(low, high + 1, (n_batch, n_keys // low + 1), generator=g)

    index = torch.arange(n_keys).expand(n_batch, -1)
    zero = torch.zeros_like(index)
    start_0, end_0, start_1, end_1 = zero, index + 1, zero, zero
    q_position = k_position = index.float()
    if mask == "packed":
        ends = lengths(n_keys // 16, 3 * n_keys // 16).cumsum(1)
        document = torch.searchsorted(ends, index.contiguous(), right=True)
        start_0 = torch.cat([zero[:, :1], ends], 1).gather(1, document)
        q_position = k_position = (index - start_0).float()
    elif mask == "block-causal":
        ends = lengths(1, 8).cumsum(1)
        end_0 = ends.gather(1, torch.searchsorted(ends, index.contiguous(), right=True)).clamp(max=n_keys)
    elif mask == "two-stream":
        n_steps = n_keys * 11 // 15
        if n_steps > FLEX_BLOCK:  # else FlexAttention would look for the end of the queries in every block
            n_steps -= n_steps % FLEX_BLOCK
        n_reader, step = n_keys - n_steps, torch.arange(n_steps).expand(n_batch, -1).contiguous()
        step_ends, token_ends = lengths(3, 8).cumsum(1), lengths(1, 3).cumsum(1)
        block = torch.searchsorted(step_ends, step, right=True)
        start_0, end_0 = torch.zeros_like(step), token_ends.gather(1, block).clamp(max=n_reader)
        start_1 = n_reader + torch.cat([zero[:, :1], step_ends], 1).gather(1, block)
        end_1 = n_reader + step + 1
        q_position = end_0.float()
        k_position = torch.cat([index[:, :n_reader].float(), q_position], 1)
    ranges = torch.stack([torch.stack([start_0, end_0], -1), torch.stack([start_1, end_1], -1)], 2).int()
    return make(mask, ranges, q_position, k_position, head_dim, form)


def decode_problem(n_queries: int, n_keys: int, n_batch: int, head_dim: int, form: Form) -> Problem:
    """A few queries a row at the end of caches of different lengths."""
    length = torch.linspace(n_keys // 4, n_keys, n_batch).long()
    end = length[:, None] - n_queries + 1 + torch.arange(n_queries)
    zero = torch.zeros_like(end)
    ranges = torch.stack([torch.stack([zero, end], -1), torch.stack([zero, zero], -1)], 2).int()
    return make("decode", ranges, end.float() - 1, torch.arange(n_keys).float().expand(n_batch, -1), head_dim, form)


def make(mask: str, ranges: Tensor, q_position: Tensor, k_position: Tensor, head_dim: int,
         form: Form) -> Problem:  # fmt: skip
    """A problem on the device, with random queries, keys and values."""
    (n_batch, n_queries), n_keys = q_position.shape, k_position.shape[1]

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(n_batch, heads, length, head_dim, device=form.device, dtype=form.dtype).requires_grad_(
            mask != "decode"
        )

    ranges = ranges.to(form.device)
    start_0, end_0, start_1 = (x.contiguous() for x in (ranges[..., 0, 0], ranges[..., 0, 1], ranges[..., 1, 0]))
    n_before = n_keys - n_queries
    q_position, k_position = q_position.to(form.device), k_position.to(form.device)
    slopes = alibi_slopes(form.heads).to(form.device)
    sees: dict[str, Modifier] = {
        "causal": lambda b, h, i, j: i >= j,
        "packed": lambda b, h, i, j: (i >= j) & (j >= start_0[b, i]),
        "block-causal": lambda b, h, i, j: j < end_0[b, i],
        "two-stream": lambda b, h, i, j: (j < end_0[b, i]) | ((j >= start_1[b, i]) & (j <= n_before + i)),
        "decode": lambda b, h, i, j: j < end_0[b, i],
    }

    # Where no visible key stands behind its query, one addition a score; the products are of a row or a column.
    bias: dict[str, Modifier] = {
        "causal": lambda score, b, h, i, j: score + slopes[h] * j - slopes[h] * i,
        "packed": lambda score, b, h, i, j: score + slopes[h] * j - slopes[h] * i,
        "block-causal": lambda score, b, h, i, j: score - slopes[h] * (i - j).abs(),
        "two-stream": lambda score, b, h, i, j: score + slopes[h] * k_position[b, j] - slopes[h] * q_position[b, i],
        "decode": lambda score, b, h, i, j: score - slopes[h] * (q_position[b, i] - j).abs(),  # keys stand in order
    }
    return Problem(
        mask, normal(form.heads, n_queries), normal(form.kv_heads, n_keys), normal(form.kv_heads, n_keys), ranges,
        q_position, k_position, slopes, sees[mask], bias[mask],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- contestants


def tidal(p: Problem, backend: str) -> Attend:
    """Ours; the plan is built beforehand (on a GPU when it is first used), as is FlexAttention's."""
    plan = TilePlan.build(p.ranges, p.k.shape[2])
    return lambda q, k, v: interval_attention(q, k, v, *p.rest, backend=backend, plan=plan)


def build_plan(p: Problem, backend: str) -> None:
    """All that forward and backward need of the ranges: once a batch, for all layers and heads."""
    plan = TilePlan.build(p.ranges, p.k.shape[2])
    if backend == "triton":
        from tidal.kernels import triton_attention

        triton_attention.prepare(plan, p.ranges, p.q_position, p.k_position, p.q.dtype, p.q.shape[3])


def flex_attention(p: Problem, mode: str | None = None) -> Attend:
    """Compiled for these shapes alone."""
    attend: Any = torch.compile(flex.flex_attention, dynamic=False, mode=mode)
    block_mask = build_block_mask(p)
    gqa = p.q.shape[1] != p.k.shape[1]
    return lambda q, k, v: attend(q, k, v, score_mod=p.bias, block_mask=block_mask, enable_gqa=gqa)


def build_block_mask(p: Problem, build: Any = flex.create_block_mask) -> flex.BlockMask:
    """FlexAttention's block mask; one for all batch rows where they are alike."""
    n_batch = None if p.mask == "causal" else p.q.shape[0]
    mask: flex.BlockMask = build(p.sees, n_batch, None, p.q.shape[2], p.k.shape[2], device=p.q.device)
    return mask


def sdpa(p: Problem) -> Attend:
    """PyTorch's own, with mask and ALiBi as one dense bias [B, Hq, Lq, Lk]."""
    distance = (p.q_position[:, :, None] - p.k_position[:, None, :]).abs_()
    distance.masked_fill_(~visible_keys(p.ranges, p.k.shape[2]), float("inf"))
    bias = torch.stack([(-slope * distance).to(p.q.dtype) for slope in p.slopes], 1)
    gqa = p.q.shape[1] != p.k.shape[1]
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=gqa)


def flash_attention(p: Problem) -> Attend:
    """Dao's FlashAttention-2."""
    attend = importlib.import_module("flash_attn").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, alibi_slopes=p.slopes)
        return out.transpose(1, 2)

    return run


def contestants(p: Problem, rivals: Sequence[str], backend: str) -> Iterator[tuple[str, Callable[[], Attend]]]:
    """Who takes part in this one, and how each is made ready."""
    yield "tidal", lambda: tidal(p, backend)
    for name in rivals:
        if name == "tidal-atomic" and p.mask != "decode" and backend == "triton":
            yield name, lambda: tidal(p, "triton-atomic")
        elif name == "flex":
            yield name, lambda: flex_attention(p)
        elif name == "flex-max-autotune":
            yield name, lambda: flex_attention(p, "max-autotune-no-cudagraphs")
        elif name == "sdpa" and p.mask != "decode":
            yield name, lambda: sdpa(p)
        elif name == "flash-attention-2" and p.mask == "causal":
            yield name, lambda: flash_attention(p)


# ------------------------------------------------------------------------------------------------ checking


class Check:
    """The float64 truth for some queries of a problem, and everything that follows from them alone."""

    def __init__(self, p: Problem, *, backward: bool = True) -> None:
        self.p, self.backward = p, backward
        n_queries = p.q.shape[2]
        self.rows = torch.linspace(0, n_queries - 1, min(CHECKED, n_queries), device=p.q.device).round().long()
        self.dout = torch.zeros_like(p.q)
        self.dout[:, :, self.rows] = torch.randn_like(self.dout[:, :, self.rows])
        q, k, v = (x.detach().double().requires_grad_(backward) for x in (p.q, p.k, p.v))
        out = interval_attention(
            q[:, :, self.rows], k, v, p.ranges[:, self.rows], p.q_position[:, self.rows], p.k_position, p.slopes,
            backend="reference",
        )  # fmt: skip
        self.wanted = {"out": out.detach()}
        if backward:
            gradients = torch.autograd.grad(out, (q, k, v), self.dout[:, :, self.rows].double())
            self.wanted |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    def errors(self, attend: Attend) -> dict[str, float]:
        """Largest error of the output and of each gradient, relative to the largest true value."""
        q, k, v = (x.detach().requires_grad_(self.backward) for x in (self.p.q, self.p.k, self.p.v))
        out = attend(q, k, v)
        got = {"out": out.detach()[:, :, self.rows]}
        if self.backward:
            got |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), self.dout), strict=True))
        return {
            name: float((got[name].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
            for name, wanted in self.wanted.items()
        }


def wrong(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Those of `Check.errors` that are not below what the dtype allows, NaN among them."""
    return {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}


@dataclass(frozen=True)
class Ready:
    """Who may be timed."""

    runs: dict[str, Attend]
    failed: dict[str, str]
    """Rivals that were wrong or did not run, and why."""
    error: float
    """Tidal's largest."""


def ready(p: Problem, rivals: Sequence[str], backend: str, *, backward: bool = True) -> Ready:
    """Make the contestants ready and check them.

    Raises:
        SystemExit: Tidal's result is wrong.
    """
    torch._dynamo.reset()  # what was compiled for other shapes
    check = Check(p, backward=backward)
    runs: dict[str, Attend] = {}
    failed: dict[str, str] = {}
    error = 0.0
    for name, prepare in contestants(p, rivals, backend):
        try:
            attend = prepare()
            errors = check.errors(attend)
        except FAILURES as reason:
            if name == "tidal":
                raise
            failed[name] = said(reason)
            continue
        bad = wrong(errors, p.q.dtype)
        if bad and name == "tidal":
            raise SystemExit(f"tidal, {p.mask}, keys {list(p.k.shape)}: errors {bad}; not timing a wrong result")
        if bad:
            failed[name] = f"wrong result: errors {bad}"
            continue
        runs[name] = attend
        error = max(errors.values()) if name == "tidal" else error
    return Ready(runs, failed, error)


def said(reason: BaseException) -> str:
    """The first line of an error.

    Raises:
        SystemExit: CUDA is of no more use to this process, and all that came next would fail in the same way.
    """
    first = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
    if cuda_is_lost(reason):
        raise SystemExit(f"CUDA has failed, and nothing more can be measured: {first}") from reason
    return first
