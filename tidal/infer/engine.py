"""Generation: every active row writes one unit per step; finished blocks are turned round and read back in."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tidal.infer.decoder import Decoder
from tidal.infer.grammar import Grammar
from tidal.infer.sampling import Sampling, choose
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer


@dataclass(frozen=True)
class Completion:
    """What was written after one prompt."""

    prompt: str
    completion: str
    text: str
    """`prompt + completion`"""
    blocks: list[str]
    """The completion, block by block; `"".join(blocks) == completion`."""
    stop_reason: Literal["eos", "length"]
    """The model ended the document, or `max_new_units` was reached (a block begun by then is dropped)."""
    log_prob: float
    """Log-probability (nats) under the model, before any sampling setting, of all finished blocks and `<eos>`."""
    units: int
    """Units written, `<eob>` and `<eos>` included; those of a dropped block are not counted."""
    seconds: float
    """Wall-clock time of the batch this row was part of."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return dataclasses.asdict(self)


@dataclass
class _Row:
    prompt: str
    generator: np.random.Generator
    written: list[int] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    n_kept: int = 0
    stop_reason: Literal["eos", "length"] | None = None


@torch.inference_mode()
def generate(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], *, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, max_new_units: int = 256,
             batch_size: int = 64) -> list[Completion]:  # fmt: skip
    """Continue every prompt; up to `batch_size` of them side by side.

    Greedy at temperature 0. Prompt number i samples from a generator seeded with (seed, i), so its text is the
    same in any batch. Raises ValueError on a lone surrogate in a prompt or on settings that make no sense.
    """
    how = Sampling(temperature, top_k, top_p, seed)
    if max_new_units < 1:
        raise ValueError(f"max_new_units is {max_new_units}; it must be at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    splits = [tokenizer.split(prompt) for prompt in prompts]
    was_training = model.training
    model.eval()
    done: list[Completion] = []
    for first in range(0, len(prompts), batch_size):
        some = slice(first, first + batch_size)
        rows = [_Row(p, np.random.default_rng([seed, first + i])) for i, p in enumerate(prompts[some])]
        done += _generate(model, tokenizer, rows, splits[some], how, max_new_units)
    model.train(was_training)
    return done


def _generate(model: TidalTransformer, tokenizer: MixedTokenizer, rows: list[_Row], splits: list[list[str]],
              how: Sampling, max_new_units: int) -> Iterator[Completion]:  # fmt: skip
    start = time.perf_counter()
    decoder, grammar = Decoder(model, tokenizer, len(rows)), Grammar(tokenizer)
    blocks = [[tokenizer.encode_block(text) for text in split] for split in splits]
    if prompted := [i for i, mine in enumerate(blocks) if mine]:
        decoder.read(prompted, [blocks[i] for i in prompted])
    while active := [i for i, row in enumerate(rows) if row.stop_reason is None]:
        logits = decoder.step(active, [rows[i].written for i in active])
        allowed = torch.stack([grammar.allowed(rows[i].written) for i in active]).to(logits.device)
        units = choose(logits, allowed, how, [rows[i].generator for i in active])
        log_probs = logits.log_softmax(-1)[torch.arange(len(active)), units].tolist()
        finished = [i for i, unit, log_prob in zip(active, units, log_probs, strict=True)
                    if _take(rows[i], unit, log_prob, tokenizer, max_new_units)]  # fmt: skip
        if finished:
            turned = [tokenizer.retokenize(rows[i].written) for i in finished]
            for i, block in zip(finished, turned, strict=True):
                rows[i].blocks.append(block.text)
                rows[i].written = []
            # a row that has stopped with its block is not written to again, but reading it keeps the code simple
            decoder.read(finished, [[block] for block in turned])
    seconds = time.perf_counter() - start
    for row in rows:
        completion = "".join(row.blocks)
        assert row.stop_reason is not None
        yield Completion(row.prompt, completion, row.prompt + completion, row.blocks, row.stop_reason,
                         float(sum(row.log_probs[: row.n_kept])), row.n_kept, seconds)  # fmt: skip


def _take(row: _Row, unit: int, log_prob: float, tokenizer: MixedTokenizer, max_new_units: int) -> bool:
    """Let a row write a unit; true where that finishes a block."""
    row.log_probs.append(log_prob)
    ends_block = unit == tokenizer.eob_id
    if ends_block or unit == tokenizer.eos_id:
        row.n_kept = len(row.log_probs)
    else:
        row.written.append(unit)
    if unit == tokenizer.eos_id:
        row.stop_reason = "eos"
    elif len(row.log_probs) >= max_new_units:
        row.stop_reason = "length"
    return ends_block
