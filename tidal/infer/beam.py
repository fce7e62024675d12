"""Beam search over units and across block ends: the likeliest completions instead of the greedy one.

    slots of 2 prompts, 3 beams each: blocks │ being written     one step

    prompt 0   the│ox   the│god   the fox│   (eob was last)      candidates [2, 3 · n_head]: 3 are taken of each prompt,
    prompt 1   1 +│95   1 +│5     (free, after <eos>)            slots reordered, ended blocks read in one pass

The rules:

- Of all (beam, unit) candidates of a prompt, the `num_beams` likeliest are taken, ties going to the lower slot, then
  to the lower unit. Those that wrote `<eos>` are finished and set aside, and only `wanted` better ones can take
  their place; the others are the beams of the next step. So a single beam is greedy decoding.
- All that was written is compared by score = log-probability / units ** length_penalty.
- The search of a prompt ends when no beam is left, or when `wanted` hypotheses are finished and no beam can pass
  the worst of them: log-probability only falls and units only grow, to `max_new_units` at most, so, the penalty being
  0 or more, a beam never comes to more than log-probability / max_new_units ** length_penalty.
- At `max_new_units` the beams left compete with the finished ones as they stand, and only then lose the block that
  they had begun.
- Of hypotheses with the same text (cut into other blocks, or made equal by that loss) the best one counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidal.blocks import BOS_BLOCK, BlockTable, Passage
from tidal.device import upload
from tidal.infer.completion import Degenerate, Limits, StopReason, degenerate
from tidal.infer.decoder import Decoder, evaluating
from tidal.infer.engine import as_prompts, read_grouped
from tidal.infer.grammar import Grammar
from tidal.infer.sampling import NOT_FINITE, NOTHING_FOLLOWS, as_float, as_int
from tidal.model import TidalTransformer
from tidal.streams import pack
from tidal.tokenizer import Block, MixedTokenizer

MAX_PENALTY = 10.0  # far beyond it, powers of units overflow
MOST_UNITS = 2**31  # more than anybody writes, and no power of it overflows


@dataclass(frozen=True)
class Hypothesis:
    """One of the completions that were found for a prompt."""

    prompt: str
    completion: str
    text: str
    """`prompt + completion`"""
    blocks: list[str]
    """The completion, block by block; `"".join(blocks) == completion`."""
    stop_reason: StopReason
    """`eos`, or `length`: `max_new_units` was reached (a block begun by then is dropped)."""
    log_prob: float
    """Log-probability (nats) under the model of all finished blocks and `<eos>`."""
    score: float
    """What hypotheses are ranked by: `log_prob / units ** length_penalty`, except that the units of a dropped block
    count in both, lest a beam gain by having its last block dropped."""
    units: int
    """Units written, `<eob>` and `<eos>` included; those of a dropped block are not counted."""
    degenerate: Degenerate
    """As of a `Completion`."""

    def to_dict(self, per_unit: bool = False) -> dict[str, Any]:
        """As JSON-ready values; nothing is kept `per_unit`, as a `Completion` does."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Beam:
    """What one slot has written. Never changed, so that slots can share it."""

    total: float
    """Log-probability of all units written; -inf: the slot is free, what it has written is another's."""
    written: tuple[int, ...] = ()  # units of the block being written, last character first
    blocks: tuple[str, ...] = ()
    log_prob: float = 0.0  # of the finished blocks
    units: int = 0  # of the finished blocks
    ended: Block | None = None  # the block that the latest unit has finished; to be read before the next step


