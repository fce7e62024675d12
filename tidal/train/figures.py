"""metrics.csv as it is read: its columns and rows. No torch here, `python -m tidal.report` needs none."""

from __future__ import annotations

import csv
import io
from pathlib import Path

MEASURED = ("seconds", "units_per_second", "memory_mib")
"""Columns of metrics.csv that tell of the machine; all others are the same in a run that was stopped and continued."""
COLUMNS = ("step", "seconds", "loss", "bits_per_byte", "grad_norm", "lr", "units_per_second", "memory_mib")
"""Of every row; those of validation come after them."""
JUDGED = ("quality", "context_gain", "typo_gain")
"""Columns beside those of validation: what the best checkpoint is chosen by, and the probes of `Watch`."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv as text; without the last one where it is torn (by a kill, or while a run writes it).

    Raises OSError, and ValueError or csv.Error for what is no table.
    """
    text = path.read_bytes().decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    return rows[:-1] if rows and None in rows[-1].values() else rows


def last_step(path: Path) -> int | None:
    """The step of the last whole row of a metrics.csv; None where there is none."""
    if not path.is_file():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    step = lines[-1].split(b",")[0] if lines and lines[-1].endswith(b"\n") else b""
    return int(step) if step.isdigit() else None
