"""What the checks say: measures, verdicts, the first place where two sides differ, the table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Verdict = Literal["well", "finding", "skipped"]
Sides = tuple[str, str]
Floats = npt.NDArray[np.float64]
SHOWN = 60  # characters of a text or value


@dataclass(frozen=True, slots=True)
class Where:
    """The first place where two sides differ; what does not apply is empty."""

    text: str = ""
    block: str = ""
    step: int | None = None
    """of the block, counted from 0; for what is read, the index of the token in the document"""
    layer: str = ""
    tensor: str = ""
    sides: Sides = ("", "")
    values: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        parts = [f"text {_short(self.text)}"] * bool(self.text) + [f"block {_short(self.block)}"] * bool(self.block)
        parts += [f"step {self.step}"] * (self.step is not None) + [self.layer] * bool(self.layer)
        differ = ", ".join(f"{side} {value}" for side, value in zip(self.sides, self.values, strict=True) if side)
        return ": ".join(filter(None, (", ".join([*parts, self.tensor] if self.tensor else parts), differ)))


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one check."""

    number: int
    check: str
    disaster: str
    """how real projects have met this bug"""
    verdict: Verdict
    measured: float
    """the measure that came nearest to its limit, or passed it; 0 of so many `compared` where all must be equal"""
    limit: float
    compared: int
    seconds: float
    message: str = ""
    """what was found, why the check was skipped, or further figures"""
    where: Where | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All results, in the order of the checks."""

    results: tuple[Result, ...]
    subject: str = ""

    @property
    def findings(self) -> list[Result]:
        """The checks that found something."""
        return [result for result in self.results if result.verdict == "finding"]

    @property
    def ok(self) -> bool:
        """Whether nothing was found. A check that was skipped has found nothing, and proved nothing."""
        return not self.findings

    @property
    def seconds(self) -> float:
        """Time of all checks."""
        return math.fsum(result.seconds for result in self.results)

    def merged(self, other: Report) -> Report:
        """The checks of this report, each with the graver of its two outcomes, and all that both compared."""
        results = []
        for mine in self.results:
            both = [mine, *(theirs for theirs in other.results if theirs.number == mine.number)]
            n_compared, seconds = sum(r.compared for r in both), sum(r.seconds for r in both)
            results.append(replace(max(both, key=_gravity), compared=n_compared, seconds=seconds))
        return Report(tuple(results), self.subject)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; numbers that JSON does not have become strings."""
        results = [dataclasses.asdict(result) for result in self.results]
        for result in results:
            for key in ("measured", "limit"):
                if not math.isfinite(result[key]):
                    result[key] = str(result[key])
        return {"subject": self.subject, "ok": self.ok, "findings": len(self.findings), "seconds": self.seconds,
                "results": results}  # fmt: skip

    def table(self) -> str:
        """For people: a line a check; below a finding, what was found and where."""
        lines = [f"{'#':>2}  {'check':<34} {'verdict':<8} {'measured':>16} {'limit':>8} {'seconds':>8}"]
        for r in self.results:
            measured, limit = "", ""
            if r.verdict != "skipped":
                exact = r.limit == 0 and float(r.measured).is_integer()  # a count
                measured = f"{r.measured:.0f} of {r.compared:,}" if exact else f"{r.measured:.3g}"
                limit = f"{r.limit:.3g}"
            mark = r.verdict.upper() if r.verdict == "finding" else r.verdict
            line = f"{r.number:>2}  {r.check:<34} {mark:<8} {measured:>16} {limit:>8} {r.seconds:>8.2f}"
            lines.append(line + (f"  {r.message}" if r.message and r.verdict != "finding" else ""))
            if r.verdict == "finding":
                lines += [f"      {r.message}"] + [f"      first: {r.where}"] * bool(str(r.where or ""))
                stopped = (r.measured, r.limit) == (math.inf, 0)  # an error, that may have any cause
                lines += [f"      this is how it shows: {r.disaster}"] * (not stopped)
        counts = [(len(self.findings), "finding" if len(self.findings) == 1 else "findings")]
        counts += [(sum(r.verdict == v for r in self.results), v) for v in ("well", "skipped")]
        summary = ", ".join(f"{n} {what}" for n, what in counts if n or what != "skipped")
        return "\n".join([*lines, f"{summary}; {self.seconds:.1f} s"])


