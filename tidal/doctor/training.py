"""What training asks of the doctor before its first step."""

from __future__ import annotations

from tidal.cli import UserError, note
from tidal.config import Train
from tidal.device import set_threads
from tidal.doctor.examine import run
from tidal.doctor.recipes import feed_of
from tidal.doctor.report import Report
from tidal.train.loop import Recipe, model_for
from tidal.train.memory import memory_for


def examine_before_training(settings: Train, recipe: Recipe) -> Report:
    """Quick checks on the model, tokenizer, data and first batch that these settings give, on the CPU.

    The model is made anew and thrown away; the training that follows is the same, bit for bit, as without.

    Raises:
        UserError: a finding; the table is on stderr.
    """
    set_threads(settings.model.d_model, settings.threads)
    with memory_for("the doctor's models; try a smaller model, or --no-doctor"):
        report = run(model_for(settings, recipe.tokenizer), recipe.tokenizer, texts=recipe.sample_prompts(0),
                     quick=True, feed=feed_of(settings, recipe), precision=settings.precision,
                     subject="before training")  # fmt: skip
    if not report.ok:
        note(report.table())
        found = ", ".join(f"{result.number} ({result.check})" for result in report.findings)
        raise UserError(f"the doctor has findings, checks {found}; see docs/doctor.md, or train with --no-doctor")
    n_well = sum(result.verdict == "well" for result in report.results)
    note(f"doctor: {n_well} checks well, {report.seconds:.1f} s (--no-doctor leaves them out)")
    return report
