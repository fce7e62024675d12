"""SIGINT and SIGTERM: training saves and stops after the step; a second signal kills at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from tidal.ranks import leads

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and what could be saved is saved. `signal` says by what."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.signal = by


class Stop:
    """Whether training was asked to stop. As a context it listens to the signals, and restores what was there before.

        with Stop() as stop:
            with stop.anywhere():      # a signal raises Stopped here: reading data, validation, sampling
                ...
            step()                     # here it is only remembered: the update and the checkpoint are not torn
            stop.check()               # raises Stopped if one came

    Signals that the process was told to ignore (`nohup`, `&` in a script) stay ignored. Outside the main thread, where
    Python allows no handlers, and without `with`, nothing is listened to.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.waited = 0.0
        """Seconds that training was paused on a full disk."""
        self._raises = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _came(self, number: int, frame: FrameType | None) -> None:
        for known in self._before:  # the next one ends the process, even in the middle of a long call into C
            signal.signal(known, signal.SIG_DFL)
        self.signal = signal.Signals(number)
        if self._raises:
            raise Stopped(self.signal)
        if not leads():
            return
        with contextlib.suppress(OSError):  # print() may be what was interrupted
            os.write(2, f"\n{self.signal.name}: saving, then stopping; once more ends it at once\n".encode())

    @contextlib.contextmanager
    def anywhere(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped` wherever it comes; so does, at once, one that has come before."""
        outside, self._raises = self._raises, True
        try:
            self.check()
            yield
        finally:
            self._raises = outside

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signal is not None:
            raise Stopped(self.signal)
