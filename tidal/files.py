"""What a disk has room for."""

from __future__ import annotations

import shutil
from pathlib import Path


def existing(path: Path) -> Path:
    """The path itself (absolute), or the nearest one above it that exists."""
    at = path.absolute()
    while not at.exists():
        at = at.parent
    return at


def free_bytes(path: Path) -> int:
    """Bytes that may be written below `path`, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free
