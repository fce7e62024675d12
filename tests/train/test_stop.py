"""Signals: training saves and stops in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, SMALL
from tests.train.runs import SETTINGS, Hooked
from tidal import checkpoint
from tidal.streams import Batch
from tidal.train import loop
from tidal.train import stop as stopping
from tidal.train.__main__ import run
from tidal.train.loop import train
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.resume import look_in
from tidal.train.stop import Stop, Stopped

SHORT = ["--no-doctor", "--max-steps", "4", "--validate-every", "2", "--rows", "2", "--digits", "1",
         "--max-block-units", "8", "--device", "cpu", "--out", "run", *SMALL]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("what", "step", "saved"), [("batch", 3, 4), ("validate", 5, 6), ("samples", 5, 6)])
def test_a_signal_saves_and_stops_within_one_step(
    number: signal.Signals, what: str, step: int, saved: int, tmp_path: Path
) -> None:
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    asked: list[tuple[str, int]] = []

    def hook(now: str, at: int) -> None:
        asked.append((now, at))
        if (now, at) == (what, step):
            os.kill(os.getpid(), number)

    with Stop() as stop, pytest.raises(Stopped) as stopped:
        train(SETTINGS, Hooked(hook=hook), tmp_path, stop=stop)
    assert stopped.value.signal == number
    assert asked[-1] == (what, step)  # nothing was begun after it
    assert look_in(tmp_path).folder.name == checkpoint.name_of(saved)
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_data_is_prepared_leaves_nothing(
    number: signal.Signals, code: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(settings: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    monkeypatch.setattr(loop, "make_recipe", prepare)
    assert run(SHORT) == code
    assert list(here.iterdir()) == []
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert capsys.readouterr().err == f"tidal.train: {word}\n"


def test_the_command_says_what_was_saved_and_continues(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = AdditionRecipe.batch

    def batch(recipe: AdditionRecipe, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(recipe, step, share)

    monkeypatch.setattr(AdditionRecipe, "validate", lambda recipe, model: {"quality": 0.0, "exact_1": 0.0})
    with monkeypatch.context() as patch:
        patch.setattr(AdditionRecipe, "batch", batch)
        assert run([*SHORT, "--workers", "0"]) == 143
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == ["saved run/checkpoints/step-000003; the same command continues it", "tidal.train: terminated"]
    assert run(SHORT) == 0
    assert "continuing at step 3 of 4, from step-000003" in capsys.readouterr().err


@pytest.mark.parametrize("second", stopping.SIGNALS)
def test_a_second_signal_kills_at_once(second: signal.Signals) -> None:
    """In a process of its own, which never looks whether it was asked to stop."""
    code = ("from tidal.train.stop import Stop\nimport sys\nwith Stop():\n    print('ready', flush=True)\n"
            "    for line in sys.stdin: print('alive', flush=True)\n")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "alive\n"
        assert process.stderr.readline() == "\n"
        assert "SIGTERM: saving, then stopping; once more ends it at once" in process.stderr.readline()
        process.send_signal(second)
        assert process.wait(60) == -second


def test_ignored_signals_stay_ignored_and_others_come_back() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal is signal.SIGTERM
            with pytest.raises(Stopped):
                stop.check()
            with pytest.raises(Stopped), stop.anywhere():
                raise AssertionError("it went on")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
