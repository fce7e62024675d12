"""Curves, drawn three ways: SVG for pages (by hand: it is quick, follows the page's colours and needs no package), PNG
(matplotlib), and letters for the terminal (plotext).
"""

from __future__ import annotations

import html
import io
import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tidal.cli import UserError
from tidal.report.runs import Points

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 22
MOST_POINTS = 400  # of a curve; more cannot be seen
FEW = 40  # points that are shown one by one
HIGHEST = 1e300  # of what can be drawn: the ends of an axis must be floats, too
COLOURS = ("#0f766e", "#c2410c", "#4f46e5", "#a16207", "#be185d", "#4d7c0f", "#0369a1", "#7c3aed", "#475569")
COLOURS_ON_DARK = ("#5eead4", "#fdba74", "#a5b4fc", "#fde047", "#f9a8d4", "#bef264", "#7dd3fc", "#c4b5fd", "#cbd5e1")


@dataclass(frozen=True)
class Curve:
    """Points (x, y), x ascending."""

    label: str
    points: Points
    colour: int = 0
    """index into COLOURS, which begin again after the last one"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "colour", self.colour % len(COLOURS))


@dataclass(frozen=True)
class Panel:
    """One diagram. What cannot be drawn (NaN, infinity, numbers near it) is left out."""

    title: str
    unit: str
    curves: Sequence[Curve]
    x: str = "step"
    noisy: bool = False
    """draw the running median, and the points faintly behind it"""
    zoom: bool = False
    """let the axis begin where the values do, not at 0"""
    linear: bool = False
    """no logarithmic axis, whatever the values"""

    def shown(self) -> list[Curve]:
        """The curves that have points, without those that cannot be drawn, and not too many."""
        curves = []
        for curve in self.curves:
            points = [(x, y) for x, y in curve.points if abs(x) < HIGHEST and abs(y) < HIGHEST]  # NaN is not
            stride = -(-len(points) // MOST_POINTS)
            if points:
                curves.append(Curve(curve.label, points[:: max(1, stride)] + points[-1:] * (stride > 1), curve.colour))
        return curves

    def log(self) -> bool:
        """Whether the y axis is logarithmic: where all is positive and spans more than a factor of 20."""
        if self.linear:
            return False
        ys = [y for curve in self.shown() for _, y in curve.points]
        return bool(ys) and min(ys) > 0 and max(ys) / min(ys) > 20


def smooth(points: Points) -> Points:
    """The running median, over a 25th of the points, five at least."""
    half = max(2, len(points) // 50)
    ys = [y for _, y in points]
    return [(x, median(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers from `low` to `high`; with `log`, powers of ten, between few of them 2s and 5s."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        between = (1, 2, 5) if last - first <= 3 else (1,)
        every = max(1, (last - first) // 5)
        return [t for e in range(first, last + 1, every) for m in between if low <= (t := m * 10.0**e) <= high]
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(m for m in (1, 2, 2.5, 5, 10) if m * size >= rough * (1 - 1e-9))
    return [n * size for n in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def number(value: float, digits: int = 3) -> str:
    """So many digits, as people write them: 1,600, 0.0032, 1.9e-5, 12k."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.{digits}g}k" if abs(value) < 1e6 else f"{value / 1e6:.{digits}g}M"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def svg(panel: Panel) -> str:
    """The panel as an <svg> element; empty where there is nothing to draw. Its colours are CSS classes c0 … c7."""
    curves, log = panel.shown(), panel.log()
    if not curves:
        return ""
    (x0, x1), (y0, y1) = _axes(panel)

    def at(x: float, y: float) -> tuple[float, float]:
        part = math.log(y / y0) / math.log(y1 / y0) if log else (y - y0) / (y1 - y0)
        return (round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1),
                round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1))  # fmt: skip

    def line(points: Points, css: str) -> str:
        return f'<polyline class="{css}" points="{" ".join(f"{x:g},{y:g}" for x, y in (at(*p) for p in points))}"/>'

    parts = []
    for tick in ticks(y0, y1, log):
        y = at(x0, tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
                     f'<text class="y" x="{LEFT - 6}" y="{y + 3.5}">{number(tick, 4)}</text>')  # fmt: skip
    for tick in ticks(x0, x1):
        x = at(tick, y0)[0]
        parts.append(f'<text class="x" x="{x}" y="{HEIGHT - 6}">{number(tick)}</text>')
    for curve in curves:
        noisy = panel.noisy and len(curve.points) > 2 * FEW
        if noisy:
            parts.append(line(curve.points, f"faint c{curve.colour}"))
        parts.append(line(smooth(curve.points) if noisy else curve.points, f"c{curve.colour}"))
        if len(curve.points) <= FEW:
            for x, y in curve.points:
                cx, cy = at(x, y)
                name = f"{curve.label}, " if len(curves) > 1 else ""
                tip = html.escape(f"{name}{panel.x} {number(x)}: {y:.4g}")
                parts.append(f'<circle class="c{curve.colour}" cx="{cx}" cy="{cy}" r="2.4"><title>{tip}</title>'
                             "</circle>")  # fmt: skip
    label = html.escape(f"{panel.title}, {panel.unit}, against {panel.x}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(panel: Panel) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of both axes of a panel that has points."""
    xs, ys = ([point[i] for curve in panel.shown() for point in curve.points] for i in (0, 1))
    return (min(0.0, *xs), max(1.0, *xs)), _range(ys, panel.log(), panel.zoom)


def _range(values: list[float], log: bool, zoom: bool) -> tuple[float, float]:
    """Ends of an axis: from 0 where nothing is negative (unless `zoom`), and never empty."""
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    low = low if zoom else min(0.0, low)
    room = 0.05 * (high - low) or max(1.0, 0.05 * abs(high))
    return low - room * (low < 0 or zoom), high + room


def png(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels with matplotlib: the whole picture or, with an OSError, nothing. UserError without panels."""
    from matplotlib.figure import Figure

    from tidal.files import atomic_write

    if not panels:
        raise UserError(f"cannot draw {path}: there is nothing to draw; all figures are nan or missing")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), dpi=120, layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for curve in panel.shown():
            colour, noisy = COLOURS[curve.colour], panel.noisy and len(curve.points) > 2 * FEW
            if noisy:
                axis.plot(*zip(*curve.points, strict=True), color=colour, linewidth=0.6, alpha=0.35)
            points, marker = smooth(curve.points) if noisy else curve.points, "o" if len(curve.points) <= FEW else None
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, label=_plain(curve.label))
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.unit)
        if panel.log():
            axis.set_yscale("log")
        elif not panel.zoom and panel.shown() and min(y for curve in panel.shown() for _, y in curve.points) >= 0:
            axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(panel.shown()) > 1:
            axis.legend(frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write(path, picture.getvalue())


def _plain(label: str) -> str:
    """Matplotlib would take dollars for a formula, and hide from the legend what begins with a line below."""
    return " " * label.startswith("_") + label.replace("$", r"\$")


def terminal(panel: Panel, width: int = 80, height: int = 18) -> str:
    """The panel in letters, without colours, each of several curves in a letter of its own; empty without points."""
    import plotext  # version 6 or newer; 5 had other names

    curves, log = panel.shown(), panel.log()
    if not curves:
        return ""
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    figure.theme("colorless")
    figure.title(f"{panel.title}, {panel.unit}, against {panel.x}")
    (x0, x1), (y0, y1) = _axes(panel)
    for axis, low, high, powers in (("x", x0, x1, False), ("y", y0, y1, log)):
        marks = ticks(low, high, powers)
        low, high, *at = (math.log10(v) if powers else v for v in (low, high, *marks))
        figure.ruler(axis).lim(low, high).ticks(at, [number(mark) for mark in marks])
    letters = list(zip(itertools.cycle(string.ascii_letters), curves, strict=False))
    for letter, curve in letters:
        points = smooth(curve.points) if panel.noisy and len(curve.points) > 2 * FEW else curve.points
        xs, ys = ([float(point[i]) for point in points] for i in (0, 1))
        ys = [math.log10(y) for y in ys] if log else ys
        figure.draw(figure.signal(xs, ys, marker=letter if len(curves) > 1 else None).lines())
    drawn = str(plotext.uncolorize(str(figure.build())))
    key = "   ".join(f"{letter} {curve.label}" for letter, curve in letters)  # a legend inside would hide curves
    return f"{drawn.rstrip()}\n{key}\n" if len(curves) > 1 else drawn
