"""A trace as text for a terminal, and the words that it shares with the page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from tidal.infer.trace import Runner, Trace, TracedBlock, TracedStep, visible
from tidal.tokenizer import NO_PLACE

SHOWN, MOST = 200, 2000  # of a long prompt the last so many blocks and characters are shown


def percent(p: float) -> str:
    """A probability for people; only certainty is 100%, only the impossible 0%."""
    if 0 < p < 0.00005 or 0.99995 <= p < 0.9999999:
        return "<0.01%" if p < 0.5 else ">99.99%"
    return f"{p:.0%}" if p == 0 or p >= 0.9999999 else f"{p:.2%}"


def nats(log_prob: float) -> str:
    """A log-probability for people."""
    return f"{log_prob:.6g} nats"


def totals(t: Trace) -> list[tuple[str, str]]:
    """What both renderings say about the whole."""
    why = {
        "eos": "the model ended the document",
        "length": f"max_new_units {t.settings['max_new_units']} reached",
        "block_limit": f"max_new_blocks {t.settings['max_new_blocks']} reached",
        "stop_string": "a stop string was written; the completion ends before it",
    }[t.stop_reason]
    dropped = f", and {len(t.dropped)} dropped" if t.dropped else ""
    lines = [
        ("stopped by", f"{t.stop_reason}: {why}"),
        ("units", f"{t.units} in {len(t.blocks)} {'block' if len(t.blocks) == 1 else 'blocks'}{dropped}"),
        ("log-probability", nats(t.log_prob)),
        ("bits per byte", "no text" if math.isnan(t.bits_per_byte) else f"{t.bits_per_byte:.4g}"),
    ]
    if t.blocks:
        n, block = min(enumerate(t.blocks, 1), key=lambda pair: pair[1].unsurest.log_prob)
        step = block.unsurest
        lines.append(("least sure", f"{step.name} at {percent(step.probability)}: block {n}, step {step.t}"))
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "max_new_blocks": 0, "stop": ()}
    chosen = [f"{name} {value}" for name, value in t.settings.items() if value != off.get(name)]
    return [*lines, ("settings", ", ".join(chosen))]


def heading(block: TracedBlock, n: int) -> str:
    """What the n-th block is called."""
    return f"Block {n}" if block.text else "End of the document" if block.finished else "Unfinished block, dropped"


def notes(step: TracedStep) -> str:
    """Rank of the chosen unit, and whether there was a choice."""
    return f"rank {step.rank}{', forced' * step.forced}"


def told(step: TracedStep) -> str:
    """What the step recalled, of each kind, or that it was nothing."""
    return " ".join(name or "–" for name in step.recalled)


def all_blocks(t: Trace) -> list[tuple[int, TracedBlock]]:
    """The blocks, counted from one, with the dropped one last."""
    return list(enumerate([*t.blocks, *([TracedBlock(t.dropped, "")] if t.dropped else [])], 1))


def render_text(t: Trace) -> str:
    """The trace for a terminal."""
    lines = [_row((16, "prompt"), (0, "… " * (len(t.prompt) > MOST) + visible(t.prompt[-MOST:]))),
             _row((16, "completion"), (0, visible(t.completion)))]  # fmt: skip
    lines += [_row((16, name), (0, value)) for name, value in totals(t)]
    hidden = len(t.prompt_blocks) - SHOWN
    lines += ["", "Prompt blocks and their tokens" + (f" ({hidden} earlier ones left out)" if hidden > 0 else "")]
    lines += [_row((2, ""), (14, visible(text)), (0, " · ".join(names))) for text, names in t.prompt_blocks[-SHOWN:]]
    recalls = any(step.recalled for _, block in all_blocks(t) for step in block.steps)
    widths = 6, 6, 10, 8, 18 * recalls, 8, 8, 18, 10, 0
    head = ("  step", "place", "position", "fed", "recalled" * recalls, "wrote", "p", "", "forbidden",
            "runners-up (x: forbidden)")  # fmt: skip
    for n, block in all_blocks(t):
        title = f"{heading(block, n)}  {visible(block.text)}".rstrip()
        lines += ["", f"{title}  {nats(block.log_prob)}"]
        if block.foretold:
            lines.append("  last token foretold  " + _with_percents(block.foretold))
        lines.append(_row(*zip(widths, head, strict=True)))
        for s in block.steps:
            cells = (f"  {s.t}", f"{s.place}", f"{s.position:g}", s.fed, told(s), s.name, percent(s.probability),
                     notes(s), percent(s.forbidden), _with_percents(s.runners_up))  # fmt: skip
            lines.append(_row(*zip(widths, cells, strict=True)))
        if block.text:
            tokens = " · ".join(name if place == NO_PLACE else f"{name} @{place}"
                                for name, place in zip(block.names, block.places, strict=True))  # fmt: skip
            lines += [f"  turned round  {visible(block.text)}", f"  read as       {tokens}   (@: place)"]
    return "\n".join(lines) + "\n"


def _with_percents(runners: Sequence[Runner]) -> str:
    return "  ".join(f"{'' if r.allowed else 'x '}{r.name} {percent(r.probability)}" for r in runners)


def _row(*cells: tuple[int, str]) -> str:
    """Columns of these widths in a terminal, where Han characters take two places and accents none."""
    line = ""
    for width, text in cells:
        taken = sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)
        line += text + " " * max(width - taken, width > 0)
    return line.rstrip()
