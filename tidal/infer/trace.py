"""Watch one completion being written, unit by unit: what a person reaches for when output looks wrong.

    trace(model, tokenizer, "54663 + 132 =")  →  Trace  →  render_text; trace_page.write_html

It drives the decoder, the grammar and `choose` as `generate` does, one row of them, and writes down what it sees.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tidal.infer.decoder import Decoder
from tidal.infer.engine import Limits, StopReason
from tidal.infer.grammar import FIRST_BYTE, Grammar
from tidal.infer.sampling import Repetition, Sampling, choose
from tidal.model import TidalTransformer
from tidal.tokenizer import NO_PLACE, Block, MixedTokenizer

SHOWN, MOST = 200, 2000  # of a long prompt the last so many blocks and characters are shown
OPEN = 12  # with more blocks than this, the page begins with their tables closed
ALARM = 0.01  # more forbidden probability than this is worth a look


class Runner(NamedTuple):
    """A unit that was not chosen."""

    name: str
    probability: float
    allowed: bool
    """Whether the grammar would have let it be written."""


@dataclass(frozen=True)
class TracedStep:
    """One unit being written. Probabilities are the model's own, before grammar, temperature and the like."""

    t: int
    place: int
    position: float
    fed: str
    unit: int
    name: str
    """Of `unit`; `fed` is the name of what the model was given: the unit before, `<bob>` first."""
    log_prob: float
    rank: int
    """1: no unit was likelier."""
    runners_up: tuple[Runner, ...]
    """The likeliest other units, likeliest first."""
    forbidden: float
    """Probability of all units that the grammar forbade."""
    forced: bool
    """The grammar left no choice."""

    @property
    def probability(self) -> float:
        """Of the unit, under the model."""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class TracedBlock:
    """A block as it was written, and as it is read; `<eos>` is a block without text."""

    steps: tuple[TracedStep, ...]
    text: str
    tokens: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    """Of the tokens."""
    places: tuple[int, ...] = ()

    @property
    def log_prob(self) -> float:
        """Log-probability (nats) of all its units, its end included."""
        return math.fsum(step.log_prob for step in self.steps)

    @property
    def finished(self) -> bool:
        """Whether it is part of the completion, and not cut short by `max_new_units`."""
        return bool(self.text) or self.steps[-1].name == "<eos>"

    @property
    def unsurest(self) -> TracedStep:
        """The step whose unit was the least probable."""
        return min(self.steps, key=lambda step: step.log_prob)


@dataclass(frozen=True)
class Trace:
    """How a prompt was continued; `completion`, `stop_reason`, `log_prob` and `units` as `generate` has them."""

    prompt: str
    prompt_blocks: tuple[tuple[str, tuple[str, ...]], ...]
    """Text and names of the tokens of each block."""
    blocks: tuple[TracedBlock, ...]
    dropped: tuple[TracedStep, ...]
    """Steps of a block that `max_new_units` cut short; not part of the completion."""
    completion: str
    stop_reason: StopReason
    settings: dict[str, object]
    """Those of `generate` that shaped it, by their names."""

    @property
    def units(self) -> int:
        """Units written, without dropped ones."""
        return sum(len(block.steps) for block in self.blocks)

    @property
    def log_prob(self) -> float:
        """Log-probability (nats) of these units under the model."""
        return math.fsum(step.log_prob for block in self.blocks for step in block.steps)

    @property
    def bits_per_byte(self) -> float:
        """Of all blocks that were written; NaN where there is no text."""
        n_bytes = sum(len(block.text.encode()) for block in self.blocks)
        return abs(self.log_prob) / math.log(2) / n_bytes if n_bytes else math.nan


