"""Checks 7, 8 and 10: what is seen in a training pass, and from how far."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from tidal.doctor.oracle import Layout, closed_form_slopes
from tidal.doctor.patient import Document, Patient
from tidal.doctor.registry import EXACT, ORACLE, TRAINED, check
from tidal.doctor.report import Meter, Where
from tidal.doctor.tape import attention_without_content
from tidal.streams import Batch


def _row(patient: Patient) -> tuple[list[Document], list[Layout]]:
    """Two short documents for one row."""

    def unfit(document: Document) -> tuple[bool, bool, int]:
        layout = patient.layout(document)
        return not layout.has_long_block, len(layout.steps) < 4, len(layout.steps)

    chosen = sorted(patient.documents, key=unfit)[:2][::-1]
    return chosen, [patient.layout(document) for document in chosen]


def _joined(parts: list[Tensor]) -> Tensor:
    joined: Tensor = torch.block_diag(*(part.float() for part in parts))  # type: ignore[no-untyped-call]
    return joined > 0


def _visibility(patient: Patient) -> dict[str, Tensor]:
    """bool [queries, keys] of every layer that attends, for the row of two documents."""
    _, layouts = _row(patient)
    reader = _joined([layout.reader_sees() for layout in layouts])
    own = _joined([layout.writer_sees() for layout in layouts])
    memory = _joined([layout.memory_sees() for layout in layouts])
    shape = patient.model.config.shape
    seen = {f"reader.{i}": reader for i in range(shape.reader_layers)}
    if shape.writer_attention != "none":
        seen |= {f"writer.{i}": own for i in range(shape.writer_layers)}
    if shape.writer_attention == "memory":
        seen["writer.0"] = torch.cat([memory, own], 1)
    return seen


def _distances(patient: Patient) -> dict[str, Tensor]:
    """float64 [queries, keys], as tabled in the definition; where nothing is seen they mean nothing."""
    _, layouts = _row(patient)
    reader = torch.tensor([token.position for layout in layouts for token in layout.tokens], dtype=torch.float64)
    writer = torch.tensor([step.position for layout in layouts for step in layout.steps], dtype=torch.float64)
    return {
        "reader": (reader[:, None] - reader[None, :]).abs(),
        "own": (writer[:, None] - writer[None, :]).abs(),
        "memory": (writer[:, None] - torch.cat([reader, writer])[None, :]).abs(),
    }


def _attention(patient: Patient) -> dict[str, Tensor]:
    if "_attention" not in patient.__dict__:
        patient.__dict__["_attention"] = attention_without_content(patient.exact, patient.pack([_row(patient)[0]]))
    found: dict[str, Tensor] = patient.__dict__["_attention"]
    return found


def _at(patient: Patient, layer: str, size: torch.Size, i: int) -> Where:
    """The place of the i-th of values [..., queries, keys] of this size, in the row of two documents."""
    query, key = i // size[-1] % size[-2], i % size[-1]
    documents, layouts = _row(patient)
    reads = layer.startswith("reader")
    for document, layout in zip(documents, layouts, strict=True):
        n = len(layout.tokens if reads else layout.steps)
        if query < n:
            return dataclasses.replace((patient.where_read if reads else patient.where)(document, query), layer=layer,
                                       tensor=f"attention to key {key}")  # fmt: skip
        query -= n
    return Where(layer=layer)


@check(7, "the future is hidden", "the mask leaks what is yet to be written")
def future_hidden(patient: Patient, meter: Meter) -> None:
    """No query gives any weight to a key it must not see, in any layer; and when all that is to come is overwritten,
    nothing before it changes, bit for bit.
    """
    for layer, seen in _visibility(patient).items():
        weight = _attention(patient)[layer].amax(0).masked_fill(seen, 0.0)
        meter.close("weights of hidden keys", torch.zeros_like(weight), weight, 0.0,
                    partial(_at, patient, layer, seen.shape), ("must be", TRAINED))  # fmt: skip
    for document in patient.documents:
        _overwrite(patient, meter, document)


@torch.inference_mode()
def _overwrite(patient: Patient, meter: Meter, document: Document) -> None:
    layout, model = patient.layout(document), patient.exact
    batch = patient.pack([[document]])
    reader, writer = model.states(batch)
    last = len(layout.blocks)
    for block in sorted({1, 2, last // 2, last - 1} if patient.quick else range(1, last)):
        n_tokens = sum(token.block < block for token in layout.tokens)
        n_steps = sum(step.block <= block for step in layout.steps)
        for middle in (n_steps, max(0, n_steps - 2)):  # all of the block written, and part of it
            changed = _scrambled(patient, batch, n_tokens, middle)
            new_reader, new_writer = model.states(changed)
            sides, width = ("as it is", "future overwritten"), model.config.shape.d_model
            meter.same("reader states", *_bits(reader[0, :n_tokens], new_reader[0, :n_tokens]),
                       partial(patient.where_read, document), sides, width)  # fmt: skip
            meter.same("writer states", *_bits(writer[0, :middle], new_writer[0, :middle]),
                       partial(patient.where, document), sides, width)  # fmt: skip


def _bits(left: Tensor, right: Tensor) -> tuple[object, object]:
    """The tensors if they differ in any bit, else two that are equal and quick to compare."""
    return (True, True) if torch.equal(left, right) else (left.flatten(), right.flatten())


def _scrambled(patient: Patient, batch: Batch, n_tokens: int, n_steps: int) -> Batch:
    """Other ids and places from these indices on."""
    config = patient.model.config

    def moved(values: Tensor, first: int, modulus: int) -> Tensor:
        values = values.clone()
        by = (1 + torch.arange(values.shape[1] - first) % 5).view(-1, *[1] * (values.ndim - 2))
        values[:, first:] = (values[:, first:] + by) % modulus
        return values

    return dataclasses.replace(
        batch,
        reader_ids=moved(batch.reader_ids, n_tokens, config.vocab_size),
        reader_places=moved(batch.reader_places, n_tokens, config.n_places),
        writer_ids=moved(batch.writer_ids, n_steps, config.n_writable),
        writer_places=moved(batch.writer_places, n_steps, config.n_places),
        suffixes=moved(batch.suffixes, n_steps, 1 << 32),
        recalled=moved(batch.recalled, n_steps, config.n_writable),
    )


@check(8, "the past is seen", "the mask hides what should be seen, or half of it: the other direction, the own block")
def past_seen(patient: Patient, meter: Meter) -> None:
    """Every query gives weight to every key it must see, in every layer and head; inside a block of the reader both
    ways.
    """
    for layer, seen in _visibility(patient).items():
        hidden = _attention(patient)[layer].amin(0) <= 0
        meter.same("keys that must be seen", seen.flatten(), (seen & ~hidden).flatten(),
                   partial(_at, patient, layer, seen.shape), ("must be", TRAINED))  # fmt: skip


@check(10, "ALiBi", "wrong sign, slope or offset, or distances that begin anew in every block")
def alibi(patient: Patient, meter: Meter) -> None:
    """With queries of zero, attention is softmax(−slope · distance) of the tabled distances and closed-form slopes."""
    shape, model = patient.model.config.shape, patient.exact
    slopes = closed_form_slopes(shape.n_heads, patient.dtype)
    for side in ("reader", "writer"):
        for i, layer in enumerate(getattr(model, side)):
            if layer.attends:
                meter.close("slopes", slopes, layer.slopes, EXACT, Where(layer=f"{side}.{i}"), (ORACLE, "model"))
    distances, seen = _distances(patient), _visibility(patient)
    for layer, weight in _attention(patient).items():
        memory = layer == "writer.0" and shape.writer_attention == "memory"
        distance = distances["reader" if layer.startswith("reader") else "memory" if memory else "own"]
        score = (-slopes[:, None, None] * distance).masked_fill(~seen[layer], -torch.inf)
        meter.close("attention", score.softmax(-1), weight, EXACT, partial(_at, patient, layer, weight.shape),
                    (ORACLE, TRAINED))  # fmt: skip
