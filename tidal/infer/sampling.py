"""Choosing the next unit from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from tidal.device import upload

NOT_FINITE = "the logits of a step are NaN or infinite: the weights are damaged"
NOTHING_FOLLOWS = "no unit that may follow has a probability above zero: the weights are damaged"


def as_int(name: str, value: object, least: float = -math.inf, means: str = "") -> int:
    """A setting as an int, also numpy's. Raises ValueError on what is no integer, and on one below `least`, whose
    meaning can be told."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}; it must be an integer") from error
    if number < least:
        raise ValueError(f"{name} is {number}; it must be " + (f"{least}{means} or more" if means else
                         f"at least {least}"))  # fmt: skip
    return number


def as_float(name: str, value: object) -> float:
    """A setting as a float, also numpy's. Raises ValueError on what is no number, NaN or infinite."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    try:
        number = float(value)
    except OverflowError:  # of an int, or a fraction, beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    return number


@dataclass(frozen=True)
class Sampling:
    """How units are chosen. Raises ValueError on settings that make no sense, and on those of a wrong type."""

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
        object.__setattr__(self, "top_k", as_int("top_k", self.top_k, 0, " (all)"))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1")
        if self.repetition_penalty < 1:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be 1 or more")

    @property
    def needs_order(self) -> bool:
        """Whether the units have to be put in the order of their probabilities to draw one."""
        return self.top_k > 0 or self.top_p < 1


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


def choose(logits: Tensor, allowed: Tensor, settings: Sequence[Sampling], generators: Sequence[np.random.Generator],
           repeated: Sequence[set[int]] = ()) -> Tensor:  # fmt: skip
    """One unit a row, int64 [B], where the logits are: logits [B, n_head], allowed bool [B, n_head]; settings and a
    generator for each row. -1 where no allowed unit has a finite logit. Does not wait for the device; `fetch` does.

    `repeated` are the units to penalize in each row. A row that samples draws one number from its own generator, and
    nothing looks at other rows, so its text does not depend on its batch mates.
    """
    logits = logits.double().masked_fill(~allowed, -math.inf)
    penalized = [(row, unit) for row, units in enumerate(repeated) for unit in units]
    if penalized:  # e^(logit) / penalty: the same effect for positive and negative logits
        at = upload(penalized, logits.device).unbind(1)
        penalties = [math.log(settings[row].repetition_penalty) for row, _ in penalized]
        logits[at] -= upload(penalties, logits.device, torch.float64)
    best, chosen = logits.max(-1)  # the first of equal ones
    for ordered in (False, True):
        drawn = [row for row, how in enumerate(settings) if how.temperature > 0 and how.needs_order == ordered]
        if drawn:
            rows: Tensor | slice = upload(drawn, logits.device) if len(drawn) < len(settings) else slice(None)
            chosen[rows] = _draw(logits[rows], best[rows], chosen[rows], [settings[row] for row in drawn],
                                 [generators[row].random() for row in drawn], ordered)  # fmt: skip
    return torch.where(best > -math.inf, chosen, -1)


def fetch(chosen: Tensor | Sequence[int], logits: Tensor) -> tuple[list[int], list[float]]:
    """Chosen units [B] and their log-probabilities (nats) under logits [B, n_head]; the host waits once, for both.

    Raises RuntimeError where logits are NaN or infinite, or nothing may follow.
    """
    units = torch.as_tensor(chosen, device=logits.device)
    log_probs = logits.double().log_softmax(-1).gather(-1, units.clamp(min=0)[:, None])[:, 0]
    below = (logits < math.inf).all(-1)  # NaN is not
    found_units, found_log_probs, finite = torch.stack([units.double(), log_probs, below.double()]).tolist()
    if not all(finite):
        raise RuntimeError(NOT_FINITE)
    if -1 in found_units:
        raise RuntimeError(NOTHING_FOLLOWS)
    return [int(unit) for unit in found_units], found_log_probs


def _draw(logits: Tensor, best: Tensor, likeliest: Tensor, settings: Sequence[Sampling], draws: Sequence[float],
          ordered: bool) -> Tensor:  # fmt: skip
    """Units int64 [B], by the inverse of the cumulative distribution at `draws`, of float64 logits [B, n_head] whose
    maxima [B] are `best`, of the units `likeliest`: the likeliest come first, or, cheaper, those with the lowest id."""
    n_units = logits.shape[1]
    table = [[how.temperature, min(how.top_k or n_units, n_units), how.top_p if how.top_p < 1 else math.inf,
              math.log(how.min_p) if how.min_p else -math.inf, draw]
             for how, draw in zip(settings, draws, strict=True)]  # fmt: skip
    temperature, top_k, top_p, least, draw = upload(table, logits.device, torch.float64)[:, :, None].unbind(1)
    values = (logits - best[:, None]) / temperature  # the highest is 0, so that no temperature overflows it
    if any(how.min_p for how in settings):
        values = values.masked_fill(values < least, -math.inf)
    if ordered:
        values, order = values.sort(dim=-1, descending=True, stable=True)
        values = values.masked_fill(torch.arange(n_units, device=logits.device) >= top_k, -math.inf)
    probabilities = values.softmax(-1)
    if ordered:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    edges = probabilities.cumsum(-1)
    at = torch.searchsorted(edges, draw * edges[:, -1:], right=True).clamp(max=n_units - 1)
    units = order.gather(-1, at) if ordered else at
    # rounding must not reach a unit of probability zero
    return torch.where(probabilities.gather(-1, at) > 0, units, likeliest[:, None])[:, 0]
