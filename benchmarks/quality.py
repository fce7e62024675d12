"""Bits per byte of held-out documents at equal wall-clock and at equal work: Tidal, a byte and a token transformer.

    python -m benchmarks.quality --corpus kjv --seconds 600 --seeds 0 1 2

One process trains all contestants of a seed in turns of a few seconds, each on its own clock, which runs while batches
are prepared and learnt and stands still during evaluation; so a noisy machine is equally noisy for all. The learning
rate rises for `warmup-steps`, as many for all, is constant, and falls to zero over the last `decay-fraction` of the
budget. All see the same windows of text in the same order, and are charged the same bytes, which is checked at every
evaluation; see benchmarks/contestants.py. Two races where --teraflops is given, too: one by the clock and one by the
work. Times of steps are on the clock of --clock.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import record
from tidal.allocator import keep_memory
from tidal.cli import UserError, main, note, parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.contestants import Runner, Texts
    from benchmarks.entries import Entry

COLOURS = ("#0b6e99", "#c1440e", "#6a8f3c", "#7d5ba6", "#b8860b", "#4a4a4a", "#c06c84", "#2a9d8f")


@dataclass(frozen=True)
class Racing:
    """What benchmarks.quality and benchmarks.ablations have in common."""

    corpus: str = "kjv"
    """A name of python -m tidal.corpora (made in corpora/NAME if need be), or a folder with train/ and held-out/."""
    seeds: tuple[int, ...] = (0,)
    """Of weights and data order; one after the other."""
    set: tuple[str, ...] = ()
    """KEY=VALUE …: settings of all contestants that have them, such as vocab-size=4096 d-model=192."""
    turn: float = 5.0
    """Seconds each contestant trains before it is the next one's turn."""
    context: int = 0
    """Reader tokens of a held-out window, half of which are its context; 0: as in training."""
    held_out_bytes: int = 0
    """Of the held-out documents take whole ones, evenly spread, up to about so many bytes; 0: all."""
    threads: int = 0
    """CPU threads; 0: as training chooses them."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    clock: Literal["wall", "cpu"] = "wall"
    """What --seconds are; cpu: those of the process on all its cores, whatever else the machine does meanwhile."""


@dataclass(frozen=True)
class Quality(Racing):
    """Settings of `python -m benchmarks.quality`."""

    seconds: float = 600.0
    """The budget of each contestant on its own clock; 0: no such race."""
    teraflops: float = 0.0
    """The budget of a second race, in 10^12 floating-point operations; 0: no such race."""
    contestants: tuple[str, ...] = ("tidal", "token", "byte")
    """NAME or NAME:KEY=VALUE,…, such as token:lr=3e-3,layers=5; names are tidal, token, byte."""
    evaluations: int = 10
    """Points of a curve, each measured on one held-out window in --every; after the last, on all of them."""
    every: int = 4
    """See --evaluations."""
    cuts: int = 400
    """At the end of a race, measure the boundary gap at so many places of the held-out documents; 0: none."""
    out: str = "benchmarks/results/quality.json"
    """Written after every evaluation."""
    picture: str | None = None
    """Draw the curves into this PNG, needs the extra `plot`."""


@dataclass(frozen=True)
class Budget:
    """What each contestant may use up."""

    of: Literal["seconds", "steps", "teraflops"]
    amount: float

    def spent(self, racer: Racer, clock: str = "wall") -> float:
        """The part of it that is used up."""
        if self.of == "seconds":
            return (racer.runner.seconds if clock == "wall" else racer.runner.cpu_seconds) / self.amount
        return (racer.runner.n_steps if self.of == "steps" else racer.flops / 1e12) / self.amount


@dataclass
class Racer:
    """A contestant on its way."""

    runner: Runner
    flops_per_step: float
    evaluated: int = 0

    @property
    def flops(self) -> float:
        """Work done so far."""
        return self.flops_per_step * self.runner.n_steps


Point = dict[str, Any]


def race(entries: Sequence[Entry], texts: Texts, seed: int, budget: Budget, settings: Racing,
         report: Callable[[Point], None], evaluations: int = 1, every: int = 1, cuts: int = 0) -> None:  # fmt: skip
    """Train all contestants of a seed in turns until each has spent its budget; `report` every evaluation."""
    from benchmarks.contestants import runner
    from tidal.device import pick_device

    device = pick_device(settings.device)
    racers = []
    for entry in entries:  # the work is counted on a copy, which also warms the machine up
        flops = runner(entry, texts, seed, device).flops_per_step()
        racers.append(Racer(runner(entry, texts, seed, device), flops))
    running = list(racers)
    while running:
        for racer in list(running):
            r, turn_ends = racer.runner, racer.runner.seconds + settings.turn
            while r.seconds < turn_ends and racer in running:
                r.timed_step(budget.spent(racer, settings.clock))
                spent = budget.spent(racer, settings.clock)
                if spent >= 1:
                    running.remove(racer)
                if spent >= 1 or spent >= (racer.evaluated + 1) / evaluations:
                    racer.evaluated = max(racer.evaluated + 1, math.floor(min(spent, 1) * evaluations))
                    report(_point(racer, settings, spent >= 1, every, cuts))


def _point(racer: Racer, settings: Racing, final: bool, every: int, cuts: int) -> Point:
    r = racer.runner
    context = settings.context or r.train.text.reader_budget
    step_seconds = r.step_seconds if settings.clock == "wall" else r.step_cpu_seconds
    point: Point = {
        "contestant": r.entry.label, "seed": r.seed, "final": final,
        "bits_per_byte": r.bits_per_byte(context, every), "seconds": r.seconds, "cpu_seconds": r.cpu_seconds,
        "steps": r.n_steps, "step_ms": 1000 * statistics.median(step_seconds), "teraflops": racer.flops / 1e12,
        "parameters": r.parameters(),
    }  # fmt: skip
    if final:  # `bits_per_byte` is of the curve's windows, for the picture; this is the result
        whole = point["bits_per_byte"] if every == 1 else r.bits_per_byte(context)
        point["final_bits_per_byte"], point["held_out_bytes"] = whole, r.texts.held_out_bytes
        if cuts:
            point["boundary"] = r.boundary_gap(cuts)
    bits = point.get("final_bits_per_byte", point["bits_per_byte"])
    note(f"{r.entry.label}, seed {r.seed}: {bits:.4f} bits per byte at step {r.n_steps:,}, {r.seconds:.0f} s "
         f"({point['step_ms']:.0f} ms a step){', the end' * final}")  # fmt: skip
    return point


def run(argv: list[str]) -> None:
    """Race, draw, and print one JSON line."""
    settings = parse(Quality, argv, "python -m benchmarks.quality", __doc__)
    keep_memory()  # as training does
    both = Budget("seconds", settings.seconds), Budget("teraflops", settings.teraflops)
    budgets = [b for b in both if b.amount > 0]
    if not budgets:
        raise UserError("nothing to race for; give --seconds or --teraflops")
    if settings.evaluations < 1 or settings.every < 1 or not settings.turn > 0 or settings.cuts < 0:
        raise UserError("--evaluations, --every and --turn must be positive, and --cuts not negative")
    from benchmarks.contestants import Texts
    from benchmarks.entries import entries_of

    entries = entries_of(settings.contestants, settings.set)
    set_up(settings, entries)
    texts = Texts(settings.corpus, settings.held_out_bytes)
    content = {"benchmark": "quality", "settings": asdict(settings), **record.machine(),
               "held_out_bytes": texts.held_out_bytes,
               "contestants": {e.label: asdict(e) for e in entries},
               "races": [{"budget": asdict(b), "points": list[Point]()} for b in budgets]}  # fmt: skip
    out = Path(settings.out)
    for seed in settings.seeds:
        for budget, entry in zip(budgets, content["races"], strict=True):

            def report(point: Point, points: list[Point] = entry["points"]) -> None:
                points.append(point)
                record.save(out, content)

            race(entries, texts, seed, budget, settings, report, settings.evaluations, settings.every, settings.cuts)
    if settings.picture:
        draw(content["races"], [e.label for e in entries], settings, Path(settings.picture))
    results = [result for r in content["races"] for result in summary(r, [e.label for e in entries])]
    print_table(results)
    print(json.dumps({**{k: content[k] for k in ("benchmark", "settings", *record.machine())}, "results": results}))


def set_up(settings: Racing, entries: Sequence[Entry]) -> None:
    """Threads. Raises UserError where the settings make no race."""
    from tidal.device import set_threads

    if not entries or not settings.seeds or min(settings.seeds) < 0:
        raise UserError("--contestants and --seeds must name at least one each, and seeds are not negative")
    set_threads(max(e.train.model.d_model for e in entries), settings.threads)


def summary(raced: dict[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Of each contestant the mean over seeds, and the ratio to the first one."""
    ends = {label: [p for p in raced["points"] if p["final"] and p["contestant"] == label] for label in labels}
    means = {label: statistics.fmean(p["final_bits_per_byte"] for p in found) for label, found in ends.items() if found}
    return [
        {"budget": raced["budget"], "contestant": label, "bits_per_byte": round(mean, 4),
         "seeds": [round(p["final_bits_per_byte"], 4) for p in ends[label]],
         "times_the_first": round(mean / next(iter(means.values())), 4),
         "steps": round(statistics.fmean(p["steps"] for p in ends[label])),
         "step_ms": round(statistics.fmean(p["step_ms"] for p in ends[label]), 2),
         "teraflops": round(statistics.fmean(p["teraflops"] for p in ends[label]), 3),
         "boundary_gap_per_byte": gap_of(ends[label]),
         "parameters": ends[label][0]["parameters"]}
        for label, mean in means.items()
    ]  # fmt: skip


