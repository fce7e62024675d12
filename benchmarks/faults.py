"""Kills, damaged files, a full disk and forged checkpoints: does training survive, and is everything noticed?

    python -m benchmarks.faults [--quick] [--out FILE]

1. A tiny run is killed (SIGKILL) at random moments, a third of them aimed into the writing of a checkpoint, and
   continued each time, until it ends; its weights, moments, metrics and samples must equal, byte for byte, those of
   the same run left alone. Then the next run, until there were enough kills.
2. Single bits of a checkpoint's files are flipped, and files cut short: each must be refused, by name.
3. A small disk (a tmpfs, where mounting one is allowed) fills up while a run writes to it.
4. Checkpoints forged by someone who can also write the manifest must be refused, nothing run, nothing touched outside.
5. What checkpoints and metrics cost is measured, as a share of the steps between them (the addition recipe's defaults).

Each process is a fork of this one that calls what `python -m tidal.train` calls: importing torch takes seconds, and
kills are many. Ends in one JSON line; exits with 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.forgeries import damage, forged
from tidal import checkpoint
from tidal.cli import UserError, main, note
from tidal.train import disk
from tidal.train.__main__ import run as train_command
from tidal.train.figures import COLUMNS, MEASURED
from tidal.train.loop import LOG_EVERY, Run, make_recipe
from tidal.train.presets import PRESETS
from tidal.train.stop import Stop

FLAGS = ["--no-doctor", "--validate-every", "10", "--rows", "4", "--digits", "1",
         "--max-block-units", "8", "--d-model", "16", "--n-heads", "2", "--n-kv-heads", "1", "--writer-layers", "1",
         "--reader-ff", "24", "--writer-ff", "24", "--suffix-rows", "50", "--accumulate", "2", "--device", "cpu",
         "--threads", "1"]  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    steps: int = 120
    kills: int = 100
    flips: int = 200
    truncations: int = 100
    rounds: int = 5
    """in which the disk fills up"""
    timed: int = 30
    """steps, saves and rows of metrics"""


QUICK = Scale(steps=30, kills=3, flips=20, truncations=10, rounds=1, timed=3)
AIMED = 1 / 3
"""Share of the kills that wait for a save."""
SAVE_S = 0.03
"""A checkpoint of this model takes about so long; an aimed kill comes at a random moment of it."""
TMPFS_MB = 3


def start(out: Path, log: Path, steps: int) -> int:
    """Begin, or continue, the run `out` in a process of its own; returns its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        with open(log, "a", buffering=1) as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout = sys.stderr = said
            try:
                main(train_command, "tidal.train", [*FLAGS, "--max-steps", str(steps), "--out", str(out)])
            except SystemExit as ended:
                code = int(ended.code or 0)
    finally:
        os._exit(code)


def finished(pid: int) -> bool:
    """Whether a process has ended by itself, and well. Raises SystemExit where it failed."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and (code := os.waitstatus_to_exitcode(status)):
        raise SystemExit(f"training failed with code {code}; see its log")
    return bool(done)


def wait_for(what: Callable[[], bool], why: str, seconds: float = 120.0) -> None:
    """Wait until `what` holds."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:g} s in vain: {why}")
        time.sleep(0.01)


def results(out: Path) -> dict[str, Any]:
    """All that a run has come to, but for times: digests of weights and moments, metrics, samples."""
    last = checkpoint.checkpoints(out)[-1]
    checkpoint.verify(last)
    found: dict[str, Any] = {name: hashlib.sha256((last / name).read_bytes()).hexdigest()
                             for name in ("model.safetensors", checkpoint.OPTIMIZER)}  # fmt: skip
    with open(out / "metrics.csv", newline="") as file:
        found["metrics"] = [{**row, **dict.fromkeys(MEASURED, "")} for row in csv.DictReader(file)]
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    found["samples"] = [{**json.loads(line), "seconds": 0} for line in lines]
    found |= {name: (out / name).read_text() for name in ("best", "latest")}
    return found


