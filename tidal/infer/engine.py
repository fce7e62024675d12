"""Generation: every active row writes one unit per step; finished blocks are turned round and read back in.

    waiting prompts → │ row │ row │ row │ … → completions
                        │ step: one unit for every row
                        │ rows that wrote <eob>: block turned round, re-tokenized, read in one batched pass
                        │ rows that ended leave, waiting prompts take their places
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tidal.infer.decoder import Decoder
from tidal.infer.grammar import Grammar
from tidal.infer.sampling import Repetition, Sampling, choose
from tidal.model import TidalTransformer
from tidal.tokenizer import Block, MixedTokenizer

StopReason = Literal["eos", "length", "block_limit", "stop_string"]
READ_SHARE = 0.75  # of the rows, which a pass of the reader waits for: docs/decoding.md
REPEATS = 4  # so many equal blocks in a row, or more, and nothing else: the completion is degenerate


@dataclass(frozen=True)
class Completion:
    """What was written after one prompt."""

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
    """The same unit by unit, in the order of writing."""
    units: int
    """Units written, `<eob>` and `<eos>` included; those of a dropped block are not counted."""
    degenerate: Literal["empty", "repeats"] | None
    """Nothing but white space was written, or one block over and over."""
    seconds: float
    """Wall-clock time from joining the batch to leaving it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return dataclasses.asdict(self)


@dataclass
class _Row:
    index: int
    prompt: str
    blocks_to_read: list[Block]
    generator: np.random.Generator
    start: float = field(default_factory=time.perf_counter)
    written: list[int] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    n_kept: int = 0
    stop_reason: StopReason | None = None
    repetition: Repetition = field(default_factory=Repetition)

    def completion(self) -> Completion:
        """What this row has come to."""
        assert self.stop_reason is not None
        completion = "".join(self.blocks)
        repeats = len(self.blocks) >= REPEATS and len(set(self.blocks)) == 1
        kept = self.log_probs[: self.n_kept]
        return Completion(
            self.prompt, completion, self.prompt + completion, self.blocks, self.stop_reason, math.fsum(kept), kept,
            self.n_kept, "repeats" if repeats else None if completion.strip() else "empty",
            time.perf_counter() - self.start,
        )  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """When a completion ends, besides `<eos>`. Raises ValueError on limits below one and on an empty stop string."""

    max_new_units: int = 256
    max_new_blocks: int = 0
    """0: no limit"""
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_units < 1:
            raise ValueError(f"max_new_units is {self.max_new_units}; it must be at least 1")
        if self.max_new_blocks < 0:
            raise ValueError(f"max_new_blocks is {self.max_new_blocks}; it must be 0 (no limit) or more")
        if "" in self.stop:
            raise ValueError("a stop string is empty; it would stop everything")


def generate(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], *, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
             seed: int | Sequence[int] = 0, max_new_units: int = 256, max_new_blocks: int = 0,
             stop: Sequence[str] = (), batch_size: int = 64,
             cuda_graphs: bool = False) -> list[Completion]:  # fmt: skip
    """Continue every prompt; up to `batch_size` of them side by side, in the order of the prompts.

    Greedy at temperature 0. Prompt number i samples from a generator seeded with (seed, i), or with its own seed
    where `seed` is a sequence, so its text is the same alone and in any batch. `cuda_graphs` replays recorded steps.
    Raises ValueError on a lone surrogate in a prompt, on settings that make no sense, on CUDA graphs without CUDA.
    """
    events = stream(
        model, tokenizer, prompts, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, max_new_units=max_new_units, max_new_blocks=max_new_blocks,
        stop=stop, batch_size=batch_size, cuda_graphs=cuda_graphs,
    )  # fmt: skip
    done = {index: event for index, event in events if isinstance(event, Completion)}
    return [done[i] for i in range(len(prompts))]


