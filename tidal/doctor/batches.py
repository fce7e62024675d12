"""Rows that come and go, for check 15: a text must not depend on what else is written, or was, in the same caches."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from tidal.doctor.patient import UNWILLING, WILLING, Patient, lively
from tidal.doctor.registry import EXACT
from tidal.doctor.report import Meter, Where
from tidal.doctor.texts import BUILT_IN
from tidal.infer.completion import Completion, Limits
from tidal.infer.decoder import Decoder
from tidal.infer.engine import Engine, generate
from tidal.infer.sampling import Sampling
from tidal.model import TidalTransformer

ROWS, STEPS = 3, 5
"""Of an engine in which rows are added after so many steps, and taken over by others later."""
ROOM = 4
TOP_P = 0.5
"""Of every other request of that engine."""
MANY = 67
"""More rows than engines have if nobody asks."""


def in_any_batch(patient: Patient, meter: Meter) -> None:
    """What is generated alone, with all others, among many, and in an engine of fewer rows than requests, which do not
    come at once, nor ask for the same sampling.
    """
    prompts, units = [document.prompt for document in patient.documents], 16 if patient.quick else 40
    few = prompts[: 2 * ROWS if patient.quick else None]
    for temperature, willing in ((0.0, UNWILLING), (1.0, WILLING)):
        model = lively(patient.exact, willing)
        continued = partial(generate, model, patient.tokenizer, temperature=temperature, max_new_units=units)
        alone = [continued([prompt], seed=[i])[0] for i, prompt in enumerate(prompts)]
        mixed = [one if i % 2 else continued([one.prompt], seed=[i], top_p=TOP_P)[0]
                 for i, one in enumerate(alone[: len(few)])]  # fmt: skip
        in_turn, streamed = _come_and_go(model, patient, few, temperature, Limits(units))
        for one, blocks in zip(in_turn, streamed, strict=True):
            meter.same("streamed blocks", one.blocks, blocks, Where(one.prompt), ("completion", "streamed"))
        together = continued(prompts, seed=range(len(prompts)))
        drawn = np.random.default_rng(0).integers(0, len(prompts), MANY if temperature else 0).tolist()
        among_many = continued([prompts[i] for i in drawn], seed=drawn, batch_size=MANY)
        for side, those, others in (("in a batch", alone, together), ("in turn", mixed, in_turn),
                                    (f"among {MANY} rows", [alone[i] for i in drawn], among_many)):  # fmt: skip
            for one, other in zip(those, others, strict=True):
                here, sides = Where(one.prompt), ("alone", side)
                meter.same("generated blocks", one.blocks, other.blocks, here, sides)
                meter.close("log-probabilities", np.array(one.log_probs), np.array(other.log_probs), EXACT, here, sides)


def _come_and_go(model: TidalTransformer, patient: Patient, prompts: list[str], temperature: float,
                 limits: Limits) -> tuple[list[Completion], list[list[str]]]:  # fmt: skip
    """The first two are being written when the others come: one gets a new row, the rest the rows of finished ones.
    Returns the completions, and the blocks that were streamed before each.
    """
    engine = Engine(model, patient.tokenizer, batch_size=ROWS)
    events = []
    for i, prompt in enumerate(prompts):
        if i == ROWS - 1:
            for _ in range(STEPS):
                events += engine.step()
        engine.submit(prompt, Sampling(temperature, top_p=1.0 if i % 2 else TOP_P), limits, i)
    events += engine.drain()
    done = {number: event for number, event in events if isinstance(event, Completion)}
    streamed = [[event for number, event in events if number == i and isinstance(event, str)]
                for i in range(len(prompts))]  # fmt: skip
    return [done[i] for i in range(len(prompts))], streamed


@torch.inference_mode()
def trimmed(patient: Patient, meter: Meter) -> None:
    """A row goes on as it would have alone when the caches are made smaller, a long one beside it having ended."""
    tokenizer = patient.tokenizer
    short, *rest = [tokenizer.encode_block(block) for block in tokenizer.split(BUILT_IN[0].text)]
    long = rest * (1 + 4 * (len(short.tokens) + ROOM + 2))  # each block has a token at least
    rows = Decoder(patient.exact, tokenizer, 1, ROOM), Decoder(patient.exact, tokenizer, 2, ROOM)
    rows[0].read([0], [[short]])
    rows[1].read([0, 1], [[short], long])
    full = rows[1].capacity
    rows[1].clear([1])
    rows[1].trim()
    meter.holds(rows[1].capacity < full, f"caches of {full} tokens are not trimmed, where a row fills "
                f"{rows[1].builders[0].n_read} of them")  # fmt: skip
    for read in ([], [rest[0]]):
        for decoder in rows:
            decoder.read([0], [read])
        one, other = (decoder.step([0], [[]])[:, : tokenizer.n_writable] for decoder in rows)
        meter.close("logits when caches are trimmed", one, other, EXACT, Where(BUILT_IN[0].text), ("alone", "trimmed"))
