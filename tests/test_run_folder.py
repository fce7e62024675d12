"""Run folders: which checkpoint is found, where a run may be, and files that are whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.run_folders import write
from tests.train.runs import refused
from tidal.checkpoint import checkpoints, newest_verified, prune, read_pointer, resolve, set_pointer
from tidal.files import atomic_write
from tidal.train import disk
from tidal.train.disk import prepare_run_dir


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in (5, 10, 999_999, 1_000_000, 1_000_001):
        write(tmp_path, step)
    set_pointer(tmp_path, "best", "step-000010")
    set_pointer(tmp_path, "latest", "step-1000001")
    prune(tmp_path, keep=6)
    assert len(checkpoints(tmp_path)) == 5, "there are not so many"
    prune(tmp_path, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "step-000010",
        "step-1000000",
        "step-1000001",
    ]
    prune(tmp_path, keep=0)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000010", "step-1000001"]


def test_an_interrupted_removal_damages_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(folder: Path, **how: object) -> None:
        (folder / "config.json").unlink()
        raise KeyboardInterrupt

    kept = [write(tmp_path, step) for step in (1, 2)][1]
    monkeypatch.setattr(shutil, "rmtree", torn)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=1)
    assert checkpoints(tmp_path) == [kept]


def test_resume_skips_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "config.json").write_text("{}")
    assert newest_verified(tmp_path) == first
    assert "step-000002 is damaged: config.json" in capsys.readouterr().err
    (first / "config.json").unlink()
    assert "no intact checkpoint" in refused(newest_verified, tmp_path)


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(resolve, None) == "no runs found under runs/; train one with: python -m tidal.train"
    run = Path("runs/a")
    first, second, third = (write(run, step) for step in (1, 2, 3))
    assert resolve(run) == third
    set_pointer(run, "latest", second.name)
    assert resolve(run) == resolve(run, "latest") == second
    set_pointer(run, "best", first.name)
    assert resolve(run) == resolve(None) == first
    assert resolve(run, "latest") == second
    assert resolve(third) == third
    assert resolve(run / "checkpoints").resolve() == first.resolve()
    other = write(Path("runs/0"), 1)
    os.utime(other, (4e9, 4e9))
    Path("runs/z").mkdir()
    assert resolve(None) == other
    os.utime(third, (5e9, 5e9))  # the newest checkpoint of a run tells its age
    assert resolve(None) == first
    assert capsys.readouterr().err == ""
    (run / "best").write_text("../../elsewhere\n")
    assert resolve(run) == second
    assert "elsewhere" in capsys.readouterr().err
    assert read_pointer(run, "best") is None


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    assert "does not exist" in refused(resolve, tmp_path / "missing")
    assert "is not a run or checkpoint folder (no manifest.json or checkpoints/ in it)" in refused(resolve, tmp_path)
    (shards := tmp_path / "shards").mkdir()
    for name in ("plan.json", "manifest.json"):
        (shards / name).write_text("{}")
        assert f"{shards} holds prepared data, not a checkpoint" in refused(resolve, shards)
    (tmp_path / "file").touch()
    assert "is not a run or checkpoint folder" in refused(resolve, tmp_path / "file")
    (tmp_path / "checkpoints").mkdir()
    assert "has no complete checkpoint" in refused(resolve, tmp_path)


def test_runs_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    good, locked = write(Path("runs/good"), 1), write(Path("runs/locked"), 2)
    os.utime(locked, (4e9, 4e9))
    real = os.listdir

    def listdir(path: object) -> list[str]:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "listdir", listdir)
    assert resolve(None) == good
    assert capsys.readouterr().err == "passing over runs/locked: Permission denied\n"
    wanted = "runs/locked/checkpoints cannot be read: Permission denied; choose another run"
    assert refused(resolve, Path("runs/locked")) == wanted
    Path("runs/locked/checkpoints").rename(tmp_path / "elsewhere")  # as if it could not be looked into at all
    assert "runs/locked cannot be read: Permission denied" in refused(resolve, Path("runs/locked"))


def test_prepare_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "a.b"
    assert prepare_run_dir(out) == prepare_run_dir(out) == out
    assert os.listdir(out) == []
    write(out)
    assert prepare_run_dir(out) == tmp_path / "runs" / "a.b-2"
    assert "a.b already holds a run; writing to" in capsys.readouterr().err
    write(tmp_path / "runs" / "a.b-2")
    assert prepare_run_dir(out).name == "a.b-3"
    monkeypatch.chdir(out)
    assert prepare_run_dir(Path(".")) == tmp_path / "runs" / "a.b-3"


def test_prepare_run_dir_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for out in (
        tmp_path / "file",
        tmp_path / "file" / "run",
        Path("/proc/x"),
        Path("/proc"),
        tmp_path / ("n" * 300),
    ):
        assert "cannot write the run folder" in refused(prepare_run_dir, out)
    assert (tmp_path / "file").read_bytes() == b""

    def denied(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "atomic_write", denied)
    assert "Permission denied" in refused(prepare_run_dir, tmp_path / "run")


def test_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    atomic_write(path, "ä\r\n")
    assert path.read_bytes() == "ä\r\n".encode()
    atomic_write(path, b"\0")
    assert path.read_bytes() == b"\0"

    def fail(*arguments: object) -> None:
        raise OSError("crash")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="crash"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"\0"
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with open(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)) as reader:
        atomic_write(tmp_path / "pipe", "through")
        assert reader.read() == "through"
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="directory"):
        atomic_write(tmp_path, "x")
