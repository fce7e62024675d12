"""Choosing the next unit from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

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
    min_p: float = 0.0
    """Sample among the units at least this many times as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides the odds of the next unit of a block that this completion has written before; 1: none."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number, 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty >= 1):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be a finite number, 1 or more")


class Repetition:
    """Which units would go on spelling a block that this completion has written before.

    Penalizing units as token models do would forbid the letter e. A block is what repeats here, so the penalty falls
    on the units after the first one of a block that has been written already: endings, which many words share, are
    free, and so is all that differs.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], set[int]] = {}

    def add(self, written: Sequence[int]) -> None:
        """Remember a finished block, given as its units, last character first."""
        for t in range(1, len(written)):
            self._next.setdefault(tuple(written[:t]), set()).add(written[t])

    def units(self, written: Sequence[int]) -> set[int]:
        """The units to penalize after `written`."""
        return self._next.get(tuple(written), set())


def choose(logits: Tensor, allowed: Tensor, how: Sampling, generators: Sequence[np.random.Generator],
           repeated: Sequence[set[int]] = ()) -> list[int]:  # fmt: skip
    """One unit a row: logits [B, n_head], allowed bool [B, n_head], one generator a row.

    `repeated` are the units to penalize in each row. Each row draws one number from its own generator, so its text
    does not depend on its batch mates.
    """
    logits = logits.double().masked_fill(~allowed, -math.inf)
    for row, units in enumerate(repeated):
        if units:  # e^(logit) / penalty: the same effect for positive and negative logits
            logits[row, list(units)] -= math.log(how.repetition_penalty)
    if how.temperature == 0:
        return logits.argmax(-1).tolist()
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    values = (values - values[:, :1]) / how.temperature  # the highest is 0, so that no temperature overflows it
    if how.top_k:
        values[:, how.top_k :] = -math.inf
    if how.min_p:
        values = values.masked_fill(values < math.log(how.min_p), -math.inf)
    probabilities = values.softmax(-1)
    if how.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= how.top_p, 0)
    edges = probabilities.cumsum(-1)
    draws = torch.tensor([g.random() for g in generators], dtype=torch.float64, device=logits.device)
    rank = torch.searchsorted(edges, (draws * edges[:, -1])[:, None], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not reach a unit of probability zero
    return order.gather(-1, torch.minimum(rank, last))[:, 0].tolist()
