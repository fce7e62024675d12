"""Warnings while a run is trained: what its figures say is wrong with it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

GUESSING = math.log(258)
"""Nats a unit of who guesses: every alphabet has 256 bytes, `<eob>` and `<eos>` at least."""
ROWS = 5
"""Rows of metrics.csv whose median is looked at: one bad batch is no illness."""

FLAT = 0.05
"""The least part of its first value that the loss must have lost after warm-up and 10 rows (100 steps). Healthy runs
lose 30% and more by then (docs/training.md); the doctor asks the same of a whole run."""
RISEN = (0.25, 0.1)
"""A loss diverges where it stands above its lowest by these parts of what had been learnt, and of its first value (of
guessing, where it began with weights of another run): a spike that the run recovers from within 50 steps, and the noise
around a loss near 0, stay below."""
ABOVE_GUESSING = 1.25
"""Untrained weights stand at 1.1 times guessing; twenty logged steps later only broken ones are above this."""
LOW, EARLY = 0.02, 100
"""No text is learnt to this part of guessing in so many steps, unless it repeats itself or the targets are seen."""
TYPO = 0.1
"""Nats by which misspelt letters are predicted better than chance. Who does not see them is never above 0 in the mean:
near 0 where all letters are alike to him, and then without noise; else far below (docs/training.md)."""
APART = (0.5, 0.5)
"""Training text costs less than this part of what held-out text costs, and so many bits per byte less."""
CONTEXT, PATIENCE = 0.002, 0.25
"""Least nats a unit that reading the text before a block must be worth (another is read in its place), and the part of
the run after which it is asked for. The doctor's own limit."""
SLOW, BEFORE = 0.5, 100
"""Of the median speed of so many rows before; said when five rows (50 steps) in a row are below it."""


@dataclass(frozen=True)
class Alarm:
    """One warning."""

    kind: str
    """flat, diverging, implausibly low, collapsed or slow"""
    step: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: WARNING, {self.kind}: {self.text}"


class Health:
    """Looks at the rows of metrics.csv in order, and says each kind of warning once.

    What it says is a function of the rows alone, so a run that is continued repeats nothing, and a report needs no
    record of the warnings. A run that began with weights of another (`fine_tuned`) may be good from its first step on.
    """

    def __init__(self, max_steps: int, warmup_steps: int, rows: Iterable[Mapping[str, Any]] = (),
                 fine_tuned: bool = False) -> None:  # fmt: skip
        self.max_steps, self.warmup_steps = max_steps, warmup_steps
        self.losses: list[float] = []
        self.fell, self.lowest, self.early = fine_tuned, math.inf, 0 if fine_tuned else EARLY
        self.least_first = GUESSING if fine_tuned else 0.0  # who begins near the lowest would be warned of any noise
        self.speeds: deque[float] = deque(maxlen=BEFORE + ROWS)
        self.alarms: dict[str, Alarm] = {}
        for row in rows:
            self.look(row)

    def look(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The warnings that one more row gives rise to; values are numbers or their text, empty ones are missing.

        Raises ValueError for a row without step and loss, or with what is no number.
        """
        values = {name: float(value) for name, value in row.items() if value not in ("", None)}
        if not {"step", "loss"} <= values.keys():
            raise ValueError(f"a row of metrics needs step and loss, this one has {', '.join(values) or 'nothing'}")
        step, before = int(values["step"]), set(self.alarms)
        self.losses.append(values["loss"])
        self._loss(step, values.get("lr", math.nan))
        self._probes(step, values)
        if "units_per_second" in values:
            self._speed(step, values["units_per_second"])
        return [alarm for kind, alarm in self.alarms.items() if kind not in before]

    def _say(self, kind: str, step: int, text: str) -> None:
        self.alarms.setdefault(kind, Alarm(kind, step, text))

    def _loss(self, step: int, rate: float) -> None:
        n, now = len(self.losses), median(self.losses[-ROWS:])
        first = max(self.least_first, median(self.losses[:ROWS]))
        if step <= self.early and n >= 2 and max(self.losses[-2:]) < LOW * GUESSING:
            self._say("implausibly low", step, f"a loss of {now:.3g} nats a unit so early; either the data say next to "
                      "nothing, or the model sees what it is asked for: run python -m tidal.doctor")  # fmt: skip
        if not self.fell and n >= 2 * ROWS and step > self.warmup_steps:
            self.fell = median(self.losses[n // 2 :]) <= (1 - FLAT) * first
            if not self.fell and now > ABOVE_GUESSING * GUESSING:
                self._diverging(step, now, f"{GUESSING:.2g} for guessing", rate)
            elif not self.fell and "diverging" not in self.alarms:
                self._say("flat", step, f"the loss does not fall: {now:.3g} nats a unit, {first:.3g} at first; the "
                          f"learning rate is {rate:.3g}, maybe too small or far too large")  # fmt: skip
                self.fell = True  # said; no need to look again
        if n > ROWS and now > self.lowest + RISEN[0] * max(0.0, first - self.lowest) + RISEN[1] * first:
            self._diverging(step, now, f"{self.lowest:.3g} before", rate)
        if n >= ROWS:
            self.lowest = min(self.lowest, now)

    def _diverging(self, step: int, now: float, against: str, rate: float) -> None:
        self._say("diverging", step, f"the loss has risen to {now:.3g} nats a unit, against {against}; the learning "
                  f"rate is {rate:.3g}, try a smaller --lr, with --resume never")  # fmt: skip

    def _probes(self, step: int, values: Mapping[str, float]) -> None:
        if (gain := values.get("typo_gain", 0.0)) > TYPO:
            self._say("implausibly low", step, f"misspelt letters are predicted {gain:.2g} nats better than chance, "
                      "which takes seeing them: the targets leak; run python -m tidal.doctor")  # fmt: skip
        held_out, bits = values.get("held_out_bits_per_byte", 0.0), values.get("bits_per_byte", math.inf)
        if bits < min(APART[0] * held_out, held_out - APART[1]):
            self._say("implausibly low", step, f"training text costs {bits:.3g} bits per byte, held-out text "
                      f"{held_out:.3g}: it is learnt by heart, or in training the targets leak")  # fmt: skip
        worth = values.get("context_gain", math.inf)
        if worth < CONTEXT and step >= max(self.warmup_steps + 1, PATIENCE * self.max_steps):
            self._say("collapsed", step, "what is written does not depend on what is read: reading the text before "
                      f"a block is worth {worth:.2g} nats a unit; see docs/garbage.md, and run python -m tidal.doctor")

    def _speed(self, step: int, speed: float) -> None:
        self.speeds.append(speed)
        before, now = list(self.speeds)[:-ROWS], list(self.speeds)[-ROWS:]
        if len(before) >= ROWS and max(now) < SLOW * max(before) and max(now) < SLOW * (usual := median(before)):
            self._say("slow", step, f"throughput has halved: {median(now):,.0f} units a second, {usual:,.0f} before; "
                      "something else may be using the machine")  # fmt: skip
