"""The picture at the end of a run: loss.png with matplotlib, else a plot in the terminal."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path


def draw(out: Path) -> None:
    """Draw loss (and the held-out figures, where there are any) of `out/metrics.csv` against the steps."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {name: [(int(r["step"]), float(r[name])) for r in rows if r[name]] for name in rows[0]}
    held_out = {name: points for name, points in curves.items() if name.startswith(("exact_", "held_out_"))}
    if importlib.util.find_spec("matplotlib"):
        _picture(out / "loss.png", curves, held_out)
    if sys.stderr.isatty() or not importlib.util.find_spec("matplotlib"):
        _terminal(curves["loss"])


def _picture(path: Path, curves: dict[str, list[tuple[int, float]]],
             held_out: dict[str, list[tuple[int, float]]]) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*curves["loss"], strict=True), color="tab:blue", linewidth=1)
    left.set(title="training loss", xlabel="step", ylabel="nats per unit", ylim=(0, None))
    for name, points in held_out.items():
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name.replace("_", " "))
    if "held_out_bits_per_byte" in held_out:
        right.plot(*zip(*curves["bits_per_byte"], strict=True), linewidth=0.5, zorder=0, label="training bits per byte")
    right.set(title="held out", xlabel="step", ylim=(0, None))
    right.legend()
    figure.savefig(path)


def _terminal(loss: list[tuple[int, float]]) -> None:
    import plotext  # version 6 or newer; 5 had other names

    figure = plotext.figure
    figure.clear()
    figure.plot_size(80, 18)
    figure.theme("colorless")
    figure.title("loss, nats per unit")
    figure.draw(figure.signal(*map(list, zip(*loss, strict=True))).lines())
    print(plotext.uncolorize(str(figure.build())), file=sys.stderr)
