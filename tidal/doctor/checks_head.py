"""Checks 5 and 6: what can be written at all, and what cannot."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tidal.doctor.patient import Document, Patient, lively
from tidal.doctor.registry import EXACT, ORACLE, check
from tidal.doctor.report import Floats, Meter, Where
from tidal.doctor.requests import settings_reach
from tidal.doctor.tape import stand_in
from tidal.doctor.texts import BUILT_IN, HOSTILE
from tidal.infer.beam import beam_search
from tidal.infer.completion import Limits, Request
from tidal.infer.engine import generate
from tidal.infer.grammar import Grammar
from tidal.infer.sampling import Sampling, choose
from tidal.model import TidalTransformer

SHORT_CAP = 16
"""Units of a block, up to which quick checks write beyond it."""
SAMPLERS = (Sampling(), Sampling(temperature=1.0), Sampling(temperature=100.0), Sampling(temperature=1.0, top_k=40),
            Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=1.0, min_p=0.1))  # fmt: skip
SETTINGS = (Sampling(temperature=0.8), Sampling(temperature=0.8, repetition_penalty=1.5),
            Sampling(temperature=1.5, top_k=40, min_p=0.02), Sampling(temperature=1.5, top_p=0.8),
            Sampling(temperature=1.5, top_k=60, top_p=0.9, min_p=0.01))  # fmt: skip
"""Whose choices are counted, of DRAWS each."""
DRAWS = 1000


@check(5, "the head fits the alphabet", "the head is wider than the vocabulary: ids that decode to junk")
def head_fits(patient: Patient, meter: Meter) -> None:
    """Sizes of head, config and tokenizer agree; columns that pad the head have no influence, whatever they hold."""
    model, tokenizer, config = patient.model, patient.tokenizer, patient.model.config
    for name in ("vocab_size", "n_writable", "n_head", "max_block_units"):
        meter.same(name, getattr(config, name), getattr(tokenizer, name), Where(), ("config", "tokenizer"))
    sizes = {"columns of the head": (config.n_head, model.unit_embedding.weight.shape[0]),
             "rows of the token table": (config.vocab_size, model.token_embedding.weight.shape[0]),
             "entries of the head's mask": (config.n_head, model.head_mask.shape[0]),
             "places, and none": (config.n_places + 1, model.place_table.shape[0])}  # fmt: skip
    for name, (wanted, got) in sizes.items():
        meter.same(name, wanted, got, Where(), ("config", "model"))
    writable = torch.arange(config.n_head) < config.n_writable
    states = torch.randn(4, config.shape.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    finite = patient.exact.head(states).isfinite().detach()
    meter.same("columns that can be chosen", writable.expand(4, -1).flatten(), finite.flatten(),
               lambda i: Where(layer="head", step=i % config.n_head), (ORACLE, "model"))  # fmt: skip

    loud = copy.deepcopy(patient.exact)
    with torch.no_grad():  # <bob> is a column as well, but it is also read
        loud.unit_embedding.weight[config.n_writable + 1 :] = 100 * states[0]
    sides = "as it is", "padding overwritten"
    for document in patient.documents[: 1 if patient.quick else 3]:
        batch, here = patient.pack([[document]]), Where(document.text)
        with torch.inference_mode():
            meter.close("losses", patient.exact(batch).units, loud(batch).units, EXACT, here, sides)
            meter.close("log-probabilities", patient.exact.log_probs(batch), loud.log_probs(batch), EXACT,
                        partial(patient.where, document), sides)  # fmt: skip
        _same_output(patient, meter, loud, document)
    _preferred(patient, meter, torch.arange(config.n_head) >= config.n_writable)


def _same_output(patient: Patient, meter: Meter, other: TidalTransformer, document: Document) -> None:
    """Greedy, sampled and found by beams."""
    here, sides, units = Where(document.prompt), ("as it is", "padding overwritten"), 6
    models = lively(patient.exact), lively(other)
    for temperature in (0.0, 1.0):
        one, two = (generate(m, patient.tokenizer, [document.prompt], temperature=temperature, max_new_units=units)[0]
                    for m in models)  # fmt: skip
        meter.same("generated text", one.blocks, two.blocks, here, sides)
        meter.close("log-probabilities", np.array(one.log_probs), np.array(two.log_probs), EXACT, here, sides)
    for cached in (True, False):
        one_beam, two_beam = (
            beam_search(m, patient.tokenizer, [document.prompt], num_beams=3, max_new_units=units, cached=cached)[0]
            for m in models
        )
        meter.same("text found by beams", [h.blocks for h in one_beam], [h.blocks for h in two_beam], here, sides)
        meter.close("scores of beams", np.array([h.score for h in one_beam]), np.array([h.score for h in two_beam]),
                    EXACT, here, sides)  # fmt: skip


@check(6, "masked is impossible", "masked logits are set to 0 instead of minus infinity")
def masked(patient: Patient, meter: Meter) -> None:
    """What may not be written has probability exactly 0, however strongly the model wants it: in every sampler, in
    generation and in beams; and what comes out is text that could have been trained on. What may be written is chosen
    as often as its probability says.
    """
    tokenizer, config = patient.tokenizer, patient.model.config
    grammar = Grammar(tokenizer)
    first_byte = next(u for u in range(2, 258) if tokenizer.id_bytes[u][0] == 0x94)  # the end of a character
    full = [tokenizer.n_writable - 1] * tokenizer.max_block_units
    for written in ([], full[:1], [first_byte], full):
        allowed = grammar.allowed(written)
        meter.same("columns of the mask", config.n_head, len(allowed), Where(), ("config", "grammar"))
        meter.same("padding allowed", False, bool(allowed[tokenizer.n_writable :].any()), Where(), (ORACLE, "grammar"))
        meter.same("<eob> allowed", bool(written) and written != [first_byte], bool(allowed[tokenizer.eob_id]), Where(),
                   (ORACLE, "grammar"))  # fmt: skip
        meter.same("<eos> allowed", not written, bool(allowed[tokenizer.eos_id]), Where(), (ORACLE, "grammar"))
        meter.same("more than <eob> allowed", written != full, int(allowed.sum()) > 1, Where(), (ORACLE, "grammar"))
        logits = torch.where(allowed, -50.0, 50.0).double()
        for how in SAMPLERS:
            for seed in range(3):
                unit = int(choose(logits[None].clone(), allowed[None], [how], [np.random.default_rng(seed)])[0])
                meter.holds(bool(allowed[unit]), f"a forbidden unit, {tokenizer.piece_name(unit)}, was chosen by {how}",
                            Where(tensor="unit", values=(str(unit), ""), sides=("chosen", "")))  # fmt: skip
    _distributed(patient, meter)
    _repeated(patient, meter)
    settings_reach(patient, meter)
    _writable(patient, meter, grammar)
    for seed in range(8 if patient.quick else 24):
        _walk(patient, meter, grammar, np.random.default_rng(seed))
    index = torch.arange(config.n_head)
    if not patient.quick or tokenizer.max_block_units <= SHORT_CAP:
        _preferred(patient, meter, index >= 258, tokenizer.max_block_units + 2)
    _preferred(patient, meter, index < 2)
    _preferred(patient, meter, (index >= 2) & (index < 258))


def _distributed(patient: Patient, meter: Meter) -> None:
    """Numbers at equal distances, in place of random ones, choose each unit as often as its probability says."""
    rng, n = np.random.default_rng(0), patient.model.config.n_head
    logits, allowed = 2 * rng.standard_normal(n), np.arange(n) < patient.tokenizer.n_writable
    allowed &= rng.random(n) < 0.8
    repeated = np.flatnonzero(allowed)[np.argsort(logits[allowed])[-4::2]]
    rows = [how for how in SETTINGS for _ in range(DRAWS)]
    draws = [cast(np.random.Generator, _Drawn((k + 0.5) / DRAWS)) for _ in SETTINGS for k in range(DRAWS)]
    units = choose(torch.from_numpy(logits).repeat(len(rows), 1), torch.from_numpy(allowed).repeat(len(rows), 1), rows,
                   draws, [set(repeated.tolist())] * len(rows))  # fmt: skip
    for how, chosen in zip(SETTINGS, units.view(-1, DRAWS).numpy(), strict=True):
        meter.close(f"units chosen by {how}", DRAWS * _probabilities(logits, allowed, repeated, how),
                    np.bincount(chosen, minlength=n).astype(float), 1.0,
                    lambda unit: Where(tensor=f"unit {unit}"), (ORACLE, f"of {DRAWS:,}"))  # fmt: skip


@dataclass(frozen=True)
class _Drawn:
    """In place of a generator."""

    number: float

    def random(self) -> float:
        return self.number


def _probabilities(logits: Floats, allowed: npt.NDArray[np.bool_], repeated: npt.NDArray[np.int64],
                   how: Sampling) -> Floats:  # fmt: skip
    """The definition: odds, penalized, tempered; then the units that min-p, top-k and top-p leave, one after the
    other.
    """
    odds = np.where(allowed, np.exp(logits), 0.0)
    odds[repeated] /= how.repetition_penalty
    odds **= 1 / how.temperature
    odds[odds < how.min_p * odds.max()] = 0
    order = np.argsort(-odds)
    if how.top_k:
        odds[order[how.top_k :]] = 0
    odds /= odds.sum()
    before = np.cumsum(odds[order]) - odds[order]
    odds[order[before >= how.top_p]] = 0
    left: Floats = odds / odds.sum()
    return left


def _repeated(patient: Patient, meter: Meter) -> None:
    """What the repetition penalty falls on: units that follow what is written in a block written before, but for the
    first ones. Of a request that writes each block of a text twice.
    """
    text = BUILT_IN[-1].text
    request = Request(0, "", [], Sampling(1.0, repetition_penalty=2.0), Limits(10**6), np.random.default_rng(0))
    before: list[list[int]] = []
    for block in 2 * patient.tokenizer.split(text):
        script = patient.oracle.script([block], False)
        for t, unit in enumerate(script):
            follow = {past[t] for past in before if 0 < t < len(past) and past[:t] == script[:t]}
            meter.same("units to penalize", sorted(follow), sorted(request.repeated()), Where(text, block, t),
                       (ORACLE, "request"))  # fmt: skip
            request.write(unit, 0.0, patient.tokenizer)
        before.append(script[:-1])


def _writable(patient: Patient, meter: Meter, grammar: Grammar) -> None:
    """Every block that the tokenizer makes of a text can be written, and ended."""
    for text in (*HOSTILE, *(document.text for document in patient.documents)):
        for block in patient.tokenizer.split(text):
            script = patient.oracle.script([block], False)
            for t, unit in enumerate(script):
                meter.holds(bool(grammar.allowed(script[:t])[unit]),
                            f"{patient.tokenizer.piece_name(unit)} may not be written, where text has it",
                            Where(text, block, t))  # fmt: skip


def _walk(patient: Patient, meter: Meter, grammar: Grammar, rng: np.random.Generator) -> None:
    """Whatever the grammar allows ends in a block that the tokenizer would spell in the same units."""
    tokenizer = patient.tokenizer
    written: list[int] = []
    while True:
        allowed = np.flatnonzero(grammar.allowed(written).numpy())
        meter.holds(len(allowed) > 0, f"nothing may follow {written}")
        unit = int(rng.choice(allowed))
        if unit < 2:
            break
        written.append(unit)
    if written:
        text = tokenizer.unreverse(written)
        meter.same("units", patient.oracle.spell(text)[::-1], written, Where(block=text), (ORACLE, "grammar"))
        meter.holds(len(written) <= tokenizer.max_block_units, f"a block of {len(written)} units", Where(block=text))


def _preferred(patient: Patient, meter: Meter, columns: Tensor, units: int = 10) -> None:
    """Generation and beams under a head that prefers these columns to all others still give text."""

    def head(states: Tensor) -> Tensor:
        return torch.where(columns, 50.0, -50.0).to(states) + states[..., :1].tanh()

    tokenizer, model, prompt = patient.tokenizer, stand_in(patient.exact, head=head), patient.documents[0].prompt
    for temperature in (0.0, 1.0):
        done = generate(model, tokenizer, [prompt], temperature=temperature, max_new_units=units)[0]
        _is_text(patient, meter, prompt, done.blocks)
    for cached in (False, True):  # caches have no slot behind the block cap
        for hypothesis in beam_search(model, tokenizer, [prompt], num_beams=2, max_new_units=units, cached=cached)[0]:
            _is_text(patient, meter, prompt, hypothesis.blocks)


def _is_text(patient: Patient, meter: Meter, prompt: str, blocks: list[str]) -> None:
    for block in blocks:
        n = len(patient.oracle.spell(block))
        meter.holds(0 < n <= patient.tokenizer.max_block_units, f"a block of {n} units was written",
                    Where(prompt, block))  # fmt: skip
