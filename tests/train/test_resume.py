"""A run that was stopped and continued equals the run that was left alone, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.runs import (
    EVERY,
    SETTINGS,
    STEPS,
    Hook,
    Hooked,
    nothing,
    refused,
    results,
    stop_at,
    stopped_and_continued,
    unequal,
    whole,
)
from tidal import checkpoint
from tidal.cli import UserError
from tidal.config import Text, Train
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.train import loop, resume
from tidal.train.loop import train
from tidal.train.optim import Optimizer
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.recipes.text import TextRecipe
from tidal.train.records import Metrics
from tidal.train.resume import Saved, check_unchanged, look_in, may_continue
from tidal.train.stop import Stop, Stopped

TWICE = dataclasses.replace(SETTINGS, optim=dataclasses.replace(SETTINGS.optim, accumulate=2))
Run = tuple[Path, dict[str, Any]]
"""The folder of a run, and its results."""


@pytest.fixture(autouse=True, scope="module")
def rows_often() -> Iterator[None]:
    with mock.patch.object(loop, "LOG_EVERY", 2):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was left alone, to be copied before it is changed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, whole(out)


# ------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize(("settings", "steps"), [(SETTINGS, range(STEPS)), (TWICE, (0, 4, 5))],
                         ids=["one batch", "accumulated"])  # fmt: skip
def test_from_every_step(settings: Train, steps: Sequence[int], undisturbed: Run, tmp_path: Path) -> None:
    wanted = undisturbed[1] if settings == SETTINGS else whole(tmp_path / "whole", settings)
    assert [row["step"] for row in wanted["metrics"]] == ["2", "3", "4", "6", "8", "9"]
    for step in steps:
        assert unequal(stopped_and_continued(tmp_path / str(step), "batch", step, settings), wanted) == [], step


@pytest.mark.parametrize("what", ["validate", "samples"])
def test_from_the_middle_of_an_examination(what: str, undisturbed: Run, tmp_path: Path) -> None:
    for step in range(EVERY - 1, STEPS, EVERY):
        assert unequal(stopped_and_continued(tmp_path / str(step), what, step), undisturbed[1]) == [], step


class Sea(TextRecipe):
    """Text; an epoch is a few batches."""

    def __init__(self, settings: Train, hook: Hook = nothing) -> None:
        super().__init__(settings)
        self.hook = hook

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        self.hook("batch", step)
        return super().batch(step, share)

    def sample_prompts(self, step: int) -> list[str]:
        return ["the"]


def test_in_the_middle_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    lines = [f"the sea comes in and goes out again on day {i} of the year, and so it goes on\n" for i in range(12)]
    (tmp_path / "sea.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text = Text(data=(str(tmp_path / "sea.jsonl"),), vocab_size=300, reader_budget=64)
    settings = dataclasses.replace(SETTINGS, recipe="text", text=text, rows=7, max_steps=8, validate_every=8)
    wanted = whole(tmp_path / "whole", settings, Sea)
    epoch = len(Sea(settings).rows) / settings.rows
    steps = sorted({0, round(epoch) - 1, round(epoch), round(2 * epoch) - 1})
    assert steps[-1] < settings.max_steps - 1  # an epoch and its end lie inside the run
    for step in steps:
        assert unequal(stopped_and_continued(tmp_path / str(step), "batch", step, settings, Sea), wanted) == [], step


@pytest.mark.parametrize("attention", ["memory", "block", "none"])
def test_every_shape_can_continue(attention: Any, tmp_path: Path) -> None:
    """Every parameter has its moments, or loading them would complain."""
    model = dataclasses.replace(SETTINGS.model, writer_attention=attention, suffix_rows=0, qk_norm=False)
    settings = dataclasses.replace(SETTINGS, model=model, max_steps=2,
                                   optim=dataclasses.replace(SETTINGS.optim, aux_weight=0.0))  # fmt: skip
    wanted = whole(tmp_path / "whole", settings)
    assert unequal(stopped_and_continued(tmp_path / "other", "batch", 0, settings), wanted) == []


def test_a_damaged_checkpoint_is_passed_over(undisturbed: Run, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = shutil.copytree(undisturbed[0], tmp_path / "run")
    last = out / "checkpoints" / checkpoint.name_of(STEPS)
    data = bytearray((last / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (last / "optimizer.safetensors").write_bytes(data)
    (out / "checkpoints" / "step-000007.tmp").mkdir()
    (out / ".latest.123.tmp").touch()
    with open(out / "samples.jsonl", "a") as file:
        file.write('{"step": 9, "torn')
    capsys.readouterr()
    found = look_in(out)
    said = capsys.readouterr().err
    assert found.folder.name == "step-000006"
    assert "step-000009 is damaged: optimizer.safetensors has SHA-256" in said
    assert "falling back to step-000006" in said
    train(SETTINGS, Hooked(), out, found=found)
    assert unequal(results(out), undisturbed[1]) == []
    assert not list(out.rglob("*.tmp"))
    assert "is damaged: optimizer" not in refused(look_in, tmp_path)


def test_no_memory_for_a_checkpoint_is_no_misfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "run", settings := dataclasses.replace(SETTINGS, max_steps=1))
    found = look_in(tmp_path / "run")
    text = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
    monkeypatch.setattr(Optimizer, "load_state", mock.Mock(side_effect=RuntimeError(text)))
    said = refused(train, settings, Hooked(settings), tmp_path / "run", found=found)
    assert said == f"out of memory ({text}) for the weights and moments of {found.folder}"


def test_from_an_earlier_checkpoint_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What comes after it is another future: it is never continued, and counts for nothing."""
    out, settings, stop = tmp_path / "run", dataclasses.replace(SETTINGS, keep=STEPS), Stop()
    wanted = whole(out, settings)
    found = look_in(out / "checkpoints" / checkpoint.name_of(3))
    with monkeypatch.context() as patch:  # nothing goes before the run can continue
        patch.setattr(loop, "check_space", mock.Mock(side_effect=UserError("not enough space")))
        assert refused(train, settings, Hooked(settings), out, found=found) == "not enough space"
    assert [folder.name for folder in checkpoint.checkpoints(out)] == [checkpoint.name_of(n) for n in (3, 6, 9)]
    capsys.readouterr()
    with pytest.raises(Stopped):
        train(settings, Hooked(settings, stop_at(stop, "batch", 4)), out, stop=stop, found=found)
    assert look_in(out).folder.name == checkpoint.name_of(5)
    assert "what was written later goes: step-000006, step-000009\n" in capsys.readouterr().err
    train(settings, Hooked(settings), out, found=look_in(out))
    assert [folder.name for folder in checkpoint.checkpoints(out)] == [checkpoint.name_of(n) for n in (3, 5, 6, 9)]
    assert unequal(results(out), wanted) == []


