"""Bugs in decoding alone: caches, rows that come and go, samplers, beams, training mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.doctor.bugs_model import of_another_row
from tests.doctor.plant import Patch, Plant, replacing
from tidal.blocks import BlockTable, Passage
from tidal.doctor.report import Floats
from tidal.infer import beam
from tidal.infer import decoder as decoding
from tidal.infer.completion import Request
from tidal.infer.decoder import Decoder, KeyValueCache
from tidal.infer.grammar import Grammar
from tidal.infer.sampling import Sampling
from tidal.model import TidalTransformer
from tidal.recall import Recollection
from tidal.streams import DocumentBuilder, WriterStep
from tidal.tokenizer import MixedTokenizer


def tempered_the_wrong_way(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Logits times the temperature."""

    def bugged(logits: Tensor, best: Tensor, likeliest: Tensor, settings: Sequence[Sampling], *rest: Any) -> Tensor:
        inverse = [dataclasses.replace(how, temperature=1 / how.temperature) for how in settings]
        return draw(logits, best, likeliest, inverse, *rest)

    return bugged


def penalty_forgotten(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, allowed, how, generators, *repeated: choose(logits, allowed, how, generators)


def place_stops_before_the_cap(self: DocumentBuilder, written: Sequence[int], step: WriterStep) -> dict[str, Any]:
    return {"place": min(step.place, self.tokenizer.max_block_units - 1)}


def memory_ends(put: Callable[..., None]) -> Callable[..., None]:
    """Values behind the first 256 slots are not stored."""

    def bugged(self: KeyValueCache, at: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        kept = (at[1] < 256).view(len(v), 1, -1, 1)
        put(self, at, k, v * kept)

    return bugged


def of_another_row_in(dtype: torch.dtype) -> Plant:
    """A step is given the context of the row before, in one precision only."""
    bugged = of_another_row("context")(right := Decoder.step)
    return lambda patch: patch.setattr(
        Decoder, "step", lambda self, *args, **how: (bugged if self.context.dtype == dtype else right)(
            self, *args, **how))  # fmt: skip


def recollection_stays(start: Callable[..., None]) -> Callable[..., None]:
    """What the row's former document had to recall."""

    def bugged(self: Decoder, rows: Sequence[int]) -> None:
        kept = [(row, self.builders[row].recollection) for row in rows]
        start(self, rows)
        for row, recollection in kept:
            self.builders[row].recollection = recollection

    return bugged


def rows_grow_in_front(grow: Callable[..., None]) -> Callable[..., None]:
    def bugged(self: Decoder, more: int) -> None:
        grow(self, more)
        for cache in (*self.reader_caches, *self.writer_caches):
            cache.data = cache.data.roll(more, 1)

    return bugged


def trimmed_in_front(resize: Callable[..., None]) -> Callable[..., None]:
    """The last slots of a cache that gets smaller are kept."""

    def bugged(self: KeyValueCache, n_slots: int) -> None:
        if n_slots < self.data.shape[3]:
            self.data = self.data[:, :, :, -n_slots:]
        resize(self, n_slots)

    return bugged


def slots_of_the_searches_that_go_on(right: Callable[..., None]) -> Callable[..., None]:
    """Rows are counted among the searches that have not ended, in place of all that took the step."""

    def search(model: TidalTransformer, tokenizer: MixedTokenizer, active: list[Any], cached: bool) -> None:
        grammar, num_beams = Grammar(tokenizer), active[0].num_beams
        rows = beam._Cached(model, tokenizer, active) if cached else beam._Recomputed(model, tokenizer)
        while active:
            beams = [one for search in active for one in search.beams]
            allowed = torch.stack([grammar.allowed(one.written) for one in beams])
            slots, units, totals = beam._take(rows.step(active), allowed, [one.total for one in beams], num_beams)
            active = [one for i, one in enumerate(active) if one.go_on(slots[i], units[i], totals[i], tokenizer)]
            if active:
                kept = [num_beams * i + slot for i, one in enumerate(active) for slot in one.sources]
                rows.go_on(kept, [one.ended for search in active for one in search.beams])

    return search


def context_of_sixteen_rows(write: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rows behind them are given none."""
    return lambda self, some, end, data, q_position, context: write(
        self, some, end, data, q_position, context * (data[:, :, decoding.ROW, None] < 16))  # fmt: skip


def not_handed_on(name: str, usual: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A setting of `generate` that does not reach the engine."""
    return lambda stream: lambda *args, **how: stream(*args, **{**how, name: usual})


def last_characters_only(submit: Callable[..., int]) -> Callable[..., int]:
    return lambda self, prompt, *how, **more: submit(self, prompt[-512:], *how, **more)


def all_penalized(units: Callable[..., set[int]]) -> Callable[..., set[int]]:
    return lambda self, written: set().union(*self._next.values())


def blocks_turned_round_again(write: Callable[..., str | None]) -> Callable[..., str | None]:
    """What is streamed, not what the completion holds."""

    def bugged(self: Request, *unit: Any) -> str | None:
        block = write(self, *unit)
        return block and block[::-1]

    return bugged


def in_order_of_length(unit_log_probs: Callable[..., list[Floats]]) -> Callable[..., list[Floats]]:
    """As they were computed."""

    def bugged(model: TidalTransformer, passages: Sequence[Passage], table: BlockTable, *rest: int) -> list[Floats]:
        sizes = [int(table.n_tokens(p.blocks).sum()) for p in passages]
        found = unit_log_probs(model, passages, table, *rest)
        return [found[i] for i in sorted(range(len(sizes)), key=sizes.__getitem__)]

    return bugged


def in_nats(bits_per_byte: Callable[..., tuple[float, int, int]]) -> Callable[..., tuple[float, int, int]]:
    def bugged(*args: Any) -> tuple[float, int, int]:
        bits, *counts = bits_per_byte(*args)
        return bits * math.log(2), counts[0], counts[1]

    return bugged


def positions_in_the_dtype_of_the_weights(patch: Patch) -> None:
    """Where a decoder keeps them, and where it feeds them."""
    of: list[torch.dtype] = [torch.float32]
    upload = decoding.upload

    def rounded(values: Any, device: torch.device, *dtype: torch.dtype) -> Tensor:
        there = upload(values, device, *dtype)
        return there.to(of[0]).float() if there.dtype == torch.float32 else there

    def with_dtype(right: Callable[..., Any]) -> Callable[..., Any]:
        def bugged(self: Decoder, *args: Any, **how: Any) -> Any:
            of[0] = self.context.dtype
            return right(self, *args, **how)

        return bugged

    patch.setattr(decoding, "upload", rounded)
    for name in ("_append", "step"):
        replacing(Decoder, name, with_dtype)(patch)


def copy_shares_what_was_read(copy: Callable[..., Recollection]) -> Callable[..., Recollection]:
    def bugged(self: Recollection) -> Recollection:
        other = copy(self)
        other._followed = self._followed
        return other

    return bugged


def with_penalty(change: Callable[[float], float]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypotheses are ranked by another length penalty than searches are pruned by."""

    def wrap(finish: Callable[..., None]) -> Callable[..., None]:
        def bugged(self: beam._Search, *rest: Any) -> None:
            right, self.length_penalty = self.length_penalty, change(self.length_penalty)
            finish(self, *rest)
            self.length_penalty = right

        return bugged

    return wrap


def first_hypothesis_ends(may_improve: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, live: not self.finished and may_improve(self, live)


def louder_in_training(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *args: forward(self, *args) * (1.01 if self.training else 1.0)


def loss_in_bfloat16(nll_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of the loss alone, and where training computes it in float32."""

    def bugged(log_probs: Tensor, *args: Any, **how: Any) -> Tensor:
        return nll_loss(log_probs.bfloat16().float() if log_probs.dtype == torch.float32 else log_probs, *args, **how)

    return bugged
