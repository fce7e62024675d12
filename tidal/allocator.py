"""How the CPU's memory is taken from the system; no torch here, it must not have been imported yet."""

from __future__ import annotations

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_memory() -> None:
    """Let the process keep what it has freed, and take memory in huge pages.

    A step of training allocates some hundred megabytes in large blocks. glibc gives each back to the system when it is
    freed, and gets the next one as new pages, which the system clears and maps one by one as they are touched: a fifth
    to a third of a step on a virtual machine (docs/training.md). Without glibc, or without huge pages, nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it first allocates
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((M_MMAP_THRESHOLD, 1 << 25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 28)):
            mallopt(name, value)
