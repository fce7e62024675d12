"""Optimizer groups and the learning rate as a pure function of the step."""

from __future__ import annotations

from typing import Any

import torch

from tidal.config import Optim
from tidal.model import TidalTransformer


def make_optimizer(model: TidalTransformer, settings: Optim) -> torch.optim.Optimizer:
    """AdamW with three groups: matrices; tables, faster and without decay; the gains of norms, without decay.

    `lr_scale` of a group is its multiple of the common learning rate.
    """
    tables = model.tables()
    is_table = {id(p) for p in tables}
    others = [p for p in model.parameters() if id(p) not in is_table]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "lr_scale": 1.0, "weight_decay": settings.weight_decay},
        {"params": tables, "lr_scale": settings.table_lr_scale, "weight_decay": 0.0},
        {"params": [p for p in others if p.ndim <= 1], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def learning_rate(step: int, max_steps: int, settings: Optim) -> float:
    """Rate of step `step` (from 0): linear warm-up, constant, then linearly to zero at `max_steps`.

    The trapezoid of Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations".
    """
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay_steps = max(1.0, settings.decay_fraction * max_steps)
    return settings.lr * min(warm, max(0.0, (max_steps - step) / decay_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
