"""What the engine is asked for and what it gives back: limits, requests and completions."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tidal.infer.sampling import Repetition, Sampling, as_int
from tidal.tokenizer import Block, MixedTokenizer
from tidal.tokenizer.split import utf8

StopReason = Literal["eos", "length", "block_limit", "stop_string"]
Degenerate = Literal["empty", "repeats"] | None
"""Nothing but white space was written, or it ends in the same few blocks over and over."""
REPEATS = 4  # so often, or more, and for the last half: the completion is degenerate


def repeats(blocks: Sequence[str]) -> bool:
    """Whether the last half of a text in blocks is one to three of them over and over, at least REPEATS times."""
    for period in (1, 2, 3):
        tail = blocks[-max(REPEATS * period, len(blocks) // 2) :]
        if len(tail) >= REPEATS * period and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False


def degenerate(blocks: Sequence[str]) -> Degenerate:
    """What is wrong with a completion that has come to these blocks, if anything."""
    if repeats(blocks):
        return "repeats"
    return None if "".join(blocks).strip() else "empty"


@dataclass(frozen=True)
class Limits:
    """When a completion ends, besides `<eos>`. Raises ValueError on limits below one, on a stop string that is empty or
    has a lone surrogate, and on what is of a wrong type."""

    max_new_units: int = 256
    max_new_blocks: int = 0
    """0: no limit"""
    stop: Sequence[str] = ()
    """A string alone is one stop string; kept as a tuple."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_units", as_int("max_new_units", self.max_new_units, 1))
        object.__setattr__(self, "max_new_blocks", as_int("max_new_blocks", self.max_new_blocks, 0, " (no limit)"))
        if not isinstance(self.stop, Iterable):
            raise ValueError(f"stop is {self.stop!r}; give a list of strings")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for string in self.stop:
            if not isinstance(string, str):
                raise ValueError(f"a stop string is {string!r}; give strings")
            try:
                utf8(string)
            except ValueError as error:
                raise ValueError(f"stop string {string!r}: {error}") from error
        if "" in self.stop:
            raise ValueError("a stop string is empty; it would stop everything")


@dataclass(frozen=True)
class Completion:
    """What was written after one prompt.

    After a stop string, `log_prob`, `log_probs`, `unit_names` and `units` are still those of whole blocks, the one with
    the string in it too: half a block has no probability of its own.
    """

    prompt: str
    completion: str
    text: str
    """`prompt + completion`"""
    blocks: list[str]
    """The completion, block by block; `"".join(blocks) == completion`."""
    stop_reason: StopReason
    """The model ended the document; `max_new_units` was reached (a block begun by then is dropped); `max_new_blocks`
    were written; or a stop string was (the completion ends before it)."""
    log_prob: float
    """Log-probability (nats) under the model, before any sampling setting, of all finished blocks and `<eos>`."""
    log_probs: list[float]
    """The same unit by unit, in the order of writing: each block from its end."""
    unit_names: list[str]
    """What each of `log_probs` is of: a character (a space as U+2581), a byte (`<0xE2>`), `<eob>` or `<eos>`."""
    units: int
    """Units written, `<eob>` and `<eos>` included; those of a dropped block are not counted."""
    degenerate: Degenerate
    """Nothing but white space was written, or it ends in the same few blocks over and over: see `repeats`."""
    seconds: float
    """Wall-clock time from joining the batch to leaving it."""

    @classmethod
    def of(cls, prompt: str, blocks: list[str], stop_reason: StopReason, log_probs: list[float],
           unit_names: list[str], seconds: float) -> Completion:  # fmt: skip
        """With all that follows from these."""
        completion = "".join(blocks)
        return cls(prompt, completion, prompt + completion, blocks, stop_reason, math.fsum(log_probs), log_probs,
                   unit_names, len(log_probs), degenerate(blocks), seconds)  # fmt: skip

    def to_dict(self, per_unit: bool = True) -> dict[str, Any]:
        """As JSON-ready values; without `per_unit`, without the two long lists of a value for each unit."""
        values = dataclasses.asdict(self)
        for name in () if per_unit else ("log_probs", "unit_names"):
            del values[name]
        return values


@dataclass(eq=False)
class Request:
    """A request, and what has been written for it."""

    number: int
    prompt: str
    split: list[str]
    sampling: Sampling
    limits: Limits
    generator: np.random.Generator
    start: float = 0.0
    to_read: list[Block] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    """Of the block being written, last character first."""
    blocks: list[str] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    n_kept: int = 0
    """Units up to the last end of a block."""
    stop_reason: StopReason | None = None
    repetition: Repetition = field(default_factory=Repetition)

    def repeated(self) -> set[int]:
        """The units to penalize next."""
        return self.repetition.units(self.written) if self.sampling.repetition_penalty > 1 else set()

    def write(self, unit: int, log_prob: float, tokenizer: MixedTokenizer) -> str | None:
        """Append a unit; the block that this finishes, if any."""
        self.units.append(unit)
        self.log_probs.append(log_prob)
        block = None
        if unit == tokenizer.eob_id:
            block = self._turn_round(tokenizer)
        elif unit == tokenizer.eos_id:
            self.stop_reason, self.n_kept = "eos", len(self.units)
        else:
            self.written.append(unit)
        if not self.stop_reason:
            if self.limits.max_new_blocks and len(self.blocks) >= self.limits.max_new_blocks:
                self.stop_reason = "block_limit"
            elif len(self.units) >= self.limits.max_new_units:
                self.stop_reason = "length"
        return block

    def _turn_round(self, tokenizer: MixedTokenizer) -> str:
        """End the block: what was written backwards becomes text, and tokens to be read."""
        block = tokenizer.retokenize(self.written)
        self.repetition.add(self.written)
        self.to_read.append(block)
        self.blocks.append(block.text)
        self.written, self.n_kept = [], len(self.units)
        self._stop_at_string()
        return block.text

    def _stop_at_string(self) -> None:
        """Cut the blocks before the first stop string that the latest block has completed."""
        if not self.limits.stop:
            return
        text = "".join(self.blocks)
        latest = len(text) - len(self.blocks[-1])
        found = [at for s in self.limits.stop if (at := text.find(s, max(0, latest - len(s) + 1))) >= 0]
        if found:
            self.stop_reason = "stop_string"
            end, kept = min(found), []
            for block in self.blocks:
                if end > 0:
                    kept.append(block[:end])
                end -= len(block)
            self.blocks = kept

    def completion(self, tokenizer: MixedTokenizer) -> Completion:
        """What this row has come to."""
        assert self.stop_reason is not None
        names = [tokenizer.piece_name(unit) for unit in self.units[: self.n_kept]]
        return Completion.of(self.prompt, self.blocks, self.stop_reason, self.log_probs[: self.n_kept], names,
                             time.perf_counter() - self.start)  # fmt: skip
