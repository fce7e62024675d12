"""Checks 20 to 22: what the model has learnt."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidal.doctor.patient import Document, Patient
from tidal.doctor.registry import check
from tidal.doctor.report import Meter, Skip, Where
from tidal.infer.completion import repeats
from tidal.infer.engine import Completion, generate
from tidal.train.figures import read_rows
from tidal.train.presets import GREEDY

# Limits of what the model does. They are wide: here a finding means "broken", not "could be better".
DEGENERATE = 0.5
"""share of completions that are empty, repeat or never end, among those whose true ones are not so"""
LEAST_DROP = 0.05
"""of the loss, from the first tenth of the steps to the last: less is flat"""
LEAST_DONE = 0.5
"""of the steps that were planned"""
LEAST_TEXTS = 4
"""to judge output by"""
LEAST_GAIN = 0.002
"""nats a unit that the true prompt must be worth against another document's"""
DRIFT = 3.0
"""ratio, either way, of the bits per byte of the model's samples and of held-out text; plus DRIFT_BITS"""
DRIFT_BITS = 0.5
OVERLAP = 0.5
"""of the n-grams that held-out text shares with other data, as many must samples share"""
N_GRAM = 3  # characters
STRETCH = 24
"""characters that two texts have in common only if one is taken from the other, or from the same place"""
RANDOM_UNITS = 400
OF_ANSWERS = 0.02
"""share of right answers by which a validation may differ when it is done again: some are close calls"""
OF_BITS = 0.01
"""the same, of bits per byte, relative where these are more than 1"""


def _samples(patient: Patient) -> list[Document]:
    """Documents with prompts to judge output by."""
    chosen = [document for document in patient.samples if document.completion]
    if len(chosen) < LEAST_TEXTS:
        raise Skip(f"needs {LEAST_TEXTS} texts of the kind it was trained on; give --data")
    return chosen


def _written(patient: Patient) -> list[Completion]:
    """Sampled from the model as it is, for the prompts of `_samples`; twice the room of the true completions."""
    if "_written" not in patient.__dict__:
        documents = _samples(patient)
        longest = max(len(patient.oracle.script(patient.tokenizer.split(d.completion), True)) for d in documents)
        patient.__dict__["_written"] = generate(
            patient.model, patient.tokenizer, [d.prompt for d in documents], temperature=1.0, seed=1,
            max_new_units=min(2 * longest + 8, 96 if patient.quick else 256))  # fmt: skip
    found: list[Completion] = patient.__dict__["_written"]
    return found


@check(20, "output has substance", "generation is empty, cut off at once, or one block for ever", of_output=True)
def substance(patient: Patient, meter: Meter) -> None:
    """Samples for the data's own prompts: the shares that are empty, that end at once, that repeat, that never end.

    Each is compared with the same share of the true completions, and not judged where most of these are such.
    """
    documents = _samples(patient)
    done = _written(patient)
    shares = {
        "empty": ([not c.completion.strip() for c in done], [not d.completion.strip() for d in patient.samples]),
        "ended at once": ([c.stop_reason == "eos" and not c.blocks for c in done],
                          [not d.completion for d in patient.samples]),
        "repeating": ([repeats(c.blocks) for c in done],
                      [repeats(patient.tokenizer.split(d.completion)) for d in documents]),
        "never ending": ([c.stop_reason == "length" for c in done], [not d.ends for d in documents]),
    }  # fmt: skip
    for name, (written, true) in shares.items():
        share, usual = float(np.mean(written)), float(np.mean(true))
        meter.note(f"{name} {share:.0%}" + f" (in the data {usual:.0%})" * (usual > 0))
        if usual <= DEGENERATE:
            bad = next((c for c, is_bad in zip(done, written, strict=True) if is_bad), done[0])
            meter.at_most(f"the share of {name} completions", share, usual + (1 - usual) * DEGENERATE,
                          _completion(bad))  # fmt: skip


def _completion(one: Completion) -> Where:
    return Where(one.prompt, tensor="completion", sides=("written", ""), values=(repr(one.completion[:60]), ""))


# ----------------------------------------------------------------------------------- what the loss fell for


@check(21, "the loss fell for a reason",
       "the loss fell by collapse, a leak or a proxy target, training was far too short, or other weights were saved",
       of_output=True)