def reference(home: Path, steps: int) -> tuple[dict[str, Any], float]:
    """The results of a run left alone, and the seconds it took."""
    began = time.monotonic()
    pid = start(home / "reference", home / "reference.log", steps)
    wait_for(lambda: finished(pid), f"a run left alone; see {home}/reference.log", 600)
    return results(home / "reference"), time.monotonic() - began


# ----------------------------------------------------------------------------------------------- kills


def kills(home: Path, scale: Scale, rng: np.random.Generator) -> dict[str, Any]:
    """SIGKILL at random moments; every run that comes to its end is compared with the reference."""
    (wanted, seconds), count = reference(home, scale.steps), scale.kills
    out, log = home / "killed", home / "killed.log"
    where: Counter[str] = Counter()
    runs = wrong = done = 0
    while done < count or out.exists():
        pid = start(out, log, scale.steps)
        if done < count and not ended_before(pid, out, rng, seconds / 3):
            os.kill(pid, signal.SIGKILL)
            done += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            where[_moment(out)] += 1
            wait_for(lambda: _free(out), "the workers of a killed run to end")
            continue
        wait_for(lambda pid=pid: finished(pid), f"a continued run; see {log}", 600)  # type: ignore[misc]
        runs, wrong = runs + 1, wrong + (results(out) != wanted)
        note(f"kills: {done} of {count}; {runs} runs ended, {wrong} of them differ from the one left alone")
        shutil.rmtree(out)
    return {"kills": done, "runs": runs, "runs_that_differ": wrong, "moments": dict(where)}


def _free(out: Path) -> bool:
    """Whether no process holds the run."""
    with contextlib.suppress(UserError):
        if out.is_dir():
            with disk.locked(out):
                pass
        return True
    return False


def ended_before(pid: int, out: Path, rng: np.random.Generator, seconds: float) -> bool:
    """Wait for a random moment; true where the process ends earlier."""
    home, end = out / "checkpoints", time.monotonic() + rng.uniform(0, seconds)
    if rng.random() < AIMED:
        while not (_gone(pid) or (home.is_dir() and any(name.endswith(".tmp") for name in os.listdir(home)))):
            time.sleep(0.0002)
        end = time.monotonic() + rng.uniform(0, SAVE_S)
    while time.monotonic() < end:
        if _gone(pid):
            return True
        time.sleep(0.0005)
    return _gone(pid)


