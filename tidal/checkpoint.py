"""Run folders and checkpoints: written whole or not at all, verified before they are read, no pickle.

    runs/NAME/
      checkpoints/step-000500/   model.safetensors  config.json  tokenizer/  optimizer.safetensors
                                 trainer.json  manifest.json (SHA-256 of every other file)
      latest, best               each holds the name of a checkpoint

Folders whose name ends in .tmp are work in progress, or the remains of a crash; nothing reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tidal.cli import UserError, note

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
Pointer = Literal["latest", "best"]


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
        UserError: it cannot be written (disk full, no permission); what was there before is untouched.
        TypeError: `config` or `trainer` holds something that JSON cannot.
    """
    texts = {"config.json": _json(config), "trainer.json": _json(trainer)}
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    new, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old.tmp")
    try:
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        (new / "tokenizer").mkdir(parents=True)
        tokenizer.save(new / "tokenizer")
        save_file(_storable(tensors), new / "model.safetensors")
        if optimizer is not None:
            save_file(_storable(optimizer), new / OPTIMIZER)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8", newline="")
        (new / MANIFEST).write_text(_manifest(step, _hashes(new)), encoding="utf-8", newline="")
        for path in (*new.rglob("*"), new):
            _fsync(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        _fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the checkpoint {folder}: {error}; free space, or change --out") from error
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
        return config, load_file(folder / "model.safetensors"), trainer
    except (OSError, ValueError, SafetensorError) as error:  # whole, by its manifest, but not what it should be
        raise UserError(f"{folder} cannot be read: {error}; use another checkpoint, or train again") from error


def read_optimizer(folder: Path) -> dict[str, torch.Tensor] | None:
    """The optimizer tensors of a checkpoint that is verified already; None if it was written without."""
    return load_file(folder / OPTIMIZER) if (folder / OPTIMIZER).exists() else None


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest, and the manifest with its own digest.

    Raises:
        UserError: a file is missing, unexpected or changed; the message names it.
    """
    use = "use another checkpoint, or train again"
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
                f"{MANIFEST} says {expected[name][:16]}…; {use}"
            )


def set_pointer(run_dir: Path, pointer: Pointer, name: str) -> None:
    """Make `latest` or `best` of a run name a checkpoint, such as "step-000500".

    Raises:
        ValueError: there is no such checkpoint.
    """
    if name not in {folder.name for folder in checkpoints(run_dir)}:
        raise ValueError(f"{pointer} cannot name {name!r}: {run_dir / 'checkpoints'} has no such checkpoint")
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
            # Renamed first, so that an interrupted removal does not look like a damaged checkpoint.
            os.rename(folder, folder.with_name(f"{folder.name}.old.tmp"))
    for leftover in (run_dir / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def resolve(path: Path | None, which: Pointer = "best") -> Path:
    """The checkpoint meant by a path: a checkpoint itself, or a run's `which`, else its latest one.

    None means the newest run under ./runs, by the time of its latest checkpoint. Nothing is verified yet.

    Raises:
        UserError: there is no checkpoint there.
    """
    if path is None:
        runs = [(steps[-1].stat().st_mtime_ns, run) for run in Path("runs").glob("*") if (steps := checkpoints(run))]
        if not runs:
            raise UserError("no runs found under runs/; train one with: python -m tidal.train")
        path = max(runs)[1]
    if os.path.isfile(path / MANIFEST):
        return path
    run_dir = path.absolute().parent if path.name == "checkpoints" else path
    if steps := checkpoints(run_dir):
        pointers: tuple[Pointer, ...] = (which,) if which == "latest" else (which, "latest")
        return next(filter(None, (read_pointer(run_dir, pointer) for pointer in pointers)), steps[-1])
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give a run folder such as runs/NAME, or one of its checkpoints")
    if os.path.isdir(run_dir / "checkpoints"):
        raise UserError(f"the run {run_dir} has no complete checkpoint (yet); wait for the first one, or train again")
    raise UserError(
        f"{path} is not a run or checkpoint folder (no {MANIFEST} or checkpoints/ in it); "
        "give a run folder such as runs/NAME, or one of its checkpoints"
    )


def check_writable(out: Path) -> None:
    """Raise UserError where a folder cannot be made or written; nothing is created."""
    at = out.absolute()
    while not at.exists():
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        why = "is not a folder" if not at.is_dir() else "may not be written to"
        raise UserError(f"cannot write the run folder {out}: {at} {why}; choose another one with --out")


def prepare_run_dir(out: Path) -> Path:
    """Create the folder of a new run; where a run already is, the first free NAME-2, NAME-3, … instead.

    Raises:
        UserError: the folder cannot be made or written.
    """
    wanted = out if out.name not in ("", "..") else out.resolve()
    run_dir, n = wanted, 1
    while checkpoints(run_dir):
        n += 1
        run_dir = wanted.with_name(f"{wanted.name}-{n}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(run_dir / ".write-test", b"")
        (run_dir / ".write-test").unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"cannot write the run folder {run_dir}: {why}; choose another one with --out") from error
    if n > 1:
        note(f"{wanted} already holds a run; writing to {run_dir}")
    return run_dir


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace a file's content as a whole: after a crash it holds the old data or the new, never a part.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