def reasons(patient: Patient, meter: Meter) -> None:
    """metrics.csv: finite, falling, as many steps as planned; its validation comes out the same again. No text that is
    random is predicted better than chance (only a leak can do that). The prompt matters, where most prompts differ.
    """
    if patient.checkpoint is not None:
        _metrics(patient, meter, patient.checkpoint)
    _random_text(patient, meter)
    try:
        documents = _samples(patient)
    except Skip as skip:
        meter.note(f"what the prompt is worth {skip}")
        return
    if 2 * (n := len({d.prompt for d in documents})) <= len(documents):  # templates say nothing
        meter.note(f"what the prompt is worth is not judged: {len(documents)} texts have {n} different prompts")
        return
    swapped = [dataclasses.replace(d, prompt=documents[(i + 1) % len(documents)].prompt)
               for i, d in enumerate(documents)]  # fmt: skip
    own, other = (_nats_per_unit(patient, some) for some in (documents, swapped))
    gain = other - own
    meter.note(f"the true prompt is worth {gain:.3f} nats a unit")
    meter.holds(gain >= LEAST_GAIN, f"what the true prompt is worth is {gain:.4g}, less than {LEAST_GAIN:.4g}",
                Where(documents[0].prompt))  # fmt: skip


def _metrics(patient: Patient, meter: Meter, folder: Path) -> None:
    path = folder.resolve().parent.parent / "metrics.csv"
    if folder.resolve().parent.name != "checkpoints" or not path.is_file():  # a copy may lie beside other figures
        meter.note("no metrics.csv")
        return
    here = Where(tensor=str(path))
    try:
        rows = [{name: float(value) for name, value in row.items() if value != ""} for row in read_rows(path)]
        losses, steps = [row["loss"] for row in rows], [int(row["step"]) for row in rows]
        trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        settings = trainer.get("settings") or {}
        in_time = bool(rows) and 0 < settings.get("max_seconds", 0) <= rows[-1]["seconds"]  # ended as was asked for
        planned = 0 if in_time else int(settings.get("max_steps", 0))
    except (AttributeError, KeyError, OSError, ValueError, TypeError, csv.Error) as error:
        meter.holds(False, f"the run's figures cannot be read: {error!r}", here)
        return
    for step, row in zip(steps, rows, strict=True):
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        meter.holds(not bad, f"step {step}: {', '.join(bad)} not finite", here)
    meter.holds(bool(losses), "no step was logged", here)
    meter.holds(max(steps) >= LEAST_DONE * planned, f"{max(steps)} steps were done of {planned} planned", here)
    if len(losses) >= 10 and settings.get("init_from") is None:  # fine-tuning may begin near its end
        tenth = max(1, len(losses) // 10)
        first, last = np.median(losses[:tenth]), np.median(losses[-tenth:])
        meter.at_most("the last loss as a share of the first", float(last / first), 1 - LEAST_DROP, here)
    uniform = math.log(patient.model.config.n_writable)
    meter.at_most("the last loss as a share of guessing", float(np.median(losses[-3:]) / uniform), 0.9, here)
    _validated_again(patient, meter, trainer, rows, here)


def _validated_again(patient: Patient, meter: Meter, trainer: dict[str, Any], rows: Sequence[dict[str, float]],
                     here: Where) -> None:  # fmt: skip
    """What the run measured of the weights it had in memory, measured once more of those that it saved."""
    step, validate = trainer.get("step"), patient.feed.validate if patient.feed is not None else None
    then = next((row["quality"] for row in rows if row["step"] == step and "quality" in row), None)
    reasons = {"--quick": patient.quick, patient.not_examined or "of no run": validate is None,
               f"no figures of step {step}": then is None,
               "it is in float32": patient.dtype != torch.float32}  # fmt: skip
    if validate is None or then is None or any(reasons.values()):
        meter.note(f"validation was not done again: {next(why for why, so in reasons.items() if so)}")
        return
    now, greedy = validate(patient.model)["quality"], trainer["settings"].get("recipe") in GREEDY
    meter.note(f"quality {now:.4g} (in metrics.csv {then:.4g})")
    meter.at_most(f"how far the validation of step {step}, done again, is from what metrics.csv says", abs(now - then),
                  OF_ANSWERS if greedy else OF_BITS * max(1.0, abs(then)), here,
                  "other weights were saved than were trained, or the code is another one")  # fmt: skip


@torch.inference_mode()
def _random_text(patient: Patient, meter: Meter) -> None:
    """Units drawn uniformly from m cost log m nats each on average, under any model (Gibbs' inequality) that does not
    see them; the mean of n of them may be below by chance, by 4 standard errors at most.
    """
    if len(alphabet := sorted(c for c in patient.oracle.alphabet if c.isascii() and c.isdecimal())) < 2:
        meter.note("the alphabet has no digits, so random ones were not tried")
        return
    rng, per_block = np.random.default_rng(3), min(8, patient.tokenizer.max_block_units - 1)
    documents = []
    for _ in range(RANDOM_UNITS // per_block // 8):
        blocks = ["".join(rng.choice(alphabet, per_block)) for _ in range(8)]
        documents.append(Document("", " ".join(blocks), False))
    log_probs = patient.log_probs([[document] for document in documents]).numpy()
    targets = [step.target for document in documents for step in patient.layout(document).steps]
    digit = np.array([patient.oracle.is_digit(u) for u in targets])
    nats = -log_probs[digit]
    entropy, error = math.log(len(alphabet)), float(nats.std() / math.sqrt(len(nats)))
    meter.note(f"random digits cost {nats.mean():.2f} nats each, at least {entropy:.2f}")
    short = entropy - float(nats.mean())
    meter.at_most("by how many nats random digits are guessed better than chance", short, 4 * error + 0.05,
                  Where(documents[0].text))  # fmt: skip


@torch.inference_mode()
def _nats_per_unit(patient: Patient, documents: Sequence[Document]) -> float:
    return -float(patient.log_probs([[document] for document in documents]).mean())


# --------------------------------------------------------------------------------------------- free running


@check(22, "free running",
       "the training loss is fine; text that the model writes itself, or has never seen, is not", of_output=True)
def free_running(patient: Patient, meter: Meter) -> None:
    """The model's own samples cost about as many bits per byte, under the model, as held-out text, and share about as
    many n-grams with the data.
    """
    documents = _samples(patient)
    done = [c for c in _written(patient) if c.completion]
    meter.holds(bool(done), "nothing was written")
    samples = [Document(c.prompt, c.completion, c.stop_reason == "eos") for c in done]
    own, true = (_bits_per_byte(patient, some) for some in (samples, documents))
    meter.note(f"bits per byte: samples {own:.3g}, held out {true:.3g}")
    here = _completion(done[0])
    meter.at_most("bits per byte of samples, against held-out text,", own, DRIFT * true + DRIFT_BITS, here)
    meter.at_most("bits per byte of held-out text, against samples,", true, DRIFT * own + DRIFT_BITS, here,
                  "what was trained on is learnt by heart, or in training the targets leak")  # fmt: skip
    _compare_n_grams(documents, [c.completion for c in _written(patient)], meter, here)


def _compare_n_grams(documents: Sequence[Document], written: Sequence[str], meter: Meter, here: Where) -> None:
    """What was `written` for the prompts of documents has about as much in common with other documents as the true
    completions have.
    """
    half = len(documents) // 2
    reference = [d.text for d in documents[:half]]
    copied = _n_grams(reference, STRETCH).keys()
    pairs = list(zip(documents, written, strict=True))[half:]
    apart = [(d.completion, text) for d, text in pairs if text and not _n_grams([d.text], STRETCH).keys() & copied]
    if 2 * len(apart) < half:
        meter.note(f"{N_GRAM}-grams not compared: the texts overlap; give --data")
        return
    known = _n_grams(reference)
    of_true, of_written = (_share(_n_grams(texts), known) for texts in zip(*apart, strict=True))
    meter.note(f"{N_GRAM}-grams known: samples {of_written:.0%}, held out {of_true:.0%}")
    meter.at_most("the share of n-grams that held-out text has and samples lack", of_true - of_written,
                  (1 - OVERLAP) * of_true + 0.05, here)  # fmt: skip


def _bits_per_byte(patient: Patient, documents: Sequence[Document]) -> float:
    nats = -float(patient.log_probs([[document] for document in documents]).sum())
    return nats / math.log(2) / max(1, sum(len(d.completion.encode()) for d in documents))


def _n_grams(texts: Sequence[str], n: int = N_GRAM) -> Counter[str]:
    return Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))


def _share(some: Counter[str], known: Counter[str]) -> float:
    return sum(n for gram, n in some.items() if gram in known) / max(1, some.total())
