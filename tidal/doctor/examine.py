"""Put a model and its tokenizer through all checks: by themselves, of a checkpoint, or before training."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tidal.cli import UserError, note
from tidal.config import Train
from tidal.device import set_threads
from tidal.doctor import (
    checks_attention,
    checks_beams,
    checks_decoding,
    checks_head,
    checks_kernels,
    checks_run,
    checks_streams,
    checks_text,
    checks_weights,
)
from tidal.doctor.patient import Document, Feed, Patient, Precision
from tidal.doctor.recipes import feed_of, feed_of_run, precision_of_run
from tidal.doctor.registry import CHECKS, Check
from tidal.doctor.report import Found, Meter, Report, Result, Skip, Where
from tidal.doctor.texts import BUILT_IN, of_run, prompts, window
from tidal.infer.load import load_with_trainer
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer
from tidal.train.loop import Recipe, model_for
from tidal.train.memory import memory_for, out_of_memory

MODULES = (checks_text, checks_head, checks_attention, checks_streams, checks_decoding, checks_beams, checks_kernels,
           checks_weights, checks_run)  # fmt: skip
"""To be imported is all they need: each registers its checks."""
NARROW = 256
"""Models of less width are examined on one thread: where other programs run, two threads wait for each other (198 s in
place of 25 at width 128; where none does, 13.5 in place of 14.5)."""
SAMPLES = 48
"""To judge what a model writes. Of 24 sums, a healthy model knew 5% of the 3-grams of half, where 25% were right."""
CRASHES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError,
           UserError, ValueError, OSError)  # fmt: skip
"""What the package under examination may raise where it is broken; that is a finding, not the doctor's failure."""


def run(model: TidalTransformer, tokenizer: MixedTokenizer, *, texts: Iterable[str | Document] | None = None,
        quick: bool = False, checks: Iterable[int] | None = None, trained: bool = False,
        checkpoint: Path | None = None, feed: Feed | None = None, not_examined: str = "",
        precision: Precision = "float32", subject: str = "",
        tell: Callable[[Check], None] = lambda check: None) -> Report:  # fmt: skip
    """Examine a model; the same checks as `python -m tidal.doctor`.

    `texts` are the user's own (plain, or Documents with prompts); a built-in list is always added. `quick` takes fewer
    and shorter ones. `checks` are numbers, None: all. `trained`: judge also what the model has learnt (20 to 22), by
    `texts`; the weights of an untrained one are given some noise first, in a copy, where they are constant.
    `checkpoint` is the folder the model was loaded from. `feed` is what training feeds, or `not_examined` why that is
    not known, and `precision` that of its products. `tell` is called before each check. The model is left as it was.
    Raises ValueError for a check that does not exist, one string for `texts`, and on lone surrogates.
    """
    wanted = sorted(CHECKS if checks is None else set(checks))
    if unknown := [n for n in wanted if n not in CHECKS]:
        raise ValueError(f"there are no checks {unknown}; they are numbered {min(CHECKS)} to {max(CHECKS)}")
    if isinstance(texts, str):
        raise ValueError(f"texts is the string {texts[:60]!r}; give a list of strings")
    given = [text if isinstance(text, Document) else Document("", text) for text in texts or ()]
    was_training, generator, threads = model.training, torch.random.get_rng_state(), torch.get_num_threads()
    try:
        if model.config.shape.d_model < NARROW:
            torch.set_num_threads(1)
        with torch.inference_mode(False), torch.enable_grad():  # wherever it is called: gradients are examined, too
            patient = _patient(model, tokenizer, given, quick, trained, checkpoint)
            patient.feed, patient.not_examined, patient.precision = feed, not_examined, precision
            results = []
            for number in wanted:
                tell(CHECKS[number])
                results.append(_result(CHECKS[number], patient))
    finally:
        model.train(was_training)
        torch.random.set_rng_state(generator)
        torch.set_num_threads(threads)
    return Report(tuple(results), subject)


