"""Interval attention against FlexAttention, dense SDPA and FlashAttention-2, in one run on the same inputs.

    python -m benchmarks.attention [--masks two-stream] [--lengths 8192] [--out benchmarks/results/NAME.json]
    python -m benchmarks.attention --device cpu --tiny        what of it runs without a GPU, in seconds

All masks come with ALiBi. Forward and backward are timed apart, with device events, the contestants alternating; the
medians go beside the speed of a large matrix product (the roofline). Then: building the plan against building
FlexAttention's block mask, and decoding. Refuses to time a wrong result: at full size, the output and the gradients
of some queries are compared with the float64 reference (the incoming gradient is zero for the others, so the
gradients of keys and values are exact, too). A rival that is wrong, or fails, is reported and not timed.

FlexAttention is given its best form: distances from indices where these are the positions, no look-ups it can do
without, a mask made for the case. FlashAttention-2 knows causal ALiBi only. Compiling is what takes most time: with
max-autotune minutes a problem, so that it takes part only where asked for: --rivals flex-max-autotune --lengths 8192
--masks causal --head-dims 64 --decode-queries.

What the goals ask for is measured first, --out is written anew after every problem, and none is begun after --budget-s
seconds. A failure of Tidal's is reported, the rest is measured nevertheless, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import record
from benchmarks.attention_problems import (
    FAILURES,
    MASKS,
    RIVALS,
    Attend,
    Form,
    Problem,
    build_block_mask,
    build_plan,
    decode_problem,
    problem,
    ready,
    said,
)
from benchmarks.clock import Clock, median_times

GOALS: tuple[tuple[str, str, tuple[str, ...], float, float], ...] = (  # rival, direction, masks, floor, goal: issue 3
    ("flex", "forward", ("causal",), 1.1, 1.25),
    ("flex", "forward", ("packed", "two-stream"), 1.2, 1.5),
    ("flex", "backward", ("causal",), 1.2, 1.5),
    ("flex", "backward", ("packed", "two-stream"), 1.3, 1.8),
    ("flash-attention-2", "forward", ("causal",), 1.05, 1.15),
    ("flash-attention-2", "backward", ("causal",), 0.9, 1.05),
    ("flex", "decode", ("decode",), 1.2, 2.0),
    ("create_block_mask", "plan", MASKS, 20.0, 100.0),
)
GOALS_AT = 8192  # keys: measured first, and the only ones for which the goals of the plan are

Named = tuple[str, str, Callable[[], dict[str, Any]]]  # a problem: its name, part of the results, what measures it


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="keys a row")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32768, help="keys in a batch, at least one row (default: 32768)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, help="(default: all but max-autotune; sdpa if --tiny)")
    parser.add_argument("--backend", help="of interval_attention (default: the device's)")
    parser.add_argument("--decode-queries", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--decode-contexts", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--decode-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget-s", type=float, default=480, help="no problem is begun later (default: 480)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes and rivals that take seconds on a CPU")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, too")
    args = parser.parse_args(argv)
    if args.tiny:
        args.lengths, args.head_dims, args.tokens, args.repeats, args.dtype = [96, 192], [32], 256, 2, "float32"
        args.heads, args.kv_heads, args.decode_queries, args.decode_contexts, args.decode_batch = 4, 2, [1, 5], [96], 2
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --tiny shows that the benchmark works")
    if args.rivals is None:
        args.rivals = ["sdpa"] if args.tiny else [name for name in RIVALS if name != "flex-max-autotune"]
    args.backend = args.backend or ("cpu" if args.device == "cpu" else "triton")
    if ":" in args.device:  # events are recorded and awaited on the current device
        torch.cuda.set_device(args.device)
    args.form = Form(args.heads, args.kv_heads, getattr(torch, args.dtype), args.device)
    torch.manual_seed(0)

    started, clock = time.monotonic(), Clock(args.device)
    roofline = measure_roofline(clock, args.form, 256 if args.tiny else 8192)
    device = record.device_name(args.device)
    print(f"{device}, {args.dtype}: a matrix product runs at {roofline:.4g} TFLOP/s", flush=True)
    results: dict[str, list[dict[str, Any]]] = {"results": [], "plans": [], "decode": []}
    failed: dict[str, str] = {}
    left_out: list[str] = []
    line: dict[str, Any] = {
        "benchmark": "attention", "device": device, "backend": args.backend, "dtype": args.dtype,
        "heads": args.heads, "kv_heads": args.kv_heads, "tokens": args.tokens, "repeats": args.repeats,
        "rivals": args.rivals, "not_asked": [name for name in RIVALS if name not in args.rivals], **record.machine(),
        "roofline_tflops": roofline, "goals": against_goals(), **results, "plan_shares": [], "failed": failed,
        "left_out": left_out,
    }  # fmt: skip
    for name, section, measure in problems(args, clock, roofline):
        if time.monotonic() - started > args.budget_s:
            left_out.append(name)
            continue
        try:
            results[section].append(measure())
        except FAILURES as reason:
            failed[name] = said(reason)
            print(f"{name}: {failed[name]}", flush=True)
        line["goals"] = against_goals(*results.values())
        line["plan_shares"] = plan_shares(results["results"], results["plans"])
        line["sleep_ms"], line["runs_with_late_launches"] = round(clock.sleep_ms, 1), clock.late
        if args.out:
            record.save(args.out, line)
    for goal in line["goals"]:
        known = goal["worst"] is not None
        found = f"worst {goal['worst']:>7.2f}  median {goal['median']:>7.2f}" if known else "not measured"
        print(f"{goal['direction']:<9} against {goal['rival']:<27} {'/'.join(goal['masks']):<40} "
              f"{found:<29}  (floor {goal['floor']}, goal {goal['goal']})")  # fmt: skip
    for share in line["plan_shares"]:
        print(f"plan {share['mask']:<13} {share['keys']:>6} keys D {share['head_dim']:>3}  takes "
              f"{share['plan_share_of_a_layer']:.1%} of the attention of one layer, forward and backward")  # fmt: skip
    for what, names in (("not asked for", line["not_asked"]), ("no time left for", left_out), ("failed", [*failed])):
        if names:
            print(f"{what}: {', '.join(names)}")
    record.write(line, args.out)
    if failed:
        sys.exit(1)


def problems(args: argparse.Namespace, clock: Clock, roofline: float) -> list[Named]:
    """All that is to be measured, what the goals ask for first: plans, which take least, then one head dimension after
    another."""
    first, *others = sorted(args.lengths, key=lambda n: n != GOALS_AT)
    print(f"{'mask':<13} {'D':>3} {'keys':>6} {'rows':>4}  {'':<18} {'forward':>10} {'roofline':>9} {'tidal ×':>8}"
          f" {'backward':>10} {'roofline':>9} {'tidal ×':>8}")  # fmt: skip

    def attention(lengths: list[int], masks: list[str], head_dims: list[int]) -> list[Named]:
        return [(f"attention {mask} D {d} {n} keys", "results",
                 functools.partial(attention_result, args, clock, roofline, mask, n, d))
                for n, mask, d in itertools.product(lengths, masks, head_dims)]  # fmt: skip

    def plan(lengths: list[int]) -> list[Named]:
        return [(f"plan {mask} {n} keys", "plans", functools.partial(plan_result, args, clock, mask, n))
                for n, mask in itertools.product(lengths, args.masks)]  # fmt: skip

    def decode(d: int) -> list[Named]:
        return [(f"decode {m} queries {n} keys D {d}", "decode", functools.partial(decode_result, args, clock, m, n, d))
                for m, n in itertools.product(args.decode_queries, args.decode_contexts)]  # fmt: skip

    asked = {mask for _, direction, masks, *_ in GOALS if direction != "plan" for mask in masks}
    of_goals = [mask for mask in args.masks if mask in asked]
    rest = [mask for mask in args.masks if mask not in asked]
    goals = [work for d in args.head_dims for work in (*decode(d), *attention([first], of_goals, [d]))]
    return [*plan([first]), *goals, *attention([first], rest, args.head_dims),
            *attention(others, args.masks, args.head_dims), *plan(others)]  # fmt: skip


# -------------------------------------------------------------------------------------------------- timing


def measure_roofline(clock: Clock, form: Form, size: int) -> float:
    """TFLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, dtype=form.dtype, device=form.device) for _ in range(2))
    return 2 * size**3 / median_times(clock, {"product": lambda: a @ b}, 10)["product"] / 1e9


