"""Pages that need nothing but themselves: one run, or several side by side."""

from __future__ import annotations

import html
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidal.cli import UserError, note
from tidal.config import flat
from tidal.files import atomic_write
from tidal.report.draw import COLOURS, COLOURS_ON_DARK, Curve, Panel, number, png, svg, terminal
from tidal.report.runs import Run, read
from tidal.train.presets import PRESETS

MOST_SAMPLES = 12  # steps whose samples are shown
MOST_CHARS = 600  # of a sample
DIGITS = 4  # of figures: runs are told apart by 0.2% of their bits

_CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #56616d; --line: #dfe4e8; --page: #f6f7f8; --card: #fff;
  --alarm: #a8430f; --alarm-back: #fdf1e7; --well: #14695f; COLOURS }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ec; --soft: #9aa7b2; --line: #333c44; --page: #14181c;
  --card: #1c2228; --alarm: #f0a070; --alarm-back: #33251a; --well: #7fd1c5; ON_DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0 } h2 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .75rem }
h3 { font-size: .92rem; font-weight: 600; margin: 0 } .soft, dt, th, small { color: var(--soft) }
header p { margin: .2rem 0 1.25rem; color: var(--soft) }
section, .tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
section { padding: 1.25rem 1.5rem; margin: 1rem 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 }
.tiles div { padding: .7rem 1rem } .tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600 }
.tiles dt { font-size: .85rem }
.alarms { background: var(--alarm-back); border-color: var(--alarm) } .alarms h2, .alarm { color: var(--alarm) }
.alarms p { margin: .3rem 0 } .well { color: var(--well) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem 2rem }
.panels header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; flex-wrap: wrap }
figure { margin: 0; min-width: 0 } figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem }
svg { width: 100%; height: auto; display: block; margin-top: .3rem; overflow: visible }
svg text { font-size: 11px; fill: var(--soft) } svg .y { text-anchor: end } svg .x { text-anchor: middle }
polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round } .faint { opacity: .28 }
polyline.faint { stroke-width: 1 } circle { fill: currentColor } .grid { stroke: var(--line); fill: none }
.key::before { content: ""; display: inline-block; width: .9rem; height: .2rem; border-radius: 1px; margin-right: .4rem;
  vertical-align: middle; background: currentColor } .key span { color: var(--ink) }
table { border-collapse: collapse; width: 100%; font-size: .87rem } .wide { overflow-x: auto }
th { font-weight: 500; text-align: left; white-space: nowrap } tbody tr { border-top: 1px solid var(--line) }
td, th { padding: .35rem 1rem .35rem 0; vertical-align: top } .r { text-align: right; white-space: nowrap; width: 1% }
.u { font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace; font-size: .85rem;
  unicode-bidi: isolate; overflow-wrap: anywhere; white-space: pre-wrap } .u b { color: var(--well); font-weight: 400 }
.u i { color: var(--soft); font-style: normal } div.u { max-height: 8rem; overflow-y: auto }
.flags { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .15rem 2rem; margin: 0;
  font-size: .87rem } .flags div { display: flex; justify-content: space-between; gap: 1rem; min-width: 0 }
.flags dd { margin: 0; overflow-wrap: anywhere; text-align: right } .own dd { font-weight: 600 }
summary { cursor: pointer; color: var(--soft); width: fit-content } details table { margin-top: .6rem }
@media (max-width: 40rem) { section { padding: 1rem } } @media print { section, figure { break-inside: avoid }
  .wide table { font-size: .6rem }
  .wide td, .wide th { white-space: normal; padding-right: .4rem; overflow-wrap: anywhere } }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{css}</style></head><body>
<header><h1>{title}</h1><p>{subtitle}</p></header><main>{body}</main></body></html>
"""


def draw(folder: Path) -> None:
    """The picture at the end of a run: its diagrams as loss.png with matplotlib, else the loss in the terminal."""
    panels, installed = run_panels(read(folder)), importlib.util.find_spec("matplotlib") is not None
    if panels and installed:
        png(panels, folder / "loss.png")
    if panels and (sys.stderr.isatty() or not installed):
        print(terminal(panels[0]), file=sys.stderr)


class Pages:
    """Writes the page of a run that is being trained, in at most a hundredth of the time."""

    def __init__(self) -> None:
        self._due = 0.0

    def write(self, folder: Path, last: bool = False) -> None:
        """Write `report.html` into a run folder, the whole of it or nothing, if it is time, or for the `last` time.

        What cannot be read is said, and ends no training. Raises OSError where it cannot be written.
        """
        if (began := time.monotonic()) < self._due and not last:
            return
        try:
            atomic_write(folder / "report.html", render_run(read(folder)))
        except UserError as error:
            note(f"no report.html: {error}")
        self._due = began + 100 * (time.monotonic() - began)


def render_run(run: Run) -> str:
    """The page of one run."""
    done, of = int(run.rows[-1]["step"]), run.settings.get("max_steps")
    subtitle = f"recipe {run.settings.get('recipe', 'unknown')} · step {done:,}"
    subtitle += f" of {of:,}" if isinstance(of, int) else ""
    subtitle += f" · {duration(run.rows[-1]['seconds'])}"
    body = [_tiles(run), _alarms([run]), _section("Curves", _figures(run_panels(run))), _samples(run), _doctor(run),
            _configuration(run)]  # fmt: skip
    return _page(run.name, subtitle, body)


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs: held-out figures and losses against steps and seconds, the last figures, settings."""
    return _page("Runs compared", f"{len(runs)} runs", [
        _alarms(runs),
        _section("Curves", _figures(comparison_panels(runs))),
        _section("Figures", _table(figures_table(runs))),
        _section("Settings that differ", _table(differing(runs))),
    ])  # fmt: skip