def test_more_steps_before_the_rate_falls(tmp_path: Path) -> None:
    short, long = (dataclasses.replace(SETTINGS, max_steps=steps, keep=99) for steps in (8, 12))
    wanted, out, stop = whole(tmp_path / "whole", long), tmp_path / "run", Stop()
    out.mkdir()
    with pytest.raises(Stopped):
        train(short, Hooked(short, stop_at(stop, "batch", 2)), out, stop=stop)
    shutil.copytree(out, tmp_path / "finished")
    found = look_in(out)
    assert may_continue(found, long, path_given=False)
    assert not may_continue(found, long, path_given=False, named=False)  # it was begun beside another one, for 8 steps
    train(long, Hooked(long), out, found=found)
    assert unequal(results(out), wanted) == []

    train(short, Hooked(short), out := tmp_path / "finished", found=look_in(tmp_path / "finished"))
    said = "--max-steps 8 (now 12), which only checkpoints up to step 5 can go on with"
    assert said in refused(may_continue, look_in(out), long, path_given=True)
    assert not may_continue(look_in(out), long, path_given=False)  # a new run begins beside it
    found = look_in(out / "checkpoints" / checkpoint.name_of(3))
    assert may_continue(found, long, path_given=True)
    train(long, Hooked(long), out, found=found)
    assert unequal(results(out), wanted) == []


def test_the_best_checkpoint_is_remembered(tmp_path: Path) -> None:
    out, qualities = tmp_path / "run", iter([0.9, 0.2, 0.1])
    out.mkdir()

    class Falling(Hooked):
        def validate(self, model: TidalTransformer) -> dict[str, float]:
            return {"quality": next(qualities)}

    train(dataclasses.replace(SETTINGS, keep=1), Falling(), out)
    assert (out / "best").read_text() == "step-000003\n"
    (out / "best").write_text("step-000009\n")  # of a future that is undone
    qualities = iter([0.1])
    train(SETTINGS, Falling(), out, found=look_in(out))
    assert (out / "best").read_text() == "step-000003\n"
    shutil.rmtree(out / "checkpoints" / "step-000003")
    qualities = iter([0.1])
    train(SETTINGS, Falling(), out, found=look_in(out))
    assert (out / "best").read_text() == "step-000009\n"


