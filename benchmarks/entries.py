"""Contestants and their settings, as they are written on the command line.

A contestant is written `NAME` or `NAME:KEY=VALUE,…`, such as `token:lr=3e-3,layers=5`: any field of Shape, Optim,
Switches or Baseline, `rows`, `precision`, `vocab-size`, `reader-budget` and `cut-probability`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.switches import Switches
from tidal.cli import UserError
from tidal.config import Optim, Shape, Train
from tidal.train.presets import PRESETS

T = TypeVar("T")


@dataclass(frozen=True)
class Baseline:
    """What the baselines have in place of Tidal's two depths."""

    layers: int = 4
    d_ff: int = 384
    position_scale: float = 1.0
    """Distances are multiplied by it before ALiBi sees them. A byte is further away in bytes than in tokens."""
    recall: bool = False
    """Told what followed the same one, two and three ids the last time, as Tidal's writer is told."""
    ngram_rows: int = 0
    """Rows of a hashed table of the last two and three ids, as Tidal's writer has of suffixes (two vectors a row)."""


@dataclass(frozen=True)
class Entry:
    """A contestant and all its settings."""

    label: str
    kind: str
    train: Train = PRESETS["text"]
    switches: Switches = field(default_factory=Switches)
    baseline: Baseline = field(default_factory=Baseline)

    def takes(self, key: str) -> str | None:
        """The name of a setting as its field is spelled; None where this kind of contestant has none such."""
        name = key.strip().replace("-", "_")
        return name if name in (OF_TIDAL if self.kind == "tidal" else OF_BASELINES) else None


def entries_of(specs: Sequence[str], common: Sequence[str] = ()) -> list[Entry]:
    """Read contestants; each has the `common` settings (KEY=VALUE) that it knows, and then its own.

    Raises UserError: an unknown contestant or setting, a value that cannot be, two of the same name.
    """
    entries, used = [], set()
    for spec in specs:
        kind, _, own = spec.partition(":")
        if kind not in KINDS:
            raise UserError(f"{spec!r} is no contestant; begin with one of {', '.join(KINDS)}")
        entry, values = Entry(spec, kind), dict[str, str]()
        for setting in [*common, *filter(None, own.split(","))]:
            key, _, value = setting.partition("=")
            if (name := entry.takes(key)) is not None:
                values[name] = value
                used.add(setting)
            elif setting not in common:
                raise UserError(f"{spec!r}: {kind} has no setting {key!r}")
        entry = _with(entry, values)
        entries.append(entry)
    if unused := [setting for setting in common if setting not in used]:
        raise UserError(f"no contestant has a setting {unused[0].partition('=')[0]!r}")
    if len({e.label for e in entries}) < len(entries):
        raise UserError("a contestant is named twice; give its other settings after a colon")
    return entries


KINDS = ("tidal", "token", "byte")
OF_TIDAL = frozenset(
    [f.name for kind in (Shape, Optim, Switches) for f in dataclasses.fields(kind)]
    + ["rows", "precision", "vocab_size", "reader_budget", "cut_probability"]
)
OF_BASELINES = frozenset(
    [f.name for kind in (Baseline, Optim) for f in dataclasses.fields(kind)]
    + ["d_model", "n_heads", "n_kv_heads", "qk_norm", "rows", "precision", "vocab_size", "reader_budget"]
) - {"aux_weight", "accumulate"}


def _with(settings: T, values: dict[str, str]) -> T:
    """The dataclass with these fields, its own or of the dataclasses in it, replaced. Raises UserError."""
    new: dict[str, Any] = {}
    for f in dataclasses.fields(settings):  # type: ignore[arg-type]
        old = getattr(settings, f.name)
        if dataclasses.is_dataclass(old):
            new[f.name] = _with(old, values)
        elif f.name in values:
            new[f.name] = _value(old, f.name, values[f.name])
    try:
        return dataclasses.replace(settings, **new)  # type: ignore[type-var]
    except ValueError as error:
        raise UserError(str(error)) from error


def _value(old: Any, name: str, value: str) -> Any:
    try:
        if isinstance(old, bool):
            return {"on": True, "off": False, "true": True, "false": False}[value.lower()]
        if isinstance(old, int | float | str):
            return type(old)(value)
    except (ValueError, KeyError):
        pass
    raise UserError(f"{name}={value!r} cannot be: it is {old!r} by default")
