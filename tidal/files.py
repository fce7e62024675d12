"""Writing files as a whole, what a disk has room for, folders held alone, the newest run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tidal.cli import UserError, note


def existing(path: Path) -> Path:
    """The path itself (absolute), or the nearest one above it that exists."""
    at = path.absolute()
    while not os.path.exists(at):  # Path.exists raises where it may not look, and on long names
        at = at.parent
    return at


def free_bytes(path: Path) -> int:
    """Bytes that may be written below `path`, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def newest_run(mark: Callable[[Path], Path | None]) -> Path:
    """The run under ./runs that has written last, by the time of what `mark` finds in it; None: not a run (yet).

    Raises UserError where there is none.
    """
    found = []
    for run in Path("runs").glob("*"):
        try:
            if (path := mark(run)) is not None:
                found.append((path.stat().st_mtime_ns, run))
        except OSError as error:
            note(f"passing over {run}: {error.strerror}")
    if not found:
        raise UserError("no runs found under runs/; train one with: python -m tidal.train")
    return max(found)[1]


@contextlib.contextmanager
def locked(folder: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Hold a folder alone; the kernel releases it when the process ends, however it ends.

    The lock is on the folder itself and leaves no file. `busy` is called where another process holds it; if it returns,
    the other one is waited for. Raises OSError where there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            note(f"{folder} cannot be locked ({error.strerror}); use it in one process only")
        yield
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace a file's content as a whole: after a crash it holds the old data or the new, never a part.

    A link stays one. What is no file (a pipe, a device) has no content to keep, and is written to.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    path, data = Path(os.path.realpath(path)), data.encode("utf-8") if isinstance(data, str) else data
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
