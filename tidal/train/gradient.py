"""The gradient of one step, whatever the number of parts and processes it is computed in."""

from __future__ import annotations

import math

import torch
from torch import nn

from tidal.cli import UserError
from tidal.config import Train
from tidal.train.optim import Optimizer
from tidal.train.parallel import Parallel, full_tensor
from tidal.train.records import parts_of
from tidal.train.workers import Source


class NotFiniteError(UserError):
    """A loss or a gradient that is not finite."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(f"step {step}: loss {loss} and gradient norm {norm}; weights were left as they were, "
                         "and so were the checkpoints; try a smaller --lr, with --resume never")  # fmt: skip
        self.loss, self.norm = loss, norm


def products_in(precision: str, device: torch.device) -> torch.autocast:
    """The context of a training pass: with `bf16`, products are computed in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def gradients(model: nn.Module, optimizer: Optimizer, recipe: Source, step: int, settings: Train, device: torch.device,
              parts: int = 1, parallel: Parallel | None = None) -> dict[str, float]:  # fmt: skip
    """Leave the clipped gradients of a step; returns the loss (nats a unit), bits per byte, the gradient's norm and
    the number of units.

    The sums over its batches, each computed in `parts` in each process, are divided by the units of all of them: the
    gradient is that of one large batch, but for rounding. Raises NotFiniteError.
    """
    parallel = parallel or Parallel()
    optimizer.zero_grad()
    n = settings.optim.accumulate
    batches = [recipe.batch(step * n + i, (parallel.rank, parallel.size)) for i in range(n)]
    counts = [(b.n_units, b.n_bytes, b.n_asked) for b in batches]
    totals = parallel.all_reduce_sum([number for count in counts for number in count])
    n_units, n_bytes, n_aux = sum(totals[::3]), sum(totals[1::3]), sum(totals[2::3])
    passes = [part for batch in batches for part in parts_of(batch, parts)]
    sums = torch.zeros((), dtype=torch.float64, device=device)
    for number, part in enumerate(passes, start=1):
        with parallel.no_sync(model, last=number == len(passes)):
            with products_in(settings.precision, device):
                losses = model(part.to(device))
            loss = losses.units / n_units
            if settings.optim.aux_weight:
                loss = loss + settings.optim.aux_weight * losses.aux / n_aux
            (loss * parallel.size).backward()  # DDP and FSDP take the mean over processes
        sums += losses.units.detach()
    norms = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip))
    nats, norm = torch.stack([sums, norms.double()]).tolist()  # the one time that the device is waited for
    [nats] = parallel.all_reduce_sum([nats])
    loss_per_unit = nats / n_units
    if not (math.isfinite(nats) and math.isfinite(norm)):
        raise NotFiniteError(step, loss_per_unit, norm)
    return {"loss": loss_per_unit, "bits_per_byte": nats / math.log(2) / max(1, n_bytes), "grad_norm": norm,
            "units": n_units}  # fmt: skip
