"""Checks 9, 11, 12 and 15: what the model is fed, and that neither mates nor padding change anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tidal.blocks import BOS_BLOCK, NOTHING, BlockTable, Passage, windows
from tidal.boundary_dropout import cut_at_random
from tidal.doctor.batches import in_any_batch, trimmed
from tidal.doctor.feeding import compare_batch, features, fed_in, written_blocks
from tidal.doctor.oracle import Layout, place_encodings
from tidal.doctor.patient import Document, Patient
from tidal.doctor.registry import DECODED, EXACT, ORACLE, TRAINED, check
from tidal.doctor.report import Meter, Where
from tidal.doctor.requests import seeds_reach
from tidal.doctor.tape import Tape
from tidal.prepare.corpus import Corpus, Rows
from tidal.prepare.reading import Part
from tidal.prepare.seams import at_seams
from tidal.prepare.shards import Shard
from tidal.streams import Batch, pack
from tidal.tokenizer import NO_PLACE

PIECE = 8
"""Characters of the pieces that a text is prepared in, where it may be cut so."""
PREPARED = "prepared"


def _compare(patient: Patient, meter: Meter, document: Document, layout: Layout, fed: dict[str, Tensor],
             side: str) -> None:  # fmt: skip
    for name, wanted in features(layout).items():
        if name in fed:
            at = patient.where_read if name.startswith("reader") else patient.where
            meter.same(name, wanted.flatten(), fed[name].flatten(), partial(at, document), (ORACLE, side),
                       max(1, wanted[:1].numel()))  # fmt: skip


@check(9, "coordinates are causal",
       "positions or places depend on the total or the padded length, which a decoder cannot know")
def coordinates(patient: Patient, meter: Meter) -> None:
    """Positions, places, suffixes, what is recalled and contexts are those of the definition: alone, padded, behind
    another document, with the future cut off, and in decoding; and the log-probabilities of a prefix do not depend on
    what follows it.
    """
    shape, table = patient.model.config.shape, patient.model.place_table.cpu()
    coarse = 4 * max(torch.finfo(table.dtype).eps, 1e-4)
    norm = 1.0 if shape.rotary_places else (8 / shape.d_model) ** 0.5
    wanted = torch.cat([norm * place_encodings(len(table) - 1, table.shape[1]), torch.zeros_like(table[:1])])
    meter.close("place encodings", wanted, table, coarse, Where(), (ORACLE, "model"))
    longest = max(patient.documents, key=lambda document: len(patient.layout(document).tokens))
    for document in patient.documents:
        layout, other = patient.layout(document), patient.layout(longest)
        count = len(layout.tokens), len(layout.steps)
        _compare(patient, meter, document, layout, fed_in(patient.pack([[document]]), 0, (0, 0), count), TRAINED)
        padded = patient.pack([[document], [longest, document]])
        _compare(patient, meter, document, layout, fed_in(padded, 0, (0, 0), count), "training, padded")
        behind = len(other.tokens), len(other.steps)
        _compare(patient, meter, document, layout, fed_in(padded, 1, behind, count),
                 "training, behind another document")  # fmt: skip
        tape = Tape(patient.exact)
        patient.decode(tape.model, [document])
        fed = tape.row()
        fed.pop("context", None)  # a state here, not an index
        _compare(patient, meter, document, layout, fed, DECODED)
        _prefixes(patient, meter, document)
        if shape.place_jitter:
            moved = pack([[patient.passage(document, shape.place_jitter)]], patient.table,
                         steps=shape.steps)  # fmt: skip
            for name, places in (("reader places", moved.reader_places), ("writer places", moved.writer_places)):
                back = torch.where(places[0] == NO_PLACE, NO_PLACE, places[0] - shape.place_jitter)
                meter.same(f"{name} less the offset", features(layout)[name], back, Where(document.text),
                           (ORACLE, TRAINED))  # fmt: skip


@torch.inference_mode()
def _prefixes(patient: Patient, meter: Meter, document: Document) -> None:
    """The document cut off after some of its blocks."""
    layout, table = patient.layout(document), patient.table
    first = layout.steps[0].block if layout.steps else len(layout.blocks)
    cuts = range(first, len(layout.blocks) - document.ends - 1, 4 if patient.quick else 1)
    for last in cuts:
        indices = table.indices(layout.blocks[1 : last + 1])
        batch = pack([[Passage(np.array([BOS_BLOCK, *indices], np.int32), first)]], table,
                     steps=patient.model.config.shape.steps)  # fmt: skip
        n_tokens = sum(token.block <= last for token in layout.tokens)
        n_steps = sum(step.block <= last for step in layout.steps)
        short = dataclasses.replace(layout, tokens=layout.tokens[:n_tokens], steps=layout.steps[:n_steps])
        fed = fed_in(batch, 0, (0, 0), (n_tokens, n_steps))
        _compare(patient, meter, document, short, fed, "training, cut off")
        meter.close("log-probabilities before another future", patient.packed(document)[:n_steps],
                    patient.exact.log_probs(batch), EXACT, partial(patient.where, document),
                    ("whole", "cut off"))  # fmt: skip


@check(11, "targets and supervision",
       "targets are shifted by one, the loss mask is off, supervision starts at the wrong place")
def supervision(patient: Patient, meter: Meter) -> None:
    """Targets spell the completion, block by block, and nothing else; so many units and bytes are counted.

    Also through windows and boundary dropout, and for the batch that training is about to feed.
    """
    tokenizer, table = patient.tokenizer, patient.table
    for document in patient.documents:
        layout, batch = patient.layout(document), patient.pack([[document]])
        here, sides = Where(document.text), (ORACLE, TRAINED)
        n = len(layout.steps)
        meter.same("supervised units", n, int((batch.targets >= 0).sum()), here, sides)
        meter.same("counted units", n, batch.n_units, here, sides)
        meter.same("counted bytes", len(document.completion.encode()), batch.n_bytes, here, sides)
        targets = [step.target for step in layout.steps]
        meter.same("targets", targets, batch.targets[0, :n], partial(patient.where, document), sides)
        asked = [NOTHING] * len(layout.tokens)
        for block, n_before in dict.fromkeys((step.block, step.n_memory) for step in layout.steps):
            read = [tokenizer.eos_id, *(token.id for token in layout.tokens if token.block == block)]
            asked[n_before - 1] = read[-1]
        meter.same("auxiliary targets", asked, batch.aux_targets[0],
                   partial(patient.where_read, document), sides)  # fmt: skip
        with torch.inference_mode():
            losses = patient.exact(batch)
            states, written = patient.exact.states(batch)
            logits = patient.exact.head(written[0, :n])[:, : tokenizer.n_writable]
        nats = -logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None]).sum() if n else torch.zeros(())
        meter.same("units in the loss", n, losses.n_units, here, sides)
        meter.close("losses", nats, losses.units, EXACT * max(1, n), here, sides)
        at = [i for i, token in enumerate(asked) if token != NOTHING]
        foretold = (states[0, at] @ patient.exact.token_embedding.weight.T).log_softmax(-1)
        nats = -foretold.gather(1, torch.tensor(asked)[at][:, None]).sum()
        meter.same("tokens in the auxiliary loss", len(at), losses.n_aux, here, sides)
        meter.close("auxiliary losses", nats, losses.aux, EXACT * max(1, len(at)), here, sides)

        whole = patient.passage(document)
        for reader_budget, writer_budget, overlap in ((9, 20, 0), (16, 1000, 6)):
            cut = windows(whole, table, reader_budget, writer_budget, overlap)
            _same_targets(patient, meter, document, cut, "windows")
        dropped = cut_at_random(whole, table, np.random.default_rng(1), 0.7)
        text = "".join(table.texts[i] for i in dropped.blocks)
        meter.same("text after boundary dropout", document.text, text, here, ("text", TRAINED))
        _cuts(patient, meter, document, whole)
    _through_shards(patient, meter)
    if patient.feed is not None:
        compare_batch(patient, meter, patient.feed)
    if patient.not_examined:
        meter.note(f"training batches not examined: {patient.not_examined}")


class _OneCut(np.random.Generator):
    """Boundary dropout's random numbers for a cut in the middle of one block."""

    def __init__(self, block: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.block = block

    def random(self, n: int) -> npt.NDArray[np.float64]:  # type: ignore[override]
        return np.where(np.arange(n) == self.block, 0.0, 1.0)

    def integers(self, low: int, high: int) -> int:  # type: ignore[override]
        return (low + high) // 2


def _cuts(patient: Patient, meter: Meter, document: Document, whole: Passage) -> None:
    """Around one cut at a time: what is before it is read as a prompt, and asked for only where it is as it was."""
    split, table = patient.tokenizer.split, patient.table
    prompt, completion = split(document.prompt), split(document.completion)
    here, sides = Where(document.text), ("text", TRAINED)
    for i, block in enumerate([*prompt, *completion]):
        if len(block) < 2 or (patient.quick and i % 3):
            continue
        cut = cut_at_random(whole, table, _OneCut(1 + i), 0.5)
        at = len("".join([*prompt, *completion][:i])) + (1 + len(block)) // 2
        in_prompt = i < len(prompt)
        of, start = (document.prompt, 0) if in_prompt else (document.completion, len(document.prompt))
        before, after = split(of[: at - start]), split(of[at - start :])
        read = [*before, *after, *completion] if in_prompt else [*prompt, *before, *after]
        same = [a == b for a, b in zip(before, completion, strict=False)]
        kept = completion[: [*same, False].index(False)]
        fed = [text for index in cut.blocks if (text := table.texts[index])]
        meter.same("blocks read around a cut", read, fed, here, sides)
        meter.same("blocks asked for around a cut", completion if in_prompt else [*kept, *after],
                   _written(patient, cut), here, sides)  # fmt: skip


def _through_shards(patient: Patient, meter: Meter) -> None:
    """The way of the recipe `text`: cut at seams, here into the smallest pieces, encoded as shards, read back in rows.

    What is written to the disk and what stays in memory go the same way.
    """
    documents = [Document(d.prompt, d.completion) for d in patient.documents if d.text.strip()]
    cap, shards, table = patient.tokenizer.max_block_units, [], BlockTable(patient.tokenizer)
    for part in at_seams((part for d in documents for part in _pieces(d)), cap, PIECE):
        shards.append(Shard.encode([part], table))
    corpus, order = Corpus(shards), np.arange(len(documents))
    texts = [(d.prompt, d.completion) for d in documents]
    meter.same("prepared texts", texts, list(corpus.texts()), Where(), ("text", PREPARED))
    for budgets in ((10**9, 10**9), (9, 20), (16, 1000)):
        rows = Rows(corpus, order, patient.table, *budgets)
        for i, document in enumerate(documents):
            here, cut = Where(document.text), list(rows.of_document(i))
            _same_targets(patient, meter, document, cut, PREPARED)
            if budgets[0] > 9**9:
                blocks = [patient.table.texts[j] for p in cut for j in p.blocks[1:]]
                meter.same("blocks of prepared text", list(patient.layout(document).blocks[1:]), blocks, here,
                           (ORACLE, PREPARED))  # fmt: skip


def _pieces(document: Document) -> Iterator[Part]:
    """As a file is read that is far too long."""
    for is_prompt, text in ((True, document.prompt), (False, document.completion)):
        starts = range(0, max(1, len(text)), PIECE)
        yield from (Part(text[n : n + PIECE], is_prompt, not is_prompt and n == starts[-1], "") for n in starts
                    if text or not is_prompt)  # fmt: skip


def _same_targets(patient: Patient, meter: Meter, document: Document, cut: Sequence[Passage], side: str) -> None:
    batches = [pack([[p]], patient.table) for p in cut]
    targets = [unit for batch in batches for unit in batch.targets[0].tolist()]
    meter.same("targets", [step.target for step in patient.layout(document).steps], targets,
               partial(patient.where, document), (ORACLE, side))  # fmt: skip
    for p in cut:
        meter.same("first blocks", BOS_BLOCK, int(p.blocks[0]), Where(document.text), (ORACLE, side))


def _written(patient: Patient, one: Passage) -> list[str]:
    """The blocks that the targets of a passage spell."""
    batch, tokenizer = pack([[one]], patient.table), patient.tokenizer
    targets = [batch.targets[0, first:last].tolist() for first, last in written_blocks(batch, 0, tokenizer)]
    return [tokenizer.decode(units[::-1]) for *units, end in targets if end == tokenizer.eob_id]


@check(12, "packed rows do not leak", "documents packed into one row see each other")
def packed_rows(patient: Patient, meter: Meter) -> None:
    """A document has the same log-probabilities alone and anywhere in a row of others."""
    documents = list(patient.documents)
    for row in (documents, documents[::-1]):
        got = patient.log_probs([row]).numpy()
        at = 0
        for document in row:
            alone = patient.packed(document)
            meter.close("log-probabilities", alone, got[at : at + len(alone)], EXACT,
                        partial(patient.where, document), ("alone", "in a row"))  # fmt: skip
            at += len(alone)


@check(15, "batch and padding do not matter", "the answer changes with batch mates or with padding")
def batch_and_padding(patient: Patient, meter: Meter) -> None:
    """Alone, in rows that are padded, whatever the padding holds; decoded side by side; generated in any batch,
    also where rows come and go.
    """
    documents = list(patient.documents)
    batch = patient.pack([[document] for document in documents])
    with torch.inference_mode():
        got = patient.exact.log_probs(batch)
        filled = patient.exact.log_probs(_fill_padding(patient, batch, documents))
    alone = np.concatenate([patient.packed(document) for document in documents])
    owners = [(document, i) for document in documents for i in range(len(patient.layout(document).steps))]

    def at(i: int) -> Where:
        return patient.where(*owners[i])

    meter.close("log-probabilities", alone, got, EXACT, at, ("alone", "in a padded batch"))
    meter.close("log-probabilities", got, filled, EXACT, at, ("padding as it is", "padding overwritten"))
    together = patient.decode(patient.exact, documents, capacity=3)
    for document, mine in zip(documents, together, strict=True):
        meter.close("log-probabilities in decoding", patient.decoded(document), mine, EXACT,
                    partial(patient.where, document), ("alone", "side by side"))  # fmt: skip
    trimmed(patient, meter)
    in_any_batch(patient, meter)
    seeds_reach(patient, meter)


def _fill_padding(patient: Patient, batch: Batch, documents: Sequence[Document]) -> Batch:
    """The batch with arbitrary ids, positions and places wherever the definition has no element."""
    config, generator = patient.model.config, torch.Generator().manual_seed(0)
    limits = {"reader_ids": config.vocab_size, "reader_places": config.n_places, "reader_positions": 99,
              "writer_ids": config.n_head, "writer_places": config.n_places, "writer_positions": 99}  # fmt: skip
    changed = {}
    for name, limit in limits.items():
        value = getattr(batch, name).clone()
        for row, document in enumerate(documents):
            layout = patient.layout(document)
            rest = value[row, len(layout.tokens if name.startswith("reader") else layout.steps) :]
            rest.copy_(torch.randint(limit, rest.shape, generator=generator))
        changed[name] = value
    return dataclasses.replace(batch, **changed)
