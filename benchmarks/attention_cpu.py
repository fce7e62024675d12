"""Tidal's CPU attention against SDPA with a dense bias and FlexAttention (forward only), on the two-stream mask.

    python -m benchmarks.attention_cpu [--lengths 512 4096] [--out benchmarks/results/attention-cpu.json]

Plan, bias and block mask are built beforehand, as they serve all layers. Contestants alternate in one process, and
ratios are medians over the rounds: the machine's speed may change from one round to the next. What is kept in memory
by a forward and backward pass is measured in a process of its own for each, as growth of the peak (bias included).
Refuses to time a wrong result. FlexAttention has no backward pass on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.attention_problems import Attend, Form, Problem, problem, ready, sdpa, tidal
from benchmarks.clock import Clock, alternating

GOAL_AT, GOAL = 4096, 2.0  # keys, times faster than dense SDPA forward and backward: issue 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="keys")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which takes long to compile")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, too")
    parser.add_argument("--memory-of", choices=["tidal", "sdpa"], help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    form = Form(args.heads, args.heads, torch.float32, "cpu")
    if args.memory_of:
        print(peak_growth(problem("two-stream", args.lengths[0], 1, args.head_dim, form), args.memory_of))
        return

    print(f"{'keys':>5} {'queries':>8}  {'':<6} {'forward + backward':>19} {'tidal ×':>8} {'forward':>11}"
          f" {'tidal ×':>8} {'memory':>9}")  # fmt: skip
    results = []
    for n_keys in args.lengths:
        p = problem("two-stream", n_keys, 1, args.head_dim, form)
        results.append(measure(p, args.repeats, not args.no_flex))
        results[-1]["memory_mb"] = {name: round(memory_of(name, n_keys, args), 1) for name in ("tidal", "sdpa")}
        print_result(results[-1])
    goal = next((r["times_faster"]["both"]["sdpa"] for r in results if r["keys"] == GOAL_AT), None)
    if goal is not None:
        print(f"goal: at least {GOAL}× SDPA with a dense bias, forward and backward, {GOAL_AT} keys; measured {goal}×")
    record.write({
        "benchmark": "attention-cpu", "mask": "two-stream", "results": results, "goal": {"at": GOAL_AT, "goal": GOAL,
        "measured": goal}, "heads": args.heads, "head_dim": args.head_dim, "repeats": args.repeats,
        **record.machine(),
    }, args.out)  # fmt: skip


def measure(p: Problem, repeats: int, flex: bool) -> dict[str, Any]:
    """Medians in milliseconds, and how many times faster than each rival Tidal is."""
    clock = Clock("cpu")
    dout = torch.randn_like(p.q)
    both = ready(p, ["sdpa"], "cpu")
    forward = ready(p, ["sdpa", "flex"] if flex else ["sdpa"], "cpu", backward=False)
    if failed := both.failed | forward.failed:
        raise SystemExit(f"a rival failed: {failed}")

    def forward_backward(attend: Attend) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(p.q, p.k, p.v), (p.q, p.k, p.v), dout)

    def only_forward(attend: Attend) -> Callable[[], Tensor]:
        q, k, v = (x.detach() for x in (p.q, p.k, p.v))
        return lambda: attend(q, k, v)

    times = {
        "both": alternating(clock, {name: forward_backward(run) for name, run in both.runs.items()}, repeats),
        "forward": alternating(clock, {name: only_forward(run) for name, run in forward.runs.items()}, repeats),
    }
    return {
        "keys": p.k.shape[2], "queries": p.q.shape[2], "tidal_error": both.error,
        "milliseconds": {part: {name: float(f"{statistics.median(t):.4g}") for name, t in of.items()}
                         for part, of in times.items()},
        "times_faster": {part: {name: round(statistics.median(x / y for x, y in zip(t, of["tidal"], strict=True)), 2)
                                for name, t in of.items() if name != "tidal"} for part, of in times.items()},
    }  # fmt: skip


def memory_of(name: str, n_keys: int, args: argparse.Namespace) -> float:
    """MB of a forward and backward pass in a fresh process."""
    flags = ["--memory-of", name, "--lengths", str(n_keys), "--heads", str(args.heads),
             "--head-dim", str(args.head_dim), "--threads", str(args.threads)]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.attention_cpu", *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return float(json.loads(done.stdout))


def peak_growth(p: Problem, name: str) -> float:
    """MB by which this process grows, at its peak, while a contestant is made ready and runs."""
    small = problem("two-stream", 256, 1, p.q.shape[3], Form(p.q.shape[1], p.k.shape[1], torch.float32, "cpu"))
    before = 0.0
    for each in (small, p):  # what is loaded on first use is not counted
        before = resident("VmRSS")
        attend = tidal(each, "cpu") if name == "tidal" else sdpa(each)
        out = attend(each.q, each.k, each.v)
        torch.autograd.grad(out, (each.q, each.k, each.v), torch.ones_like(out))
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """MB of this process, now (VmRSS) or at its peak (VmHWM). Linux only; getrusage would count the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(which))


def print_result(result: dict[str, Any]) -> None:
    """One line a contestant."""
    forward, both = result["milliseconds"]["forward"], result["milliseconds"]["both"]
    for name, ahead in forward.items():
        ratios = [result["times_faster"][part].get(name, 1.0) for part in ("both", "forward")]
        first = f"{both[name]:>16.4g} ms {ratios[0]:>8.2f}" if name in both else " " * 28
        memory = f"{result['memory_mb'][name]:>6.0f} MB" if name in result["memory_mb"] else ""
        print(f"{result['keys']:>5} {result['queries']:>8}  {name:<6} {first} {ahead:>8.4g} ms {ratios[1]:>8.2f} "
              f"{memory}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