@torch.inference_mode()
def trace(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, *, temperature: float = 0.0,
          top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0,
          max_new_units: int = 256, max_new_blocks: int = 0, stop: Sequence[str] = (),
          runners_up: int = 5) -> Trace:  # fmt: skip
    """Continue one prompt as `generate` does, and keep what happens at every step.

    Raises ValueError on a lone surrogate in the prompt or on settings that make no sense.
    """
    how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    limits = Limits(max_new_units, max_new_blocks, (stop,) if isinstance(stop, str) else tuple(stop))
    if runners_up < 0:
        raise ValueError(f"runners_up is {runners_up}; it must be 0 or more")
    settings = {**vars(how), "seed": seed, **vars(limits)}
    read = [tokenizer.encode_block(text) for text in tokenizer.split(prompt)]
    was_training = model.training
    model.eval()
    try:
        writing = _Writing(model, tokenizer, how, np.random.default_rng([seed, 0]), runners_up)
        writing.decoder.read([0], [read])
        blocks: list[TracedBlock] = []
        steps: list[TracedStep] = []
        completion, n_units = "", 0
        reason: StopReason | None = None
        while not reason:
            steps.append(step := writing.step([s.unit for s in steps]))
            n_units += 1
            if step.unit in (tokenizer.eob_id, tokenizer.eos_id):
                blocks.append(writing.finish(steps))
                completion, steps = completion + blocks[-1].text, []
            found = [at for s in limits.stop if (at := completion.find(s)) >= 0]
            if found:
                completion, reason = completion[: min(found)], "stop_string"
            elif step.unit == tokenizer.eos_id:
                reason = "eos"
            elif 0 < max_new_blocks <= len(blocks):
                reason = "block_limit"
            elif n_units >= max_new_units:
                reason = "length"
    finally:
        model.train(was_training)
    prompt_blocks = tuple((block.text, tuple(unit_name(tokenizer, i) for i in block.tokens)) for block in read)
    return Trace(prompt, prompt_blocks, tuple(blocks), tuple(steps), completion, reason, settings)


