"""A trace as one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path

from tidal.files import atomic_write
from tidal.infer.trace import Trace, TracedBlock, TracedStep, mark, visible
from tidal.infer.trace_text import MOST, SHOWN, all_blocks, heading, nats, notes, percent, told, totals
from tidal.tokenizer import NO_PLACE

OPEN = 12  # with more blocks than this, the page begins with their tables closed
ALARM = 0.01  # more forbidden probability than this is worth a look

_CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #56616d; --line: #dfe4e8; --page: #f6f7f8; --card: #fff;
  --sure: #cfe9e4; --unsure: #f7c9a8; --bar: #2f8f83; --track: #e9edf0; --alarm: #a8430f; --link: #14695f }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ec; --soft: #9aa7b2; --line: #333c44; --page: #14181c;
  --card: #1c2228; --sure: #1d4a45; --unsure: #7a431d; --bar: #4db3a5; --track: #2b333a; --alarm: #f0a070;
  --link: #7fd1c5 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 .25rem } h2 { font-size: 1.05rem; font-weight: 600; margin: 0 }
p, .soft, th, dt, small, summary { color: var(--soft) } p { max-width: 46rem; margin: .25rem 0 1.25rem }
a { color: inherit; text-decoration: none } a:hover { text-decoration: underline }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.5rem;
  margin: 1rem 0; scroll-margin: 1rem } section:target { border-color: var(--link) }
.dropped { border-style: dashed } .dropped h2, .alarm, s { color: var(--alarm) }
.head { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; margin-bottom: .9rem }
pre, .u { font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace }
pre { font-size: 1.05rem; line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
pre b { color: var(--link) } pre span, pre i { color: var(--soft) } pre i { font-style: normal; font-weight: 400 }
.u { unicode-bidi: isolate; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: 10rem 1fr; gap: .6rem 1rem; margin: 0; align-items: baseline }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere } .totals { gap: .2rem 1rem; margin-top: 1.1rem }
ul, ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem }
.legend { display: block; margin-top: .4rem }
.chip { display: inline-flex; flex-wrap: wrap; border-radius: 6px; padding: .1rem .4rem; background: var(--track) }
.chip.p, .strip li { color: var(--ink);
  background: color-mix(in oklab, var(--sure) calc(var(--p) * 100%), var(--unsure)) }
.chip .u + .u { border-left: 1px solid color-mix(in srgb, var(--soft) 45%, transparent); padding-left: .3rem;
  margin-left: .3rem }
.strip { flex-direction: row-reverse; width: fit-content; max-width: 100% }
.strip li { min-width: 3.6rem; padding: .25rem .4rem; border-radius: 8px; text-align: center; line-height: 1.35 }
.strip .u { display: block; font-size: 1.25rem } .strip .n { font-size: .85rem; line-height: 1.7rem }
.strip small, .read small { display: block; font-size: .72rem; color: inherit; opacity: .8 }
.read .chip { flex-direction: column; align-items: center }
summary { cursor: pointer; margin-top: 1rem; width: fit-content } .wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin-top: .4rem; font-size: .85rem }
th { font-weight: 500; text-align: left } tbody tr { border-top: 1px solid var(--line) }
td, th { padding: .4rem .8rem .4rem 0; white-space: nowrap } .r { text-align: right }
td .u { font-size: .95rem } td .n { font-size: .8rem } td:last-child, th:last-child { padding-right: 0; width: 45% }
.others { display: grid; grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); gap: .3rem .6rem;
  min-width: 27.4rem }
.others li { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; line-height: 1.3 }
.bar { display: inline-block; height: .4rem; border-radius: 3px; vertical-align: middle; width: 5rem;
  background: linear-gradient(90deg, var(--bar) calc(var(--p) * 100%), var(--track) 0); margin-right: .6rem }
.others .bar { width: 100%; height: .2rem; margin: .1rem 0 0 }
@media (max-width: 40rem) { dl:not(.totals) { grid-template-columns: 1fr; gap: .15rem } section { padding: 1rem }
  dd + dt { margin-top: .6rem } }
@media print { body { padding: 0 } section { break-inside: avoid } .wide { overflow: visible }
  .chip, .strip li, .bar { print-color-adjust: exact } table { font-size: .7rem }
  td, th { white-space: normal; padding-right: .4rem } td .u { font-size: .75rem; white-space: nowrap }
  .bar { width: 2.5rem } .others { grid-template-columns: repeat(5, 1fr); min-width: 0 } }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Tidal trace</title><style>{css}</style></head><body>
<header><h1>Tidal trace</h1><p>Each block is written last character first, turned round, and read back as tokens.
Read the coloured strips from right to left: that is the order of writing.</p></header><main>
<section aria-label="Result"><pre dir="auto"><span>{prompt}</span><b>{completion}</b></pre>
<dl class="totals">{totals}</dl></section>
<section aria-label="Blocks"><dl><dt>prompt, as read</dt><dd><ul>{read}</ul></dd>
<dt>blocks written</dt><dd><ul>{wrote}</ul><small class="legend">Coloured by the least probable unit in each:
<span class="chip p" style="--p:1">sure</span> <span class="chip p" style="--p:.5">even odds</span>
<span class="chip p" style="--p:0">surprised</span>. Probabilities are the model’s own, before the grammar and the
sampling settings. Units <s>struck out</s> are forbidden by the grammar.</small></dd></dl></section>
{cards}</main></body></html>
"""


