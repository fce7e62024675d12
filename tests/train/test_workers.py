"""Batches that other processes build are those of this one, and no such process outlives it."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests import commands
from tests.commands import ENVIRONMENT, SMALL
from tests.strategies import differing, tokenizers
from tests.train.runs import SETTINGS, STEPS, Hooked, as_process, refused, results, stop_at, unequal, whole
from tidal.blocks import BlockTable, passage
from tidal.cli import UserError
from tidal.ranks import OwnError
from tidal.streams import pack
from tidal.train import __main__ as training
from tidal.train import loop, workers
from tidal.train.loop import Run, train
from tidal.train.memory import first_line
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.resume import look_in
from tidal.train.stop import Stop, Stopped
from tidal.train.workers import Flat, PrefetchLoader, n_workers

TWICE = dataclasses.replace(SETTINGS, optim=dataclasses.replace(SETTINGS.optim, accumulate=2))


def children() -> set[int]:
    """The living processes that this one has started."""
    return set(commands.children(os.getpid()))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_come_in_order_and_out_of_turn(workers: int) -> None:
    recipe, before = AdditionRecipe(SETTINGS), children()
    loader = PrefetchLoader(recipe, workers)
    for step in (5, 6, 6, 2, 7, 8, 0, 9):  # 6 again, as in more parts; 2 and 0 as for probes
        assert not differing(loader.batch(step), recipe.batch(step))
        assert not differing(loader.batch(3, (1, 2)), recipe.batch(3, (1, 2)))
    assert len(children() - before) == workers
    loader.close()
    assert children() == before


def test_a_batch_is_handed_over_as_one_tensor() -> None:
    """Whose parts begin at whole elements, also where a stream of four-byte numbers has an odd length."""
    table = BlockTable(tokenizers()["english"])
    for prompt in ("", "the", "the light"):
        batch = pack([[passage(table, prompt, " light and")]], table)
        flat = Flat.of(batch)
        assert not any(isinstance(getattr(flat.rest, f.name), torch.Tensor) for f in dataclasses.fields(batch))
        assert not differing(flat.batch(), batch)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_is_bit_for_bit_the_one_without(workers: int, tmp_path: Path) -> None:
    """Also when it is stopped, and continued with another number of workers."""
    before = children()
    wanted = whole(tmp_path / "plain", TWICE)
    settings = dataclasses.replace(TWICE, workers=workers)
    assert not unequal(whole(tmp_path / "whole", settings), wanted)
    out, stop = tmp_path / "stopped", Stop()
    out.mkdir()
    with pytest.raises(Stopped):
        train(settings, Hooked(settings, stop_at(stop, "validate", 5)), out, stop=stop)
    assert children() == before
    settings = dataclasses.replace(settings, workers=2 - workers)
    train(settings, Hooked(settings), out, found=look_in(out))
    assert not unequal(results(out), wanted)
    assert children() == before


def test_an_error_of_a_worker_is_that_of_the_run(tmp_path: Path) -> None:
    def fail(what: str, step: int) -> None:
        if (what, step) == ("batch", 2):
            raise ValueError("no such batch")

    settings, before = dataclasses.replace(SETTINGS, workers=1), children()
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="no such batch"):
        train(settings, Hooked(settings, fail), tmp_path / "run")
    assert children() == before  # though the traceback still holds on to what built them


def test_a_worker_that_is_killed_is_said_in_one_line(tmp_path: Path) -> None:
    us = os.getpid()

    def die(what: str, step: int) -> None:
        if os.getpid() != us and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    settings, before = dataclasses.replace(SETTINGS, workers=1), children()
    said = refused(train, settings, Hooked(settings, die), tmp_path)
    how = r"(DataLoader worker \(pid|while it handed over)"  # whichever is heard of first
    assert re.match(rf"a worker, which builds batches, was killed \({how}", said)
    assert said.endswith("; try --workers 0, or more (shared) memory")
    assert children() == before


def test_a_worker_that_dies_while_it_hands_over_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the signal is heard of: what it was sending cannot be received. Heard of while that is said, the signal
    must not be another error, of torch's words.
    """
    before = children()
    loader = PrefetchLoader(Hooked(SETTINGS), 1)
    loader.batch(0)
    (worker,) = children() - before
    hears = signal.getsignal(signal.SIGCHLD)
    assert callable(hears)

    def reset(*_: object, **__: object) -> NoReturn:
        signal.signal(signal.SIGCHLD, lambda *_: None)  # not yet
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        raise ConnectionResetError(104, "Connection reset by peer")

    def line(error: Exception) -> str:
        hears(signal.SIGCHLD, None)  # but now
        return first_line(error)

    monkeypatch.setattr(loader._coming, "_try_get_data", reset)
    monkeypatch.setattr(workers, "first_line", line)
    said = r"^a worker, which builds batches, was killed \(while it handed over a batch\)"
    try:
        with pytest.raises(OwnError, match=said), workers.said_if_killed():
            loader.batch(1)
    finally:
        signal.signal(signal.SIGCHLD, hears)
        loader.close()
    assert children() == before


