"""Continuing a run: which checkpoint, whether it may be, and the state it holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from tidal import checkpoint
from tidal.cli import UserError, flag_of, note
from tidal.config import TidalConfig, Train, flat
from tidal.train.disk import locked, numbered
from tidal.train.figures import last_step
from tidal.train.optim import learning_rate

HARMLESS = {
    "out": "where it lies",
    "resume": "how it came to be continued",
    "model_size": "a name; what it stands for is compared",
    "doctor": "looks before the first step only",
    "tensorboard": "looks on",
    "data": "what is in it is compared, not where it is",
    "validation_data": "likewise",
    "prepared": "likewise",
    "cache": "likewise",
    "hold_out": "where data go on in another form, see `may_continue`; it is in their digest, which is compared",
    "tokenizer": "likewise, by its fingerprint",
    "max_steps": "where no rate of the steps done would have been another, see `may_continue`",
    "max_seconds": "when it ends, not how it gets there",
    "validate_every": "validation leaves no trace in the weights",
    "keep": "what is kept, not what is learnt",
    "workers": "who builds a batch leaves no trace in it",
    "threads": "the same sums in another order: equal but for rounding",
    "device": "likewise",
    "parallel": "likewise, as the number of processes, which is no setting",
    "parts": "likewise",
    "compile": "likewise",
    "checkpoint_activations": "the same sums, done twice",
}
"""Settings that may change when a run is continued, and why. All others mean another run: the model, the data, their
order, the tokenizer's rules, the optimizer and its schedule."""

NEW = "start a new run with --resume never"


@dataclass
class Saved:
    """What a run is, besides weights and moments; goes into trainer.json."""

    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Of training, in all processes; what was lost after the last checkpoint is not in it."""
    parts: int = 1
    """In which a batch is computed, after running out of memory."""
    best: float | None = None
    """Highest quality so far, and the checkpoint that had it."""
    best_name: str | None = None
    due: dict[str, float] | None = None
    """The row of a step whose validation is still to come."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """All rows of metrics.csv."""

    def ended(self, settings: Train) -> bool:
        """Whether all steps are done, or the time is over."""
        late = 0 < settings.max_seconds <= self.seconds
        return self.step >= settings.max_steps or late

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`; other keys are ignored. Raises ValueError for a missing one or a wrong type."""
        kinds: dict[str, Any] = {"step": int, "seconds": float, "parts": int, "best": float | None,
                                 "best_name": str | None, "due": dict | None, "metrics": list}  # fmt: skip
        for name, kind in kinds.items():
            if name not in values:
                raise ValueError(f"it has no {name}; the version that wrote it could not resume")
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"{name} is {values[name]!r:.60}")
        saved = cls(**{name: values[name] for name in kinds})
        if saved.step < 1 or saved.parts < 1 or not 0 <= saved.seconds < math.inf:
            raise ValueError(f"step {saved.step}, parts {saved.parts}, seconds {saved.seconds}")
        numbers = [*(saved.due or {}).values(), *(row.get("step") if isinstance(row, dict) else None
                                                  for row in saved.metrics)]  # fmt: skip
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("its rows of metrics are none")
        return saved


@dataclass(frozen=True)
class Found:
    """A checkpoint to continue from: verified, and its trainer.json read."""

    folder: Path
    trainer: dict[str, Any]
    settings: Train
    saved: Saved
    newest: Path
    """The last checkpoint of the run, intact or not, when it was looked into."""

    @property
    def run_dir(self) -> Path:
        """The run it belongs to."""
        return self.folder.parent.parent

    def read(self, config: TidalConfig, digest: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Saved]:
        """Weights, moments and state. Raises UserError for another model, other data, or damage."""
        values, tensors, _ = checkpoint.read_checkpoint(self.folder)
        if values != json.loads(json.dumps(config.to_dict())):
            ours = {name: value for name, value in config.to_dict().items() if values.get(name) != value}
            raise UserError(f"{self.folder} is of another model: {', '.join(ours)} would differ; {NEW}")
        if self.trainer.get("data") != digest:
            raise UserError(f"the data hold other text than {self.run_dir} was trained on, or --validation-data, or "
                            "--hold-out and --seed (also of tidal.prepare) hold out another part of them; give the "
                            f"same, or {NEW}")  # fmt: skip
        moments = checkpoint.read_optimizer(self.folder)
        if moments is None:
            raise UserError(f"{self.folder} has no optimizer state, so training cannot continue from it; {NEW}")
        return tensors, moments, self.saved


def with_tokenizer(settings: Train, folder: Path | None) -> Train:
    """The settings to make the recipe with: the tokenizer of a run or checkpoint, if any, instead of training one."""
    if folder is None or settings.recipe != "text" or settings.text.tokenizer:
        return settings
    text = dataclasses.replace(settings.text, tokenizer=str(folder / "tokenizer"))
    return dataclasses.replace(settings, text=text)


