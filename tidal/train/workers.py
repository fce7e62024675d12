"""Batches built by other processes while those before them are learnt."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tidal.ranks import OwnError, n_cores
from tidal.streams import Batch
from tidal.train.memory import first_line

Share = tuple[int, int]
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Source(Protocol):
    """Where batches come from."""

    def batch(self, step: int, share: Share = (0, 1)) -> Batch:
        """The batch of a step, a pure function of seed and step; for the share (i, n), the i-th n-th of its rows."""


def n_workers(asked: int, device: torch.device, processes: int) -> int:
    """How many; of `asked` −1, in each of this machine's `processes`: up to four beside a GPU, one on a CPU if its
    threads leave a core to it (and if it is Linux's, where to fork is safe).
    """
    if asked >= 0:
        return asked
    on_gpu = device.type == "cuda"
    left = n_cores() // processes - (1 if on_gpu else torch.get_num_threads())
    return min(max(0, left), 4 if on_gpu else int(sys.platform == "linux"))


@contextlib.contextmanager
def said_if_killed() -> Iterator[None]:
    """Around all that is done beside workers. One that dies is heard of by a signal, anywhere, as a RuntimeError of
    torch, which becomes one line; and so does a `HandOverError`.
    """
    try:
        yield
    except RuntimeError as error:
        said = first_line(error)
        if isinstance(error, HandOverError):
            what = f"a worker, which builds batches, {said}"
        elif said.startswith("DataLoader worker (pid"):
            what = f"a worker, which builds batches, was killed ({said})"
        elif said.startswith("Too many open files"):
            what = "a batch that a worker built cannot be received (Too many open files)"
        else:
            raise
        more = "a higher ulimit -n" if "Too many open files" in said else "more (shared) memory"
        raise OwnError(f"{what}; the last checkpoint is intact; try --workers 0, or {more}") from error


class HandOverError(RuntimeError):
    """A worker could not hand over a batch, or died as it did so (its numbers come through a socket of their own)."""


class PrefetchLoader:
    """Batches of a recipe, built by worker processes, in order.

    A batch is a pure function of its number and share, so it makes no difference who builds it: a worker is forked off
    with a copy of the recipe. What is asked for out of turn (again, in more parts) is built here.
    """

    def __init__(self, recipe: Source, workers: int) -> None:
        self.recipe, self.workers = recipe, workers
        self._coming: Iterator[Flat | HandOverError] = iter(())
        self._next: tuple[int, Share] | None = None

    def batch(self, step: int, share: Share = (0, 1)) -> Batch:
        """As the recipe's."""
        if self._next is None:  # the first: those that follow are expected
            self._coming = iter(DataLoader(
                _Batches(self.recipe, share), batch_size=None, sampler=itertools.count(step),
                num_workers=self.workers, multiprocessing_context="fork",
                worker_init_fn=functools.partial(_belong, os.getpid()),
            ))  # fmt: skip
            self._next = step, share
        if self._next != (step, share):
            return self.recipe.batch(step, share)
        self._next = step + 1, share
        try:
            coming = next(self._coming)
        except (ConnectionError, EOFError) as error:
            self.close()  # waits for the signal, which else would be heard of wherever this error is dealt with
            raise HandOverError("was killed (while it handed over a batch)") from error
        if isinstance(coming, HandOverError):
            raise coming
        return coming.batch()

    def close(self) -> None:
        """End the workers. (Torch ends them with their iterator, but the traceback of an error may hold on to that.)"""
        if self._next is not None:
            coming: Any = self._coming
            self._coming, self._next = iter(()), None
            try:
                coming._shutdown_workers()
            finally:
                for worker in coming._workers:  # torch sends SIGTERM to those that take too long: they ignore it
                    worker.kill()
                    worker.join()


@dataclass(frozen=True, slots=True)
class Flat:
    """A batch whose tensors are views of one. A worker hands each tensor over by a connection of its own, for which
    training would wait fifteen times (docs/training.md).
    """

    whole: Tensor
    """uint8, the bytes of all tensors, one after the other"""
    kinds: tuple[tuple[str, torch.dtype, torch.Size], ...]
    """What they are."""
    rest: Batch
    """The batch without them."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """`batch`, copied together."""
        rest, values = copy.copy(batch), {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        tensors = [(name, value) for name, value in values.items() if isinstance(value, Tensor)]
        tensors.sort(key=lambda pair: -pair[1].itemsize)  # so that none begins inside an element
        for name, _ in tensors:
            object.__setattr__(rest, name, None)
        whole = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])
        return cls(whole, tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors), rest)

    def batch(self) -> Batch:
        """The batch again."""
        sizes = [dtype.itemsize * shape.numel() for _, dtype, shape in self.kinds]
        for (name, dtype, shape), own in zip(self.kinds, torch.split(self.whole, sizes), strict=True):
            object.__setattr__(self.rest, name, own.view(dtype).view(shape))
        return self.rest


class _Batches(Dataset[Flat | HandOverError]):
    def __init__(self, recipe: Source, share: Share) -> None:
        self.recipe, self.share = recipe, share

    def __getitem__(self, step: int) -> Flat | HandOverError:
        flat = Flat.of(self.recipe.batch(step, self.share))
        try:  # where torch shares it, in a thread, an error would end in a batch that never comes
            flat.whole.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            return HandOverError(f"could not hand one over ({first_line(error)})")
        return flat


def _belong(parent: int, _: int) -> None:
    """What a worker does first. Signals are its parent's to obey, which saves and then ends it; a parent that is killed
    takes it along, for it holds the run's lock, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before
            os._exit(1)