def test_a_batch_that_cannot_be_handed_over_is_said_in_one_line(tmp_path: Path) -> None:
    """As where a container has next to no shared memory."""
    us = os.getpid()

    def no_room(what: str, step: int) -> None:
        if os.getpid() != us and step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # of files in shared memory, too

    settings, before = dataclasses.replace(SETTINGS, workers=1), children()
    said = refused(train, settings, Hooked(settings, no_room), tmp_path)
    assert re.match(r"a worker, which builds batches, could not hand one over \(unable to (resize|allocate)", said)
    assert said.endswith("; try --workers 0, or more (shared) memory")
    assert children() == before


def test_too_few_file_handles_are_said_in_one_line() -> None:
    """A batch comes with one of its own."""
    loader = PrefetchLoader(Hooked(SETTINGS), 1)
    loader.batch(0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "rb") as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 1, limits[1]))
    said = "a batch that a worker built cannot be received (Too many open files); the last checkpoint is intact; try "
    try:
        with (pytest.raises(OwnError, match=f"^{re.escape(said)}--workers 0, or a higher ulimit -n$"),
              workers.said_if_killed()):  # fmt: skip
            loader.batch(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        loader.close()


def test_workers_are_of_use_after_a_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which begins with a validation, and its probes ask for a batch that is not the next one."""
    expected: list[object] = []

    class Noted(PrefetchLoader):
        def close(self) -> None:
            expected.append(self._next)
            super().close()

    monkeypatch.setattr(loop, "PrefetchLoader", Noted)
    settings, stop = dataclasses.replace(TWICE, workers=1), Stop()
    with pytest.raises(Stopped):
        train(settings, Hooked(settings, stop_at(stop, "samples", 2)), tmp_path, stop=stop)
    train(settings, Hooked(settings), tmp_path, found=look_in(tmp_path))
    assert expected == [(2 * 3, (0, 1)), (2 * STEPS, (0, 1))]


def test_cores_are_shared_with_the_processes_of_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_process(5, 8, 4, monkeypatch)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(loop, "n_workers", lambda *of: asked.append(of) or 0)
    Run(SETTINGS, Hooked(), tmp_path, Stop())
    assert asked == [(0, torch.device("cpu"), 4)]


@pytest.mark.parametrize(("asked", "device", "threads", "processes", "wanted"), [
    (-1, "cpu", 1, 1, 1), (-1, "cpu", 8, 1, 0), (-1, "cpu", 7, 1, 1), (-1, "cpu", 1, 4, 1), (-1, "cpu", 1, 8, 0),
    (3, "cpu", 8, 1, 3), (0, "cpu", 1, 1, 0), (0, "cuda", 1, 1, 0), (-1, "cuda", 8, 1, 4), (-1, "cuda", 1, 4, 1),
    (-1, "cuda", 1, 8, 0),
])  # fmt: skip
def test_how_many(asked: int, device: str, threads: int, processes: int, wanted: int,
                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)  # of those, it may use 8
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(sys, "platform", "linux")
    assert n_workers(asked, torch.device(device), processes) == wanted
    monkeypatch.setattr(sys, "platform", "darwin")
    assert n_workers(asked, torch.device(device), processes) == (0 if (asked, device) == (-1, "cpu") else wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="what a killed parent takes along")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_takes_its_workers_along(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Killed, it leaves no worker that holds the run's lock: the same command continues."""
    command = [*SMALL, "--digits", "1", "--max-block-units", "8", "--rows", "4", "--max-steps", "5000", "--out", "run",
               "--validate-every", "2", "--workers", "2"]  # fmt: skip
    said = tmp_path / "said.txt"
    with said.open("wb") as file, subprocess.Popen([sys.executable, "-m", "tidal.train", *command], cwd=tmp_path,
                                                   env=ENVIRONMENT, stderr=file) as run:  # fmt: skip
        try:
            commands.wait_for((tmp_path / "run/latest").exists, run, said, 120)
            theirs = commands.children(run.pid)
            assert len(theirs) == 2, said.read_text()
            run.send_signal(number)
            assert run.wait(60) == (-number if number == signal.SIGKILL else 128 + number), said.read_text()
            end = time.monotonic() + 60  # killed as well, but a busy machine may take a moment over it
            while set(theirs) & commands.living().keys():
                assert time.monotonic() < end, "the workers have outlived their parent"
                time.sleep(0.01)
        finally:
            run.kill()
    monkeypatch.chdir(tmp_path)
    assert training.run([*command, "--max-seconds", "0.01"]) == 0
    assert "continuing at step" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="--workers is -2; it must be between -1 and 64"):
        training.run(["--workers", "-2"])
