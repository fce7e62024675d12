"""Generation: every active row writes one unit per step; finished blocks are turned round and read back in.

    submit → waiting → │ row │ row │ row │ … → completions
                         │ step: one unit for every row
                         │ rows that wrote <eob>: block turned round, re-tokenized, read in one batched pass
                         │ rows that ended leave, waiting requests take their places; the batch grows and shrinks
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tidal.device import upload
from tidal.infer import recorded
from tidal.infer.completion import Completion as Completion
from tidal.infer.completion import Limits as Limits
from tidal.infer.completion import Request
from tidal.infer.decoder import Decoder, evaluating
from tidal.infer.grammar import Grammar
from tidal.infer.sampling import Sampling, as_int, choose, fetch
from tidal.model import TidalTransformer
from tidal.streams import WriterStep
from tidal.tokenizer import Block, MixedTokenizer

READ_SHARE = 0.75  # of the rows, which a pass of the reader waits for: docs/decoding.md
PASS_TOKENS = 2**16  # of several rows that are read at once, which bounds the memory it takes; as PREFILL_TOKENS does
Seed = int | Sequence[int] | np.random.Generator
Event = tuple[int, str | Completion]
GREEDY, USUAL = Sampling(), Limits()


class Chosen(NamedTuple):
    """A unit that has just been chosen, for whoever watches."""

    number: int
    """of the request"""
    unit: int
    fed: WriterStep
    """what the model was given"""
    log_prob: float
    """of the unit, under the model"""
    logits: Tensor
    """[n_head], the model's own"""
    allowed: Tensor
    """bool [n_head], by the grammar"""
    foretold: Tensor
    """running sums of what the reader foretells, as `Decoder.sums` has them for this row"""