def stream(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], *, temperature: float = 0.0,
           top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
           seed: int | Sequence[int] = 0, max_new_units: int = 256, max_new_blocks: int = 0,
           stop: Sequence[str] = (), batch_size: int = 64,
           cuda_graphs: bool = False) -> Iterator[tuple[int, str | Completion]]:  # fmt: skip
    """Like `generate`, but yields (prompt number, block) as blocks are finished, and (prompt number, Completion).

    Blocks of a stop string come out before it is complete; the Completion has the text without it.
    """
    refuse_string(prompts)
    how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    limits = Limits(max_new_units, max_new_blocks, (stop,) if isinstance(stop, str) else tuple(stop))
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    seeds = list(seed) if isinstance(seed, Iterable) else [[int(seed), i] for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one, or one each")
    splits = [tokenizer.split(prompt) for prompt in prompts]  # refuses lone surrogates before anything is written
    requests = deque(enumerate(zip(prompts, splits, seeds, strict=True)))
    decoder = Decoder(model, tokenizer, min(batch_size, len(requests)), cuda_graphs=cuda_graphs)
    return _run(decoder, requests, how, limits)


def refuse_string(prompts: Sequence[str]) -> None:
    """Raise ValueError where a string is given for the list of prompts: it would be one prompt a character."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts[:60]!r}; give a list of strings")


@torch.inference_mode()
def _run(decoder: Decoder, waiting: deque[Any], how: Sampling,
         limits: Limits) -> Iterator[tuple[int, str | Completion]]:  # fmt: skip
    model, tokenizer = decoder.model, decoder.tokenizer
    was_training = model.training
    model.eval()
    grammar = Grammar(tokenizer)
    rows: list[_Row | None] = [None] * len(decoder.builders)
    try:
        while True:
            decoder.open(_join(rows, waiting, tokenizer))
            active = [i for i, row in enumerate(rows) if row is not None]
            if not active:
                return
            if not waiting and 2 * len(active) <= len(rows):  # the others have left for good
                decoder.select(active)
                rows = [rows[i] for i in active]
                active = list(range(len(rows)))
            to_read = {i: row.blocks_to_read for i in active if (row := rows[i]) and row.blocks_to_read}
            if len(to_read) >= READ_SHARE * len(active):
                read_grouped(decoder, to_read)
            going = [(i, row) for i in active if (row := rows[i]) and not row.blocks_to_read]
            if not going:
                continue
            # Rows that wait or are free take the step, too, and what comes out is dropped: leaving them out of the
            # batch would copy the caches of all others.
            step = decoder.step(range(len(rows)), [row.written if row else () for row in rows])
            now = [row for _, row in going]
            logits = step if len(now) == len(rows) else step[[i for i, _ in going]]
            allowed = torch.stack([grammar.allowed(row.written) for row in now]).to(logits.device)
            repeated = [r.repetition.units(r.written) for r in now] if how.repetition_penalty > 1 else ()
            units = choose(logits, allowed, how, [row.generator for row in now], repeated)
            log_probs = logits.double().log_softmax(-1)[torch.arange(len(now)), units].tolist()
            for (i, row), unit, log_prob in zip(going, units, log_probs, strict=True):
                if block := _take(row, unit, log_prob, tokenizer, limits):
                    yield row.index, block
                if row.stop_reason:
                    yield row.index, row.completion()
                    rows[i] = None
    finally:
        decoder.recording = None
        model.train(was_training)


def _join(rows: list[_Row | None], waiting: deque[Any], tokenizer: MixedTokenizer) -> list[int]:
    """Let waiting prompts take the free rows; which ones."""
    joined = []
    for i, row in enumerate(rows):
        if row is None and waiting:
            index, (prompt, split, seed) = waiting.popleft()
            blocks = [tokenizer.encode_block(text) for text in split]
            rows[i] = _Row(index, prompt, blocks, np.random.default_rng(seed))
            joined.append(i)
    return joined


def read_grouped(decoder: Decoder, blocks: dict[int, list[Block]]) -> None:
    """Read blocks {row: blocks}, in one pass those up to 8 tokens above twice the shortest; the lists are emptied."""
    lengths = {row: sum(len(block.tokens) for block in mine) for row, mine in blocks.items()}
    group: list[int] = []
    for row in sorted(lengths, key=lengths.__getitem__):
        if group and lengths[row] > 2 * lengths[group[0]] + 8:
            decoder.read(group, [blocks[r] for r in group])
            group = []
        group.append(row)
    if group:
        decoder.read(group, [blocks[r] for r in group])
    for mine in blocks.values():
        mine.clear()


def _take(row: _Row, unit: int, log_prob: float, tokenizer: MixedTokenizer, limits: Limits) -> str | None:
    """Let a row write a unit; the block that this finishes, if any."""
    row.log_probs.append(log_prob)
    block = None
    if unit == tokenizer.eob_id:
        turned = tokenizer.retokenize(row.written)
        row.repetition.add(row.written)
        row.blocks_to_read.append(turned)
        row.blocks.append(block := turned.text)
        row.written = []
        row.n_kept = len(row.log_probs)
        _stop_at_string(row, limits.stop)
    elif unit == tokenizer.eos_id:
        row.stop_reason, row.n_kept = "eos", len(row.log_probs)
    else:
        row.written.append(unit)
    if not row.stop_reason:
        if limits.max_new_blocks and len(row.blocks) >= limits.max_new_blocks:
            row.stop_reason = "block_limit"
        elif len(row.log_probs) >= limits.max_new_units:
            row.stop_reason = "length"
    return block


def _stop_at_string(row: _Row, stop: tuple[str, ...]) -> None:
    """Cut the blocks before the first stop string that the latest block has completed."""
    if not stop:
        return
    text = "".join(row.blocks)
    latest = len(text) - len(row.blocks[-1])
    found = [at for s in stop if (at := text.find(s, max(0, latest - len(s) + 1))) >= 0]
    if found:
        row.stop_reason = "stop_string"
        end, kept = min(found), []
        for block in row.blocks:
            if end > 0:
                kept.append(block[:end])
            end -= len(block)
        row.blocks = kept