def run_panels(run: Run) -> list[Panel]:
    """The diagrams of one run; those without data are left out."""
    def one(title: str, unit: str, name: str, noisy: bool = False) -> Panel:
        return Panel(title, unit, [Curve(title, run.curve(name))], noisy=noisy, linear=not noisy)

    bits = [Curve("training", run.curve("bits_per_byte"))]
    shares = []
    for i, name in enumerate(run.held_out):
        if name == "held_out_bits_per_byte":
            bits.append(Curve("held out", run.curve(name), 1))
        else:
            shares.append(Curve(name.removeprefix("held_out_").replace("_", " "), run.curve(name), i))
    panels = [
        one("Loss", "nats a unit", "loss", noisy=True), Panel("Bits per byte", "bits", bits, noisy=True),
        Panel("Held out", "share", shares, linear=True),
        one("Gradient norm", "before clipping", "grad_norm", noisy=True),
        one("Learning rate", "of the matrices", "lr"), one("Throughput", "units a second", "units_per_second"),
        one("What the context is worth", "nats a unit", "context_gain"),
    ]  # fmt: skip
    return [panel for panel in panels if panel.shown()]


def comparison_panels(runs: Sequence[Run]) -> list[Panel]:
    """Validation and loss of all runs, each against the steps and against the seconds."""
    in_bits = all("held_out_bits_per_byte" in run.held_out for run in runs)
    judged = (("Held-out bits per byte", "bits", "held_out_bits_per_byte") if in_bits else
              ("Held-out quality", "higher is better", "quality"))  # fmt: skip
    panels = []
    for title, unit, name in (judged, ("Training loss", "nats a unit", "loss")):
        for x in ("step", "seconds"):
            curves = [Curve(run.name, run.curve(name, x), i) for i, run in enumerate(runs)]
            panels.append(Panel(title, unit, curves, x=x, noisy=name == "loss", zoom=True,
                                linear=name == "quality"))
    return [panel for panel in panels if panel.shown()]


def figures_table(runs: Sequence[Run]) -> list[list[str]]:
    """The final figures, a row a run, under a row of headings; columns that no run has are left out."""
    finals = [run.final() for run in runs]
    names = [name for name in {n: None for final in finals for n in final} if name not in ("recipe", "max_steps")]
    rows = [[_value(final.get(name)) for name in names] for final in finals]
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    return [[names[i].replace("_", " ") for i in kept], *([row[i] for i in kept] for row in rows)]


def differing(runs: Sequence[Run]) -> list[list[str]]:
    """Settings in which the runs differ, a row a setting."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ("out", "resume"))
    rows = [[name.replace("_", "-"), *(_setting(run.settings.get(name)) for run in runs)] for name in names]
    return [["setting", *(run.name for run in runs)], *(row for row in rows if len(set(row[1:])) > 1)]


def duration(seconds: float) -> str:
    """As people say it: 42 s, 16 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def visible(text: str, most: int = MOST_CHARS) -> str:
    """Text from anywhere as HTML: what cannot be seen is spelled out, so that it can turn nothing round."""
    cut = text[:most] + " …" * (len(text) > most)
    return "".join(html.escape(c) if c.isprintable() or c == "\n" else f"<i>{html.escape(repr(c)[1:-1])}</i>"
                   for c in cut)  # fmt: skip


def _value(value: Any) -> str:
    if isinstance(value, list):
        return str(len(value)) if value else ""
    return "" if value is None else number(value, DIGITS) if isinstance(value, int | float) else str(value)


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _page(title: str, subtitle: str, body: Iterable[str]) -> str:
    css = _CSS
    for word, colours in (("COLOURS", COLOURS), ("ON_DARK", COLOURS_ON_DARK)):
        css = css.replace(word, "; ".join(f"--c{i}: {colour}" for i, colour in enumerate(colours)))
    css += "".join(f".c{i} {{ color: var(--c{i}) }}\n" for i in range(len(COLOURS)))
    return _PAGE.format(title=visible(title), subtitle=visible(subtitle), css=css, body="\n".join(filter(None, body)))


