"""Products of activations with weights, quick for the few rows of a decoder on a CPU; and what logits come to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 128
LARGE = 2**16  # elements of a weight that is not expected to lie in a core's own cache


class Linear(nn.Linear):
    """A linear layer without bias, multiplied as `product` does."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of weight [O, I], plus bias [O]: [..., O], with any strides.

    BLAS libraries copy the right-hand matrix into an order of their own before they multiply, which pays when many
    rows share it. With few rows of float32 on a CPU the weight is therefore put on the left: W xᵀ, transposed, takes
    a third to nine tenths of the time (docs/decoding.md). Not where gradients are wanted: training has many rows.
    """
    if x.is_cpu and x.dtype == torch.float32 and weight.numel() >= LARGE and not torch.is_grad_enabled():
        n_rows = x.numel() // x.shape[-1]
        if 1 < n_rows <= FEW_ROWS:
            y = torch.mm(weight, x.reshape(n_rows, -1).t()).t().view(*x.shape[:-1], len(weight))
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits [..., V], float32 or better: bfloat16 would leave them two or three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