def write_html(t: Trace, path: Path) -> None:
    """Write the page, the whole of it or nothing; OSError where that cannot be done."""
    atomic_write(path, render_html(t))


def render_html(t: Trace) -> str:
    """The trace as one page that needs nothing else: no script, no network."""
    hidden = len(t.prompt_blocks) - SHOWN
    read = [f'<li class="soft">… {hidden} earlier blocks</li>'] if hidden > 0 else []
    read += [f'<li class="chip">{"".join(map(_u, names))}</li>' for _, names in t.prompt_blocks[-SHOWN:]]
    blocks = all_blocks(t)
    wrote = [
        f'<li><a href="#b{n}" class="chip p"{_p(block.unsurest.probability)}>'
        f"{_u(visible(block.text) or ('<eos>' if block.finished else '<dropped>'))}</a></li>"
        for n, block in blocks
    ]
    return _PAGE.format(
        css=_CSS,
        prompt="… " * (len(t.prompt) > MOST) + _lines(t.prompt[-MOST:]),
        completion=_lines(t.completion),
        totals="".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in totals(t)),
        read="".join(read) or '<li class="soft">nothing: the prompt is empty</li>',
        wrote="".join(wrote),
        cards="".join(_card(block, n, len(blocks) <= OPEN) for n, block in blocks),
    )


def _p(p: float) -> str:
    return f' style="--p:{p:.4f}"'


def _percent(p: float) -> str:
    return html.escape(percent(p))  # of which some begin with < or >


def _u(name: str, tag: str = "span") -> str:
    """The name of a unit, a token or a block."""
    return f'<{tag} class="u{" n" * (len(name) > 1 and name[0] in "<0⟨")}">{html.escape(name)}</{tag}>'


def _lines(text: str) -> str:
    """Text to be read: what cannot be seen is marked, but for single spaces between words."""
    parts = []
    for i, char in enumerate(text):
        between_words = char == " " and text[i - 1 : i].strip() and text[i + 1 : i + 2].strip()
        shown = "" if between_words else mark(char)
        parts.append(f"<i>{shown}</i>" + "\n" * (char == "\n") if shown else html.escape(char))
    return "".join(parts)


def _card(block: TracedBlock, n: int, opened: bool) -> str:
    strip = "".join(
        f"<li{_p(s.probability)}><small>{s.t}</small>{_u(s.name)}<small>{_percent(s.probability)}</small></li>"
        for s in block.steps
    )
    turned = ""
    if block.text:
        said = ("" if place == NO_PLACE else f"place {place}" for place in block.places)
        tokens = "".join(f'<li class="chip">{_u(name)}<small>{place}</small></li>'
                         for name, place in zip(block.names, said, strict=True))  # fmt: skip
        turned = (f"<dt>turned round →</dt><dd>{_u(visible(block.text))}</dd>"
                  f'<dt>read as</dt><dd><ul class="read">{tokens}</ul></dd>')  # fmt: skip
    foretold = "".join(
        f'<li class="chip p"{_p(r.probability)}>{_u(r.name)}&nbsp;<small>{_percent(r.probability)}</small></li>'
        for r in block.foretold
    )
    if foretold:
        foretold = f"<dt>last token foretold</dt><dd><ul>{foretold}</ul></dd>"
    recalled = '<th scope="col">recalled' * any(s.recalled for s in block.steps)
    heads = ('<th scope="col" class="r">step<th scope="col" class="r">place<th scope="col" class="r">position'
             f'<th scope="col">fed{recalled}<th scope="col">wrote<th scope="col">probability'
             '<th scope="col" class="r">forbidden<th scope="col">runners-up')  # fmt: skip
    units = f"{len(block.steps)} {'unit' if len(block.steps) == 1 else 'units'}"
    opened = opened or not block.finished
    return f"""<section id="b{n}"{"" if block.finished else ' class="dropped"'} aria-labelledby="h{n}">
<div class="head"><h2 id="h{n}">{heading(block, n)}</h2>
<span class="soft">{units} · {nats(block.log_prob)}</span></div>
<dl>{foretold}<dt>← written</dt><dd><ol class="strip">{strip}</ol></dd>{turned}</dl>
<details{" open" * opened}><summary>Step by step</summary>
<div class="wide" tabindex="0" role="region" aria-label="Steps of block {n}">
<table><thead><tr>{heads}</thead><tbody>{"".join(map(_table_row, block.steps))}</tbody></table></div></details>
</section>
"""


def _table_row(s: TracedStep) -> str:
    others = "".join(
        f"<li>{_u(r.name, 'span' if r.allowed else 's')}<span>{_percent(r.probability)}</span>"
        f'<i class="bar"{_p(r.probability)}></i></li>'
        for r in s.runners_up
    )
    alarm = " alarm" * (s.forbidden >= ALARM)
    recalled = f"<td>{_u(told(s))}" if s.recalled else ""
    return (
        f'<tr><td class="r">{s.t}<td class="r">{s.place}<td class="r">{s.position:g}<td>{_u(s.fed)}{recalled}'
        f'<td>{_u(s.name)}'
        f'<td><i class="bar"{_p(s.probability)}></i>{_percent(s.probability)} <small>{notes(s)}</small>'
        f'<td class="r{alarm}">{_percent(s.forbidden)}<td><ul class="others">{others}</ul>'
    )