def _gravity(result: Result) -> tuple[int, float]:
    """Findings, then what came nearest to its limit, then what was skipped."""
    return ("skipped", "well", "finding").index(result.verdict), result.measured / result.limit if result.limit else 0.0


class Found(Exception):  # noqa: N818, not an error: what a check was looking for
    """Raised by a `Meter` at the first violation."""

    def __init__(self, message: str, measured: float, limit: float, where: Where) -> None:
        super().__init__(message)
        self.message, self.measured, self.limit, self.where = message, measured, limit, where


class Skip(Exception):  # noqa: N818
    """Raised by a check that has nothing to look at."""


Place = Where | Callable[[int], Where]


class Meter:
    """Compares, counts what it compared, remembers what came nearest to its limit, and stops at the first violation."""

    def __init__(self) -> None:
        self.compared = 0
        self.measured = self.limit = 0.0
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """A figure to show beside the verdict."""
        self.notes.append(text)

    def same(self, what: str, left: object, right: object, where: Place, sides: Sides, width: int = 1) -> None:
        """Two values, sequences or tensors must be equal; of sequences the first difference is named.

        `width` values make up one step of the text.
        """
        a, b = _listed(left), _listed(right)
        self.compared += max(len(a), 1)
        if a == b:
            return
        n_differ = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        values = tuple(_short(side[at]) if at < len(side) else "nothing" for side in (a, b))
        self._stop(f"{what} differ", n_differ, 0.0, where, at // width, what, sides, (values[0], values[1]))

    def close(self, what: str, left: Tensor | Floats, right: Tensor | Floats, limit: float, where: Place,
              sides: Sides) -> Floats:  # fmt: skip
        """The largest difference of two arrays must be within the limit; returns all differences, flat."""
        a, b = _flat(left), _flat(right)
        if a.shape != b.shape:
            values = f"{a.size} values", f"{b.size} values"
            self._stop(f"{what} differ in number", math.inf, limit, where, min(a.size, b.size), what, sides, values)
        self.compared += a.size
        with np.errstate(invalid="ignore"):
            differences = np.where(a == b, 0.0, np.abs(a - b))
        differences[np.isnan(differences)] = math.inf
        worst = float(differences.max(initial=0.0))
        if not worst <= limit:  # nor is NaN a limit
            at = int(np.flatnonzero(~(differences <= limit))[0])
            self._stop(f"{what} differ by up to {worst:.3g}", worst, limit, where, at, what, sides,
                       (f"{a[at]:.9g}", f"{b[at]:.9g}"))  # fmt: skip
        self._remember(worst, limit)
        return differences

    def at_most(self, what: str, value: float, limit: float, where: Where | None = None, means: str = "") -> None:
        """A figure must not pass its limit; NaN does. `means`: what it means if it does."""
        self.compared += 1
        if not value <= limit:
            said = f"{what} is {value:.4g}, more than {limit:.4g}" + f": {means}" * bool(means)
            self._stop(said, value, limit, where or Where(), 0, "", ("", ""), ("", ""))
        self._remember(value, limit)

    def holds(self, condition: bool, message: str, where: Where | None = None) -> None:
        """A statement must be true."""
        self.compared += 1
        if not condition:
            self._stop(message, 1, 0.0, where or Where(), 0, "", ("", ""), ("", ""))

    def _remember(self, measured: float, limit: float) -> None:
        if limit and (not self.limit or measured / limit >= self.measured / self.limit):
            self.measured, self.limit = measured, limit

    def _stop(self, message: str, measured: float, limit: float, where: Place, at: int, tensor: str, sides: Sides,
              values: tuple[str, str]) -> NoReturn:  # fmt: skip
        place = where(at) if callable(where) else where
        if not any(place.sides):
            place = replace(place, tensor=place.tensor or tensor, sides=sides, values=values)
        raise Found(message, measured, limit, place)


def _listed(value: object) -> list[Any]:
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _flat(value: Tensor | Floats) -> Floats:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return value.reshape(-1)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}…{text[-SHOWN // 2 + 1 :]}"
