"""What a request asks for reaches the steps, for checks 6 and 15: settings, limits, stop strings, seeds."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tidal.doctor.patient import Patient, by_heart
from tidal.doctor.report import Meter, Where
from tidal.doctor.tape import stand_in
from tidal.doctor.texts import BUILT_IN
from tidal.infer.engine import generate

UNITS = 8
HOT = 1e6
"""A temperature at which one unit is as likely as another."""
NARROWED: tuple[dict[str, float], ...] = ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0})
"""Each leaves the likeliest unit only."""


def settings_reach(patient: Patient, meter: Meter) -> None:
    """Each sampler's setting, given to `generate`, has the effect that it must have."""
    rng, config, prompt = np.random.default_rng(0), patient.model.config, BUILT_IN[0].prompt
    likely = torch.from_numpy(rng.permutation(config.n_head) / config.n_head)
    likely[patient.tokenizer.eob_id], likely[patient.tokenizer.eos_id] = 2.0, -1.0  # what is greedy has many blocks

    def head(states: Tensor) -> Tensor:
        logits = likely.to(states).repeat(len(states), 1)
        logits[:, config.n_writable :] = -torch.inf
        return logits

    write = partial(generate, stand_in(patient.exact, head=head), patient.tokenizer, [prompt] * 2, max_new_units=UNITS)
    greedy = [one.unit_names for one in write()]
    for how in NARROWED:
        written = [one.unit_names for one in write(**{"temperature": HOT, **how})]  # type: ignore[arg-type]
        said = ", ".join(f"{name} {value:g}" for name, value in how.items())
        meter.same(f"units under {said}", greedy, written, Where(prompt), ("greedy", said))
    hot = [one.unit_names for one in write(temperature=HOT)]
    meter.holds(hot != greedy, f"what is sampled at temperature {HOT:g} is what is greedy", Where(prompt))
    _repeats_are_penalized(patient, meter)
    _limits_hold(patient, meter)


def _repeats_are_penalized(patient: Patient, meter: Meter) -> None:
    """Of a model that writes a block twice, by a little: a penalty makes the second another one."""
    blocks = [block for document in BUILT_IN for block in patient.tokenizer.split(document.text)]
    if not (long := [block for block in blocks if len(patient.oracle.spell(block)) > 1]):
        return  # a block of one unit has none after the first, which is free
    script, here = patient.oracle.script([long[0]] * 2, False), Where(block=long[0])
    for penalty in (1.0, HOT):
        done = generate(by_heart(patient.exact, script, 1.0, 0.0), patient.tokenizer, [""],
                        repetition_penalty=penalty, max_new_units=len(script))[0]  # fmt: skip
        meter.holds((done.blocks == [long[0]] * 2) == (penalty == 1.0),
                    f"repetition penalty {penalty:g}: {done.blocks} was written", here)  # fmt: skip


def _limits_hold(patient: Patient, meter: Meter) -> None:
    """A text that is known by heart ends where it is asked to."""
    document = BUILT_IN[-1]
    blocks = patient.tokenizer.split(document.completion)
    script, n_first = patient.oracle.script(blocks, True), len(patient.oracle.script(blocks[:1], False))
    end = len(document.completion) // 2
    stop = document.completion[end:]
    write = partial(patient.forced, patient.exact, document, script)
    for what, wanted, got in (
        ("stop string", document.completion[: document.completion.index(stop)], write(stop=[stop, "\0"])),
        ("limit of blocks", blocks[0], write(max_new_blocks=1)),
        ("limit of units", blocks[0], write(max_new_units=n_first + 1)),
        ("end", document.completion, write()),
    ):
        meter.same(f"text before its {what}", wanted, got.completion, Where(document.text), ("asked for", "written"))


def seeds_reach(patient: Patient, meter: Meter) -> None:
    """A prompt that is given twice is continued in two ways, where one unit is as likely as another, and with another
    seed in a third; with the same seed in the same.
    """

    def head(states: Tensor) -> Tensor:
        logits = torch.zeros(len(states), patient.model.config.n_head, dtype=states.dtype)
        logits[:, patient.tokenizer.eob_id] = math.log(logits.shape[1])  # half of the time, or nothing is kept
        return logits

    prompt, even = BUILT_IN[0].text, stand_in(patient.exact, head=head)
    write = partial(generate, even, patient.tokenizer, [prompt] * 2, temperature=1.0, max_new_units=16)
    (one, other), again, (third, _), (fourth, fifth) = (write(seed=seed) for seed in (1, 1, 2, [9, 9]))

    def told(what: str, right: bool) -> None:
        here = Where(prompt, tensor="completion", sides=("the first", ""), values=(repr(one.completion), ""))
        meter.holds(right, what, here)

    told("two samples of a prompt are the same", one.completion != other.completion or one.units < 2)
    told("samples with two seeds are the same", one.completion != third.completion or one.units < 2)
    told("the same seed gives other samples", [one.blocks, other.blocks] == [sample.blocks for sample in again])
    told("the same seed gives two prompts that are the same other samples", fourth.blocks == fifth.blocks)