def look_in(path: Path) -> Found:
    """The checkpoint `path`, or the newest intact one of the run `path` (or of the run whose `checkpoints` it is).

    A damaged one is passed over, with a note that names the damage, for the one before; not so where it is named
    itself. Raises UserError where there is none, or none that a run can be continued from.
    """
    inside = Path(os.path.abspath(path))
    named = inside if inside in checkpoint.checkpoints(inside.parent.parent) else None
    run_dir = path if named is None else inside.parent.parent
    if path.name == "checkpoints" and not checkpoint.checkpoints(path):
        run_dir = path.parent
    if not checkpoint.checkpoints(run_dir):
        raise UserError(f"nothing to resume: {path} has no checkpoints; give a run folder, or a checkpoint in one")
    with locked(run_dir):
        return _read(run_dir, named)


def _read(run_dir: Path, named: Path | None) -> Found:
    newest = checkpoint.checkpoints(run_dir)[-1]
    if named is not None:
        checkpoint.verify(folder := named)
    elif (folder := checkpoint.newest_verified(run_dir)) != newest:
        note(f"falling back to {folder.name}: {newest.name} is damaged")
    try:
        trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        if not isinstance(trainer, dict):
            raise ValueError("it is no object")
        saved, settings = Saved.from_dict(trainer), Train.from_dict(trainer.get("settings"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'trainer.json'} cannot be resumed from: {error}; {NEW}") from error
    if checkpoint.name_of(saved.step) != folder.name:
        raise UserError(f"{folder} holds step {saved.step}; give it its name back, or {NEW}")
    return Found(folder, trainer, settings, saved, newest)


def to_continue(settings: Train, out: Path) -> Found | None:
    """What `--resume auto` continues: the first of the runs NAME, NAME-2, … that may go on with these settings.

    None where there is none, so that a new one begins. Raises UserError where NAME itself cannot be looked into, or was
    begun with other settings; those beside it may be in use, or damaged.
    """
    for n, path in enumerate(itertools.takewhile(checkpoint.checkpoints, numbered(out))):
        try:
            if may_continue(found := look_in(path), settings, path_given=False, named=n == 0):
                return found
        except UserError:
            if n == 0:
                raise
    return None


def check_unchanged(out: Path, found: Found | None) -> None:
    """Raise UserError where another process has trained in the folder `out`, which is locked now, since `found` was
    looked for there: while data were prepared nothing was.
    """
    there = checkpoint.checkpoints(out)[-1:]
    if there != ([] if found is None else [found.newest]):
        now = there[0].name if there else "no checkpoint"
        raise UserError(f"{out} has changed while the data were prepared: it holds {now} now; the same command looks "
                        "again")  # fmt: skip


def may_continue(found: Found, settings: Train, path_given: bool, named: bool = True) -> bool:
    """Whether a run with these settings continues `found`; if not, another one does, or it begins anew, beside it.

    Only a finished run that nobody pointed to is passed over, and one that is called otherwise than was asked for.
    Else settings of another meaning raise UserError, which lists them; harmless ones are noted. `max_steps` is harmless
    as long as the rate, which is planned over it, has not fallen: the run is then the beginning of the longer one.
    """
    changed = differences(found.settings, settings)
    same_form = (found.settings.text.prepared is None) == (settings.text.prepared is None)
    meant = [text for name, text in changed.items() if name not in HARMLESS or (name == "hold_out" and same_form)]
    if "max_steps" in changed and ((fits := last_that_fits(found, settings.max_steps)) < found.saved.step or not named):
        meant.append(f"{changed['max_steps']}, which only checkpoints up to step {fits} can go on with")
    if meant and not path_given and (is_finished(found, found.settings) or not named):
        return False
    if meant:
        raise UserError(f"{found.run_dir} was begun with other settings: {', '.join(meant)}. Repeat them, continue "
                        f"with its own by --resume {found.run_dir}, or {NEW}")  # fmt: skip
    quiet = ("out", "resume", "data", "validation_data", "prepared", "cache", "hold_out", "tokenizer")
    shown = [text for name, text in changed.items() if name not in quiet]
    if shown:
        note(f"continuing with other settings: {', '.join(shown)}")
    return True


def last_that_fits(found: Found, max_steps: int) -> int:
    """The last step up to which all learning rates of `found` are those of a run of `max_steps` steps."""
    then, steps = found.settings, found.saved.step
    return next((step for step in range(steps) if learning_rate(step, then.max_steps, then.optim)
                 != learning_rate(step, max_steps, then.optim)), steps)  # fmt: skip


def is_finished(found: Found, settings: Train) -> bool:
    """Whether nothing is left to do: all steps, and the last validation with its samples."""
    step = found.saved.step if found.saved.due is not None else 0
    return found.saved.ended(settings) and step <= (last_step(found.run_dir / "metrics.csv") or 0)


def differences(then: Train, now: Train) -> dict[str, str]:
    """Settings that differ, by name, as `--rows 32 (now 64)`; those of another recipe do not count."""
    unused = {"addition", "characters", "text"} - {now.recipe}
    old, new = (flat(dataclasses.asdict(s), unused) for s in (then, now))
    return {name: f"{flag_of(name)} {old[name]} (now {new[name]})" for name in new if old[name] != new[name]}
