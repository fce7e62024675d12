"""Times work on a GPU with device events, elsewhere by the wall clock; contestants alternate."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

CYCLES_PER_MS = 2_000_000
"""of a GPU at its highest frequency"""
LONGEST_SLEEP_MS = 50.0


def cuda_is_lost(error: BaseException) -> bool:
    """Whether CUDA answers whatever this process asks of it from now on with the same error."""
    lost = "illegal memory access|illegal instruction|misaligned address|unspecified launch failure|assert triggered"
    return re.search(lost, str(error)) is not None


class Clock:
    """Times work in milliseconds: device events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.flush = torch.zeros(256 << 20, dtype=torch.uint8, device=device) if self.cuda else None
        self.sleep_ms = 1.0
        """how long the device sleeps while work is put into its queue"""
        self.late = 0
        """runs, those that warm up included, whose work took longer to be queued than the device slept"""

    def __call__(self, work: Callable[[], object]) -> float:
        """Time of the device, launches hidden: it finds the cache cold and sleeps until all is in the queue.

        The cache is emptied by reading: what was written would have to be written back while the work is timed. Where
        the queue took more than half the sleep, later runs get a longer one.
        """
        if self.flush is None:
            return self.wall(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.flush.max()
        torch.cuda._sleep(round(self.sleep_ms * CYCLES_PER_MS))  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        start.record()
        work()
        end.record()
        queued_ms = 1e3 * (time.perf_counter() - began)
        torch.cuda.synchronize()
        self.late += queued_ms > self.sleep_ms
        self.sleep_ms = max(self.sleep_ms, min(2 * queued_ms, LONGEST_SLEEP_MS))
        return float(start.elapsed_time(end))

    def wall(self, work: Callable[[], object]) -> float:
        """Time until all is done, launches included."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)


Work = TypeVar("Work", bound=Callable[[], object])


def alternating(time_of: Callable[[Work], float], works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every contestant in `repeats` rounds, one run each a round, after a round that warms up."""
    rounds = [{name: time_of(work) for name, work in works.items()} for _ in range(repeats + 1)]
    return {name: [times[name] for times in rounds[1:]] for name in works}


def median_times(time_of: Callable[[Work], float], works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Medians of alternating runs."""
    return {name: statistics.median(times) for name, times in alternating(time_of, works, repeats).items()}