def calls(p: Problem, runs: dict[str, Attend]) -> dict[str, Callable[[], Tensor]]:
    """Each contestant on the problem's inputs."""
    return {name: functools.partial(run, p.q, p.k, p.v) for name, run in runs.items()}


def times_of(p: Problem, runs: dict[str, Attend], clock: Clock, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds forward (for training, keeping what the backward needs) and backward."""
    dout = torch.randn_like(p.q)

    def backward(forward: Callable[[], Tensor]) -> float:
        out = forward()  # anew every time: compiled code reuses the memory of what it saved
        return clock(lambda: torch.autograd.grad(out, (p.q, p.k, p.v), dout))

    ahead, back = (median_times(time_of, calls(p, runs), repeats) for time_of in (clock, backward))
    return {name: {"forward_ms": ahead[name], "backward_ms": back[name]} for name in runs}


def attention_result(
    args: argparse.Namespace, clock: Clock, roofline: float, mask: str, n_keys: int, head_dim: int
) -> dict[str, Any]:
    """Forward and backward of one mask, length and head dimension."""
    n_batch = max(1, args.tokens // n_keys)
    p = problem(mask, n_keys, n_batch, head_dim, args.form)
    entrants = ready(p, args.rivals, args.backend)
    times = times_of(p, entrants.runs, clock, args.repeats)
    for name, t in times.items():
        cells = f"{mask:<13} {head_dim:>3} {n_keys:>6} {n_batch:>4}  {name:<18}"
        for key, factor in (("forward", 1.0), ("backward", 2.5)):
            ratio = t[f"{key}_ms"] / times["tidal"][f"{key}_ms"]
            t[f"{key}_tflops"] = factor * p.flops / t[f"{key}_ms"] / 1e9
            t[f"{key}_share"] = t[f"{key}_tflops"] / roofline
            cells += f" {t[f'{key}_ms']:>7.3f} ms {t[f'{key}_share']:>8.1%} {ratio:>8.2f}"
        print(cells, flush=True)
    for name, why in entrants.failed.items():
        print(f"{mask:<13} {head_dim:>3} {n_keys:>6} {n_batch:>4}  {name:<18} {why}", flush=True)
    return {"mask": mask, "head_dim": head_dim, "keys": n_keys, "queries": p.q.shape[2], "batch": n_batch,
            "tidal_error": entrants.error, "times": rounded(times), "failed": entrants.failed}  # fmt: skip


def plan_result(args: argparse.Namespace, clock: Clock, mask: str, n_keys: int) -> dict[str, Any]:
    """Building the plan against building FlexAttention's block mask, as each batch must: by the wall clock, and by the
    device's, which launches do not count for."""
    p = problem(mask, n_keys, max(1, args.tokens // n_keys), args.head_dims[0], args.form)
    failed: dict[str, str] = {}
    works: dict[str, Callable[[], object]] = {
        "tidal": functools.partial(build_plan, p, args.backend),
        "create_block_mask": functools.partial(build_block_mask, p, create_block_mask),
    }
    if "create_block_mask-compiled" in args.rivals:
        torch._dynamo.reset()
        compiled = functools.partial(build_block_mask, p, torch.compile(create_block_mask, dynamic=False))
        try:
            compiled()
            works["create_block_mask-compiled"] = compiled
        except FAILURES as reason:
            failed["create_block_mask-compiled"] = said(reason)
    wall, device = (median_times(time_of, works, args.repeats) for time_of in (clock.wall, clock))
    times = {name: {"plan_ms": wall[name], "plan_device_ms": device[name]} for name in works}
    cells = [f"{n} {t['plan_ms']:.3f} ms (device {t['plan_device_ms']:.3f})" for n, t in times.items()]
    cells += [f"{n}: {why}" for n, why in failed.items()]
    print(f"plan {mask:<13} {n_keys:>6} keys  {'  '.join(cells)}", flush=True)
    return {"mask": mask, "keys": n_keys, "failed": failed, "times": rounded(times)}


def decode_result(args: argparse.Namespace, clock: Clock, n_queries: int, n_keys: int, head_dim: int) -> dict[str, Any]:
    """A few queries a row over caches; what FlexAttention builds is not counted."""
    p = decode_problem(n_queries, n_keys, args.decode_batch, head_dim, args.form)
    with torch.no_grad():
        entrants = ready(p, args.rivals, args.backend, backward=False)
        times = median_times(clock, calls(p, entrants.runs), args.repeats)
    found = [f"{n} {t * 1e3:.1f} µs" for n, t in times.items()] + [f"{n}: {why}" for n, why in entrants.failed.items()]
    print(f"decode {n_queries:>2} queries {n_keys:>6} keys D {head_dim:>3}  {'  '.join(found)}", flush=True)
    return {"queries": n_queries, "keys": n_keys, "head_dim": head_dim, "batch": args.decode_batch,
            "tidal_error": entrants.error, "failed": entrants.failed,
            "times": rounded({n: {"decode_ms": t} for n, t in times.items()})}  # fmt: skip


# ------------------------------------------------------------------------------------------------- results


def against_goals(*sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster Tidal is than a rival in its best form, at worst and in the median, beside floor and goal;
    None where nothing was measured."""
    met = []
    for rival, direction, masks, floor, goal in GOALS:
        ratios = []
        for result in (r for section in sections for r in section if r.get("mask", "decode") in masks):
            key = f"{direction}_ms"
            times = {name: t[key] for name, t in result["times"].items() if key in t}
            theirs = [t for name, t in times.items() if name == rival or name.startswith(f"{rival}-")]
            if theirs and "tidal" in times and (direction != "plan" or result["keys"] == GOALS_AT):
                ratios.append(min(theirs) / times["tidal"])
        met.append({"rival": rival, "direction": direction, "masks": masks, "floor": floor, "goal": goal,
                    "worst": round(min(ratios), 3) if ratios else None,
                    "median": round(statistics.median(ratios), 3) if ratios else None})  # fmt: skip
    return met


def plan_shares(results: list[dict[str, Any]], plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What building the plan takes, as a share of the attention of one layer, forward and backward.

    Divided by the number of layers that share the plan, it bounds the plan's share of a training step from above.
    """
    building = {(r["mask"], r["keys"]): r["times"]["tidal"]["plan_ms"] for r in plans}
    shares = []
    for result in results:
        layer, key = result["times"]["tidal"], (result["mask"], result["keys"])
        if key in building:
            share = building[key] / (layer["forward_ms"] + layer["backward_ms"])
            shares.append({"mask": key[0], "keys": key[1], "head_dim": result["head_dim"],
                           "plan_share_of_a_layer": float(f"{share:.3g}")})  # fmt: skip
    return shares


def rounded(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Five digits are more than the clock has."""
    return {name: {key: float(f"{value:.5g}") for key, value in t.items()} for name, t in times.items()}


if __name__ == "__main__":
    main()
