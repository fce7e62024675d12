"""Which of the processes that torchrun started this one is, and which cores it has. No torch here: `--help` and workers
must start at once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from tidal.cli import UserError

PATIENCE_S = 10.0
"""Seconds that the first process is given to say an error that all of them meet."""


def n_cores() -> int:
    """Cores that this process may use (where the system tells, else those there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def size() -> int:
    """How many processes train together; 1 unless torchrun started this one."""
    return int(os.environ["WORLD_SIZE"]) if by_torchrun() else 1


def rank() -> int:
    """The number of this one among them, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """The same among those on this machine; it is the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def local_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def leads() -> bool:
    """Whether this process is the one that speaks, and writes files."""
    return rank() == 0


class OwnError(UserError):
    """An error that the other processes do not know of."""


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Let only the first process write to stderr (a traceback is shown whoever it is of).

    A UserError is met by all processes at about the same time, unless it is an `OwnError`. The others keep it to
    themselves for a while, in which torchrun sees the first one end and ends them, too.
    """
    if leads():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        except OwnError:
            raise
        except UserError:
            time.sleep(PATIENCE_S)
            raise


def share_of(n_rows: int, share: tuple[int, int]) -> range:
    """The rows of a batch that make up a share: of (i, n) the i-th n-th."""
    i, n = share
    return range(i * n_rows // n, (i + 1) * n_rows // n)
