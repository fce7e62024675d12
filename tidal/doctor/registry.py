"""The list of checks; each module of checks adds its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tidal.doctor.patient import Patient
from tidal.doctor.report import Meter

EXACT = 1e-9
"""Two computations of a log-probability in float64. Rounding leaves about 1e-13 of it, a bug rarely less than 1e-6."""
FLOAT32 = 1e-4
"""The same in float32: 2^-24 relative, logits up to some hundreds, a few thousand roundings."""
FORETOLD = 1e-6
"""In float64, a model that foretells against its definition: a share is the difference of two running sums up to 1,
each off by some 1e-15, over a probability of 1e-6 or more, and its logarithm begins at 1e-3."""
TRAINED, DECODED, ORACLE = "training", "decoding", "definition"


@dataclass(frozen=True, slots=True)
class Check:
    """A law, and the disaster that follows where it is broken."""

    number: int
    title: str
    disaster: str
    run: Callable[[Patient, Meter], None]
    of_output: bool
    """it judges what the model has learnt, which says nothing before training"""


CHECKS: dict[int, Check] = {}


def check(number: int, title: str, disaster: str, *, of_output: bool = False,
          ) -> Callable[[Callable[[Patient, Meter], None]], Callable[[Patient, Meter], None]]:  # fmt: skip
    """Register a check under its number in docs/doctor.md."""

    def add(run: Callable[[Patient, Meter], None]) -> Callable[[Patient, Meter], None]:
        if number in CHECKS:
            raise ValueError(f"there are two checks number {number}")
        CHECKS[number] = Check(number, title, disaster, run, of_output)
        return run

    return add
