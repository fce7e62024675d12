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
ROUNDINGS, SHAKY = 16, 100
"""Where log-probabilities are further apart: ROUNDINGS times as far as one rounding of all weights moves them, up to
SHAKY times FLOAT32. The passes of 18 random models were at most 1.5 to 6 times as far from float64."""
ROUGH = 32
"""Largest mean error of log-probabilities in bfloat16 and float16, in units of eps. 25 healthy models had 1 to 4.4."""
AUTOCAST = 8
"""The same of a training pass whose products alone are in bfloat16. 38 healthy models had 0.8 to 3.7."""
MOVED = 0.5
"""How far its log-probabilities may move on average, in units of eps, with all positions. On a CPU they do not."""
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
        CHECKS[number] = Check(number, title, disaster, run, of_output)
        return run

    return add
