"""Bugs in training: in supervision, between the data and the model, in what a recipe feeds, in the pass."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.doctor.plant import INT32, Patch, Plant, everywhere, replacing
from tidal.blocks import BlockTable, Passage
from tidal.config import PLAIN_STEPS, Addition, Shape, Steps, Text, Train
from tidal.layers import View
from tidal.model import Losses, TidalTransformer
from tidal.prepare import seams
from tidal.prepare.reading import Part
from tidal.prepare.shards import Shard
from tidal.streams import Batch
from tidal.train.presets import PRESETS
from tidal.train.recipes import addition
from tidal.train.recipes.text import TextRecipe
from tidal.train.workers import Flat

SHAPE = Shape(d_model=32, n_heads=2, n_kv_heads=2, reader_layers=1, writer_layers=1, reader_ff=48, writer_ff=48,
              suffix_rows=97, recall=True, place_jitter=9)  # fmt: skip


@dataclass(frozen=True)
class OfTraining:
    """A bug that shows with some settings of training (given a folder for data)."""

    name: str
    check: int
    plant: Plant
    settings: Callable[[Path], Train]


def sums(folder: Path, **own: Any) -> Train:
    """Every document begins with a stray, and is stretched."""
    given = {"digits": 2, "max_block_units": 16, "elsewhere": 1.0, "stretch": 3.0, **own}
    return dataclasses.replace(PRESETS["addition"], rows=8, model=SHAPE, addition=Addition(**given))


def pairs(folder: Path, seed: int = 0, **own: Any) -> Train:
    """Prompts with completions, plain texts, and one that is too long for a row."""
    r = random.Random(seed)
    words = ("tide", "the sea", "comes", "in", "day", "night", "moon", "don't", "12", "345", "今天天气好", "😀", "f(x)")

    def text(n: int) -> str:
        return " ".join(r.choice(words) for _ in range(n)) + ".\n"

    lines: list[dict[str, str]] = [{"prompt": text(4), "completion": " " + text(6)} for _ in range(20)]
    lines += [{"text": text(r.randint(1, 30))} for _ in range(10)]
    lines += [{"text": text(200)}, {"prompt": text(60), "completion": text(80)}]
    r.shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given = {"vocab_size": 420, "reader_budget": 64, "hold_out": 0.2, "cut_probability": 0.1, **own}
    return dataclasses.replace(PRESETS["text"], rows=6, seed=seed, model=SHAPE, text=Text(data=(str(path),), **given))


def in_bf16(folder: Path) -> Train:
    return dataclasses.replace(sums(folder), precision="bf16")


# ------------------------------------------------------------------------------- in packing and windows


def supervised_late(right: Callable[..., Batch], by: int) -> Plant:
    def bugged(rows: Sequence[Sequence[Passage]], table: BlockTable, *, steps: Steps = PLAIN_STEPS) -> Batch:
        moved = [[dataclasses.replace(p, supervise_from=max(1, p.supervise_from + by)) for p in row] for row in rows]
        return right(moved, table, steps=steps)

    return everywhere(right, bugged)


def window_forgotten(right: Callable[..., Batch]) -> Callable[..., Batch]:
    def pack(rows: Sequence[Sequence[Passage]], table: BlockTable, *, steps: Steps = PLAIN_STEPS) -> Batch:
        return dataclasses.replace(right(rows, table, steps=steps._replace(window=0)), steps=steps)

    return pack


def window_loses_block(windows: Callable[..., list[Passage]]) -> Callable[..., list[Passage]]:
    def bugged(*args: Any, **kwargs: Any) -> list[Passage]:
        cut = windows(*args, **kwargs)
        late = [i > 0 and len(p.blocks) > p.supervise_from + 1 for i, p in enumerate(cut)]
        return [dataclasses.replace(p, supervise_from=p.supervise_from + by) for p, by in zip(cut, late, strict=True)]

    return bugged


def dropout_moves_supervision(cut: Callable[..., Passage]) -> Callable[..., Passage]:
    return lambda p, *rest: dataclasses.replace(cut(p, *rest), supervise_from=p.supervise_from)


def dropout_asks_for_beginnings(cut: Callable[..., Passage]) -> Callable[..., Passage]:
    return lambda p, *rest: dataclasses.replace(cut(p, *rest), read_only=())


def document_start_ignored(batch: Batch) -> dict[str, Tensor]:
    from_zero = torch.tensor([0, 1], dtype=INT32)
    return {"reader_sees": batch.reader_sees * from_zero, "sees_reader": batch.sees_reader * from_zero}


def bytes_are_characters(batch: Batch) -> dict[str, Any]:
    return {"n_bytes": int((batch.targets > 1).sum())}


def aux_of_the_token_before(forward: Callable[..., Losses]) -> Callable[..., Losses]:
    def bugged(self: TidalTransformer, batch: Batch) -> Losses:
        next_nv = self._foretell_blocks(batch, self._reader_states(batch).roll(1, 1))
        wanted = batch.aux_targets.flatten()[batch.asked]
        return forward(self, batch)._replace(aux=-next_nv.gather(1, wanted[:, None]).sum())

    return bugged


eob_dropped = replacing(BlockTable, "n_targets", lambda right: lambda self, index: right(self, index) - (index > 1))


# ------------------------------------------------------------------------- in shards, recipes and passes


def prompts_are_learnt(patch: Patch) -> None:
    """A part of a shard forgets that it is a prompt."""
    right = Shard.encode

    def encode(parts: Sequence[Part], table: BlockTable) -> Shard:
        shard = right(parts, table)
        shard.parts[:, 1] = 0
        return shard

    patch.setattr(Shard, "encode", encode)


def after_the_space(patch: Patch) -> None:
    """Text is cut where the space before a word would go to the piece before."""
    patch.setattr(seams, "seam", lambda text, _: text.rfind(" ", 0, -1) + 1)


def passages(change: Callable[[Passage], Passage]) -> Plant:
    """The recipe `addition` packs other passages."""
    return replacing(addition, "pack", lambda right: lambda rows, table, *, steps: right(
        [[change(p) for p in row] for row in rows], table, steps=steps))  # fmt: skip


def reader_stretched(right: Callable[..., Batch]) -> Callable[..., Batch]:
    """The writer's positions are as they are decoded."""

    def pack(rows: Sequence[Sequence[Passage]], table: BlockTable, **how: Any) -> Batch:
        plain = [[dataclasses.replace(p, position_scale=1.0) for p in row] for row in rows]
        positions = right(plain, table, **how).writer_positions
        return dataclasses.replace(right(rows, table, **how), writer_positions=positions)

    return pack


