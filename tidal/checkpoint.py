"""Run folders and checkpoints: written whole or not at all, verified before they are read, no pickle.

    runs/NAME/
      checkpoints/step-000500/   model.safetensors  config.json  tokenizer/
                                 optimizer.safetensors
                                 trainer.json  manifest.json (SHA-256 of every other file)
      latest, best               each holds the name of a checkpoint

Folders whose name ends in .tmp are work in progress, or the remains of a crash; nothing reads them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tidal.cli import UserError, note
from tidal.files import atomic_write, free_bytes, fsync, newest_run

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
Pointer = Literal["latest", "best"]
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk, or a share of one, is full."""


class DiskFullError(UserError):
    """There is no space for a checkpoint; nothing was changed, and it may be tried again."""


class Saves(Protocol):
    """What a checkpoint asks of a tokenizer."""

    def save(self, folder: Path, /) -> object:
        """Write the files of the tokenizer into `folder`."""


def write_checkpoint(
    run_dir: Path,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    trainer: Mapping[str, Any],
    tokenizer: Saves,
    optimizer: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write `checkpoints/step-N/` of a run: all of it, on the disk, before it gets its name.

    A checkpoint of the same step is replaced. `config` and `trainer` are stored as JSON. Tensors that share
    memory (tied weights) are stored once for each name.

    Raises:
        DiskFullError: there is no space for it; what was there before is untouched.
        UserError: it cannot be written for another reason (no permission); likewise.
        TypeError: `config` or `trainer` holds something that JSON cannot.
    """
    texts = {"config.json": _json(config), "trainer.json": _json(trainer)}
    weights, moments = _storable(tensors), None if optimizer is None else _storable(optimizer)
    sizes = [t.nbytes for some in (weights, moments or {}) for t in some.values()] + [len(t) for t in texts.values()]
    folder = run_dir / "checkpoints" / name_of(step)
    new, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old.tmp")
    try:
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        if (free := free_bytes(run_dir)) < (need := sum(sizes)):
            raise OSError(errno.ENOSPC, f"it needs {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
        (new / "tokenizer").mkdir(parents=True)
        tokenizer.save(new / "tokenizer")
        save_file(weights, new / "model.safetensors")
        if moments is not None:
            save_file(moments, new / OPTIMIZER)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8", newline="")
        for path in new.glob("*.safetensors"):  # which are its owner's alone at first, whatever the umask
            shutil.copymode(new / "config.json", path)
        (new / MANIFEST).write_text(_manifest(step, _hashes(new)), encoding="utf-8", newline="")
        for path in (*new.rglob("*"), new):
            fsync(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        # safetensors tells the number only in words
        full = any(getattr(error, "errno", None) == n or f"(os error {n})" in str(error) for n in FULL)
        said = f"cannot write the checkpoint {folder}: {error}; free space, or change --out"
        raise (DiskFullError if full else UserError)(said) from error
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """The config, weights (on the CPU) and trainer state of a checkpoint, after `verify`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    verify(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        if not (isinstance(config, dict) and isinstance(trainer, dict)):
            raise ValueError("config.json and trainer.json must each be an object")
        return config, load_file(folder / "model.safetensors"), trainer
    except (OSError, ValueError, RecursionError, SafetensorError) as error:  # though whole
        raise UserError(f"{folder} cannot be read: {error}; use another checkpoint, or train again") from error


def read_optimizer(folder: Path) -> dict[str, torch.Tensor] | None:
    """The optimizer tensors of a checkpoint that is verified already; None if it was written without.

    Raises:
        UserError: the file is whole, by its manifest, but holds no tensors.
    """
    try:
        return load_file(folder / OPTIMIZER) if (folder / OPTIMIZER).exists() else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / OPTIMIZER} cannot be read: {error}; use another checkpoint") from error


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest, and the manifest with its own digest.

    Raises:
        UserError: a file is missing, unexpected, changed, or no plain file (a link may lead anywhere); the message
            names it.
    """
    use = "use another checkpoint, or train again"
    for path in folder.rglob("*"):  # does not follow links
        if not stat.S_ISREG(mode := path.lstat().st_mode) and not stat.S_ISDIR(mode):
            what = "a link" if stat.S_ISLNK(mode) else "no plain file"
            raise UserError(f"{folder} is damaged: {path.relative_to(folder).as_posix()} is {what}; {use}")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is damaged: {MANIFEST} is missing; {use}")
    try:
        text = (folder / MANIFEST).read_bytes().decode("utf-8")
        content = json.loads(text)
        expected: dict[str, str] = content["files"]
        intact = text == _manifest(content["step"], expected)
        found = _hashes(folder)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact = False
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}; {use}") from error
    if not intact:
        raise UserError(f"{folder} is damaged: {MANIFEST} does not match its own digest; {use}")
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{folder} is damaged: {name} is missing; {use}")
        if name not in expected:
            raise UserError(f"{folder} is damaged: {name} is unexpected (not in {MANIFEST}); remove it, or {use}")
        if found[name] != expected[name]:
            raise UserError(
                f"{folder} is damaged: {name} has SHA-256 {found[name][:16]}…, "
                f"{MANIFEST} says {str(expected[name])[:16]}…; {use}"
            )


def set_pointer(run_dir: Path, pointer: Pointer, name: str) -> None:
    """Make `latest` or `best` of a run name a checkpoint, such as "step-000500"."""
    atomic_write(run_dir / pointer, name + "\n")


def read_pointer(run_dir: Path, pointer: Pointer) -> Path | None:
    """The checkpoint that `latest` or `best` names; None where nothing is named or it is not there."""
    path = run_dir / pointer
    if not path.is_file():
        return None
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    found = next((folder for folder in checkpoints(run_dir) if folder.name == name), None)
    if found is None:
        note(f"{path} names {name!r}, which is not in {run_dir / 'checkpoints'}; ignoring it")
    return found


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:06d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    home = run_dir / "checkpoints"
    names = os.listdir(home) if os.path.isdir(home) else []
    folders = (home / name for name in names if re.fullmatch(r"step-[0-9]+", name))
    return sorted((folder for folder in folders if folder.is_dir()), key=_step)


def prune(run_dir: Path, keep: int = 2) -> None:
    """Remove all checkpoints but the newest `keep`, `latest` and `best`; and what crashes left behind.

    To be called when the new checkpoint is in place and the pointers are set.
    """
    spared = {read_pointer(run_dir, "latest"), read_pointer(run_dir, "best")}
    steps = checkpoints(run_dir)
    for folder in steps[: max(0, len(steps) - keep)]:
        if folder not in spared:
            _set_aside(folder)
    sweep(run_dir)


def undo(run_dir: Path, step: int) -> list[str]:
    """Take their names, which are returned, from the checkpoints after `step`; the next `sweep` removes them."""
    later = [folder for folder in checkpoints(run_dir) if _step(folder) > step]
    for folder in later:
        _set_aside(folder)
    return [folder.name for folder in later]


def _set_aside(folder: Path) -> None:
    """Rename what is to be removed: an interrupted removal must not look like a damaged checkpoint."""
    os.rename(folder, folder.with_name(f"{folder.name}.old.tmp"))


def sweep(run_dir: Path) -> None:
    """Remove what a killed process left half-written. Only for the process that writes the run."""
    for leftover in (run_dir / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in run_dir.glob(".*.*.tmp"):
        if re.fullmatch(r".*\.[0-9]+\.tmp", leftover.name) and leftover.is_file():  # of `atomic_write`
            leftover.unlink(missing_ok=True)


def newest_verified(run_dir: Path) -> Path:
    """The newest checkpoint of a run that verifies, for resuming; a note on stderr for each that does not.

    Raises:
        UserError: there is none.
    """
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
        except UserError as error:
            note(f"skipping a checkpoint: {error}")
        else:
            return folder
    raise UserError(f"nothing to resume: {run_dir} has no intact checkpoint; choose another run, or train anew")


def resolve(path: str | os.PathLike[str] | None, which: Pointer = "best") -> Path:
    """The checkpoint meant by a path: a checkpoint itself, or a run's `which`, else its latest one.

    None means the newest run under ./runs, by the time of its latest checkpoint. Nothing is verified yet.

    Raises:
        UserError: there is no checkpoint there, or it cannot be read.
    """
    try:
        return _resolved(newest_run(_last) if path is None else Path(path), which)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; choose another run") from error


def _last(run_dir: Path) -> Path | None:
    return next(reversed(checkpoints(run_dir)), None)


def _resolved(path: Path, which: Pointer) -> Path:
    if os.path.isfile(path / "plan.json") and not os.path.exists(path / "config.json"):  # a manifest they have, too
        raise UserError(f"{path} holds prepared data, not a checkpoint; give a run folder such as runs/NAME, or one of "
                        "its checkpoints")  # fmt: skip
    if os.path.isfile(path / MANIFEST):
        return path
    run_dir = path.absolute().parent if path.name == "checkpoints" else path
    if steps := checkpoints(run_dir):
        pointers: tuple[Pointer, ...] = (which,) if which == "latest" else (which, "latest")
        return next(filter(None, (read_pointer(run_dir, pointer) for pointer in pointers)), steps[-1])
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give a run folder such as runs/NAME, or one of its checkpoints")
    if os.path.isdir(path):
        os.listdir(path)  # raises, where that is why nothing is found
    if os.path.isdir(run_dir / "checkpoints"):
        raise UserError(f"the run {run_dir} has no complete checkpoint (yet); wait for the first one, or train again")
    raise UserError(
        f"{path} is not a run or checkpoint folder (no {MANIFEST} or checkpoints/ in it); "
        "give a run folder such as runs/NAME, or one of its checkpoints"
    )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"  # in ASCII: names of files need not be UTF-8


def _manifest(step: int, files: Mapping[str, str]) -> str:
    """The text of manifest.json. It carries a digest of itself, so that damage to it shows as well."""
    content: dict[str, Any] = {"format": 1, "step": step, "files": dict(sorted(files.items()))}
    return _json({**content, "digest": hashlib.sha256(_json(content).encode()).hexdigest()})


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the manifest."""
    hashes = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name != MANIFEST:
            with open(path, "rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own: what safetensors can store."""
    storable: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        storable[name] = tensor
    return storable
