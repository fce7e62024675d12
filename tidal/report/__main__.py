"""`python -m tidal.report`: look at a run, or compare several."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidal.cli import UserError, finite, main, note, parse

if TYPE_CHECKING:
    from tidal.report.runs import Run

DESCRIPTION = """Look at a run, or compare several: a plot and the final figures; --out writes a page or a picture.
Usage: python -m tidal.report [RUN …] [flags]; RUN is a run folder; without one, the newest run under runs/."""


@dataclass(frozen=True)
class Report:
    """Settings of `python -m tidal.report`."""

    out: str | None = None
    """File to write instead of printing: .html, a page that needs nothing but itself, or .png (extra plot)."""
    json: bool = False
    """Print one JSON object: the final figures and the warnings of each run."""


def run(argv: list[str]) -> None:
    """Read the runs, then print or write."""
    folders = [a for before, a in zip(["", *argv], argv, strict=False) if not a.startswith("-") and before != "--out"]
    flags = [a for before, a in zip(["", *argv], argv, strict=False) if a.startswith("-") or before == "--out"]
    settings = parse(Report, flags, "tidal.report", DESCRIPTION)
    from tidal.report.runs import newest, read

    if settings.out is not None:
        _check(Path(settings.out))
    runs = _distinct([read(Path(folder)) for folder in folders] or [read(newest())])
    if settings.out is not None:
        _write(runs, Path(settings.out))
        note(f"wrote {settings.out}")
    if settings.json:
        print(json.dumps({"runs": [finite(run.final()) for run in runs]}, ensure_ascii=False, allow_nan=False))
    elif settings.out is None:
        print(_text(runs))


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same name, from different places, are numbered."""
    names = [run.name for run in runs]
    return [dataclasses.replace(run, name=f"{run.name} ({names[:i].count(run.name) + 1})")
            if names.count(run.name) > 1 else run for i, run in enumerate(runs)]  # fmt: skip


def _check(out: Path) -> None:
    """Raise UserError for a file of another kind, and where matplotlib is missing."""
    if out.suffix not in (".html", ".png"):
        raise UserError(f"--out is {out}; it must end in .html or .png")
    if out.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise UserError('--out FILE.png needs matplotlib: pip install -e ".[plot]"; or write a .html')


def _write(runs: Sequence[Run], out: Path) -> None:
    from tidal.files import atomic_write
    from tidal.report.draw import png
    from tidal.report.page import comparison_panels, render_comparison, render_run, run_panels

    try:
        if out.suffix == ".png":
            png(run_panels(runs[0]) if len(runs) == 1 else comparison_panels(runs), out)
        else:
            atomic_write(out, render_run(runs[0]) if len(runs) == 1 else render_comparison(runs))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def _text(runs: Sequence[Run]) -> str:
    """A plot of validation (where it has run, else of the loss), the figures, the warnings."""
    from tidal.report.draw import terminal
    from tidal.report.page import comparison_panels, figures_table

    table = [list(column) for column in zip(*figures_table(runs), strict=True)]  # a line a figure
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in table]  # fmt: skip
    said = [f"{run.name}: {alarm}" for run in runs for alarm in run.alarms]
    plots = [terminal(panel).rstrip() for panel in comparison_panels(runs)[:1]]
    return "\n".join([*plots, "", *lines, *[""] * bool(said), *said])


if __name__ == "__main__":
    main(run, "tidal.report")
