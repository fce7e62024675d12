"""`--init-from`: a new run begins with the weights of another, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.commands import SMALL_TEXT
from tests.train.runs import SETTINGS, Hooked, refused, results, short_samples, stop_at, unequal, whole
from tidal import checkpoint, load
from tidal.tokenizer import MixedTokenizer
from tidal.train import loop
from tidal.train.__main__ import run
from tidal.train.health import Health
from tidal.train.loop import train
from tidal.train.resume import look_in
from tidal.train.stop import Stop, Stopped

LINES = "".join(f"The {name} sat on the mat and saw {n} rats.\n" for n, name in enumerate(["cat", "dog", "hen"] * 40))
ASKED = "".join(json.dumps({"prompt": f"What saw {n} rats?", "completion": f" The cat {n}."}) + "\n" for n in range(60))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on text, `base`, a run of sums, `sums`, and data."""
    home = tmp_path_factory.mktemp("fine-tuning")
    (home / "text.txt").write_text(LINES)
    (home / "asked.jsonl").write_text(ASKED)
    with pytest.MonkeyPatch.context() as patch, short_samples():
        patch.chdir(home)
        assert run([*SMALL_TEXT, "--data", "text.txt", "--out", "base", *BRIEF, "--lr", "0.003"]) == 0
    (home / "sums").mkdir()
    train(SETTINGS, Hooked(SETTINGS), home / "sums")
    return home


BRIEF = ("--max-steps", "4", "--validate-every", "2", "--device", "cpu", "--workers", "0")
TUNE = ("--init-from", "base", "--data", "asked.jsonl", "--no-doctor", *BRIEF)


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def best(path: Path) -> dict[str, torch.Tensor]:
    return load(path)[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in {**one, **other})


def test_it_begins_with_the_weights_and_has_tokenizer_shape_and_rates_of_the_run(
        here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    before = best(here / "base")
    with short_samples():
        assert run([*TUNE, "--lr", "0", "--out", str(tmp_path / "still")]) == 0  # weight decay is of the rate, too
        said = capsys.readouterr().err
        assert run([*TUNE, "--out", str(tmp_path / "tuned")]) == 0
    assert "training the tokenizer" not in said
    figures = re.findall(r"^step (\d+): held_out_bits_per_byte (.+)$", said, re.MULTILINE)
    assert [step for step, _ in figures] == ["0", "2", "4"]  # the first is said before training
    assert len({bits for _, bits in figures}) == 1
    assert same(best(tmp_path / "still"), before)
    assert not same(best(tmp_path / "tuned"), before)
    assert same(best(here / "base"), before)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "tuned", here / "base"))
    assert ours["optim"] == theirs["optim"]
    assert ours["rows"] == theirs["rows"]
    assert ours["model"] == theirs["model"]
    assert ours["text"]["reader_budget"] == 64
    assert ours["text"]["data"] == ["asked.jsonl"]
    prints = {MixedTokenizer.load(path / "tokenizer").fingerprint for path in (tmp_path / "tuned", here / "base")}
    assert len(prints) == 1


