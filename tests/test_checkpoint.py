"""Checkpoints: whole or not at all, verified, found again."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from tests.run_folders import CONFIG, FILES, TRAINER, Tokenizer, write
from tests.train.runs import refused
from tidal import checkpoint
from tidal.checkpoint import (
    DiskFullError,
    checkpoints,
    newest_verified,
    prune,
    read_checkpoint,
    read_optimizer,
    resolve,
    set_pointer,
    verify,
    write_checkpoint,
)
from tidal.cli import UserError


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


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_who_may_read_it_is_for_the_umask_to_say(mask: int, tmp_path: Path) -> None:
    usual = os.umask(mask)
    try:
        folder = write(tmp_path)
    finally:
        os.umask(usual)
    assert {stat.S_IMODE(os.stat(folder / name).st_mode) for name in FILES} == {0o666 & ~mask}


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
        assert f"is damaged: {name}" in refused(verify, path.parents[name.count("/")])
    path.write_bytes(data[:-1])
    assert name in refused(read_checkpoint, path.parents[name.count("/")])
    path.write_bytes(data)
    verify(path.parents[name.count("/")])


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    (folder / name).unlink()
    assert f"{name} is missing" in refused(verify, folder)


def test_unexpected_and_exchanged_files_are_found(tmp_path: Path) -> None:
    folder, other = write(tmp_path), write(tmp_path, 600, fill=2.0)
    (folder / "extra").touch()
    assert "extra is unexpected" in refused(verify, folder)
    (folder / "extra").unlink()
    (folder / "tokenizer/manifest.json").touch()
    assert "tokenizer/manifest.json is unexpected" in refused(verify, folder)
    (folder / "tokenizer/manifest.json").unlink()
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    said = refused(verify, folder)
    assert "model.safetensors has SHA-256" in said
    assert json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"][:16] in said
    assert json.loads((other / "manifest.json").read_text())["files"]["model.safetensors"][:16] in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {}, "step": 1}', "[" * 99999, "\udcff"])
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path)
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "manifest.json" in refused(verify, folder)


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
    assert os.listdir(old.parent) == [old.name], "what is half-written takes no space"
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
    assert f"is damaged: {name} is {'no plain file' if what == 'pipe' else 'a link'}" in refused(verify, folder)


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
    (tmp_path / "checkpoints" / "step-000600.tmp" / "tokenizer").mkdir()
    (tmp_path / "checkpoints" / "step-000600.tmp" / "model.safetensors").write_bytes(b"half")
    assert resolve(tmp_path) == newest_verified(tmp_path) == old
    verify(write(tmp_path, 600))
    (tmp_path / "checkpoints" / "step-000700.tmp").mkdir()
    (tmp_path / ".latest.77.tmp").touch()
    (tmp_path / ".corpus.77.tmp").mkdir()  # not ours, and neither is the next one
    (tmp_path / ".notes.old.tmp").touch()
    prune(tmp_path)
    assert sorted(os.listdir(old.parent)) == ["step-000500", "step-000600"]
    assert sorted(os.listdir(tmp_path)) == [".corpus.77.tmp", ".notes.old.tmp", "checkpoints"]