def gap_of(ends: Sequence[Point]) -> float | None:
    """The mean boundary gap, in nats a byte; None where it was not measured."""
    gaps = [p["boundary"]["gap_per_byte"] for p in ends if "boundary" in p]
    return round(statistics.fmean(gaps), 4) if gaps else None


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """One line a contestant and race."""
    print(f"{'budget':<16} {'contestant':<28} {'bits/byte':>9} {'× first':>8} {'steps':>8} {'ms/step':>8}"
          f" {'10^12 flop':>10} {'parameters':>11} {'gap/byte':>9}")  # fmt: skip
    for r in results:
        gap = "" if r["boundary_gap_per_byte"] is None else f"{r['boundary_gap_per_byte']:.4f}"
        budget = f"{r['budget']['amount']:g} {r['budget']['of']}"
        print(f"{budget:<16} {r['contestant']:<28} {r['bits_per_byte']:>9.4f} {r['times_the_first']:>8.4f}"
              f" {r['steps']:>8,} {r['step_ms']:>8.1f} {r['teraflops']:>10.2f} {r['parameters']:>11,}"
              f" {gap:>9}")  # fmt: skip


def draw(races: Sequence[dict[str, Any]], labels: Sequence[str], settings: Quality, path: Path) -> None:
    """Bits per byte against seconds and against work; seeds thin, their mean thick. Raises UserError."""
    figure = new_figure(11, 5)
    clock = "CPU seconds of training" if settings.clock == "cpu" else "seconds of training"
    for axes, of, what in zip(figure.subplots(1, 2, sharey=True), ("seconds", "teraflops"),
                              (clock, "10¹² floating-point operations"), strict=True):  # fmt: skip
        raced = next((r for r in races if r["budget"]["of"] == of), races[0])
        for label, colour in zip(labels, [*COLOURS, *["grey"] * len(labels)], strict=False):
            points = [p for p in raced["points"] if p["contestant"] == label]
            x = "cpu_seconds" if of == "seconds" and settings.clock == "cpu" else of
            curves = [[(p[x], p["bits_per_byte"]) for p in points if p["seed"] == seed]
                      for seed in dict.fromkeys(p["seed"] for p in points)]  # fmt: skip
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.6)
            mean = [tuple(statistics.fmean(xs) for xs in zip(*at, strict=True)) for at in zip(*curves, strict=False)]
            if mean:
                axes.plot(*zip(*mean, strict=True), color=colour, linewidth=2, marker="o", markersize=3, label=label)
        axes.set(xlabel=what)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="bits per byte, held out", title=f"{Path(settings.corpus).name}: equal time")
    own = any(r["budget"]["of"] == "teraflops" for r in races)
    figure.axes[1].set(title="equal work" if own else "the same runs, by their work")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center")  # names are long
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--picture needs matplotlib: pip install -e ".[plot]"') from None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, and the folder it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main(run, "benchmarks.quality")
