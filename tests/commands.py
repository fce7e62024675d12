"""Running the commands as a person does: real processes, in a folder of their own."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

SMALL = (
    "--d-model", "16", "--n-heads", "2", "--n-kv-heads", "1", "--reader-layers", "1", "--writer-layers", "1",
    "--reader-ff", "24", "--writer-ff", "24", "--no-doctor",
)  # fmt: skip
"""Flags of a tiny model, and no doctor before it: its own tests are in tests/doctor."""
SMALL_TEXT = (*SMALL, "--suffix-rows", "500", "--reader-budget", "64", "--vocab-size", "320", "--rows", "4")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
"""One thread; the package under test, wherever the process runs."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def run(command: Sequence[str | bytes], cwd: Path, stdin: str = "", env: Mapping[str, str] | None = None) -> Ran:
    """Run any command to its end, neither input nor outputs being a terminal."""
    done = subprocess.run(command, cwd=cwd, input=stdin.encode(), capture_output=True, check=False,
                          env={**ENVIRONMENT, **(env or {})})  # fmt: skip
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


def tidal(module: str, *arguments: str | bytes, cwd: Path, stdin: str = "", fails: bool = False) -> Ran:
    """Run `python -m tidal.MODULE`; unless it `fails`, its exit code must be 0."""
    done = run([sys.executable, "-m", f"tidal.{module}", *arguments], cwd, stdin)
    assert fails or done.code == 0, done.err
    return done


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 240.0) -> None:
    """Until it is so; the process, which writes to `log`, must not end before."""
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def living() -> dict[int, int]:
    """The ids of the living processes, and of those that started them. From /proc. Where the first thread has ended (Z)
    and others have not, their files are still open."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent, *more = stat.read_text().rpartition(")")[2].split()
            n_threads = int(more[15])
            if state != "Z" or n_threads > 1:
                found[int(stat.parent.name)] = int(parent)
    return found


def children(parent: int) -> list[int]:
    """The ids of the living processes that a process has started, in their order."""
    return sorted(child for child, its_parent in living().items() if its_parent == parent)


class Terminal:
    """A process whose standard input, output and error are a terminal."""

    def __init__(self, command: Sequence[str], cwd: Path) -> None:
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # rows, columns
        self.process = subprocess.Popen(command, cwd=cwd, env={**ENVIRONMENT, "TERM": "dumb"},
                                        stdin=its, stdout=its, stderr=its, start_new_session=True)  # fmt: skip
        os.close(its)
        self.ours, self.shown = ours, b""

    def read_until(self, what: str, seconds: float = 240.0) -> str:
        """All that has been shown since the last call, as soon as `what` is in it."""
        end = time.monotonic() + seconds
        while what.encode() not in self.shown:
            assert self._read(end - time.monotonic()), f"no {what!r} in {self.shown.decode(errors='replace')!r}"
        shown, self.shown = self.shown, b""
        return shown.decode(errors="replace")

    def type(self, keys: str | bytes) -> None:
        os.write(self.ours, keys.encode() if isinstance(keys, str) else keys)

    def end(self, seconds: float = 240.0) -> tuple[int, str]:
        """Wait for the end: exit code, and what was shown since the last call."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        code = self.process.wait(max(1.0, end - time.monotonic()))
        return code, self.shown.decode(errors="replace")

    def _read(self, seconds: float) -> bool:
        """Wait for more to be shown; false where there will be none, or not in time."""
        if not select.select([self.ours], [], [], max(0.0, seconds))[0]:
            return False
        data = b""
        with contextlib.suppress(OSError):  # Linux: the other side is closed
            data = os.read(self.ours, 65536)
        self.shown += data
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content, and every folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def objects(lines: list[str]) -> list[dict[str, object]]:
    """What --json prints, line by line."""
    return [json.loads(line) for line in lines]


def figures(plain: list[str]) -> dict[str, float]:
    """What `evaluate` prints without --json, as it is with it."""
    pairs = [re.fullmatch(r"(.*?) +([\d.,]+)", line) for line in plain]
    return {pair[1].replace(" ", "_"): float(pair[2].replace(",", "")) for pair in pairs if pair}


def assert_refused(done: Ran, module: str, message: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.endswith("\n")
    (line,) = done.err.splitlines()
    prefix = f"tidal.{module}: error: "
    assert line.startswith(prefix)
    assert re.search(message, line.removeprefix(prefix)), line
