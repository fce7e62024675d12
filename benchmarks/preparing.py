"""Peak memory and speed of preparing one long document, and many short ones, and of training from them.

    python -m benchmarks.preparing --text FILE --mb 200 --lines 1000000

The data are lines of a text in random order, with one word in 60 replaced by a random one, so that blocks keep coming
that were never met. Memory is the peak of the resident set (VmHWM), looked up ten times a second; of training, also
the part of it that is no page of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import record


def lines(text: Path) -> Iterator[str]:
    """Endless lines, the same each time."""
    rng = random.Random(1)
    known = [line.split(" ") for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    while True:
        words = ["".join(rng.choices("aeioustrnlmdk", k=7)) if rng.random() < 1 / 60 else word
                 for word in rng.choice(known)]  # fmt: skip
        yield " ".join(words) + "\n"


def write(path: Path, source: Iterator[str], mb: float, n: int) -> int:
    """One document of so many megabytes, or .jsonl of so many lines; bytes of text."""
    size = count = 0
    with open(path, "w", encoding="utf-8") as file:
        while count < n if n else size < mb * 1e6:
            line = next(source)
            file.write(json.dumps({"text": line}) + "\n" if n else line)
            size, count = size + len(line.encode()), count + 1
    return size


def watched(command: Sequence[str], folder: Path) -> dict[str, float | list[int]]:
    """Run a command of Tidal to its end: seconds, and MB of its processes, the first one first."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    peaks: dict[int, tuple[int, int]] = {}
    while process.poll() is None:
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                status = Path(f"/proc/{pid}/status").read_text() if os.getsid(pid) == process.pid else ""
            except (ProcessLookupError, FileNotFoundError):
                continue
            if found := re.search(r"VmHWM:\s+(\d+).*RssAnon:\s+(\d+)", status, re.DOTALL):
                peak, anonymous = (int(kilobytes) // 1024 for kilobytes in found.groups())
                peaks[pid] = peak, max(anonymous, peaks.get(pid, (0, 0))[1])
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    seconds = round(time.monotonic() - began, 1)
    sizes = [peaks[pid] for pid in sorted(peaks)]
    return {"seconds": seconds, "peak_mb": [peak for peak, _ in sizes], "anonymous_mb": [size for _, size in sizes]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--mb", type=float, default=200)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true")
    args = parser.parse_args()
    results: dict[str, object] = {"benchmark": "preparing", "workers": args.workers}
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), lines(args.text)
        for kind, n in (("one.txt", 0), ("many.jsonl", args.lines)):
            size = write(folder / kind, source, args.mb, n)
            prepare = watched(["tidal.prepare", "--data", kind, "--out", f"{kind}.shards", "--workers",
                               str(args.workers)], folder)  # fmt: skip
            on_disk = sum(p.stat().st_size for p in (folder / f"{kind}.shards").rglob("*") if p.is_file())
            train: dict[str, float | list[int]] = {}
            if not args.no_training:
                train = watched(["tidal.train", "--prepared", f"{kind}.shards", "--max-steps", "20", "--no-doctor",
                                 "--out", f"run-{kind}"], folder)  # fmt: skip
            results[kind] = {"bytes": size, "shards_bytes": on_disk, "prepare": prepare, "train": train}
            print(f"{kind}: {size / 1e6:.1f} MB, shards {on_disk / 1e6:.1f} MB; prepared in {prepare['seconds']} s, "
                  f"MB of each process {prepare['peak_mb']}; training {train.get('peak_mb')}, not file "
                  f"pages {train.get('anonymous_mb')}", flush=True)  # fmt: skip
    print(json.dumps({**results, **record.machine()}))


if __name__ == "__main__":
    main()
