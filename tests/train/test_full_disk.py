"""No space: training pauses and goes on, and no file is left half-written."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from safetensors import SafetensorError

from tests.train.runs import SETTINGS, Hooked, unequal, whole
from tidal import checkpoint
from tidal.cli import UserError
from tidal.train import disk, loop
from tidal.train.disk import append, check_space, check_writable, keep_lines, locked, retry_while_full
from tidal.train.loop import Run, train
from tidal.train.stop import Stop, Stopped


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting; the waits are listed."""
    waits: list[float] = []
    sleep = SimpleNamespace(sleep=waits.append, monotonic=lambda: float(sum(waits)))
    for module in (disk, loop):
        monkeypatch.setattr(module, "time", sleep)
    return waits


def failing(real: Callable[..., Any], error: Exception, times: dict[int, int]) -> Callable[..., Any]:
    """`real`, but its n-th calls fail as often as `times` says."""
    left, calls = dict(times), [0]

    def call(*arguments: Any, **more: Any) -> Any:
        if left.get(calls[0], 0):
            left[calls[0]] -= 1
            raise error
        calls[0] += 1
        return real(*arguments, **more)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("home", "name", "error"),
    [(checkpoint, "save_file", SafetensorError("Error while serializing: I/O error: No space left (os error 28)")),
     (checkpoint, "_hashes", FULL), (checkpoint, "atomic_write", OSError(errno.EDQUOT, "Disk quota exceeded")),
     ("tidal.train.records", "append", FULL), ("tidal.train.records", "atomic_write", FULL)],
)  # fmt: skip
def test_a_full_disk_pauses_training(home: Any, name: str, error: Exception, tmp_path: Path, alone: dict[str, Any],
                                     monkeypatch: pytest.MonkeyPatch, clock: list[float],
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    module = sys.modules[home] if isinstance(home, str) else home
    monkeypatch.setattr(module, name, failing(getattr(module, name), error, {1: 3, 2: 1}))
    assert unequal(whole(tmp_path / "run"), alone) == []
    said = capsys.readouterr().err
    assert said.count("THE DISK IS FULL, training is paused") == said.count("there is space again after") > 0
    assert checkpoint.read_checkpoint(tmp_path / "run/checkpoints/step-000009")[2]["seconds"] == 0  # none of the pauses
    assert clock == [disk.POLL_S] * 4


def test_the_clock_is_that_of_the_process_which_knows_of_pauses(tmp_path: Path) -> None:
    run = Run(SETTINGS, Hooked(), tmp_path, Stop())
    for leads, seconds in ((False, 0.0), (True, 7.0)):
        run.parallel = mock.Mock(leads=leads, all_reduce_max=list)
        run._agree(7.0)
        assert run.saved.seconds == seconds


def test_free_space_is_looked_at_before_each_save(tmp_path: Path, alone: dict[str, Any], clock: list[float],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nothing is written where it would not fit."""
    free = failing(shutil.disk_usage, ValueError(), {})
    looks = [0]

    def usage(path: Path) -> Any:
        looks[0] += 1
        small = looks[0] in (3, 4)  # the first look is that of the run; the second save's
        return SimpleNamespace(free=1000) if small else free(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert unequal(whole(tmp_path / "run"), alone) == []
    assert len(clock) == 2


def test_a_run_that_will_not_fit_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs are tensors, and little else."""
    looks: list[int] = []
    monkeypatch.setattr(loop, "check_space", lambda out, n_bytes: looks.append(n_bytes))
    whole(tmp_path / "kept", dataclasses.replace(SETTINGS, keep=1000))
    names = ("model.safetensors", "optimizer.safetensors")
    sizes = [(folder / name).stat().st_size for folder in checkpoint.checkpoints(tmp_path / "kept") for name in names]
    assert 0.95 * sum(sizes) < looks[0] < sum(sizes)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    check_space(tmp_path / "new" / "run", 300_000)
    with pytest.raises(UserError, match=r"not enough space .* need about 0\.6 MB, only 0\.3 MB are free"):
        train(dataclasses.replace(SETTINGS, keep=1000), Hooked(), tmp_path)  # it makes three


def test_a_signal_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        raise FULL

    with Stop() as stop:
        monkeypatch.setattr(disk.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped):
            retry_while_full(write, tmp_path, stop)

    def denied() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(UserError, match="Permission denied"):
        retry_while_full(denied, tmp_path, Stop())


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "one\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))  # the system writes as much as it may
    try:
        with pytest.raises(OSError, match=r"No space|too large"):
            append(path, "second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"one\n"
    append(path, "zwölf\n", sync=True)
    assert path.read_text(encoding="utf-8") == "one\nzwölf\n"


def test_kept_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    keep_lines(path, lambda values: True)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2, "text": "\\u2028"}\n[]\nnonsense\n{"step": 3}\n{"step": 1}')
    keep_lines(path, lambda values: values["step"] < 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "text": "\\u2028"}\n'


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="is being trained by another process"), locked(tmp_path):
        raise AssertionError("locked twice")
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_again_every_five_minutes(tmp_path: Path, clock: list[float],
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    retry_while_full(mock.Mock(side_effect=[FULL] * 130 + [None]), tmp_path, Stop())
    assert sum(clock) == 650
    assert capsys.readouterr().err.count("THE DISK IS FULL") == 3


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="may not be written to"):
        check_writable(tmp_path / "run")
