"""The disk under a run: enough space, patience while it is full, and one process at a time."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tidal import files
from tidal.checkpoint import FULL, DiskFullError, checkpoints
from tidal.cli import UserError, note
from tidal.files import atomic_write, existing, free_bytes
from tidal.ranks import leads
from tidal.train.stop import Stop

T = TypeVar("T")
POLL_S = 5.0
"""Seconds between two looks at a full disk."""
REMIND_S = 300.0
"""Seconds between two notes about it."""


def check_space(out: Path, n_bytes: int) -> None:
    """Raise UserError where a run that will need `n_bytes` for its checkpoints has not so many."""
    if (free := free_bytes(out)) < n_bytes:
        raise UserError(f"not enough space for {out}: its checkpoints need about {n_bytes / 1e6:,.1f} MB, only "
                        f"{free / 1e6:,.1f} MB are free; make room, or choose another --out")  # fmt: skip


def check_writable(out: Path) -> None:
    """Raise UserError where a folder cannot be made or written; nothing is created."""
    try:
        os.stat(out)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"cannot write the run folder {out}: {error.strerror}; choose another with --out") from error
    at = existing(out)
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        why = "is not a folder" if not at.is_dir() else "may not be written to"
        raise UserError(f"cannot write the run folder {out}: {at} {why}; choose another one with --out")


def numbered(out: Path) -> Iterator[Path]:
    """NAME, NAME-2, NAME-3, …"""
    out = out if out.name not in ("", "..") else out.resolve()
    yield out
    yield from (out.with_name(f"{out.name}-{n}") for n in itertools.count(2))


def prepare_run_dir(out: Path) -> Path:
    """Create the folder of a new run; where a run already is, the first free NAME-2, NAME-3, … instead.

    Raises:
        UserError: the folder cannot be made or written.
    """
    run_dir = next(path for path in numbered(out) if not checkpoints(path))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(run_dir / ".write-test", b"")
        (run_dir / ".write-test").unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"cannot write the run folder {run_dir}: {why}; choose another one with --out") from error
    if run_dir != next(numbered(out)):
        note(f"{next(numbered(out))} already holds a run; writing to {run_dir}")
    return run_dir


def retry_while_full(write: Callable[[], T], out: Path, stop: Stop) -> T:
    """The result of `write`, which is tried again and again, loudly, as long as the disk is full.

    `write` must leave everything as it was where it fails. The wait is added to `stop.waited`. Raises Stopped if a
    signal ends it, and UserError for errors that waiting cannot mend.
    """
    began = reminded = None
    while True:
        try:
            done = write()
        except DiskFullError as error:
            said = str(error)
        except OSError as error:
            if error.errno not in FULL:
                raise UserError(f"cannot write to {out}: {error}") from error
            said = f"cannot write to {out}: {error.strerror}"
        else:
            if began is not None:
                waited = time.monotonic() - began
                stop.waited += waited
                note(f"there is space again after {waited:.0f} s; training goes on")
            return done
        now = time.monotonic()
        began = now if began is None else began
        if reminded is None or now - reminded >= REMIND_S:
            reminded = now
            note(f"THE DISK IS FULL, training is paused: {said}. It goes on by itself when there is space "
                 f"(looking every {POLL_S:g} s); Ctrl-C ends it at the last checkpoint")  # fmt: skip
        with stop.anywhere():
            time.sleep(POLL_S)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run folder alone; of processes that train together the first one holds it.

    Raises UserError where another process does.
    """
    def busy() -> NoReturn:
        raise UserError(f"{run_dir} is being trained by another process; wait for it, or choose another --out")

    with files.locked(run_dir, busy) if leads() else contextlib.nullcontext():
        yield


def append(path: Path, text: str, *, sync: bool = False) -> None:
    """Add lines to a file, all or none. Raises OSError, and the file is as it was."""
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only those lines of a .jsonl file that `keep` approves of; a line torn by a kill goes as well."""
    if not path.exists():
        return
    lines: Sequence[bytes] = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if line.endswith(b"\n") and isinstance(values, dict) and keep(values):
                kept.append(line)
    if kept != lines:
        atomic_write(path, b"".join(kept))
