"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidal.config import Optim
from tidal.layers import Layer
from tidal.model import TidalTransformer
from tidal.train.muon import Muon
from tidal.train.parallel import shard_like

EPS = 1e-12
"""Of AdamW. Of a table's row that is met once in a step of 250,000 units, the root of the second moment is near 2e-8:
torch's default of 1e-8 would take a third of its update. What was never met moves by 0 / EPS."""


class Optimizer:
    """Muon for the matrices, AdamW for tables (faster, without decay) and gains of norms (without decay; those of
    queries may grow while the rate is below its highest: a little in warm-up, mostly while it falls)."""

    def __init__(self, model: TidalTransformer, settings: Optim) -> None:
        self.settings = settings
        tables = model.tables()
        attending = [m for m in model.modules() if isinstance(m, Layer) and m.attends]
        of_queries = [p for layer in attending for p in layer.norm_query.parameters()]
        told_apart = {id(p) for p in (*tables, *of_queries)}
        others = [p for p in model.parameters() if id(p) not in told_apart]
        gains, matrices = [p for p in others if p.ndim < 2], [p for p in others if p.ndim == 2]
        self.parts: list[torch.optim.Optimizer] = [
            Muon([{"params": matrices, "scale": 1.0}], lr=settings.lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW(
                [{"params": tables, "scale": settings.table_lr_scale}, {"params": gains, "scale": 1.0},
                 {"params": of_queries, "scale": 1.0, "sharpen": settings.sharpen}],
                lr=settings.lr, weight_decay=0.0, betas=(0.9, settings.beta2), eps=EPS, fused=True,
            ),
        ]  # fmt: skip
        for part in self.parts:  # now, not in the first update, where running out of memory could not be mended
            for p in (p for group in part.param_groups for p in group["params"]):
                part.state[p] = {name: torch.zeros_like(p) if like_p else torch.zeros((), device=p.device)
                                 for name, like_p in moments_of(part).items()}  # fmt: skip

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Update the weights; each group takes its multiple of `rate`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["scale"]
                if "sharpen" in group:  # decay with the other sign, but none while the rate is at its highest
                    group["weight_decay"] = -group["sharpen"] * (1 - rate / (self.settings.lr or 1.0))
            part.step()

    def state(self) -> dict[str, Tensor]:
        """All moments and counters, by name."""
        entries: dict[str, Tensor] = {}
        for n, part in enumerate(self.parts):
            for i, values in part.state_dict()["state"].items():
                entries |= {f"{n}.{i}.{name}": torch.as_tensor(value) for name, value in values.items()}
        return entries

    def load_state(self, entries: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises ValueError for entries of another model's optimizer.

        Torch itself takes whatever it is given, and starts the moments that are missing at zero.
        """
        left = dict(entries)
        for n, part in enumerate(self.parts):
            params = [p for group in part.param_groups for p in group["params"]]
            state: dict[int, dict[str, Any]] = {}
            for i, p in enumerate(params):
                for name, like_p in moments_of(part).items():
                    value = left.pop(f"{n}.{i}.{name}", None)
                    if value is None or value.shape != (p.shape if like_p else ()):
                        shape = "missing" if value is None else list(value.shape)
                        raise ValueError(f"the optimizer's {n}.{i}.{name} is {shape}, not {list(p.shape)}")
                    own = value.clone()  # torch would go on with a mapped file's memory
                    state.setdefault(i, {})[name] = shard_like(p, own) if like_p else own
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
        if left:
            raise ValueError(f"the optimizer knows nothing of {', '.join(sorted(left))[:200]}")


def moments_of(part: torch.optim.Optimizer) -> dict[str, bool]:
    """What an optimizer keeps for each parameter: names, and whether that is shaped like it (or a number)."""
    if isinstance(part, Muon):
        return {"momentum_buffer": True}
    return {"step": False, "exp_avg": True, "exp_avg_sq": True}


def learning_rate(step: int, max_steps: int, settings: Optim) -> float:
    """Rate of step `step` (from 0): linear warm-up, constant, then linearly to zero at `max_steps`.

    The trapezoid of Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations".
    """
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay_steps = max(1.0, settings.decay_fraction * max_steps)
    return settings.lr * min(warm, max(0.0, (max_steps - step) / decay_steps))
