"""The clock of the GPU benchmarks, with a device that takes as long as its queue says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import clock


class Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, _: Event) -> float:
        return 7.0


def test_a_clock_sleeps_until_all_is_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is emptied by reading alone, and slow launches get a longer sleep from the next run on."""
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    now = iter(1e-3 * x for x in (0, 0.1, 10, 14, 20, 24, 30, 90, 100, 100.1))  # before and after each of five runs
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    timed = clock.Clock("cpu")
    timed.flush = torch.zeros(4)
    before = timed.flush._version
    assert [timed(lambda: None) for _ in range(5)] == [7.0] * 5
    assert timed.flush._version == before
    assert slept == [clock.CYCLES_PER_MS * ms for ms in (1, 1, 8, 8, clock.LONGEST_SLEEP_MS)]
    assert timed.late == 2
