"""RMSNorm (Zhang & Sennrich 2019) in few passes over memory, with its gradient.

    y = x · r        r = (mean x² + ε)^−½
    out = y · w
    dx = r · (g·w − y · mean(g·w·y))        dw = Σ g · y

torch has one kernel for it on GPUs; on a CPU it takes six operations, which autograd differentiates one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`; on a CPU with a gradient of its own, in half of the time (docs/training.md)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        if x.device.type != "cpu" or x.dtype != self.weight.dtype or torch.compiler.is_compiling():
            return super().forward(x)
        if not torch.is_grad_enabled():
            return (x * _scale(x, self.eps)).mul_(self.weight)
        out: Tensor = _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


def _scale(x: Tensor, eps: float | None) -> Tensor:
    """r [..., 1]."""
    assert eps is not None
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        r = _scale(x, eps)
        y = x * r
        ctx.save_for_backward(y, r, w)
        return y * w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        y, r, w = ctx.saved_tensors
        gw = g * w
        with torch.autocast("cpu", enabled=False):  # which would make a product of it, in bfloat16
            mean = torch.linalg.vecdot(gw, y).div_(len(w))[..., None]
        return gw.addcmul_(y, mean, value=-1).mul_(r), (g * y).sum_to_size(w.shape), None
