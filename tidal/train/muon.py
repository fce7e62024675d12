"""Muon, which learns the matrices: each update is the gradient's momentum with all singular values brought near one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tidal.train.parallel import full_tensor, shard_like

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)
TOGETHER = 2**24
"""Elements of matrices that are updated at once: on a GPU, small ones one by one would be all launches."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov momentum and decoupled weight decay, its updates as large as AdamW's (Liu
    et al. 2025, "Muon is scalable for LLM training"), so that one learning rate serves both.

    Not torch's own, which works in bfloat16 everywhere: a CPU that has no such products emulates them, 9 to 31 times
    slower than float32 (docs/training.md), and takes matrices that FSDP has cut up by their pieces, which is not the
    same update. Here moments stay cut up, and matrices are put together for their updates, a few at a time.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices; where they are cut up, to be called by all processes."""
        for group in self.param_groups:
            for some in _alike([p for p in group["params"] if p.grad is not None]):
                updates = newton_schulz(torch.stack([full_tensor(self._with_momentum(p)) for p in some]))
                for p, update in zip(some, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(shard_like(p, update), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))

    def _with_momentum(self, p: Tensor) -> Tensor:
        if not (state := self.state[p]):
            state["momentum_buffer"] = torch.zeros_like(p)
        assert p.grad is not None
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM), MOMENTUM)


def _alike(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, of at most TOGETHER elements."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, same in by_shape.items():
        n = max(1, TOGETHER // shape.numel())
        yield from (same[i : i + n] for i in range(0, len(same), n))


def newton_schulz(g_kmn: Tensor) -> Tensor:
    """U S Vᵀ [k, m, n] of each g = U D Vᵀ with S near one (0.7 to 1.2), by Newton-Schulz iterations
    X ← aX + (bA + cA²)X, A = XXᵀ, with Jordan's coefficients; in bfloat16 on GPUs, in the gradient's own precision on
    CPUs.
    """
    a, b, c = COEFFICIENTS
    wide = g_kmn.shape[1] <= g_kmn.shape[2]
    x = (g_kmn if wide else g_kmn.mT).to(torch.bfloat16 if g_kmn.is_cuda else g_kmn.dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g_kmn.dtype)
