"""Writing files as a whole, and what a disk has room for."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def existing(path: Path) -> Path:
    """The path itself (absolute), or the nearest one above it that exists."""
    at = path.absolute()
    while not os.path.exists(at):  # Path.exists raises where it may not look, and on long names
        at = at.parent
    return at


def free_bytes(path: Path) -> int:
    """Bytes that may be written below `path`, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


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
