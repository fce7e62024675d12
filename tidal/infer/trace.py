"""Watch one completion being written, unit by unit: what a person reaches for when output looks wrong.

    trace(model, tokenizer, "54663 + 132 =")  →  Trace  →  trace_text.render_text, trace_page.write_html

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

from tidal.blocks import NOTHING
from tidal.infer.decoder import Decoder, evaluating
from tidal.infer.engine import Limits, StopReason
from tidal.infer.grammar import FIRST_BYTE, Grammar
from tidal.infer.sampling import Repetition, Sampling, choose
from tidal.linear import log_softmax
from tidal.model import TidalTransformer
from tidal.streams import WriterStep
from tidal.tokenizer import Block, MixedTokenizer


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
    recalled: tuple[str, ...]
    """What followed the same units before, also after the same block, and the same two; "" where nothing did."""
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
    foretold: tuple[Runner, ...] = ()
    """The likeliest last tokens, as the reader foretold them before the first unit, and that it is a single byte."""

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
    with evaluating(model):
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
    prompt_blocks = tuple((block.text, tuple(unit_name(tokenizer, i) for i in block.tokens)) for block in read)
    return Trace(prompt, prompt_blocks, tuple(blocks), tuple(steps), completion, reason, settings)


class _Writing:
    """One row of the decoder, and all that chooses its units."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, how: Sampling,
                 generator: np.random.Generator, runners_up: int) -> None:  # fmt: skip
        self.tokenizer, self.how, self.generator, self.runners_up = tokenizer, how, generator, runners_up
        self.decoder, self.grammar = Decoder(model, tokenizer, 1), Grammar(tokenizer)
        self.repetition = Repetition()
        self.foretold: tuple[Runner, ...] = ()

    def step(self, written: list[int]) -> TracedStep:
        fed = self.decoder.builders[0].step(written)
        logits = self.decoder.step([0], [written])
        if not written:
            self.foretold = self._foretold()
        allowed = self.grammar.allowed(written).to(logits.device)
        repeated = [self.repetition.units(written)] if self.how.repetition_penalty > 1 else ()
        unit = choose(logits, allowed[None], self.how, [self.generator], repeated)[0]
        log_probs = log_softmax(logits)[0, : self.tokenizer.n_writable].cpu()
        probabilities, allowed = log_probs.double().exp(), allowed.cpu()[: self.tokenizer.n_writable]
        order = log_probs.sort(descending=True, stable=True).indices[: self.runners_up + 1].tolist()
        runners = [Runner(unit_name(self.tokenizer, i), probabilities[i].item(), bool(allowed[i])) for i in order
                   if i != unit]  # fmt: skip
        return TracedStep(
            len(written), fed.place, fed.position, unit_name(self.tokenizer, fed.id), unit,
            unit_name(self.tokenizer, unit), self._recalled(fed), log_probs[unit].item(),
            1 + int((log_probs > log_probs[unit]).sum()),
            tuple(runners[: self.runners_up]), probabilities[~allowed].sum().item(), int(allowed.sum()) == 1,
        )  # fmt: skip

    def _recalled(self, fed: WriterStep) -> tuple[str, ...]:
        if not self.decoder.model.config.shape.recall:
            return ()
        return tuple("" if unit == NOTHING else unit_name(self.tokenizer, unit) for unit in fed.recalled)

    def _foretold(self) -> tuple[Runner, ...]:
        if not self.decoder.model.foretold:
            return ()
        shares = self.decoder.sums[0].sum(0).diff()
        top = shares.topk(min(self.runners_up, len(shares)))
        tokens = self.tokenizer.spelling.order[top.indices.cpu().numpy()].tolist()
        likely = zip([unit_name(self.tokenizer, token) for token in tokens], top.values.tolist(), strict=True)
        unspelled = max(0.0, 1 - shares.sum().item())
        return tuple(Runner(name, p, True) for name, p in (*likely, ("a single byte", unspelled)))

    def finish(self, steps: list[TracedStep]) -> TracedBlock:
        written = [step.unit for step in steps[:-1]]
        if not written:
            return TracedBlock(tuple(steps), "", foretold=self.foretold)
        self.repetition.add(written)
        block: Block = self.tokenizer.retokenize(written)
        self.decoder.read([0], [[block]])
        names = tuple(unit_name(self.tokenizer, i) for i in block.tokens)
        return TracedBlock(tuple(steps), block.text, block.tokens, names, block.places, self.foretold)


# ------------------------------------------------------------------------------------------------------- names


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
