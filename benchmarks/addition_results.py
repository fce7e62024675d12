"""What benchmarks/addition.py has measured, as tables and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality import COLOURS, new_figure, save
from tidal.cli import UserError
from tidal.train.presets import PRESETS

Run = dict[str, Any]
LEE = {2000: (0.306, None), 4000: (0.982, None), 10000: (1.0, 0.874)}
"""Samples → exact match of Lee et al.'s 10.6M-parameter model, answers reversed and plain."""


def markdown(runs: Sequence[Run]) -> str:
    """A table for each part, way of training and of asking: mean and worst seed."""
    groups: dict[str, list[Run]] = {}
    for r in runs:
        kept = {k: v for k, v in r["train"].items() if k not in ("seed", "addition")}
        key = json.dumps([r["part"], kept, {**r["train"]["addition"], "samples": 0}, r["asked"]],
                         sort_keys=True)  # fmt: skip
        groups.setdefault(key, []).append(r)
    lines = []
    for found in groups.values():
        first = found[0]
        digits, rows = first["train"]["addition"]["digits"], first["train"]["rows"]
        count = first["asked"].get("count", first["asked"].get("pairs"))
        lines += [f"**{first['part']}**: operands of at most {digits} digits, {first['steps']} steps of {rows} rows, "
                  f"{first['parameters']:,} parameters{unusual(first)}; {count:,} sums asked", ""]  # fmt: skip
        lengths = first["part"] == "length"
        columns = [f"{n} digits" for n in first["asked"]["lengths"]] if lengths else ["exact match"]
        columns += {"samples": ["Lee et al."], "exact": ["edge cases"], "length": []}[first["part"]]
        lines += [f"| variant | samples | {' | '.join(columns)} | seeds | CPU seconds |",
                  "|---" * (len(columns) + 4) + "|"]  # fmt: skip
        for variant, samples in dict.fromkeys((r["variant"], r["samples"]) for r in found):
            some = [r for r in found if (r["variant"], r["samples"]) == (variant, samples)]
            if lengths:
                cells = [spread([r["exact_match"][str(n)] for r in some]) for n in first["asked"]["lengths"]]
            else:
                cells = [spread([r["exact_match"] for r in some])]
            if first["part"] == "exact":
                cells.append(spread([r["edge_cases"] for r in some]))
            elif first["part"] == "samples":
                theirs = LEE.get(samples, (None, None))[variant == "forward"] if variant != "no places" else None
                cells.append("" if theirs is None else f"{theirs:.1%}")
            seconds = statistics.fmean(r["cpu_seconds"] for r in some)
            lines.append(f"| {variant} | {samples or 'endless'} | {' | '.join(cells)} | {len(some)} | {seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def unusual(run: Run) -> str:
    """Settings of model and optimizer that are not the recipe's own, as --set takes them."""
    own = asdict(PRESETS["addition"])
    changed = {name: value for part in ("model", "optim") for name, value in run["train"][part].items()
               if value != own[part].get(name)}  # fmt: skip
    return "".join(f", {name.replace('_', '-')}={value}" for name, value in changed.items())


def spread(shares: Sequence[float]) -> str:
    """Mean, and the least in brackets."""
    mean = f"{statistics.fmean(shares):.2%}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.2%})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Exact match by length, a thin line for each seed and a thick one for the mean. Raises UserError."""
    if not runs:
        raise UserError("--picture shows the part `length`, of which there is no run yet")
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    kinds: dict[str, list[Run]] = {}
    for r in runs:
        kinds.setdefault(json.dumps([r["variant"], {**r["train"], "seed": 0}]), []).append(r)
    for some, colour in zip(kinds.values(), COLOURS, strict=False):
        variant, digits = some[0]["variant"], some[0]["train"]["addition"]["digits"]
        for r in some:
            axes.plot([int(n) for n in r["exact_match"]], list(r["exact_match"].values()), color=colour, alpha=0.3,
                      linewidth=1)  # fmt: skip
        shared = [n for n in some[0]["exact_match"] if all(n in r["exact_match"] for r in some)]
        means = [statistics.fmean(r["exact_match"][n] for r in some) for n in shared]
        axes.plot([int(n) for n in shared], means, color=colour, marker="o", markersize=4,
                  label=f"{variant}, up to {digits} digits, {some[0]['steps']:,} steps{unusual(some[0])}, "
                        f"seeds: {len(some)}")  # fmt: skip
        axes.axvline(digits, color=colour, linewidth=0.8, linestyle="--")
    lengths = sorted({int(n) for r in runs for n in r["exact_match"]})
    axes.set(xscale="log", xlabel="digits of both operands (dashed: trained up to here)", ylabel="exact match")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)