class _Writing:
    """One row of the decoder, and all that chooses its units."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, how: Sampling,
                 generator: np.random.Generator, runners_up: int) -> None:  # fmt: skip
        self.tokenizer, self.how, self.generator, self.runners_up = tokenizer, how, generator, runners_up
        self.decoder, self.grammar = Decoder(model, tokenizer, 1), Grammar(tokenizer)
        self.repetition = Repetition()

    def step(self, written: list[int]) -> TracedStep:
        fed = self.decoder.builders[0].step(written)
        logits = self.decoder.step([0], [written])
        allowed = self.grammar.allowed(written).to(logits.device)
        repeated = [self.repetition.units(written)] if self.how.repetition_penalty > 1 else ()
        unit = choose(logits, allowed[None], self.how, [self.generator], repeated)[0]
        log_probs = logits.log_softmax(-1)[0, : self.tokenizer.n_writable].cpu()
        probabilities, allowed = log_probs.double().exp(), allowed.cpu()[: self.tokenizer.n_writable]
        order = log_probs.sort(descending=True, stable=True).indices[: self.runners_up + 1].tolist()
        runners = [Runner(unit_name(self.tokenizer, i), probabilities[i].item(), bool(allowed[i])) for i in order
                   if i != unit]  # fmt: skip
        return TracedStep(
            len(written), fed.place, fed.position, unit_name(self.tokenizer, fed.id), unit,
            unit_name(self.tokenizer, unit), log_probs[unit].item(), 1 + int((log_probs > log_probs[unit]).sum()),
            tuple(runners[: self.runners_up]), probabilities[~allowed].sum().item(), int(allowed.sum()) == 1,
        )  # fmt: skip

    def finish(self, steps: list[TracedStep]) -> TracedBlock:
        written = [step.unit for step in steps[:-1]]
        if not written:
            return TracedBlock(tuple(steps), "")
        self.repetition.add(written)
        block: Block = self.tokenizer.retokenize(written)
        self.decoder.read([0], [[block]])
        names = tuple(unit_name(self.tokenizer, i) for i in block.tokens)
        return TracedBlock(tuple(steps), block.text, block.tokens, names, block.places)


# ---------------------------------------------------------------------------------------------- names, numbers


_MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}


@functools.cache
def mark(char: str) -> str:
    """A visible stand-in for a character that has no shape of its own, or that is such a stand-in; else ""."""
    if char in _MARKS:
        return _MARKS[char]
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs") or "\ufe00" <= char <= "\ufe0f"
    return f"⟨U+{ord(char):04X}⟩" if hidden or char in _MARKS.values() else ""


def visible(text: str) -> str:
    """The text with white space, control characters and other invisible ones made visible."""
    return "".join([mark(char) or char for char in text])


def unit_name(tokenizer: MixedTokenizer, index: int) -> str:
    """Display name of a unit or token: `<eob>`, `0xE2`, or its text made visible."""
    byte = index - FIRST_BYTE
    if 0 <= byte < 256 and chr(byte) not in "\n\t":  # these have no other spelling
        return f"0x{byte:02X}"
    text = visible(tokenizer.id_bytes[index].decode())
    return "◌" * bool(text and unicodedata.combining(text[0])) + text or tokenizer.piece_name(index)


def percent(p: float) -> str:
    """A probability for people; only certainty is 100%, only the impossible 0%."""
    if 0 < p < 0.00005 or 0.99995 <= p < 0.9999999:
        return "<0.01%" if p < 0.5 else ">99.99%"
    return f"{p:.0%}" if p == 0 or p >= 0.9999999 else f"{p:.2%}"


def nats(log_prob: float) -> str:
    """A log-probability for people."""
    return f"{log_prob + 0.0:.6g} nats"


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
    told = [f"{name} {value}" for name, value in t.settings.items() if value != off.get(name)]
    return [*lines, ("settings", ", ".join(told))]


def heading(block: TracedBlock, n: int) -> str:
    """What the n-th block is called."""
    return f"Block {n}" if block.text else "End of the document" if block.finished else "Unfinished block, dropped"


def notes(step: TracedStep) -> str:
    """Rank of the chosen unit, and whether there was a choice."""
    return f"rank {step.rank}{', forced' * step.forced}"


def all_blocks(t: Trace) -> list[tuple[int, TracedBlock]]:
    """The blocks, counted from one, with the dropped one last."""
    return list(enumerate([*t.blocks, *([TracedBlock(t.dropped, "")] if t.dropped else [])], 1))


# ------------------------------------------------------------------------------------------------- the terminal


def render_text(t: Trace) -> str:
    """The trace for a terminal."""
    lines = [_row((16, "prompt"), (0, "… " * (len(t.prompt) > MOST) + visible(t.prompt[-MOST:]))),
             _row((16, "completion"), (0, visible(t.completion)))]  # fmt: skip
    lines += [_row((16, name), (0, value)) for name, value in totals(t)]
    hidden = len(t.prompt_blocks) - SHOWN
    lines += ["", "Prompt blocks and their tokens" + (f" ({hidden} earlier ones left out)" if hidden > 0 else "")]
    lines += [_row((2, ""), (14, visible(text)), (0, " · ".join(names))) for text, names in t.prompt_blocks[-SHOWN:]]
    widths = 6, 6, 10, 8, 8, 8, 18, 10, 0
    head = "  step", "place", "position", "fed", "wrote", "p", "", "forbidden", "runners-up (x: forbidden)"
    for n, block in all_blocks(t):
        title = f"{heading(block, n)}  {visible(block.text)}".rstrip()
        lines += ["", f"{title}  {nats(block.log_prob)}", _row(*zip(widths, head, strict=True))]
        for s in block.steps:
            others = "  ".join(f"{'' if r.allowed else 'x '}{r.name} {percent(r.probability)}" for r in s.runners_up)
            cells = (f"  {s.t}", f"{s.place}", f"{s.position:g}", s.fed, s.name, percent(s.probability), notes(s),
                     percent(s.forbidden), others)  # fmt: skip
            lines.append(_row(*zip(widths, cells, strict=True)))
        if block.text:
            tokens = " · ".join(name if place == NO_PLACE else f"{name} @{place}"
                                for name, place in zip(block.names, block.places, strict=True))  # fmt: skip
            lines += [f"  turned round  {visible(block.text)}", f"  read as       {tokens}   (@: place)"]
    return "\n".join(lines) + "\n"


def _row(*cells: tuple[int, str]) -> str:
    """Columns of these widths in a terminal, where Han characters take two places and accents none."""
    line = ""
    for width, text in cells:
        taken = sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)
        line += text + " " * max(width - taken, width > 0)
    return line.rstrip()