@dataclass
class _Search:
    """The search of one prompt, which has `num_beams` slots."""

    prompt: str
    split: list[str]
    num_beams: int
    wanted: int
    length_penalty: float
    max_new_units: int
    beams: list[_Beam] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    """of each beam the slot it had before its latest unit"""
    finished: list[Hypothesis] = field(default_factory=list)
    n_units: int = 0

    def __post_init__(self) -> None:  # all slots but one are free at first, or the beams would never differ
        self.beams = [_Beam(0.0), *[_Beam(-math.inf)] * (self.num_beams - 1)]

    def go_on(self, slots: Sequence[int], units: Sequence[int], totals: Sequence[float],
              tokenizer: MixedTokenizer) -> bool:  # fmt: skip
        """Write one unit: candidate i goes on from `slots[i]`, with `units[i]`. Whether the search goes on."""
        self.n_units += 1
        successors = [(slot, beam) for slot, unit, total in zip(slots, units, totals, strict=True)
                      if total > -math.inf and (beam := self._written(self.beams[slot], unit, total, tokenizer))]
        self._put(successors)
        if all(total == -math.inf for total in totals):
            raise RuntimeError(NOTHING_FOLLOWS)
        return self._may_improve([beam for _, beam in successors])

    def _written(self, beam: _Beam, unit: int, total: float, tokenizer: MixedTokenizer) -> _Beam | None:
        """The beam with one more unit; None if that ends it, and it is set aside."""
        if unit == tokenizer.eos_id:
            self._finish(replace(beam, total=total, log_prob=total, units=self.n_units), "eos")
            return None
        if unit == tokenizer.eob_id:
            block = tokenizer.retokenize(beam.written)
            return _Beam(total, (), (*beam.blocks, block.text), total, self.n_units, block)
        return replace(beam, total=total, written=(*beam.written, unit), ended=None)

    def _put(self, successors: Sequence[tuple[int, _Beam]]) -> None:
        """Give each a slot: the first of a slot's successors stays, so that only those of the others are copied."""
        self.beams, self.sources = [_Beam(-math.inf)] * self.num_beams, [*range(self.num_beams)]
        others = []
        for slot, beam in successors:
            if self.beams[slot].total == -math.inf:
                self.beams[slot] = beam
            else:
                others.append((slot, beam))
        free = [slot for slot, beam in enumerate(self.beams) if beam.total == -math.inf]
        for slot, (source, beam) in zip(free, others, strict=False):
            self.beams[slot], self.sources[slot] = beam, source

    def _may_improve(self, live: Sequence[_Beam]) -> bool:
        """Whether these beams go on: there are some, there is room, and not all that is wanted is found yet, or one of
        them might still pass the worst of it. Without room they are finished as they stand."""
        live = sorted(live, key=lambda beam: -beam.total)
        if self.n_units == self.max_new_units:
            for beam in live:
                self._finish(beam, "length")
            return False
        if not live or len(self.finished) < self.wanted:
            return bool(live)
        most = min(self.max_new_units, MOST_UNITS)
        return live[0].total / math.pow(most, self.length_penalty) > self.finished[-1].score

    def _finish(self, beam: _Beam, stop_reason: StopReason) -> None:
        """Add a hypothesis and keep the best; of equally good ones, and of the same text, those finished first."""
        completion, score = "".join(beam.blocks), beam.total / math.pow(self.n_units, self.length_penalty)
        if any(h.completion == completion and h.score >= score for h in self.finished):
            return
        self.finished = [h for h in self.finished if h.completion != completion]
        self.finished.append(Hypothesis(self.prompt, completion, self.prompt + completion, list(beam.blocks),
                                        stop_reason, beam.log_prob, score, beam.units,
                                        degenerate(beam.blocks)))  # fmt: skip
        self.finished = sorted(self.finished, key=lambda h: -h.score)[: self.wanted]


def as_length_penalty(value: object) -> float:
    """A length penalty as a float, also numpy's. Raises ValueError outside 0 … 10."""
    penalty = as_float("length_penalty", value)
    if not 0 <= penalty <= MAX_PENALTY:
        raise ValueError(f"length_penalty is {penalty}; it must be a number from 0 to {MAX_PENALTY:g}")
    return penalty


@torch.inference_mode()
def beam_search(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Iterable[str], *, num_beams: int = 4,
                wanted: int | None = None, length_penalty: float = 1.0, max_new_units: int = 256,
                batch_size: int = 16, cached: bool = True) -> list[list[Hypothesis]]:  # fmt: skip
    """For every prompt the best hypotheses that its search meets, best first: `wanted` different texts (none: as many
    as there are beams). The fewer are wanted, the earlier a search can end, with the same first ones.

    There are fewer where fewer exist, or where the last beams come to the same text (cut into other blocks, or but for
    the block that `max_new_units` drops). `batch_size` prompts are searched side by side. `cached=False` computes every
    step anew, as one training pass over all that was read and written: slow, and the same. Raises ValueError on a lone
    surrogate in a prompt, on numbers below one, on more wanted than there are beams, on a length penalty outside 0 … 10
    and on a tokenizer that is not the model's.
    """
    Limits(max_new_units)
    prompts = as_prompts(prompts)
    num_beams, batch_size = as_int("num_beams", num_beams, 1), as_int("batch_size", batch_size, 1)
    wanted = num_beams if wanted is None else as_int("wanted", wanted, 1)
    if wanted > num_beams:
        raise ValueError(f"wanted is {wanted}; of {num_beams} beams there are no more")
    length_penalty = as_length_penalty(length_penalty)
    model.config.check_tokenizer(tokenizer.fingerprint)
    # a lone surrogate is refused here, before anything is written
    searches = [_Search(p, tokenizer.split(p), num_beams, wanted, length_penalty, max_new_units) for p in prompts]
    with evaluating(model):
        for first in range(0, len(searches), batch_size):
            _search(model, tokenizer, searches[first : first + batch_size], cached)
    return [search.finished for search in searches]