def _gone(pid: int) -> bool:
    """Whether a process has ended; it is left to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _moment(out: Path) -> str:
    """Where a kill has struck, as far as the run folder tells."""
    home = out / "checkpoints"
    names = sorted(os.listdir(home)) if home.is_dir() else []
    if any(name.endswith(".tmp") for name in names):
        return "checkpoint half-written or half-removed"
    if not names:
        return "before the first checkpoint"
    latest = (out / "latest").read_text().strip() if (out / "latest").exists() else ""
    return "elsewhere" if latest == names[-1] else "checkpoint written, not yet named latest"


# ------------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[bool]:
    """A tmpfs of TMPFS_MB at `at`; False where this process may not mount one."""
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m", "tmpfs", str(at)],
                             capture_output=True, check=False).returncode == 0  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(at)], check=True)


def full_disk(home: Path, scale: Scale, rng: np.random.Generator) -> dict[str, Any]:
    """Fill the disk under a run, look at every file, make room again; several times in one run."""
    wanted, rounds = results(home / "reference"), scale.rounds
    before, disk.POLL_S = disk.POLL_S, 0.05
    try:
        with small_disk(home / "disk") as mounted:
            if not mounted:
                return {"rounds": 0, "why": "this process may not mount a tmpfs"}
            out, log, ballast = home / "disk" / "run", home / "disk.log", home / "disk" / "ballast"
            pid, pauses = start(out, log, scale.steps), 0
            for i in range(rounds):
                passed = i * scale.steps // (rounds + 1)
                wait_for(lambda n=passed: any(c.name >= checkpoint.name_of(n) for c in checkpoint.checkpoints(out)),  # type: ignore[misc]
                         f"a checkpoint after step {passed}; see {log}")  # fmt: skip
                size = sum(path.stat().st_size for path in checkpoint.checkpoints(out)[-1].rglob("*") if path.is_file())
                leave = int(rng.integers(size))  # too little for one more, sometimes only just
                while log.read_text().count("THE DISK IS FULL") <= i:
                    _fill(ballast, leave)  # again: meanwhile old checkpoints go
                    time.sleep(0.01)
                time.sleep(0.2)
                for folder in checkpoint.checkpoints(out):
                    checkpoint.verify(folder)
                with open(out / "metrics.csv", newline="") as file:
                    assert all(None not in row.values() for row in csv.DictReader(file))
                for line in (out / "samples.jsonl").read_text().splitlines():
                    json.loads(line)
                pauses += 1
                ballast.unlink()
                wait_for(lambda n=i: log.read_text().count("there is space again") > n, f"it to go on; see {log}")  # type: ignore[misc]
            wait_for(lambda: finished(pid), f"the end; see {log}", 600)
            return {"rounds": rounds, "pauses": pauses, "same_as_left_alone": results(out) == wanted}
    finally:
        disk.POLL_S = before


def _fill(ballast: Path, leave: int) -> None:
    """Write until `leave` bytes are free."""
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while (room := shutil.disk_usage(ballast.parent).free - leave) > 0:
            file.write(b"\0" * min(room, 1 << 16))


# -------------------------------------------------------------------------------------------- overhead


def overhead(home: Path, scale: Scale) -> dict[str, Any]:
    """What checkpoints and metrics cost, of the time of the steps between them: the addition recipe as it comes."""
    settings = dataclasses.replace(PRESETS["addition"], device="cpu", threads=1)
    home.mkdir()
    run = Run(settings, make_recipe(settings), home, Stop())
    run.open(None)
    row = dict.fromkeys(COLUMNS, 0.123456789)
    took: dict[str, list[float]] = {"step": [], "save": [], "row": []}

    def step() -> None:
        run._step(1e-3)
        run.saved.step += 1

    parts: dict[str, Callable[[], None]] = {"step": step, "save": run._save, "row": lambda: run.metrics.add(**row)}
    for _ in range(scale.timed):
        for name, do in parts.items():
            began = time.perf_counter()
            do()
            took[name].append(time.perf_counter() - began)
        checkpoint.prune(home, 1)
    median = {name: statistics.median(times) for name, times in took.items()}
    every = settings.validate_every
    share = (median["save"] + every / LOG_EVERY * median["row"]) / (every * median["step"])
    return {**{f"{name}_ms": round(1000 * t, 2) for name, t in median.items()}, "steps_between_saves": every,
            "share_of_a_step": round(share, 5)}  # fmt: skip


# ------------------------------------------------------------------------------------------------ main


def command(argv: list[str] | None = None) -> int:
    """Do all of it, print a table and one JSON line; 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each, in seconds")
    parser.add_argument("--kills", type=int, help="SIGKILLs (default: 100; quick: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of all random moments and places (default: 0)")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    torch.set_num_threads(1)
    scale = QUICK if args.quick else Scale()
    scale = dataclasses.replace(scale, kills=args.kills or scale.kills)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        line: dict[str, Any] = {"benchmark": "faults", "kills": kills(home, scale, rng)}
        line["full_disk"] = full_disk(home, scale, rng)
        last = checkpoint.checkpoints(home / "reference")[-1]
        line["damage"] = damage(last, scale.flips, scale.truncations, rng)
        line["forged"] = forged(home, last)
        line["overhead"] = overhead(home / "overhead", scale)
    line |= {"seconds": round(time.monotonic() - began), **record.machine()}
    wrong = [line["kills"]["runs_that_differ"], line["damage"]["missed"], line["forged"]["accepted"],
             not line["full_disk"].get("same_as_left_alone", True)]  # fmt: skip
    line["survived"] = not any(wrong)
    for part in ("kills", "full_disk", "damage", "forged", "overhead"):
        print(f"{part:<10} " + "  ".join(f"{name} {value}" for name, value in line[part].items()))
    print(json.dumps(line))
    if args.out:
        record.save(args.out, line)
    return 0 if line["survived"] else 1


if __name__ == "__main__":
    sys.exit(command())