def _section(title: str, content: str, css: str = "") -> str:
    return f'<section{f" class={css}" if css else ""}><h2>{title}</h2>{content}</section>' if content else ""


def _tiles(run: Run) -> str:
    final = run.final()
    shown = {"loss, nats a unit": final["loss"], "bits per byte": final["bits_per_byte"]}
    shown |= {name.replace("_", " "): final[name] for name in run.held_out if name in final}
    shown |= {"units a second": final["units_per_second"], "peak memory, MiB": final["memory_mib"]}
    tiles = (f"<div><dt>{visible(name)}</dt><dd>{_value(value)}</dd></div>" for name, value in shown.items()
             if value is not None)  # fmt: skip
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _alarms(runs: Sequence[Run]) -> str:
    said = "".join(f"<p>{visible(run.name) + ', ' if len(runs) > 1 else ''}<b>{visible(a.kind)}</b> (step {a.step:,}): "
                   f"{visible(a.text)}</p>" for run in runs for a in run.alarms)  # fmt: skip
    return _section("Warnings", said, "alarms")


def _figures(panels: Sequence[Panel]) -> str:
    figures = []
    for panel in panels:
        curves = panel.shown()
        keys = "".join(f'<span class="key c{c.colour}"><span>{visible(c.label, 60)}</span></span>' for c in curves)
        over = f" · against {panel.x}" if panel.x != "step" else ""
        figures.append(f'<figure><header><h3>{visible(panel.title)}</h3><small>{visible(panel.unit)}{over}</small></header>'
                       f"{svg(panel)}<figcaption>{keys if len(curves) > 1 else ''}</figcaption></figure>")  # fmt: skip
    return f'<div class="panels">{"".join(figures)}</div>' if figures else ""


def _samples(run: Run) -> str:
    steps = sorted({int(sample["step"]) for sample in run.samples})
    shown = {steps[round(i * (len(steps) - 1) / max(1, min(MOST_SAMPLES, len(steps)) - 1))]
             for i in range(min(MOST_SAMPLES, len(steps)))}  # fmt: skip
    rows, before = [], None
    for sample in sorted((s for s in run.samples if s["step"] in shown), key=lambda s: -int(s["step"])):
        step = "" if sample["step"] == before else f"{int(sample['step']):,}"
        before = sample["step"]
        text = f"{visible(str(sample['prompt']))}<b>{visible(str(sample['completion']))}</b>"
        rows.append(f'<tr><td class="r soft">{step}<td><div class="u" dir="auto">{text}</div>')
    if not rows:
        return ""
    head = '<thead><tr><th class="r">step<th>prompt, and <span class="well">what was written</span></thead>'
    return _section("Samples over time", f"<table>{head}<tbody>{''.join(rows)}</tbody></table>")


def _doctor(run: Run) -> str:
    results = run.doctor.get("results") if run.doctor else None
    if not run.doctor or not isinstance(results, list):
        return _section("Doctor", '<p class="soft">Not examined before training.</p>')
    rows = [["#", "check", "verdict", "measured", "limit"]]
    rows += [[_value(r.get(name)) for name in ("number", "check", "verdict", "measured", "limit")] for r in results]
    verdict = "all well" if run.doctor.get("ok") else f"{run.doctor.get('findings')} findings"
    verdicts = Counter(str(r.get("verdict")) for r in results)
    counted = ", ".join(f"{n} {kind}" for kind, n in verdicts.items())
    said = f"<p>Before training: <b>{visible(verdict)}</b> ({visible(counted)}).</p>"
    return _section("Doctor", f"{said}<details><summary>All checks</summary>{_table(rows)}</details>")


def _configuration(run: Run) -> str:
    preset = PRESETS.get(str(run.settings.get("recipe")))
    usual = {} if preset is None else flat(json.loads(json.dumps(asdict(preset))))
    flags = []
    for name, value in run.settings.items():
        own = ' class="own"' if name in usual and usual[name] != value else ""
        flags.append(f"<div{own}><dt>{visible(name.replace('_', '-'))}</dt><dd>{visible(_setting(value))}</dd></div>")
    return _section("Configuration", f'<dl class="flags">{"".join(flags)}</dl>') if flags else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) < 2:
        return ""
    head = "".join(f"<th>{visible(cell)}" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{visible(cell)}' for cell in row)}" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</thead><tbody>{body}</tbody></table></div>'