def reader_moved(right: Callable[..., Batch]) -> Callable[..., Batch]:
    def pack(*args: Any, **how: Any) -> Batch:
        places = (batch := right(*args, **how)).reader_places
        return dataclasses.replace(batch, reader_places=places + (places >= 0))

    return pack


def writer_places_moved(batch: Callable[..., Batch]) -> Callable[..., Batch]:
    return lambda self: dataclasses.replace(right := batch(self), writer_places=right.writer_places + 1)


def cut_learns_prompts(cut: Callable[..., Passage]) -> Callable[..., Passage]:
    return lambda self, *rest: dataclasses.replace(cut(self, *rest), supervise_from=1)


def second_of_equal_blocks(write: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of two blocks that are written alike, the second is told something else, in a training pass."""

    def bugged(self: TidalTransformer, ids: Tensor, places: Tensor, suffixes: Tensor, recalled: Tensor,
               context_bsd: Tensor, *rest: Any) -> Tensor:  # fmt: skip
        told, bob = context_bsd.clone(), self.config.n_writable
        for row, units in enumerate(ids.tolist()):
            starts, met = [s for s, unit in enumerate(units) if unit == bob], set[tuple[int, ...]]()
            for start, end in pairwise([*starts, len(units)]):
                if (block := tuple(units[start:end])) in met:
                    told[row, start:end] += 0.1
                met.add(block)
        return write(self, ids, places, suffixes, recalled, told, *rest)

    return bugged


def rounded_positions(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As an operator that autocast gives bfloat16."""

    def bugged(self: View, q: Tensor, *rest: Tensor) -> Tensor:
        if torch.is_autocast_enabled(q.device.type):
            self = dataclasses.replace(self, q_position=self.q_position.bfloat16().float(),
                                       k_position=self.k_position.bfloat16().float())  # fmt: skip
        return attend(self, q, *rest)

    return bugged


OF_TRAINING: tuple[OfTraining, ...] = (
    OfTraining("sums are learnt with their prompts", 11,
               passages(lambda p: dataclasses.replace(p, supervise_from=1)), sums),
    OfTraining("the answers of strays have the places of others", 11,
               passages(lambda p: dataclasses.replace(p, n_stray=max(0, p.n_stray - 2))), sums),
    OfTraining("places are moved by one more for the reader", 11, replacing(addition, "pack", reader_moved), sums),
    OfTraining("distances are stretched for the reader only", 11,
               replacing(addition, "pack", reader_stretched), sums),
    OfTraining("rows learn prompts, where the shards do not", 11,
               replacing(TextRecipe, "cut", cut_learns_prompts), pairs),
    OfTraining("workers hand batches over with other places", 11, replacing(Flat, "batch", writer_places_moved), pairs),
    OfTraining("positions are rounded by autocast", 13, replacing(View, "attend", rounded_positions), in_bf16),
)  # fmt: skip
