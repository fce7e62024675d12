"""Choosing the next unit from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How units are chosen. Raises ValueError on settings that make no sense."""

    temperature: float = 0.0
    """0 takes the likeliest unit; 1 samples from the model as it is."""
    top_k: int = 0
    """Sample among the k likeliest units only; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest units that together reach this probability."""
    seed: int = 0
    """Of the samples; the same seed gives the same text, alone and in any batch."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number, 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def choose(logits: Tensor, allowed: Tensor, how: Sampling, generators: Sequence[np.random.Generator]) -> list[int]:
    """One unit a row: logits [B, n_head], allowed bool [B, n_head], one generator a row.

    Each row draws one number from its own generator, so its text does not depend on its batch mates.
    """
    logits = logits.double().masked_fill(~allowed, -math.inf)
    if how.temperature == 0:
        return logits.argmax(-1).tolist()
    values, units = logits.sort(dim=-1, descending=True, stable=True)
    values = (values - values[:, :1]) / how.temperature  # the highest is 0, so that no temperature overflows it
    if how.top_k:
        values[:, how.top_k :] = -math.inf
    probabilities = values.softmax(-1)
    if how.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= how.top_p, 0)
    edges = probabilities.cumsum(-1)
    draws = torch.tensor([g.random() for g in generators], dtype=torch.float64, device=logits.device)
    rank = torch.searchsorted(edges, (draws * edges[:, -1])[:, None], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not reach a unit of probability zero
    return units.gather(-1, torch.minimum(rank, last))[:, 0].tolist()
