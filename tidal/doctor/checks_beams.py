"""Check 16: beams, and decoder rows that are moved and copied as these are."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from tidal.doctor.checks_decoding import trained_log_probs
from tidal.doctor.patient import UNWILLING, WILLING, Patient, by_heart, lively
from tidal.doctor.registry import EXACT, ORACLE, TRAINED, check
from tidal.doctor.report import Meter, Where
from tidal.infer.beam import beam_search
from tidal.infer.decoder import Decoder
from tidal.infer.engine import generate

KNOWN = 15.0
"""Logit of the unit that is right, all others having 0: a text is likelier than any that differs by one unit."""


@check(16, "beams", "beam search reads logits of the wrong shape, or its caches are not reordered")
def beams(patient: Patient, meter: Meter) -> None:
    """One beam is greedy decoding; cached and recomputed searches agree; a hypothesis has the log-probability that
    training gives its blocks; they are sorted, different, and the same alone and side by side.
    """
    _reordered(patient, meter)
    _by_heart(patient, meter)
    prompts = [document.prompt for document in patient.documents][: 2 if patient.quick else 4]
    tokenizer, units = patient.tokenizer, 14 if patient.quick else 24
    model = lively(patient.exact)
    greedy = generate(model, tokenizer, prompts, max_new_units=units)
    single = beam_search(model, tokenizer, prompts, num_beams=1, max_new_units=units)
    for one, found in zip(greedy, single, strict=True):
        meter.same("blocks", one.blocks, found[0].blocks, Where(one.prompt), ("greedy", "one beam"))
        meter.close("log-probabilities", np.array(one.log_prob), np.array(found[0].log_prob), EXACT, Where(one.prompt),
                    ("greedy", "one beam"))  # fmt: skip
    for num_beams, wanted, penalty, willing in ((2, 1, 0.5, WILLING), (4, 4, 1.0, UNWILLING)):
        model = lively(patient.exact, willing)  # a willing one's searches do not all end at once
        search = partial(beam_search, model, tokenizer, num_beams=num_beams, wanted=wanted, length_penalty=penalty,
                         max_new_units=units)  # fmt: skip
        cached, anew = search(prompts), search(prompts, cached=False)
        alone = [search([prompt])[0] for prompt in prompts]
        for prompt, mine, others in zip(prompts, cached, zip(anew, alone, strict=True), strict=True):
            here = Where(prompt)
            for other, side in zip(others, ("recomputed", "alone"), strict=True):
                meter.same("hypotheses", [h.blocks for h in other], [h.blocks for h in mine], here, (side, "cached"))
                meter.close("log-probabilities", np.array([h.log_prob for h in other]),
                            np.array([h.log_prob for h in mine]), EXACT, here, (side, "cached"))  # fmt: skip
            scores = [h.score for h in mine]
            meter.same("scores in order", sorted(scores, reverse=True), scores, here, ("sorted", "given"))
            meter.same("different hypotheses", len(mine), len({(*h.blocks, h.stop_reason) for h in mine}), here,
                       ("given", "different"))  # fmt: skip
            for hypothesis in mine:
                trained = trained_log_probs(model, patient, hypothesis).sum()
                meter.close("log-probabilities", trained, np.array(hypothesis.log_prob), EXACT, Where(hypothesis.text),
                            (TRAINED, "beam search"))  # fmt: skip


def _by_heart(patient: Patient, meter: Meter) -> None:
    """A text that a model knows is found, although `<eos>` is found before, and has the score of the definition."""
    document = next(d for d in patient.documents if d.ends and d.completion)
    script = [step.target for step in patient.layout(document).steps]
    for penalty in (0.0, 0.5, 2.0):
        model = by_heart(patient.exact, script, KNOWN, 0.0)
        best = beam_search(model, patient.tokenizer, [document.prompt], num_beams=2, wanted=1, length_penalty=penalty,
                           max_new_units=len(script))[0][0]  # fmt: skip
        here, sides = Where(document.text), (ORACLE, f"beam search, length penalty {penalty}")
        meter.same("text found by beams", document.completion, best.completion, here, sides)
        meter.close("scores of beams", np.array(best.log_prob / len(script) ** penalty), np.array(best.score), EXACT,
                    here, sides)  # fmt: skip


@torch.inference_mode()
def _reordered(patient: Patient, meter: Meter) -> None:
    """A row of a decoder that is moved or copied goes on as it would have where it was, inside a block and after it."""
    documents = [d for d in patient.documents if len(patient.tokenizer.split(d.completion)) > 1][:3]
    n = len(documents)
    blocks = [[patient.tokenizer.encode_block(b) for b in patient.tokenizer.split(d.completion)[:2]] for d in documents]
    written = [list(second.units[::-1][:2]) for _, second in blocks]

    def opened() -> Decoder:
        decoder = Decoder(patient.exact, patient.tokenizer, n)
        decoder.read(range(n), [[first] for first, _ in blocks])
        for t in range(2):
            rows = [i for i in range(n) if len(written[i]) >= t]
            decoder.step(rows, [written[i][:t] for i in rows])
        return decoder

    plain = opened()
    inside = plain.step(range(n), written)
    plain.read(range(n), [[second] for _, second in blocks])
    after = plain.step(range(n), [[]] * n)
    for order in ([*range(1, n), 0], [n - 1] * n, [0, *range(n - 1)]):
        moved, sides = opened(), ("where it was", "moved")
        moved.select(order)
        meter.close("logits inside a block", inside[order], moved.step(range(n), [written[i] for i in order]), EXACT,
                    Where(documents[order[0]].text), sides)  # fmt: skip
        moved.read(range(n), [[blocks[i][1]] for i in order])
        meter.close("logits after a block", after[order], moved.step(range(n), [[]] * n), EXACT,
                    Where(documents[order[0]].text), sides)  # fmt: skip
    parted = opened()
    parted.select([0] * n)
    parted.read(range(n), [[second] for _, second in blocks])
    for i in range(n):
        alone = Decoder(patient.exact, patient.tokenizer, 1)
        alone.read([0], [[blocks[0][0], blocks[i][1]]])
        for units in written:  # those of the block that another copy has read, too
            for t in range(len(units) + 1):
                one, other = alone.step([0], [units[:t]]), parted.step([i], [units[:t]])
                meter.close("logits of copies that go on in different blocks", one, other, EXACT,
                            Where(documents[0].text), ("alone", "copied"))  # fmt: skip