# -------------------------------------------------------------------------------------------- planted bugs


def forgets_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Optimizer, "load_state", lambda self, entries: None)


def changing(name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = Saved.from_dict.__func__  # type: ignore[attr-defined]

        def from_dict(cls: type[Saved], values: dict[str, Any]) -> Saved:
            saved: Saved = real(cls, values)
            setattr(saved, name, change(getattr(saved, name)))
            return saved

        patch.setattr(Saved, "from_dict", classmethod(from_dict))

    return plant


def one_step_further(patch: pytest.MonkeyPatch) -> None:
    real = resume.Found.read

    def read(self: resume.Found, *arguments: Any) -> Any:
        weights, moments, saved = real(self, *arguments)
        return weights, moments, dataclasses.replace(saved, step=saved.step + 1)

    patch.setattr(resume.Found, "read", read)


def keeps_later_samples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "keep_lines", lambda path, keep: None)


def keeps_later_rows(patch: pytest.MonkeyPatch) -> None:
    class Keeping(Metrics):
        def __init__(self, path: Path, rows: Any = ()) -> None:
            super().__init__(path, [*rows, *rows[-1:]])

    patch.setattr(loop, "Metrics", Keeping)


def counts_its_batches(patch: pytest.MonkeyPatch) -> None:
    """The order of the data depends on how many batches this process has made."""
    counts = dict[int, int]()

    def batch(self: Hooked, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        counts[id(self)] = counts.get(id(self), -1) + 1
        self.hook("batch", step)
        return super(Hooked, self).batch(counts[id(self)], share)

    patch.setattr(Hooked, "batch", batch)


class Noisy(Hooked):
    """A batch draws from torch's generator, whose state is that of the process and not of the run."""

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        self.hook("batch", step)
        return AdditionRecipe.batch(self, int(torch.randint(1000, ())), share)


BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "moments not restored": (forgets_moments, "batch", "weights"),
    "one step too far": (one_step_further, "batch", "weights"),
    "samples twice": (keeps_later_samples, "batch after samples", "samples"),
    "a row twice": (keeps_later_rows, "batch", "metrics"),
    "rows forgotten": (changing("metrics", lambda rows: []), "batch", "metrics"),
    "validation left out": (changing("due", lambda row: None), "validate", "metrics"),
    "data in the order of the process": (counts_its_batches, "batch", "weights"),
}


def continued(what: str, undisturbed: Path, out: Path) -> dict[str, Any]:
    """The results of a run that was stopped, or of one that has lost its last checkpoint since."""
    if what != "batch after samples":
        return stopped_and_continued(out, what, 5 if what == "validate" else 4)
    shutil.copytree(undisturbed, out)
    shutil.rmtree(checkpoint.checkpoints(out)[-1])
    train(SETTINGS, Hooked(), out, found=look_in(out))
    return results(out)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(bug: str, undisturbed: Run, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plant, what, part = BUGS[bug]
    run, wanted = undisturbed
    plant(monkeypatch)
    assert part in unequal(continued(what, run, tmp_path / "stopped"), wanted)


def test_without_a_bug_they_agree(undisturbed: Run, tmp_path: Path) -> None:
    """After samples; the others are above."""
    run, wanted = undisturbed
    assert unequal(continued("batch after samples", run, tmp_path / "stopped"), wanted) == []


def test_batches_that_draw_from_the_process_are_noticed(tmp_path: Path) -> None:
    wanted = whole(tmp_path / "whole", make=Noisy)
    assert unequal(whole(tmp_path / "again", make=Noisy), wanted) == []
    assert "weights" in unequal(stopped_and_continued(tmp_path / "stopped", "batch", 4, make=Noisy), wanted)


def test_a_run_that_has_gone_meanwhile(undisturbed: Run, tmp_path: Path) -> None:
    found = look_in(undisturbed[0])
    assert "it holds no checkpoint now" in refused(check_unchanged, tmp_path, found)


def test_latest_goes_back_at_once(undisturbed: Run, tmp_path: Path) -> None:
    """What it names must not be what is undone."""
    out = shutil.copytree(undisturbed[0], tmp_path / "run")
    run = loop.Run(SETTINGS, Hooked(), out, Stop())
    run.open(found := look_in(checkpoint.checkpoints(out)[0]))
    run.close()
    assert (out / "latest").read_text() == f"{found.folder.name}\n" != "step-000009\n"