def _search(model: TidalTransformer, tokenizer: MixedTokenizer, active: list[_Search], cached: bool) -> None:
    grammar, num_beams = Grammar(tokenizer), active[0].num_beams
    rows = _Cached(model, tokenizer, active) if cached else _Recomputed(model, tokenizer)
    while active:
        beams = [beam for search in active for beam in search.beams]
        logits = rows.step(active)
        allowed = upload(torch.stack([grammar.allowed(beam.written) for beam in beams]), logits.device)
        slots, units, totals = _take(logits, allowed, [beam.total for beam in beams], num_beams)
        going, kept = [], []
        for i, search in enumerate(active):
            if search.go_on(slots[i], units[i], totals[i], tokenizer):
                going.append(search)
                kept += [num_beams * i + slot for slot in search.sources]
        active = going
        if active:
            rows.go_on(kept, [beam.ended for search in active for beam in search.beams])


def _take(logits: Tensor, allowed: Tensor, totals: Sequence[float],
          num_beams: int) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:  # fmt: skip
    """The likeliest candidates of each prompt: slots, units and log-probabilities, each [prompts, num_beams].

    logits [prompts * num_beams, n_head], allowed the same, totals [prompts * num_beams]. The candidates are given in
    the order of their slots.
    """
    log_probs, n = logits.double().log_softmax(-1), logits.shape[1]
    damaged = log_probs.isnan().any(-1)
    log_probs = log_probs.masked_fill(~allowed, -math.inf) + upload(totals, logits.device, torch.float64)[:, None]
    flat = log_probs.view(-1, num_beams * n)
    last = flat.topk(num_beams).values[:, -1:]  # its indices are not used: they leave open who wins a tie
    above, equal = flat > last, flat == last
    taken = above | equal & (equal.cumsum(-1) <= num_beams - above.sum(-1, keepdim=True))
    index = taken.nonzero_static(size=len(flat) * num_beams, fill_value=0)[:, 1].view(-1, num_beams)
    fetched = torch.stack([index.double(), flat.gather(-1, index), damaged.view(-1, num_beams).double()])
    found, sums, bad = fetched.tolist()  # the one time that the device is waited for
    if any(map(any, bad)):
        raise RuntimeError(NOT_FINITE)
    return [[int(i) // n for i in row] for row in found], [[int(i) % n for i in row] for row in found], sums


class _Cached:
    """The slots of all prompts as rows of one decoder."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, searches: Sequence[_Search]) -> None:
        self.decoder = Decoder(model, tokenizer, len(searches))
        blocks = [[tokenizer.encode_block(text) for text in search.split] for search in searches]
        read_grouped(self.decoder, dict(enumerate(blocks)))
        self.decoder.select([row for row, search in enumerate(searches) for _ in search.beams])

    def step(self, searches: Sequence[_Search]) -> Tensor:
        """Logits [rows, n_head] for the next unit of every slot."""
        written = [beam.written for search in searches for beam in search.beams]
        return self.decoder.step(range(len(written)), written, check=False)

    def go_on(self, rows: Sequence[int], ended: Sequence[Block | None]) -> None:
        """Keep these rows in this order; then read the blocks that have ended in them."""
        self.decoder.select(rows)
        if read := {row: [block] for row, block in enumerate(ended) if block}:
            self.decoder.read(list(read), list(read.values()))


class _Recomputed:
    """No caches: a training pass over passages whose last block is the one being written."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def step(self, searches: Sequence[_Search]) -> Tensor:
        """Logits [rows, n_head] for the next unit of every slot."""
        table, rows, last = BlockTable(self.tokenizer), [], []
        for search in searches:
            for beam in search.beams:
                before = table.indices([*search.split, *beam.blocks])
                blocks = np.array([BOS_BLOCK, *before, table.unfinished(beam.written)], np.int32)
                rows.append([Passage(blocks, len(blocks) - 1)])
                last.append(len(beam.written))
        batch = pack(rows, table, steps=self.model.config.shape.steps).to(self.model.device)
        return self.model.head(self.model.states(batch)[1][range(len(rows)), last])

    def go_on(self, rows: Sequence[int], ended: Sequence[Block | None]) -> None:
        """Nothing is kept between steps."""
