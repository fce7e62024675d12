"""What the model is fed for a document: by the definition, and in the batches that a recipe makes (check 11)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from tidal.blocks import NOTHING
from tidal.doctor.oracle import Layout
from tidal.doctor.patient import Feed, Patient
from tidal.doctor.registry import ORACLE
from tidal.doctor.report import Meter, Where
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer

FED_BY_RECIPE = "training batch"
LAID_OUT = 600
"""Units of a batch that are laid out anew; what is recalled makes that slow."""
LAID_BLOCKS = 40
"""Of one document, at most so many that are learnt."""
ROUNDING = 1e-6
"""of positions, relative: they are stretched and stored in float32"""


def features(layout: Layout) -> dict[str, Tensor]:
    """What must be fed for a document that stands alone, by the names of a `Tape`."""
    tokens, steps = layout.tokens, layout.steps
    return {
        "reader ids": torch.tensor([token.id for token in tokens]),
        "reader positions": torch.tensor([token.position for token in tokens], dtype=torch.float32),
        "reader places": torch.tensor([token.place for token in tokens]),
        "writer ids": torch.tensor([step.id for step in steps]),
        "writer positions": torch.tensor([step.position for step in steps], dtype=torch.float32),
        "writer places": torch.tensor([step.place for step in steps]),
        "suffixes": torch.tensor([step.suffixes for step in steps]),
        "recalled": torch.tensor([step.recalled for step in steps]),
        "context": torch.tensor([step.n_memory - 1 for step in steps]),
    }


def fed_in(batch: Batch, row: int, first: tuple[int, int], count: tuple[int, int]) -> dict[str, Tensor]:
    """The same of a document in a batch: it begins at these reader and writer indices and has so many."""
    reader, writer = (slice(start, start + n) for start, n in zip(first, count, strict=True))
    return {
        "reader ids": batch.reader_ids[row, reader], "reader positions": batch.reader_positions[row, reader],
        "reader places": batch.reader_places[row, reader], "writer ids": batch.writer_ids[row, writer],
        "writer positions": batch.writer_positions[row, writer], "writer places": batch.writer_places[row, writer],
        "suffixes": batch.suffixes[row, writer], "recalled": batch.recalled[row, writer],
        "context": batch.context[row, writer] - first[0],
    }  # fmt: skip


def compare_batch(patient: Patient, meter: Meter, feed: Feed) -> None:
    """Of every document that a batch reads, the blocks that are asked for, and how it is laid out: as the definition
    says, but for one offset of all places and one scale of all positions.
    """
    batch, n_units, n_bytes, laid = feed.batch, 0, 0, 0
    for row in range(len(batch.targets)):
        for read in _documents_in(patient, meter, batch, row):
            _learnt_blocks(meter, feed, read)
            n_units += sum(end - start for start, end in read.steps)
            n_bytes += sum(len(read.blocks[j].encode()) for j in read.asked if j < len(read.blocks))
            if laid < LAID_OUT and read.asked:
                laid += _laid_out(patient, meter, feed, read)
    counts = int((batch.targets != NOTHING).sum()), n_bytes
    meter.same("units and bytes counted in the training batch", counts, (batch.n_units, batch.n_bytes), Where(),
               ("targets", "count"))  # fmt: skip
    meter.same("units asked for in the training batch", counts[0], n_units, Where(), ("targets", "documents"))


@dataclass
class _Read:
    """A document in a batch, as its reader sees it."""

    row: int
    start: int
    """where `<bos>` stands in the row"""
    blocks: list[str]
    """after `<bos>`"""
    begins: list[int]
    """where each begins in the row; and, last, where the document ends"""
    asked: list[int] = field(default_factory=list)
    """indices of the blocks that are learnt; len(blocks) is the end of the document"""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """from which writer index of the row to which they are written"""

    @property
    def text(self) -> str:
        return "".join(self.blocks)

    def where(self, index: int) -> Where:
        """The place of a block."""
        return Where(self.text, self.blocks[index] if index < len(self.blocks) else "<eos>")


def _documents_in(patient: Patient, meter: Meter, batch: Batch, row: int) -> list[_Read]:
    """The documents of a row, with what is asked of each: blocks, turned round, that are read right behind their
    context.
    """
    tokenizer, ids, ends = patient.tokenizer, batch.reader_ids[row].tolist(), batch.reader_sees[row, :, 1].tolist()
    n = sum(end > 0 for end in ends)
    starts = [i for i in range(n) if ids[i] == tokenizer.bos_id]
    meter.same("beginnings of the first document", 0, starts[0] if starts else -1, Where(), (ORACLE, FED_BY_RECIPE))
    found = []
    for start, end in pairwise([*starts, n]):
        begins = [*(i for i in range(start + 1, end) if ends[i] != ends[i - 1]), end]
        found.append(_Read(row, start, [tokenizer.decode(ids[a:b]) for a, b in pairwise(begins)], begins))
    for first, last in written_blocks(batch, row, tokenizer):
        behind = int(batch.context[row, first]) + 1
        read = found[sum(start < behind for start in starts) - 1]
        targets = batch.targets[row, first:last].tolist()
        ended = targets[-1] == tokenizer.eos_id
        index = read.begins.index(behind) if behind in read.begins else -1
        at = Where(read.text, tokenizer.decode(targets[:-1][::-1]), 0)
        meter.holds(index >= 0 and ended == (index == len(read.blocks)), "a block of the training batch is asked for "
                    "where none begins, or the end of a document where it does not end", at)  # fmt: skip
        meter.same("blocks of the training batch", "" if ended else read.blocks[index],
                   tokenizer.decode(targets[:-1][::-1]), at, ("read", "asked for"))  # fmt: skip
        read.asked.append(index)
        read.steps.append((first, last))
    for read in found:
        meter.same("order of the blocks that are asked for", sorted(set(read.asked)), read.asked, Where(read.text),
                   (ORACLE, FED_BY_RECIPE))  # fmt: skip
        asked = [NOTHING] * (read.begins[-1] - read.start)
        for index in read.asked:
            at_end = index == len(read.blocks)
            asked[read.begins[index] - 1 - read.start] = tokenizer.eos_id if at_end else ids[read.begins[index + 1] - 1]
        meter.same("auxiliary targets of the training batch", asked,
                   batch.aux_targets[row, read.start : read.begins[-1]], Where(read.text),
                   (ORACLE, FED_BY_RECIPE))  # fmt: skip
    return found


def written_blocks(batch: Batch, row: int, tokenizer: MixedTokenizer) -> Iterator[tuple[int, int]]:
    """From which writer index to which the blocks of a row are written, `<eob>` or `<eos>` included."""
    start = 0
    for s, target in enumerate(batch.targets[row].tolist()):
        if target in (tokenizer.eob_id, tokenizer.eos_id):
            yield start, s + 1
            start = s + 1


def _learnt_blocks(meter: Meter, feed: Feed, read: _Read) -> None:
    """Nothing of the prompt, and all behind it, but for the beginnings of blocks that are cut."""
    n_blocks, sides = len(read.blocks), (ORACLE, FED_BY_RECIPE)
    first = read.asked[0] if read.asked else n_blocks
    if (prompt := feed.prompt_of(read.text)) is not None:
        learnt = sum(map(len, read.blocks[:first]))
        right = learnt >= len(prompt) if feed.cuts else learnt == len(prompt)
        meter.holds(right, f"{learnt} characters of a document of the training batch are a prompt, not {len(prompt)}",
                    read.where(first))  # fmt: skip
    if not feed.cuts:
        end = 1 + max(read.asked, default=first)
        meter.same("blocks that are learnt", list(range(first, end)), read.asked, Where(read.text), sides)
    last = read.asked[-1] if read.asked else -1
    meter.holds(last >= n_blocks - 1, "the end of a document of the training batch is not learnt",
                read.where(n_blocks - 1))  # fmt: skip


def _laid_out(patient: Patient, meter: Meter, feed: Feed, read: _Read) -> int:
    """Compare a document, up to LAID_BLOCKS that are learnt, with the definition's layout of its blocks; returns the
    number of units.
    """
    batch, first, n = feed.batch, read.asked[0], len(read.blocks)
    end = min(n, first + LAID_BLOCKS)
    layout = patient.oracle.lay_out(read.blocks[:first], read.blocks[first:end], n in read.asked and end == n)
    asked = {1 + index for index in read.asked}
    layout = dataclasses.replace(layout, steps=tuple(step for step in layout.steps if step.block in asked))
    writer_start, tokens, steps = read.steps[0][0], layout.tokens, layout.steps
    got = fed_in(batch, read.row, (read.start, writer_start), (len(tokens), len(steps)))
    wanted = features(layout)

    def at(s: int) -> Where:
        return Where(read.text, layout.blocks[steps[s].block] or "<eos>", steps[s].t)

    def at_token(i: int) -> Where:
        return Where(read.text, layout.blocks[tokens[i].block] or "<bos>", i)

    here, sides = Where(read.text), (ORACLE, FED_BY_RECIPE)
    for name in ("reader ids", "writer ids", "context", "suffixes", "recalled"):
        meter.same(name, wanted[name].flatten(), got[name].flatten(), at_token if name == "reader ids" else at,
                   sides, max(1, wanted[name][:1].numel()))  # fmt: skip
    meter.same("targets", [step.target for step in steps],
               batch.targets[read.row, writer_start : writer_start + len(steps)], at, sides)  # fmt: skip
    _ranges(meter, batch, read, layout, sides)

    fed = torch.cat([got["reader positions"], got["writer positions"]]).double()
    right = torch.cat([wanted["reader positions"], wanted["writer positions"]]).double()
    last = int(right.argmax())
    scale = float(fed[last] / right[last]) if right[last] > 0 else 1.0
    meter.holds(1 - ROUNDING <= scale <= feed.stretch * (1 + ROUNDING),
                f"positions are multiplied by {scale:.6g}, not by 1 to {feed.stretch:.6g}", here)
    for name, where in (("reader positions", at_token), ("writer positions", at)):
        meter.close(f"{name} over their scale", wanted[name], got[name].double() / scale,
                    ROUNDING * max(1.0, float(right[last])), where, sides)  # fmt: skip
    _places(patient, meter, feed, read, layout, got)
    return len(steps)


def _ranges(meter: Meter, batch: Batch, read: _Read, layout: Layout, sides: tuple[str, str]) -> None:
    """What elements see, counted in the row."""
    here, start, first = Where(read.text), read.start, read.steps[0][0]
    n_tokens = {token.block: 1 + i for i, token in enumerate(layout.tokens)}
    reader = [[start, start + n_tokens[token.block]] for token in layout.tokens]
    memory = [[start, start + step.n_memory] for step in layout.steps]
    own = [[first + s - min(step.t, (layout.window or step.t + 1) - 1), first + s + 1]
           for s, step in enumerate(layout.steps)]  # fmt: skip
    for name, wanted, got in (("ranges of reader tokens", reader, batch.reader_sees[read.row, start:]),
                              ("ranges of the memory", memory, batch.sees_reader[read.row, first:]),
                              ("ranges of writer steps", own, batch.sees_writer[read.row, first:])):  # fmt: skip
        meter.same(name, wanted, got[: len(wanted)], here, sides)


def _places(patient: Patient, meter: Meter, feed: Feed, read: _Read, layout: Layout, got: dict[str, Tensor]) -> None:
    """One offset for all; of strays, which are whole lines in front, another one, which leads away from all others."""
    wanted, here, sides = features(layout), Where(read.text), (ORACLE, FED_BY_RECIPE)
    most = patient.model.config.shape.place_jitter
    own = int(got["writer places"][0] - wanted["writer places"][0])
    meter.same("writer places less the offset", wanted["writer places"], got["writer places"] - own, here, sides)
    placed = wanted["reader places"] >= 0
    meter.same("tokens without a place", ~placed, got["reader places"] < 0, here, sides)
    offsets = (got["reader places"] - wanted["reader places"])[placed].tolist()
    n_stray = max((i + 1 for i, offset in enumerate(offsets) if offset != own), default=0)
    far = offsets[0] if n_stray else own
    meter.same("reader places less the offset", [far] * n_stray + [own] * (len(offsets) - n_stray), offsets, here,
               sides)  # fmt: skip
    meter.holds(min(own, far) >= 0 and max(own, far) <= most,
                f"places are moved by {own} and {far}, not by 0 to {most}", here)  # fmt: skip
    if not n_stray:
        return
    meter.holds(feed.strays and n_stray < len(offsets),
                f"places of the reader are moved by {far}, those of the writer by {own}", here)  # fmt: skip
    blocks = [token.block for token, has_place in zip(layout.tokens, placed.tolist(), strict=True) if has_place]
    last, behind = blocks[n_stray - 1], blocks[n_stray]
    meter.holds("\n" in "".join(layout.blocks[last:behind]), "places are moved by another offset up to a block in the "
                "middle of a line", read.where(last - 1))  # fmt: skip
    places = got["reader places"][placed].tolist()
    shared = set(places[:n_stray]) & {*places[n_stray:], *got["writer places"].tolist()}
    meter.same("places of strays that others have, too", [], sorted(shared), here, sides)
