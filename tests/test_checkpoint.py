"""Checkpoints: whole or not at all, verified, found again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from tidal import checkpoint
from tidal.checkpoint import (
    DiskFullError,
    checkpoints,
    newest_verified,
    prune,
    read_checkpoint,
    read_optimizer,
    read_pointer,
    resolve,
    set_pointer,
    verify,
    write_checkpoint,
)
from tidal.cli import UserError
from tidal.files import atomic_write
from tidal.train import disk
from tidal.train.disk import prepare_run_dir


class Tokenizer:
    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(b"\0\1\2")
        (folder / "tokenizer.json").write_text("{}")


CONFIG = {"d_model": 8, "name": "Größe"}
TRAINER = {"step": 5, "best": math.inf, "lr": 0.1 + 0.2, "rng": 2**127 + 1}


def write(run_dir: Path, step: int = 500, fill: float = 1.0) -> Path:
    shared = torch.full((3, 4), fill)
    tensors = {
        "a": shared,
        "tied": shared,
        "transposed": shared.T,
        "row": shared[1],
        "alone": torch.arange(10.0)[2:5],
        "half": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    optimizer = {"exp_avg": torch.arange(6).view(2, 3).T}
    return write_checkpoint(
        run_dir,
        step,
        tensors=tensors,
        config=CONFIG,
        trainer=TRAINER,
        tokenizer=Tokenizer(),
        optimizer=optimizer,
    )


FILES = ["model.safetensors", "config.json", "optimizer.safetensors", "trainer.json", "manifest.json",
         "tokenizer/tokenizer.model", "tokenizer/tokenizer.json"]  # fmt: skip


def error_of(function: object, *arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        function(*arguments)  # type: ignore[operator]
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_round_trip(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-000500"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(FILES)
    config, tensors, trainer = read_checkpoint(folder)
    assert (config, trainer) == (CONFIG, TRAINER)
    assert torch.equal(tensors["tied"], torch.ones(3, 4))
    assert torch.equal(tensors["transposed"], torch.ones(4, 3))
    assert torch.equal(tensors["row"], torch.ones(4))
    assert torch.equal(tensors["alone"], torch.tensor([2.0, 3.0, 4.0]))
    assert tensors["half"].dtype == torch.bfloat16
    assert tensors["scalar"].item() == 3
    assert tensors["empty"].shape == (0, 2)
    optimizer = read_optimizer(folder)
    assert optimizer is not None
    assert torch.equal(optimizer["exp_avg"], torch.arange(6).view(2, 3).T)
    assert os.listdir(folder.parent) == ["step-000500"]


def test_no_optimizer(tmp_path: Path) -> None:
    arguments = {"tensors": {}, "config": {}, "trainer": {}, "tokenizer": Tokenizer()}
    folder = write_checkpoint(tmp_path, 1, **arguments)  # type: ignore[arg-type]
    assert read_checkpoint(folder) == ({}, {}, {})
    assert read_optimizer(folder) is None
    assert read_optimizer(write_checkpoint(tmp_path, 2, **arguments, optimizer={})) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path) / name
    data = path.read_bytes()
    bits = 8 * len(data)
    for bit in range(0, bits, max(1, bits // 37)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert f"is damaged: {name}" in error_of(verify, path.parents[name.count("/")])
    path.write_bytes(data[:-1])
    assert name in error_of(read_checkpoint, path.parents[name.count("/")])
    path.write_bytes(data)
    verify(path.parents[name.count("/")])


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    (folder / name).unlink()
    assert f"{name} is missing" in error_of(verify, folder)


def test_unexpected_and_exchanged_files_are_found(tmp_path: Path) -> None:
    folder, other = write(tmp_path), write(tmp_path, 600, fill=2.0)
    (folder / "extra").touch()
    assert "extra is unexpected" in error_of(verify, folder)
    (folder / "extra").unlink()
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    said = error_of(verify, folder)
    assert "model.safetensors has SHA-256" in said
    assert json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"][:16] in said
    assert json.loads((other / "manifest.json").read_text())["files"]["model.safetensors"][:16] in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {}, "step": 1}', "[" * 99999, "\udcff"])
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path)
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "manifest.json" in error_of(verify, folder)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("where", ["tokenizer", "save_file", "_hashes", "fsync", "rename"])
@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_crash_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, crash: BaseException, same_step: bool
) -> None:
    old = write(tmp_path)
    set_pointer(tmp_path, "latest", old.name)

    real_rename = os.rename

    def fail(*arguments: object) -> None:
        if where == "rename" and not str(arguments[0]).endswith("00.tmp"):
            real_rename(*arguments)  # type: ignore[arg-type]
        else:  # for "rename": the one that gives the new checkpoint its name
            raise crash

    homes = {"tokenizer": (Tokenizer, "save"), "rename": (os, "rename")}
    home, name = homes.get(where, (checkpoint, where))
    with monkeypatch.context() as patch:
        patch.setattr(home, name, fail)
        with pytest.raises((UserError, KeyboardInterrupt)):
            write(tmp_path, 500 if same_step else 600, fill=2.0)
    assert checkpoints(tmp_path) == [old]
    assert resolve(tmp_path) == old
    assert torch.equal(read_checkpoint(old)[1]["a"], torch.ones(3, 4))
    again = write(tmp_path, 600, fill=3.0)
    assert newest_verified(tmp_path) == again


def named_too_early(run_dir: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str = "") -> list[str]:
    """What was not on the disk yet when the checkpoint got its name, or not after it; `forgotten` is never synced."""
    events: list[str] = []
    real_rename, real_fsync = os.rename, checkpoint.fsync

    def rename(source: Path, target: Path) -> None:
        events.append(f"rename {target.name}")
        real_rename(source, target)

    def fsync(path: Path) -> None:
        if path.name != forgotten:
            events.append(path.name)
            real_fsync(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(checkpoint, "fsync", fsync)
        write(run_dir)
    at = events.index("rename step-000500")
    before, after = {Path(name).name for name in FILES} | {"tokenizer", "step-000500.tmp"}, {"checkpoints"}
    return sorted((before - set(events[:at])) | (after - set(events[at + 1 :])))


def test_nothing_is_named_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_too_early(tmp_path, monkeypatch) == []


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "tokenizer.json", "tokenizer",
                                  "step-000500.tmp", "checkpoints"])  # fmt: skip
def test_planted_bug_a_sync_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_too_early(tmp_path, monkeypatch, name) == [name]


def test_planted_bug_a_half_written_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With names that are looked at less closely, `resolve` would take the remains of a kill."""
    write(tmp_path)
    (tmp_path / "checkpoints" / "step-000600.tmp").mkdir()
    assert resolve(tmp_path).name == "step-000500"
    monkeypatch.setattr(checkpoint.re, "fullmatch", lambda pattern, name: name.startswith("step-"))
    monkeypatch.setattr(checkpoint, "_step", lambda folder: int(folder.name[5:11]))
    assert resolve(tmp_path).name == "step-000600.tmp"


