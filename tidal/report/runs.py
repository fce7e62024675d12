"""A run folder, read as far as it has come."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tidal.cli import UserError
from tidal.config import flat
from tidal.files import newest_run
from tidal.train.figures import COLUMNS, JUDGED, read_rows
from tidal.train.health import Alarm, Health

Points = list[tuple[float, float]]
LATEST = 5
"""Rows whose median stands for a run's last loss: a row is of a single batch."""


@dataclass(frozen=True)
class Run:
    """The files of a run that are there."""

    name: str
    settings: dict[str, Any]
    """of config.json, flat: without the groups of the flags"""
    rows: list[dict[str, float]]
    """of metrics.csv, without empty fields"""
    samples: list[dict[str, Any]]
    doctor: dict[str, Any] | None
    """what `Report.to_dict` of the examination before training gave"""

    def curve(self, name: str, against: str = "step") -> Points:
        """A column of metrics.csv over the steps or the seconds."""
        return [(row[against], row[name]) for row in self.rows if name in row]

    @property
    def held_out(self) -> list[str]:
        """The columns of validation, but for `quality` and the probes of `Watch`."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in COLUMNS + JUDGED]

    @property
    def alarms(self) -> list[Alarm]:
        """What the rows warn of."""
        steps, warmup = (int(self.settings.get(name, 0)) for name in ("max_steps", "warmup_steps"))
        return list(Health(steps, warmup, self.rows, self.settings.get("init_from") is not None).alarms.values())

    def latest(self, name: str) -> float:
        """The median of the last rows; the last one's value if that of any is no number."""
        values = [row[name] for row in self.rows[-LATEST:]]
        return median(values) if all(map(math.isfinite, values)) else values[-1]

    def final(self) -> dict[str, Any]:
        """The figures a run is judged by: the last ones (of training `latest`), and the best of validation (`quality`,
        higher is better).
        """
        last = self.rows[-1]
        quality = [(value, step) for step, value in self.curve("quality") if not math.isnan(value)]
        best, at = max(quality, default=(None, None))
        held_out = {name: points[-1][1] for name in self.held_out if (points := self.curve(name))}
        speeds = [row["units_per_second"] for row in self.rows if "units_per_second" in row]
        return {
            "run": self.name, "recipe": self.settings.get("recipe"), "step": int(last["step"]),
            "max_steps": self.settings.get("max_steps"), "seconds": last["seconds"], "loss": self.latest("loss"),
            "bits_per_byte": self.latest("bits_per_byte"), **held_out, "best_quality": best,
            "best_step": None if at is None else int(at), "units_per_second": median(speeds) if speeds else None,
            "memory_mib": last.get("memory_mib"), "warnings": [str(alarm) for alarm in self.alarms],
        }  # fmt: skip


def read(folder: Path) -> Run:
    """The run in a folder, or that of a checkpoint or of `checkpoints`. Raises UserError where there is none."""
    if not os.path.exists(folder / "metrics.csv"):
        at = folder.absolute()
        folder = next((up.parent for up in (at, at.parent) if up.name == "checkpoints"), folder)
    try:
        rows = [_numbers(row) for row in read_rows(folder / "metrics.csv")]
        config = folder / "config.json"
        settings = _settings(json.loads(config.read_text(encoding="utf-8"))) if config.exists() else {}
        samples = _samples(folder / "samples.jsonl")
        verdict = folder / "doctor.json"
        doctor = _doctor(json.loads(verdict.read_text(encoding="utf-8"))) if verdict.exists() else None
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no run: it has no metrics.csv; give a run folder such as runs/NAME") from error
    except (OSError, ValueError, TypeError, csv.Error, RecursionError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    if not rows:
        raise UserError(f"{folder} has no figures yet; wait for its tenth step")
    name = os.fsencode(folder.absolute().name).decode("utf-8", "backslashreplace")  # it need not be UTF-8, reports are
    return Run(name, settings, rows, samples, doctor)


def newest() -> Path:
    """The run under ./runs that has written last. Raises UserError where there is none."""
    return newest_run(lambda run: next(run.glob("metrics.csv"), None))


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    """Raises ValueError for what is no number, a row that lacks one of those that every row has, an endless step."""
    numbers = {name: float(value) for name, value in row.items() if value != ""}
    if missing := {"step", "seconds", "loss", "bits_per_byte"} - numbers.keys():
        raise ValueError(f"a row of metrics.csv has no {', '.join(sorted(missing))}")
    if not math.isfinite(numbers["step"]):
        raise ValueError(f"a row of metrics.csv has step {numbers['step']}")
    return numbers


def _settings(content: Any) -> dict[str, Any]:
    """What config.json holds, flat. Raises ValueError where that cannot be settings."""
    if not isinstance(content, dict):
        raise ValueError("config.json must hold an object")
    settings = flat(content)
    for name in ("max_steps", "warmup_steps"):
        if not isinstance(value := settings.get(name, 0), int):
            raise ValueError(f"config.json has {name} {value!r:.60}, which is no whole number")
    return settings


def _doctor(content: Any) -> dict[str, Any]:
    """What doctor.json holds. Raises ValueError where that cannot be a report of the doctor."""
    if not (isinstance(content, dict) and isinstance(results := content.get("results", []), list)
            and all(isinstance(result, dict) for result in results)):  # fmt: skip
        raise ValueError("doctor.json must hold an object, and its results must be objects")
    return content


def _samples(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    samples = [json.loads(line) for line in lines]
    samples = [s for s in samples if isinstance(s, dict) and {"step", "prompt", "completion"} <= s.keys()]
    if odd := [s["step"] for s in samples if not isinstance(s["step"], int)]:
        raise ValueError(f"samples.jsonl has step {odd[0]!r:.60}, which is no whole number")
    return samples