def examine_checkpoint(folder: Path, *, texts: Sequence[str | Document] = (), quick: bool = False,
                       checks: Iterable[int] | None = None, device: str | torch.device = "cpu",
                       dtype: torch.dtype | None = None,
                       tell: Callable[[str], None] = lambda line: None) -> Report:  # fmt: skip
    """Examine a checkpoint folder, and the run around it if there is one. `tell` is given lines about the progress.

    Without `texts`, those that the run was trained on are used, held-out ones where possible. A checkpoint that cannot
    be loaded is a finding of check 19. `dtype` is that of the weights in memory; none: as stored. Raises ValueError as
    `run` does.
    """
    tell(f"examining {folder}")
    try:
        model, tokenizer, trainer = load_with_trainer(folder, device=device, dtype=dtype)
    except UserError as error:
        check, here = CHECKS[19], Where(tensor=str(folder))
        result = Result(19, check.title, check.disaster, "finding", float("inf"), 0.0, 1, 0.0, str(error), here)
        return Report((result,), str(folder))
    set_threads(model.config.shape.d_model)
    source = "the texts given"
    if not texts:
        texts, source = of_run(trainer)
    tell(f"texts: {source or 'a built-in list'}")
    feed, not_examined = feed_of_run(trainer, folder, tokenizer)
    if not_examined:
        tell(f"what training feeds is not examined: {not_examined}")
    return run(model, tokenizer, texts=texts, quick=quick, checks=checks, trained=True, checkpoint=folder, feed=feed,
               not_examined=not_examined, precision=precision_of_run(trainer), subject=str(folder),
               tell=lambda check: tell(f"{check.number:>2} {check.title}"))  # fmt: skip


def examine_before_training(settings: Train, recipe: Recipe, source: Path | None = None) -> Report:
    """Quick checks on the model, tokenizer, data and first batch that these settings give, on the CPU.

    The model is made anew, or with the weights of the checkpoint `source`, and thrown away; the training that follows
    is the same, bit for bit, as without.

    Raises:
        UserError: a finding; the table is on stderr.
    """
    set_threads(settings.model.d_model, settings.threads)
    with memory_for("the doctor's models; try a smaller model, or --no-doctor"):
        report = run(model_for(settings, recipe.tokenizer, source), recipe.tokenizer, texts=recipe.sample_prompts(0),
                     quick=True, feed=feed_of(settings, recipe), precision=settings.precision,
                     subject="before training")  # fmt: skip
    if not report.ok:
        note(report.table())
        found = ", ".join(f"{result.number} ({result.check})" for result in report.findings)
        raise UserError(f"the doctor has findings, checks {found}; see docs/doctor.md, or train with --no-doctor")
    n_well = sum(result.verdict == "well" for result in report.results)
    note(f"doctor: {n_well} checks well, {report.seconds:.1f} s (--no-doctor leaves them out)")
    return report


def _patient(model: TidalTransformer, tokenizer: MixedTokenizer, given: Sequence[Document], quick: bool, trained: bool,
             checkpoint: Path | None) -> Patient:  # fmt: skip
    units = 40 if quick else 200
    documents = [window(tokenizer, document, units) for document in (*given[: 2 if quick else 8], *BUILT_IN)]
    if (cap := tokenizer.max_block_units) <= (64 if quick else 256):  # its last step: nothing but <eob> may follow
        documents.append(Document("-" * cap, "x" * cap + " y\n"))
    samples = prompts(tokenizer, given, SAMPLES, 60 if quick else 120) if trained else []
    return Patient(model, tokenizer, tuple(dict.fromkeys(documents)), samples, quick, trained, checkpoint)


def _result(check: Check, patient: Patient) -> Result:
    meter, began = Meter(), time.perf_counter()

    def result(verdict: str, message: str, measured: float, limit: float, where: Where | None = None) -> Result:
        return Result(check.number, check.title, check.disaster, verdict, measured, limit, meter.compared,  # type: ignore[arg-type]
                      time.perf_counter() - began, message, where)  # fmt: skip

    if check.of_output and not patient.trained:
        return result("skipped", "nothing has been learnt yet", 0, 0)
    try:
        check.run(patient, meter)
    except Skip as skip:
        return result("skipped", str(skip), 0, 0)
    except Found as found:
        return result("finding", found.message, found.measured, found.limit, found.where)
    except CRASHES as error:
        if out_of_memory(error):
            raise
        said = f"Tidal itself stopped: {type(error).__name__}: {error}"
        return result("finding", said, float("inf"), 0, Where(tensor=_origin(error)))
    if not meter.compared:
        return result("skipped", "there was nothing to compare", 0, 0)
    return result("well", "; ".join(meter.notes), meter.measured, meter.limit)


def _origin(error: BaseException) -> str:
    """The line of this package that raised."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "tidal" in frame.filename]
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}, in {lines[-1].name}" if lines else ""