class Engine:
    """Continues prompts that come at any time, up to `batch_size` of them side by side, each with its own settings.

        engine = Engine(model, tokenizer)
        number = engine.submit("Once upon a time", Sampling(temperature=0.8), Limits(max_new_units=100), seed=1)
        while engine.unfinished:
            for number, event in engine.step():     # a block (str), or at the end the Completion
                …

    A request's text and log-probabilities do not depend on the others. `cuda_graphs` replays recorded steps; `watch` is
    called with every unit that is chosen. Raises ValueError on a batch size below one, on a tokenizer that is not the
    model's, and on CUDA graphs without CUDA.
    """

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, *, batch_size: int = 64,
                 cuda_graphs: bool = False, watch: Callable[[Chosen], None] | None = None) -> None:  # fmt: skip
        model.config.check_tokenizer(tokenizer.fingerprint)
        if cuda_graphs:
            recorded.check(model.device)
        self.model, self.tokenizer, self.cuda_graphs = model, tokenizer, cuda_graphs
        self.batch_size = as_int("batch_size", batch_size, 1)
        self._watch, self._grammar = watch, Grammar(tokenizer)
        self._numbers = itertools.count()
        self._cancelled: set[int] = set()
        """since the latest step"""
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = []
        """what the rows of the decoder are writing; None: free"""
        self._decoder: Decoder | None = None

    def submit(self, prompt: str, sampling: Sampling = GREEDY, limits: Limits = USUAL,
               seed: Seed | None = None) -> int:  # fmt: skip
        """Add a request; its number, which counts from 0.

        It samples from a generator with this seed (or from the generator given); none: (0, number), as prompt number
        `number` of `generate` does. Raises ValueError on a lone surrogate in the prompt, on a seed that is negative or
        no integer, and on what is of a wrong type.
        """
        for name, value, kind in (("prompt", prompt, str), ("sampling", sampling, Sampling),
                                  ("limits", limits, Limits)):  # fmt: skip
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}; it must be a {kind.__name__}")
        split, given = self.tokenizer.split(prompt), None if seed is None else _generator(seed)
        number = next(self._numbers)  # in one go, since other threads may submit, too
        generator = given or _generator((0, number))
        self._waiting.append(Request(number, prompt, split, sampling, limits, generator))
        return number

    @property
    def unfinished(self) -> int:
        """Requests that wait or are being written."""
        return len(self._waiting) + len(self._active())

    def step(self) -> list[Event]:
        """Let requests join, read what was finished, and write one unit in every active row.

        Returns (request number, block) for blocks that are finished now, and (request number, Completion) for
        requests. A block of a stop string comes out before the string is complete; the Completion has the text
        without it. An error (of damaged weights, of memory) leaves the engine empty, as `close` does.
        """
        self._cancelled.clear()
        if not self.unfinished:
            return []
        try:
            with evaluating(self.model), torch.inference_mode():
                decoder = self._admit()
                self._shrink(decoder)
                self._read_finished(decoder)
                events = self._write_one(decoder)
                if not self.unfinished:  # the next request may be long in coming
                    decoder.trim()
                return events
        except BaseException:
            self.close()
            raise

    def drain(self) -> Iterator[Event]:
        """What all steps return, until nothing is left; the engine is closed then, and where the rest is not wanted."""
        try:
            while self.unfinished:
                yield from (event for event in self.step() if event[0] not in self._cancelled)
        finally:
            self.close()

    def cancel(self, number: int) -> bool:
        """Forget a request; whether it was there, waiting or being written."""
        for row in self._waiting:
            if row.number == number:
                self._waiting.remove(row)
                return True
        for i, row in self._active():
            if row.number == number:
                self._leave(i)
                self._cancelled.add(number)  # what it has just written is not to come any more
                return True
        return False

    def close(self) -> None:
        """Forget all requests and give back all memory. More may be submitted afterwards."""
        if self._decoder:
            self._decoder.recording = None
        self._decoder, self._rows = None, []
        self._waiting.clear()

    def _active(self) -> list[tuple[int, Request]]:
        return [(i, row) for i, row in enumerate(self._rows) if row]

    def _admit(self) -> Decoder:
        """Let waiting requests take free rows, after making more of these where they are too few."""
        n = len(self._rows)
        wanted = len(self._active()) + len(self._waiting)
        if wanted > n and n < self.batch_size:
            # by a quarter at least: else each of many that come one by one would have all caches copied
            more = min(self.batch_size, max(wanted, n + n // 4)) - n
            if self._decoder:
                self._decoder.grow(more)
            else:
                self._decoder = Decoder(self.model, self.tokenizer, more, cuda_graphs=self.cuda_graphs)
            self._rows += [None] * more
        assert self._decoder is not None
        empty = []
        for i, row in enumerate(self._rows):
            if row is None and self._waiting:
                self._rows[i] = new = self._waiting.popleft()
                new.to_read = [self.tokenizer.encode_block(text) for text in new.split]
                new.start = time.perf_counter()
                if not new.to_read:
                    empty.append(i)
        self._decoder.open(empty)  # others when they are read: until then a step would read their <bos> alone
        return self._decoder

    def _leave(self, i: int) -> None:
        """Free a row."""
        assert self._decoder is not None
        self._rows[i] = None
        self._decoder.clear([i])

    def _shrink(self, decoder: Decoder) -> None:
        """Copy the active rows together where half are free; give back memory that only longer ones needed."""
        active = self._active()
        if not self.cuda_graphs and 2 * len(active) <= len(self._rows):  # to record anew takes longer than idle rows
            decoder.select([i for i, _ in active])
            self._rows = [row for _, row in active]
        decoder.trim()

    def _read_finished(self, decoder: Decoder) -> None:
        """Read prompts and finished blocks, once enough rows have some."""
        active = self._active()
        waiting = [(i, row) for i, row in active if row.to_read]
        if len(waiting) >= READ_SHARE * len(active):
            decoder.open([i for i, row in waiting if not row.units])
            read_grouped(decoder, {i: row.to_read for i, row in waiting})
            for _, row in waiting:
                row.to_read = []

    def _write_one(self, decoder: Decoder) -> list[Event]:
        """Write a unit in every row that has nothing to read; what is finished by that."""
        going = [(i, row) for i, row in self._active() if not row.to_read]
        numbers, rows = [i for i, _ in going], [row for _, row in going]
        if decoder.steps_some:
            logits = decoder.step(numbers, [row.written for row in rows], check=False)
        else:  # rows that wait or are free take the step, too, and what comes out is dropped
            written = [row.written if row else () for row in self._rows]
            logits = decoder.step(range(len(self._rows)), written, check=False)
            if len(going) < len(self._rows):
                logits = logits[upload(numbers, logits.device)]
        allowed = upload(torch.stack([self._grammar.allowed(row.written) for row in rows]), logits.device)
        units, log_probs = fetch(choose(logits, allowed, [row.sampling for row in rows],
                                        [row.generator for row in rows], [row.repeated() for row in rows]),
                                 logits)  # fmt: skip
        if self._watch:
            for (i, row), unit, log_prob, own, may in zip(going, units, log_probs, logits, allowed, strict=True):
                fed = decoder.builders[i].step(row.written)
                self._watch(Chosen(row.number, unit, fed, log_prob, own, may, decoder.sums[i]))
        events: list[Event] = []
        for (i, row), unit, log_prob in zip(going, units, log_probs, strict=True):
            if block := row.write(unit, log_prob, self.tokenizer):
                events.append((row.number, block))
            if row.stop_reason:
                events.append((row.number, row.completion(self.tokenizer)))
                self._leave(i)
        return events


def _generator(seed: Seed) -> np.random.Generator:
    """Seeded with an integer, or with several; or the generator itself."""
    if isinstance(seed, np.random.Generator):
        return seed
    several = [as_int("seed", part, 0) for part in seed] if isinstance(seed, list | tuple) else None
    return np.random.default_rng(several or as_int("seed", seed, 0))


def generate(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Iterable[str], *, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
             seed: int | Sequence[int] = 0, max_new_units: int = 256, max_new_blocks: int = 0,
             stop: Sequence[str] = (), batch_size: int = 64,
             cuda_graphs: bool = False) -> list[Completion]:  # fmt: skip
    """Continue every prompt; up to `batch_size` of them side by side, in the order of the prompts.

    Greedy at temperature 0. Prompt number i samples from a generator seeded with (seed, i): its text is the same
    whatever `batch_size` is, but not alone or as another number. For that give each a seed of its own, as a sequence;
    `Engine.submit` with the seed (seed, i) draws the same. `cuda_graphs` replays recorded steps. Raises ValueError on a
    lone surrogate in a prompt, on settings that make no sense, on CUDA graphs without CUDA.
    """
    prompts = as_prompts(prompts)
    events = stream(
        model, tokenizer, prompts, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, max_new_units=max_new_units, max_new_blocks=max_new_blocks,
        stop=stop, batch_size=batch_size, cuda_graphs=cuda_graphs,
    )  # fmt: skip
    done = {index: event for index, event in events if isinstance(event, Completion)}
    return [done[i] for i in range(len(prompts))]


def stream(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Iterable[str], *, temperature: float = 0.0,
           top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
           seed: int | Sequence[int] = 0, max_new_units: int = 256, max_new_blocks: int = 0,
           stop: Sequence[str] = (), batch_size: int = 64,
           cuda_graphs: bool = False) -> Iterator[Event]:  # fmt: skip
    """Like `generate`, but yields (prompt number, block) as blocks are finished, and (prompt number, Completion).

    Blocks of a stop string come out before it is complete; the Completion has the text without it.
    """
    prompts = as_prompts(prompts)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    limits = Limits(max_new_units, max_new_blocks, stop)
    engine = Engine(model, tokenizer, batch_size=batch_size, cuda_graphs=cuda_graphs)
    seeds: list[Seed]
    try:
        seeds = list(seed)  # type: ignore[arg-type]
    except TypeError:  # one, also as a tensor
        first = as_int("seed", seed, 0)
        seeds = [(first, i) for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one, or one each")
    for prompt, its_seed in zip(prompts, seeds, strict=True):  # refuses what is wrong before anything is written
        engine.submit(prompt, sampling, limits, its_seed)
    return engine.drain()


def as_prompts(prompts: Iterable[str]) -> list[str]:
    """Prompts as a list. Raises ValueError where one is no string, and on a string in place of the list, which would be
    one prompt a character."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts[:60]!r}; give a list of strings")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r}; give a list of strings")
    prompts = list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {prompt!r}; it must be a str")
    return prompts


def read_grouped(decoder: Decoder, blocks: Mapping[int, Sequence[Block]]) -> None:
    """Read blocks {row: blocks}, in one pass those up to 8 tokens above twice the shortest, and no more than
    `PASS_TOKENS` unless of one row."""
    lengths = {row: sum(len(block.tokens) for block in mine) for row, mine in blocks.items()}
    group: list[int] = []
    for row in sorted(lengths, key=lengths.__getitem__):
        if group and (lengths[row] > 2 * lengths[group[0]] + 8 or (len(group) + 1) * lengths[row] > PASS_TOKENS):
            decoder.read(group, [blocks[r] for r in group])
            group = []
        group.append(row)
    if group:
        decoder.read(group, [blocks[r] for r in group])