@pytest.mark.parametrize("what", ["file", "folder", "pipe"])
def test_only_plain_files_are_read(what: str, tmp_path: Path) -> None:
    """A link may lead out of the folder, and a pipe may keep the reader waiting for ever."""
    folder = write(tmp_path)
    name = "tokenizer" if what == "folder" else "config.json"
    os.rename(folder / name, tmp_path / "outside")
    if what == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / "outside")
    assert f"is damaged: {name} is {'no plain file' if what == 'pipe' else 'a link'}" in error_of(verify, folder)


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object) -> None:
        raise PermissionError(13, "denied")

    old = write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "free_bytes", lambda path: 99)
        with pytest.raises(DiskFullError, match=r"it needs 0\.0 MB, 0\.0 MB are free"):
            write(tmp_path, 600)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", denied)
        with pytest.raises(UserError, match="denied") as raised:
            write(tmp_path, 600)
    assert not isinstance(raised.value, DiskFullError)
    assert checkpoints(tmp_path) == [old]


def test_remains_of_a_kill_are_ignored_and_cleared(tmp_path: Path) -> None:
    old = write(tmp_path)
    (tmp_path / "checkpoints" / "step-000600.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-000600.tmp" / "model.safetensors").write_bytes(b"half")
    assert resolve(tmp_path) == newest_verified(tmp_path) == old
    verify(write(tmp_path, 600))
    (tmp_path / "checkpoints" / "step-000700.tmp").mkdir()
    prune(tmp_path)
    assert sorted(os.listdir(old.parent)) == ["step-000500", "step-000600"]


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in (5, 10, 999_999, 1_000_000, 1_000_001):
        write(tmp_path, step)
    set_pointer(tmp_path, "best", "step-000010")
    set_pointer(tmp_path, "latest", "step-1000001")
    prune(tmp_path, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "step-000010",
        "step-1000000",
        "step-1000001",
    ]
    prune(tmp_path, keep=0)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000010", "step-1000001"]


def test_resume_skips_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "config.json").write_text("{}")
    assert newest_verified(tmp_path) == first
    assert "step-000002 is damaged: config.json" in capsys.readouterr().err
    (first / "config.json").unlink()
    assert "no intact checkpoint" in error_of(newest_verified, tmp_path)


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(resolve, None) == "no runs found under runs/; train one with: python -m tidal.train"
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
    assert capsys.readouterr().err == ""
    (run / "best").write_text("../../elsewhere\n")
    assert resolve(run) == second
    assert "elsewhere" in capsys.readouterr().err
    assert read_pointer(run, "best") is None
    with pytest.raises(ValueError, match="step-000009"):
        set_pointer(run, "best", "step-000009")


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    assert "does not exist" in error_of(resolve, tmp_path / "missing")
    assert "is not a run or checkpoint folder (no manifest.json or checkpoints/ in it)" in error_of(resolve, tmp_path)
    (tmp_path / "file").touch()
    assert "is not a run or checkpoint folder" in error_of(resolve, tmp_path / "file")
    (tmp_path / "checkpoints").mkdir()
    assert "has no complete checkpoint" in error_of(resolve, tmp_path)


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
    assert error_of(resolve, Path("runs/locked")) == wanted
    Path("runs/locked/checkpoints").rename(tmp_path / "elsewhere")  # as if it could not be looked into at all
    assert "runs/locked cannot be read: Permission denied" in error_of(resolve, Path("runs/locked"))


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
        assert "cannot write the run folder" in error_of(prepare_run_dir, out)
    assert (tmp_path / "file").read_bytes() == b""

    def denied(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "atomic_write", denied)
    assert "Permission denied" in error_of(prepare_run_dir, tmp_path / "run")


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
