"""Random attention problems, the equality check they are put through, and a triple loop in pure Python."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tidal.kernels import TilePlan, cpu, interval_attention, reference


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor
    q_position: Tensor
    k_position: Tensor
    slopes: Tensor
    weight: Tensor
    """gradient that is fed into the output"""

    def inputs(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.ranges, self.q_position, self.k_position, self.slopes

    def to(self, dtype: torch.dtype) -> "Case":
        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_()

        return replace(self, q=leaf(self.q), k=leaf(self.k), v=leaf(self.v), weight=self.weight.to(dtype))


def make_case(
    seed: int,
    n_batch: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    n_queries: int = 13,
    n_keys: int = 17,
    head_dim: int = 4,
    dtype: torch.dtype = torch.float64,
    structure: str = "random",
) -> Case:
    """structure: "random" ranges (empty, overlapping, adjacent, ragged), "streams" or "causal"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype).requires_grad_()

    def positions(length: int) -> Tensor:
        return (torch.rand(n_batch, length, generator=g) * 20).float()

    q_position, k_position = positions(n_queries), positions(n_keys)
    if structure == "random":
        ranges = torch.randint(0, n_keys + 1, (n_batch, n_queries, 2, 2), generator=g)
        for row in range(n_batch):  # ragged rows: later keys are padding
            ranges[row].clamp_(max=n_keys - row * n_keys // (2 * n_batch))
        adjacent = torch.rand(n_batch, n_queries, generator=g) < 0.2
        ranges[..., 1, 0] = torch.where(adjacent, ranges[..., 0, 1], ranges[..., 1, 0])
        if n_queries > 1:
            ranges[:, -1] = 0  # a query without keys
    else:
        ranges = torch.zeros(n_batch, n_queries, 2, 2, dtype=torch.int64)
        step = torch.arange(n_queries)
        if structure == "causal":
            ranges[:, :, 0, 1] = (step + 1).clamp(max=n_keys)
        else:  # keys = [reader ; writer], blocks of three units
            n_reader = n_keys - n_queries
            ranges[:, :, 0, 1] = step // 3 * 3 * n_reader // n_queries
            ranges[:, :, 1, 0] = n_reader + step // 3 * 3
            ranges[:, :, 1, 1] = n_reader + step + 1
        q_position = step.float().expand(n_batch, -1) / 2
    slopes = torch.rand(n_heads, dtype=torch.float64, generator=g).requires_grad_()
    return Case(
        q=normal(n_batch, n_heads, n_queries, head_dim),
        k=normal(n_batch, n_kv_heads, n_keys, head_dim),
        v=normal(n_batch, n_kv_heads, n_keys, head_dim),
        ranges=ranges.to(torch.int32),
        q_position=q_position,
        k_position=k_position,
        slopes=slopes,
        weight=normal(n_batch, n_heads, n_queries, head_dim).detach(),
    )


def out_and_gradients(case: Case, backend: str, plan: TilePlan | None = None) -> dict[str, Tensor]:
    """The output and the gradients of q, k, v, slopes."""
    out = interval_attention(*case.inputs(), backend=backend, plan=plan)
    gradients = torch.autograd.grad(out, (case.q, case.k, case.v, case.slopes), case.weight)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dslopes"), gradients, strict=True))}


def eager_in_same_dtype(case: Case) -> dict[str, Tensor]:
    """Output and gradients of plain PyTorch run wholly in the dtype of the case."""
    visible = reference.visible_keys(case.ranges, case.k.shape[2])[:, None]
    bias = reference.alibi_bias(case.q_position, case.k_position, case.slopes).to(case.q.dtype)
    k, v = (x.repeat_interleave(case.q.shape[1] // x.shape[1], dim=1) for x in (case.k, case.v))
    score = (case.q @ k.transpose(-1, -2)) * case.q.shape[-1] ** -0.5 + bias
    blind = ~visible.any(-1, keepdim=True)
    score = score.masked_fill(~visible, float("-inf")).masked_fill(blind, 0.0)
    out = score.softmax(-1).masked_fill(~visible, 0.0) @ v
    gradients = torch.autograd.grad(out, (case.q, case.k, case.v, case.slopes), case.weight)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dslopes"), gradients, strict=True))}


def worst_difference(case: Case, tile_q: int, dense: bool) -> tuple[float, str]:
    """The largest relative difference between cpu and reference, over the output and all gradients, and where."""
    limit, cpu.DENSE_LIMIT = cpu.DENSE_LIMIT, 2**60 if dense else -1
    try:
        plan = TilePlan.build(case.ranges, case.k.shape[2], tile_q=tile_q)
        got = out_and_gradients(case, "cpu", plan)
    finally:
        cpu.DENSE_LIMIT = limit
    wanted = out_and_gradients(case, "reference")
    differences = {
        name: float((got[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1.0))
        if wanted[name].numel()
        else 0.0
        for name in wanted
    }
    return max((math.inf if math.isnan(value) else value, name) for name, value in differences.items())


def assert_agrees(case: Case, tile_q: int, dense: bool, tolerance: float = 1e-12) -> None:
    """cpu equals reference: output and gradients of q, k, v, slopes."""
    difference, name = worst_difference(case, tile_q, dense)
    assert difference <= tolerance, f"{name} differs by {difference}"


def triple_loop(case: Case, scale: float) -> Tensor:
    """Interval attention without tensors operations: the definition, literally."""
    q, k, v = case.q.tolist(), case.k.tolist(), case.v.tolist()
    group = case.q.shape[1] // case.k.shape[1]
    out = torch.zeros_like(case.q).detach()
    for b, rows in enumerate(case.ranges.tolist()):
        for h in range(case.q.shape[1]):
            keys, values = k[b][h // group], v[b][h // group]
            for i, ((start_0, end_0), (start_1, end_1)) in enumerate(rows):
                scores: dict[int, float] = {}
                for j in {*range(start_0, end_0), *range(start_1, end_1)}:
                    distance = abs(case.q_position[b, i].item() - case.k_position[b, j].item())
                    dot = sum(x * y for x, y in zip(q[b][h][i], keys[j], strict=True))
                    scores[j] = scale * dot - case.slopes[h].item() * distance
                total = sum(math.exp(score) for score in scores.values())
                for j, score in scores.items():
                    out[b, h, i] += math.exp(score) / total * torch.tensor(values[j], dtype=out.dtype)
    return out
