"""Ablations: the default with one thing changed, each trained on the same text as the default beside it.

    python -m benchmarks.ablations --corpus kjv --steps 400 --seeds 0 1 2 --only suffix-rows aux

A few variants at a time take turns with the default in one process (see benchmarks/quality.py), so that times can be
compared as well; results are added to a JSON file as they come, and those that are there already, with the same
settings, are not measured again. `--table` prints what the file holds, for docs/ablations.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.quality import Budget, Point, Racing, race, set_up
from tidal.allocator import keep_memory
from tidal.cli import UserError, main, note, parse

DEFAULT = "default"

VARIANTS: dict[str, dict[str, str]] = {
    "tables": {
        "suffix-rows 0": "suffix-rows=0",
        "suffix-rows 4k": "suffix-rows=4096",
        "suffix-rows 8k": "suffix-rows=8192",
        "suffix-rows 64k": "suffix-rows=65536",
        "suffix-rows 256k": "suffix-rows=262144",
        "suffixes add, without gains": "suffix-gains=off",
        "suffixes: whole": "suffix-orders=0",
        "suffixes: last two and three": "suffix-orders=23",
        "suffixes: whole and last two": "suffix-orders=02",
        "table rate ×1": "table-lr-scale=1",
        "table rate ×4": "table-lr-scale=4",
        "table rate ×20": "table-lr-scale=20",
    },
    "rates": {
        "lr 1e-3": "lr=1e-3",
        "lr 2e-3": "lr=2e-3",
        "lr 8e-3, table rate ×5": "lr=8e-3,table-lr-scale=5",
        "AdamW for matrices": "matrices=adamw",
        "AdamW for matrices, lr 1e-3, table rate ×20": "matrices=adamw,lr=1e-3,table-lr-scale=20",
        "nothing recalled": "recall=off",
        "not foretold": "foretell=off",
        "not foretold, aux 0": "foretell=off,aux-weight=0",
        "aux 0.1": "aux-weight=0.1",
        "aux 1": "aux-weight=1",
        "decay 0.3": "decay-fraction=0.3",
        "decay 1": "decay-fraction=1",
    },
    "shape": {
        "reader 1, writer 1": "reader-layers=1",
        "reader 3, writer 1": "reader-layers=3",
        "reader 4, writer 1": "reader-layers=4",
        "reader 2, writer 2": "writer-layers=2",
        "writer ff 256": "writer-ff=256",
        "writer ff 384": "writer-ff=384",
        "writer ff 256, without gains": "writer-ff=256,suffix-gains=off",
        "writer attention: block": "writer-attention=block",
        "writer attention: memory": "writer-attention=memory",
        "no qk norm": "qk-norm=off",
        "2 heads": "n-heads=2,n-kv-heads=2",
        "1 key head": "n-kv-heads=1",
        "own head": "head=own",
        "bf16": "precision=bf16",
    },
    "text": {
        "vocabulary 512": "vocab-size=512",
        "vocabulary 1k": "vocab-size=1024",
        "vocabulary 4k": "vocab-size=4096",
        "vocabulary 8k": "vocab-size=8192",
        "no boundary dropout": "cut-probability=0",
        "boundary dropout × 2": "cut-probability=0.03",
        "boundary dropout × 4": "cut-probability=0.06",
        "boundary dropout: long blocks as often as short ones": "cuts=blocks,cut-probability=0.06",
        "both parts of cut blocks learnt": "beginnings=learnt",
        "blocks: tokens": "block-rule=token",
        "blocks: two words": "block-rule=pair",
        "blocks: two words, and a writer that attends to them": "block-rule=pair,writer-attention=block",
        "blocks: up to 32 characters": "block-rule=many",
    },
    "order": {
        "written forward": "write-order=forward",
        "read causally": "reading=causal",
        "read causally, aux at every token": "reading=tokens",
        "no places": "places=off",
    },
    "baselines": {
        "token transformer": "token",
        "token transformer, bf16": "token:precision=bf16",
        "token model that recalls": "token:recall=on",
        "byte transformer": "byte",
    },
}  # fmt: skip
"""Group → name → what differs from the default; what begins with the name of a contestant is that contestant."""

UNNAMED: Point = {"context": 0, "clock": "cpu", "device": "cpu"}
"""Settings that runs of before 30 November 2026 do not name; those in benchmarks/results had these.
Their `step_ms` is wall time, whatever the clock."""


@dataclass(frozen=True)
class Ablations(Racing):
    """Settings of `python -m benchmarks.ablations`."""

    steps: int = 400
    """Steps of every run; the learning rate has fallen to zero at their end."""
    seconds: float = 0.0
    """Seconds of every run on its own clock, in place of steps."""
    only: tuple[str, ...] = ()
    """Groups, names, or parts of names, of the variants to run; none: all."""
    at_once: int = 4
    """Variants that take turns with one default."""
    out: str = "benchmarks/results/ablations.json"
    """Results are added to this file."""
    cuts: int = 0
    """Measure the boundary gap, too, at so many places of the held-out documents; 0: do not."""
    table: bool = False
    """Only print the table of what is in the file, as Markdown."""
    list: bool = False
    """Only print the variants."""


def run(argv: list[str]) -> None:
    """Measure what is missing, and print the table."""
    settings = parse(Ablations, argv, "python -m benchmarks.ablations", __doc__)
    keep_memory()  # as training does
    chosen = {name: spec for _, name, spec in choose(settings.only)}
    if settings.list:
        for group, name, spec in choose(settings.only):
            print(f"{group:<10} {name:<48} {spec}")
        return
    out = Path(settings.out)
    results: list[Point] = json.loads(out.read_text()) if out.exists() else []
    if not settings.table:
        results = measure(settings, chosen, results, out)
    print(markdown(results, chosen))
    print(json.dumps({"benchmark": "ablations", "out": str(out), "results": len(results), **record.machine()}))


def choose(only: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Group, name and difference of the variants that are asked for. Raises UserError where there is none."""
    everything = [(group, name, spec) for group, variants in VARIANTS.items() for name, spec in variants.items()]
    for part in only:
        if not any(part == group or part in name for group, name, _ in everything):
            raise UserError(f"no variant and no group {part!r}; see --list")
    names = {name for _, name, _ in everything}
    whole = {part for part in only if part in VARIANTS or part in names}  # these are not to be looked for inside names
    return (v for v in everything if not only or whole & set(v[:2]) or any(p in v[1] for p in set(only) - whole))


