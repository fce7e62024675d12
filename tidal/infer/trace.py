"""Watch one completion being written, unit by unit: what a person reaches for when output looks wrong.

    trace(model, tokenizer, "54663 + 132 =")  →  Trace  →  trace_text.render_text, trace_page.write_html

It watches the engine write, so it shows what `generate` does.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tidal.blocks import NOTHING
from tidal.infer.completion import Completion, Limits, StopReason
from tidal.infer.engine import Chosen, Engine, Seed
from tidal.infer.grammar import FIRST_BYTE
from tidal.infer.sampling import Sampling, as_int
from tidal.layers import log_softmax
from tidal.model import TidalTransformer
from tidal.streams import WriterStep
from tidal.tokenizer import MixedTokenizer


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


def trace(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, *, temperature: float = 0.0,
          top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: Seed = 0,
          max_new_units: int = 256, max_new_blocks: int = 0, stop: Sequence[str] = (),
          runners_up: int = 5) -> Trace:  # fmt: skip
    """Continue one prompt as `generate` does, and keep what happens at every step.

    A whole number as the seed is that of `generate`, which draws its prompt number i from (seed, i): this one is its
    number 0, and seed=(seed, i) traces another. A sequence or a generator is used as it is, as `Engine.submit` does.
    Raises ValueError on a lone surrogate in the prompt or on settings that make no sense.
    """
    how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    limits = Limits(max_new_units, max_new_blocks, stop)
    its_own = isinstance(seed, Sequence | np.random.Generator)
    watcher = _Watcher(model, tokenizer, as_int("runners_up", runners_up, 0))
    engine = Engine(model, tokenizer, batch_size=1, watch=watcher)
    engine.submit(prompt, how, limits, seed if its_own else (as_int("seed", seed, 0), 0))
    *_, (_, done) = engine.drain()
    assert isinstance(done, Completion)
    read = [tokenizer.encode_block(text) for text in tokenizer.split(prompt)]
    prompt_blocks = tuple((block.text, tuple(shown(tokenizer, i) for i in block.tokens)) for block in read)
    return Trace(prompt, prompt_blocks, tuple(watcher.blocks), tuple(watcher.steps), done.completion, done.stop_reason,
                 {**vars(how), "seed": seed, **vars(limits)})  # fmt: skip


class _Watcher:
    """Writes down what the engine does with its one request."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, runners_up: int) -> None:
        self.model, self.tokenizer, self.runners_up = model, tokenizer, runners_up
        self.blocks: list[TracedBlock] = []
        self.steps: list[TracedStep] = []
        """of the block being written"""
        self.foretold: tuple[Runner, ...] = ()

    def __call__(self, chosen: Chosen) -> None:
        if not self.steps:
            self.foretold = self._foretold(chosen)
        self.steps.append(self._step(chosen))
        if chosen.unit in (self.tokenizer.eob_id, self.tokenizer.eos_id):
            self.blocks.append(self._block())
            self.steps = []

    def _step(self, chosen: Chosen) -> TracedStep:
        fed, unit = chosen.fed, chosen.unit
        log_probs = log_softmax(chosen.logits)[: self.tokenizer.n_writable].cpu()
        probabilities, allowed = log_probs.double().exp(), chosen.allowed.cpu()[: self.tokenizer.n_writable]
        order = log_probs.sort(descending=True, stable=True).indices[: self.runners_up + 1].tolist()
        runners = [Runner(shown(self.tokenizer, i), probabilities[i].item(), bool(allowed[i])) for i in order
                   if i != unit]  # fmt: skip
        return TracedStep(
            len(self.steps), fed.place, fed.position, shown(self.tokenizer, fed.id), unit,
            shown(self.tokenizer, unit), self._recalled(fed), chosen.log_prob,
            1 + int((log_probs > log_probs[unit]).sum()),
            tuple(runners[: self.runners_up]), probabilities[~allowed].sum().item(), int(allowed.sum()) == 1,
        )  # fmt: skip

    def _recalled(self, fed: WriterStep) -> tuple[str, ...]:
        if not self.model.config.shape.recall:
            return ()
        return tuple("" if unit == NOTHING else shown(self.tokenizer, unit) for unit in fed.recalled)

    def _foretold(self, chosen: Chosen) -> tuple[Runner, ...]:
        if not self.model.foretold:
            return ()
        shares = chosen.foretold.sum(0).diff()
        top = shares.topk(min(self.runners_up, len(shares)))
        tokens = self.tokenizer.spelling.order[top.indices.cpu().numpy()].tolist()
        likely = zip([shown(self.tokenizer, token) for token in tokens], top.values.tolist(), strict=True)
        unspelled = max(0.0, 1 - shares.sum().item())
        return tuple(Runner(name, p, True) for name, p in (*likely, ("a single byte", unspelled)))

    def _block(self) -> TracedBlock:
        if len(self.steps) == 1:  # <eos>
            return TracedBlock(tuple(self.steps), "", foretold=self.foretold)
        block = self.tokenizer.retokenize([step.unit for step in self.steps[:-1]])
        names = tuple(shown(self.tokenizer, i) for i in block.tokens)
        return TracedBlock(tuple(self.steps), block.text, block.tokens, names, block.places, self.foretold)


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


def shown(tokenizer: MixedTokenizer, index: int) -> str:
    """A unit or token for people: `<eob>`, `0xE2`, or its text made visible; `piece_name` is for programs."""
    byte = index - FIRST_BYTE
    if 0 <= byte < 256 and chr(byte) not in "\n\t":  # these have no other spelling
        return f"0x{byte:02X}"
    text = visible(tokenizer.id_bytes[index].decode())
    return "◌" * bool(text and unicodedata.combining(text[0])) + text or tokenizer.piece_name(index)