def test_the_doctor_examines_the_weights_that_training_begins_with(
        here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from tidal.doctor import examine

    seen = []

    def watched(model: torch.nn.Module, *arguments: object, **more: object) -> object:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        raise InterruptedError

    monkeypatch.setattr(examine, "run", watched)
    with pytest.raises(InterruptedError):
        run([*(flag for flag in TUNE if flag != "--no-doctor"), "--out", str(tmp_path / "run")])
    assert same(seen[0], best(here / "base"))


def test_a_run_that_is_stopped_goes_on_bit_for_bit_without_the_run_it_came_from(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "sums", base := tmp_path / "sums")
    settings, source = dataclasses.replace(SETTINGS, init_from=str(base), seed=1), checkpoint.resolve(base)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    train(settings, Hooked(settings), tmp_path / "whole", source=source)
    stop = Stop()
    with pytest.raises(Stopped):
        train(settings, Hooked(settings, stop_at(stop, "batch", 5)), tmp_path / "stopped", source=source, stop=stop)
    shutil.rmtree(base)
    train(settings, Hooked(settings), tmp_path / "stopped", found=look_in(tmp_path / "stopped"))
    assert not unequal(first := results(tmp_path / "whole"), results(tmp_path / "stopped"))
    assert "weights" in unequal(first, whole(tmp_path / "fresh", settings))


def test_which_checkpoint_is_asked_once(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is still trained may have another best one the next time."""
    shutil.copytree(here / "base", base := tmp_path / "base")
    first, last = checkpoint.checkpoints(base)
    checkpoint.set_pointer(base, "best", first.name)
    real = loop.model_for

    def slow(*arguments: Any) -> object:
        checkpoint.set_pointer(base, "best", last.name)
        return real(*arguments)

    monkeypatch.setattr(loop, "model_for", slow)
    with short_samples():
        assert run([*TUNE, "--init-from", str(base), "--lr", "0", "--out", str(tmp_path / "still")]) == 0
    assert same(best(tmp_path / "still"), best(first))
    assert not same(best(first), best(last))


def test_the_same_command_finds_the_run_again(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with short_samples():
        assert run([*TUNE, "--out", str(tmp_path / "run")]) == 0
        shutil.rmtree(checkpoint.checkpoints(tmp_path / "run")[-1])
        assert run([*TUNE, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "continuing at step 2 of 4" in said
    assert said.count("step 0: ") == 1
    assert run([*TUNE, "--init-from", "./base/", "--out", str(tmp_path / "run")]) == 0
    assert "run is finished: 4 steps" in capsys.readouterr().err
    said = refused(run, [*TUNE, "--init-from", str(checkpoint.checkpoints(here / "base")[-1]),
                         "--resume", str(tmp_path / "run")])  # fmt: skip
    assert "--init-from base (now " in said


@pytest.mark.parametrize(("flags", "said"), [
    (("--d-model", "32"), "does not fit: --d-model 32 (there 16)"),
    (("--no-qk-norm",), "does not fit: --qk-norm False (there True)"),
    (("--n-heads", "4"), "does not fit: --n-heads 4 (there 2)"),
    (("--rotary-places",), "does not fit: --rotary-places True (there False)"),
    (("--query-gain", "3"), "--query-gain does nothing with --init-from"),
    (("--writer-attention", "memory", "--reader-layers", "2"), "--reader-layers 2 (there 1)"),
    (("--init-from", "nowhere"), "goes on without it: --resume and its folder"),
    (("--init-from", ""), "--init-from is empty; give a run folder or a checkpoint in one"),
    (("--model-size", "mini"), "--model-size mini: the model of base has its size; leave --model-size out"),
    (("--vocab-size", "400"), "--vocab-size does nothing with --init-from"),
    (("--recipe", "addition"), "--recipe addition: base was trained by the recipe text"),
    (("--init-from", "sums"), "--data goes with --recipe text"),
    (("--tokenizer", "sums/tokenizer"), "does not fit: the model was trained with tokenizer"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(here: Path, flags: tuple[str, ...], said: str) -> None:
    out = here / "refused"
    told = refused(run, [*TUNE, *flags, "--out", str(out)])
    assert said in told
    assert "\n" not in told
    assert not out.exists()


def test_a_longer_block_is_another_tokenizer(here: Path) -> None:
    said = refused(run, ["--init-from", "sums", "--max-block-units", "9", "--no-doctor", *BRIEF])
    assert "--max-block-units does nothing with --init-from" in said


def test_a_recipe_that_this_version_does_not_have(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "base", base := tmp_path / "base")
    for folder in checkpoint.checkpoints(base):
        (file := folder / "trainer.json").write_text(file.read_text().replace('"recipe": "text"', '"recipe": "poems"'))
    said = refused(run, [*TUNE, "--init-from", str(base), "--out", str(tmp_path / "run")])
    assert re.search(r"--init-from: .*trainer\.json cannot be read: KeyError\('poems'\)$", said)


def test_no_memory_for_the_weights(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
    monkeypatch.setattr(loop, "model_for", mock.Mock(side_effect=RuntimeError(text)))
    said = refused(run, [*TUNE, "--out", str(tmp_path / "run")])
    assert said == f"out of memory ({text}) for the weights; try a smaller model"
    assert not (tmp_path / "run").exists()


def test_it_is_said_where_what_is_held_out_may_have_been_learnt(
        here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "new.txt").write_text("Two hens.\n" * 9)
    for number, (more, learnt) in enumerate([
        (("--data", "text.txt"), False),  # what is held out is the same
        (("--data", str(tmp_path / "new.txt")), False),
        (("--data", "text.txt", "--hold-out", "0.1"), True),
        (("--data", "text.txt", str(tmp_path / "new.txt")), True),
        (("--data", str(tmp_path / "new.txt"), "--validation-data", "text.txt"), True),
        (("--data", "text.txt", "--validation-data", str(tmp_path / "new.txt")), False),
        (("--data", "text.txt", "--hold-out", "0.1", "--init-from", str(tmp_path / "1")), True),  # from base itself
    ]):  # fmt: skip
        with short_samples():
            run(["--init-from", "base", "--no-doctor", *BRIEF, "--max-steps", "1", "--out", str(tmp_path / f"{number}"),
                 *more])  # fmt: skip
        said = re.search(r"may have been learnt by .*/checkpoints/step-.*, which was trained on .*/text\.txt, too; "
                         r"figures on it are no held-out figures", capsys.readouterr().err)  # fmt: skip
        assert bool(said) == learnt, more


def test_a_rise_that_is_small_against_guessing_is_no_divergence_of_a_tuned_run() -> None:
    rows = [{"step": 10 * i, "loss": 1e-5 if i < 10 else 1e-3, "lr": 3e-3} for i in range(1, 40)]
    assert "diverging" in Health(400, 100, rows).alarms
    assert not Health(400, 100, rows, fine_tuned=True).alarms


def test_a_run_that_is_good_from_the_first_step_is_not_warned_of() -> None:
    rows = [{"step": 10 * i, "loss": 0.05, "lr": 1e-3} for i in range(1, 40)]
    assert {alarm.kind for alarm in Health(400, 100, rows).alarms.values()} == {"implausibly low", "flat"}
    assert not Health(400, 100, rows, fine_tuned=True).alarms
    risen = rows[:20] + [{**row, "loss": 3.0} for row in rows[20:]]
    assert {alarm.kind for alarm in Health(400, 100, risen, fine_tuned=True).alarms.values()} == {"diverging"}