def measure(settings: Ablations, chosen: dict[str, str], results: list[Point], out: Path) -> list[Point]:
    """Race all that is missing; `results` grow, and so does the file."""
    from benchmarks.contestants import Texts
    from benchmarks.entries import KINDS, entries_of
    from tidal.device import pick_device

    if settings.at_once < 1 or not (settings.steps > 0 or settings.seconds > 0) or settings.cuts < 0:
        raise UserError("--at-once, and --steps or --seconds, must be positive, and --cuts not negative")
    budget = Budget("seconds", settings.seconds) if settings.seconds else Budget("steps", settings.steps)
    specs = {DEFAULT: "tidal"} | {n: s if s.partition(":")[0] in KINDS else f"tidal:{s}" for n, s in chosen.items()}
    entries = dict(zip(specs, entries_of(list(specs.values()), settings.set), strict=True))
    set_up(settings, list(entries.values()))
    texts = Texts(settings.corpus, settings.held_out_bytes)
    conditions = {"corpus": settings.corpus, "set": " ".join(settings.set), "budget": asdict(budget),
                  "held_out_bytes": texts.held_out_bytes, "context": settings.context, "clock": settings.clock,
                  "device": str(pick_device(settings.device)), "threads": record.machine()["threads"]}  # fmt: skip
    for seed in settings.seeds:
        here = conditions | {"seed": seed}
        done = {r["variant"] for r in results if here.items() <= (UNNAMED | r).items()}
        missing = [name for name in chosen if name not in done]
        for first in range(0, len(missing), settings.at_once):
            names = [DEFAULT, *missing[first : first + settings.at_once]]
            note(f"seed {seed}: {', '.join(names)}")
            ends: dict[str, Point] = {}

            def report(point: Point, ends: dict[str, Point] = ends) -> None:
                ends[point["contestant"]] = point

            race([entries[name] for name in names], texts, seed, budget, settings, report, cuts=settings.cuts)
            default_ms = ends[entries[DEFAULT].label]["step_ms"]
            for name in names:
                end = ends[entries[name].label]
                results.append({
                    "variant": name, "spec": specs[name], **conditions, **end,
                    "times_default_step": end["step_ms"] / default_ms, **record.machine(),
                })  # fmt: skip
            record.save(out, results)
    return results


def markdown(results: Sequence[Point], chosen: dict[str, str]) -> str:
    """A table for each set of conditions: mean over seeds, paired difference to the default, time of a step."""
    conditions: dict[str, list[Point]] = {}
    for r in (UNNAMED | r for r in results):
        flags = " ".join(f"--{name} {r[name]}" for name in (*UNNAMED, "threads"))
        key = (f"**{r['corpus']}, {r['budget']['amount']:g} {r['budget']['of']}, {r['set'] or 'default settings'}**, "
               f"{r['held_out_bytes']:,} held-out bytes, `{flags}`")  # fmt: skip
        conditions.setdefault(key, []).append(r)
    lines = []
    for title, found in conditions.items():
        lines += [title, "",
                  "| variant | bits per byte | against default | seeds | step | 10^12 flop | parameters | gap a unit |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        default: dict[int, list[float]] = {}
        for r in found:
            if r["variant"] == DEFAULT:
                default.setdefault(r["seed"], []).append(r["final_bits_per_byte"])
        for name in [DEFAULT, *chosen]:
            rows = [r for r in found if r["variant"] == name]
            if not rows:
                continue
            bits = [r["final_bits_per_byte"] for r in rows]
            changes = [100 * (b / statistics.fmean(default[r["seed"]]) - 1) for b, r in zip(bits, rows, strict=True)]
            spread = f" ± {statistics.stdev(changes):.2f}" if len(changes) > 1 else ""
            against = "" if name == DEFAULT else f"{statistics.fmean(changes):+.2f}%{spread}"
            step, work = (statistics.fmean(r[key] for r in rows) for key in ("times_default_step", "teraflops"))
            lines.append(f"| {name} | {statistics.fmean(bits):.4f} | {against} | {len({r['seed'] for r in rows})} |"
                         f" × {step:.2f} | {work:.1f} | {rows[0]['parameters']:,} | {_gap(rows)} |")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def _gap(rows: Sequence[Point]) -> str:
    gaps = [r["boundary"]["gap_per_unit"] for r in rows if "boundary" in r]
    return f"{statistics.fmean(gaps):.3f}" if gaps else ""


if __name__ == "__main__":
    main(run, "benchmarks.ablations")
