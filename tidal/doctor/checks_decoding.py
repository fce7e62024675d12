"""Checks 13 and 14: one pass, block by block and step by step are the same, and so is what is learnt of them."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tidal.blocks import BOS_BLOCK, EOS_BLOCK, Passage
from tidal.doctor.oracle import dense_block
from tidal.doctor.patient import UNWILLING, WILLING, Document, Patient, lively
from tidal.doctor.registry import (
    AUTOCAST,
    DECODED,
    EXACT,
    FLOAT32,
    MOVED,
    ORACLE,
    ROUGH,
    ROUNDINGS,
    SHAKY,
    TRAINED,
    check,
)
from tidal.doctor.report import Floats, Found, Meter, Where
from tidal.doctor.tape import FED, Tape
from tidal.doctor.texts import BUILT_IN, long_prompt
from tidal.infer.beam import Hypothesis
from tidal.infer.engine import Completion, generate
from tidal.infer.score import bits_per_byte, score, unit_log_probs
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.train.gradient import products_in

FAR = 1000
"""Tokens from the beginning of a document, where bfloat16 tells every fourth position apart."""


@check(13, "packed = block by block", "the packed training pass is not what reading block by block gives")
def packed_is_naive(patient: Patient, meter: Meter) -> None:
    """One packed pass against the model written a second time, densely, every block's context read from scratch; and
    the pass in the precision of training.
    """
    for document in patient.documents:
        layout = patient.layout(document)
        blocks = list(dict.fromkeys(step.block for step in layout.steps))
        if not blocks:
            continue
        with torch.inference_mode():
            naive = [dense_block(patient.exact, layout, block, patient.dtype) for block in blocks]
        try:
            meter.close("log-probabilities", patient.packed(document), torch.cat([part[0] for part in naive]), EXACT,
                        partial(patient.where, document), (TRAINED, ORACLE))  # fmt: skip
        except Found as found:
            seen = [part[1] for part in naive]  # the last block's has all that is read; each block's, its own steps
            states = {name: last if name.startswith("reader") else torch.cat([one[name] for one in seen])
                      for name, last in seen[-1].items()}  # fmt: skip
            found.where = _name_layer(found.where, patient, document, states, ORACLE)
            raise
    _gradients(patient, meter)
    if patient.dtype == torch.float32:
        _as_training_computes(patient, meter)


def _gradients(patient: Patient, meter: Meter) -> None:
    """What every weight learns of a document, from both losses, less what it learns of the definition's. Block by
    block, and nothing but the difference is kept: gradients of large models are large.
    """
    document, model = Document(BUILT_IN[-1].text, " the cat"), patient.exact  # what is recalled matters
    layout = patient.layout(document)

    def largest() -> dict[str, float]:
        """Of each weight that has a gradient, the entry furthest from zero."""
        return {name: float(w.grad.abs().max()) for name, w in model.named_parameters() if w.grad is not None}

    losses = model(patient.pack([[document]]))
    torch.autograd.backward(losses.units + losses.aux)
    limit = EXACT * max(1.0, *largest().values())
    for block in dict.fromkeys(step.block for step in layout.steps):
        log_probs, seen = dense_block(model, layout, block, patient.dtype)
        foretold = (seen["reader_norm"][-1] @ model.token_embedding.weight.T).log_softmax(-1)
        last = [patient.tokenizer.eos_id, *(token.id for token in layout.tokens if token.block == block)][-1]
        torch.autograd.backward(log_probs.sum() + foretold[last])
    left = largest()
    model.zero_grad()
    for name, difference in left.items():
        meter.close("gradients", np.zeros(1), np.array(difference), limit, Where(document.text, layer=name),
                    ("no difference", f"{TRAINED} less {ORACLE}"))  # fmt: skip


@torch.no_grad()
def _as_training_computes(patient: Patient, meter: Meter) -> None:
    """The packed pass with autocast as training has it, and without if that has none, against float64.

    In bfloat16 also with positions that begin at FAR. As all distances are the same, only positions that are rounded
    can make a difference; those of short texts are exact in bfloat16, too.
    """
    model, device, eps = patient.model, patient.model.device, torch.finfo(torch.bfloat16).eps

    def log_probs(batch: Batch) -> Floats:
        with products_in(patient.precision, device):
            return model.log_probs(batch.to(device)).double().cpu().numpy()

    def loss(batch: Batch) -> Tensor:
        with products_in(patient.precision, device):
            units: Tensor = model(batch.to(device)).units
            return units

    errors, moved = [np.zeros(1)], [np.zeros(1)]
    for document in patient.documents:
        batch, right = patient.pack([[document]]), patient.packed(document)
        got = log_probs(batch)
        meter.close("the loss", np.array(-got.sum()), loss(batch), FLOAT32 * max(1, len(got)), Where(document.text),
                    ("log-probabilities", TRAINED))  # fmt: skip
        if patient.precision == "float32":
            meter.close("log-probabilities in float32", right, got, _float32_limit(patient, document, right, got),
                        partial(patient.where, document), ("float64", TRAINED))  # fmt: skip
            continue
        far = dataclasses.replace(batch, reader_positions=batch.reader_positions + FAR,
                                  writer_positions=batch.writer_positions + FAR)  # fmt: skip
        errors.append(np.abs(got - right))
        moved.append(np.abs(got - log_probs(far)))
    meter.at_most("the training pass's mean error in bf16", float(np.concatenate(errors).mean()), AUTOCAST * eps)
    meter.at_most(f"what the training pass in bf16 changes if all positions are moved by {FAR}, on average,",
                  float(np.concatenate(moved).mean()), MOVED * eps)  # fmt: skip


@check(14, "cached decoding = training", "the cached decoder computes something else than the training pass")
def decoded_is_trained(patient: Patient, meter: Meter) -> None:
    """Log-probabilities of every unit of known text, in float64 and in the model's own dtype; and of what is generated,
    against those of one training pass. Largest difference, 95th percentile and mean.
    """
    differences, far = [], long_prompt(patient)
    for document in (*patient.documents, far):
        try:
            differences.append(meter.close("log-probabilities", patient.packed(document), patient.decoded(document),
                                           EXACT, partial(patient.where, document), (TRAINED, DECODED)))
        except Found as found:
            tape = Tape(patient.exact)
            patient.decode(tape.model, [document])
            found.where = _name_layer(found.where, patient, document, tape.row(), DECODED)
            raise
    meter.note("float64: " + _spread(np.concatenate(differences)))
    _public_scores(patient, meter)
    _generated(patient, meter)
    if patient.dtype != torch.float64:
        own, documents = [], patient.documents[: 2 if patient.quick else None]
        decoded = [one for some in (documents[:1], documents, [far]) for one in patient.decode(patient.model, some, 3)]
        for document, one in zip((documents[0], *documents, far), decoded, strict=True):
            packed, limit = _own_dtype(patient, document, one, meter)
            own.append(meter.close("log-probabilities", packed, one, limit,
                                   partial(patient.where, document), (TRAINED, DECODED)))
        meter.note(f"{str(patient.dtype).removeprefix('torch.')}: {_spread(np.concatenate(own))}, limit {limit:.2g}")


def _spread(differences: Floats) -> str:
    if not len(differences):
        return "nothing"
    largest, percentile, mean = differences.max(), np.percentile(differences, 95), differences.mean()
    return f"max {largest:.1e}, p95 {percentile:.1e}, mean {mean:.1e}"


@torch.inference_mode()
def _own_dtype(patient: Patient, document: Document, decoded: Floats, meter: Meter) -> tuple[Floats, float]:
    """The training pass in the model's own dtype, and how far what is `decoded` may be from it.

    float32: `_float32_limit`. Lower: the two round different sums, so they may differ by as much as both are wrong,
    judged by the error of the training pass against float64 (twice it), and by half a unit in the last place of a large
    logit. That error itself has a limit: a training pass that is wrong would excuse any decoding.
    """
    model: TidalTransformer = patient.model
    batch = patient.pack([[document]]).to(model.device)
    got = model.log_probs(batch).double().cpu().numpy()
    if patient.dtype == torch.float32:
        return got, _float32_limit(patient, document, got, decoded)
    errors, eps = np.abs(got - patient.packed(document)), torch.finfo(patient.dtype).eps
    if len(errors):
        meter.at_most("the training pass's mean error in its own dtype", float(errors.mean()), ROUGH * eps,
                      Where(document.text))  # fmt: skip
    return got, 2 * float(errors.max(initial=0.0)) + 16 * eps


def _float32_limit(patient: Patient, document: Document, left: Floats, right: Floats) -> float:
    """FLOAT32, and more for a model whose own rounding is larger. Bounded: one that is all rounding is a finding."""
    if left.shape != right.shape or not np.abs(left - right).max(initial=0.0) > FLOAT32:
        return FLOAT32
    return min(max(FLOAT32, ROUNDINGS * patient.rounding(document)), SHAKY * FLOAT32)


def _public_scores(patient: Patient, meter: Meter) -> None:
    """`tidal.score`, in the three ways it offers, and what `tidal.evaluate` and validation compute."""
    document = patient.documents[0]
    text, first = document.text, len(document.prompt)
    ways = [score(patient.exact, patient.tokenizer, text, how, supervise_from=first)
            for how in ("packed", "naive", "decode")]  # fmt: skip
    if document.ends:
        meter.close("scores", patient.packed(document), ways[0], EXACT, partial(patient.where, document),
                    (TRAINED, "score"))  # fmt: skip
    for name, way in zip(("naive", "decode"), ways[1:], strict=True):
        meter.close("scores", ways[0], way, EXACT, partial(patient.where, document), ("packed", name))
    passages = [patient.passage(d) for d in patient.documents]
    for d, units in zip(patient.documents, unit_log_probs(patient.exact, passages, patient.table), strict=True):
        meter.close("unit_log_probs", patient.packed(d), units, EXACT, partial(patient.where, d), (TRAINED, "score"))
    bits = -sum(float(patient.packed(d).sum()) for d in patient.documents) / math.log(2)
    n_bytes = sum(len(d.completion.encode()) for d in patient.documents)
    figure = bits_per_byte(patient.exact, [[p] for p in passages], patient.table, 2)[0]
    meter.close("bits per byte", np.array(bits / n_bytes), np.array(figure), EXACT, Where(), (TRAINED, "score"))


def _generated(patient: Patient, meter: Meter) -> None:
    """What is generated has the log-probabilities that a training pass over it gives."""
    prompts = [document.prompt for document in patient.documents][: 3 if patient.quick else None]
    for temperature, willing in ((0.0, UNWILLING), (1.0, WILLING)):
        model = lively(patient.exact, willing)
        done = generate(model, patient.tokenizer, prompts, temperature=temperature, seed=7,
                        max_new_units=16 if patient.quick else 48)  # fmt: skip
        for one in done:
            log_probs = trained_log_probs(model, patient, one)
            meter.same("generated text", one.completion, "".join(one.blocks), Where(one.text), ("text", "blocks"))
            meter.close("log-probabilities of generated text", log_probs, np.array(one.log_probs), EXACT,
                        Where(one.text), (TRAINED, "generation"))  # fmt: skip


@torch.inference_mode()
def trained_log_probs(model: TidalTransformer, patient: Patient, one: Completion | Hypothesis) -> Tensor:
    """One training pass over what was generated."""
    before = patient.tokenizer.split(one.prompt)
    indices = patient.table.indices([*before, *one.blocks])
    ends = [EOS_BLOCK] * (one.stop_reason == "eos")
    whole = Passage(np.array([BOS_BLOCK, *indices, *ends], np.int32), 1 + len(before))
    return model.log_probs(pack([[whole]], patient.table, steps=model.config.shape.steps))


@torch.inference_mode()
def _name_layer(where: Where, patient: Patient, document: Document, other: dict[str, Tensor], side: str) -> Where:
    """The first tensor of a training pass that differs from `other`, [L, …] by the names of a `Tape`: what is fed comes
    first, then layer by layer.
    """
    tape = Tape(patient.exact)
    tape.model.states(patient.pack([[document]]))
    trained = tape.row()
    for name in sorted((name for name in trained if name in other), key=lambda name: name not in FED):
        n_rows = min(len(trained[name]), len(other[name]))
        a, b = (row[name][:n_rows].double().unsqueeze(-1).flatten(1) for row in (trained, other))
        differs = ~((a - b).abs() <= EXACT * (1 + a.abs()))
        if bool(differs.any()):
            index, column = differs.nonzero()[0].tolist()
            place = (patient.where_read if name.startswith("reader") else patient.where)(document, index)
            layer, tensor = ("fed to the model", name) if name in FED else (name, f"state[{column}]")
            values = f"{a[index, column]:.9g}", f"{b[index, column]:.9g}"
            return dataclasses.replace(place, layer=layer, tensor=tensor, sides=(TRAINED, side), values=values)
    return where
