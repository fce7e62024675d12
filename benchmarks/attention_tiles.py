"""Which tiles make each Triton kernel fastest on this GPU: all candidates, checked and timed in turns.

    python -m benchmarks.attention_tiles [--head-dims 64 128] [--mask two-stream] [--out benchmarks/results/NAME.json]
    TRITON_INTERPRET=1 python -m benchmarks.attention_tiles --tiny     what of it runs without a GPU

For one kernel after another the tile is varied, with those of tidal/kernels/triton_attention.py for the others: the
forward pass is timed for `forward`, the backward for the rest, and for `decode` a step of 8 rows over caches of up to
32,768 keys, with other tiles of keys and numbers of programs. "(now)" marks the tile in use. First the candidates are
compiled, in as many processes as there are cores, into Triton's cache. One that is wrong, or wants more than a block
may have, is reported and not timed. --out is written anew after every kernel, and none is begun after --budget-s
seconds. Ends in one JSON line; what is taken from it goes into TILES, and must then show no spills
(`python -m benchmarks.kernel_resources`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.attention import times_of
from benchmarks.attention_problems import (
    FAILURES,
    MASKS,
    Attend,
    Check,
    Form,
    Problem,
    decode_problem,
    problem,
    said,
    wrong,
)
from benchmarks.clock import Clock, median_times
from tidal.kernels import TilePlan
from tidal.kernels.triton_attention import Config, Tile, architecture, attend, configuration
from tidal.kernels.triton_decode import Launch, decode, launch_of, rows_of_tile
from tidal.kernels.triton_tiles import INTERPRETED

KERNELS = ("forward", "dq", "dkdv", "dkdv_atomic", "dq_slopes", "decode")
TINY = [Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)]
TINY_DECODE = [Launch(16, 4, 1, 1), Launch(32, 4, 1, 4)]
CACHE = (32768, 8)  # keys and rows, for decoding
SHARED_BYTES = 227 << 10  # of a block on sm_90


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table for each kernel and head dimension, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask", default="causal", choices=MASKS, help="(default: causal)")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--keys", type=int, default=8192, help="a row (default: 8192)")
    parser.add_argument("--batch", type=int, default=4, help="rows (default: 4)")
    parser.add_argument("--heads", type=int, default=16, help="(default: 16)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=10, help="(default: 10)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile (default: one a core)")
    parser.add_argument("--budget-s", type=float, default=480, help="no kernel is begun later (default: 480)")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds in the interpreter")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, too")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or (args.tiny and INTERPRETED.value)):
        parser.error("no GPU here; TRITON_INTERPRET=1 and --tiny show that the benchmark works")
    if args.tiny:
        args.head_dims, args.keys, args.batch, args.heads, args.repeats = [32], 20, 1, 1, 1
    form = Form(args.heads, args.heads, getattr(torch, args.dtype), "cpu" if INTERPRETED.value else "cuda")
    torch.manual_seed(0)

    started, clock = time.monotonic(), Clock(form.device)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    left_out: list[str] = []
    line = {"benchmark": "attention-tiles", "device": record.device_name(form.device), "mask": args.mask,
            "keys": args.keys, "batch": args.batch, "heads": args.heads, "dtype": args.dtype, "repeats": args.repeats,
            "results": results, "failed": failed, "left_out": left_out, **record.machine()}  # fmt: skip
    with ExitStack() as stack:
        workers = functools.partial(ProcessPoolExecutor, args.processes, multiprocessing.get_context("spawn"))
        pool = None if INTERPRETED.value else stack.enter_context(workers())
        for kernel, head_dim in itertools.product(args.kernels, args.head_dims):
            name = f"{kernel} D {head_dim}"
            if time.monotonic() - started > args.budget_s:
                left_out.append(name)
                continue
            tiny = (TINY_DECODE if kernel == "decode" else TINY) if args.tiny else None
            tiles = candidates(kernel, head_dim, now(kernel, head_dim, form), tiny)
            try:
                if pool:
                    list(pool.map(functools.partial(compile_one, form, kernel, head_dim), tiles))
                if kernel == "decode":
                    n_keys, n_batch = (args.keys, args.batch) if args.tiny else CACHE
                    p = decode_problem(1, n_keys, n_batch, head_dim, form)
                else:
                    p = problem(args.mask, args.keys, args.batch, head_dim, form)
                results.append(compare(p, kernel, tiles, clock, args.repeats))
            except FAILURES as reason:
                failed[name] = said(reason)
                if isinstance(reason, BrokenProcessPool):  # a compiler crashed
                    pool = stack.enter_context(workers())
            if args.out:
                record.save(args.out, line)
    for what, names in (("no time left for", left_out), ("failed", [*failed])):
        if names:
            print(f"{what}: {', '.join(names)}")
    record.write(line, args.out)
    if failed:
        sys.exit(1)


def now(kernel: str, head_dim: int, form: Form) -> Tile | Launch:
    """The tile in use."""
    if kernel == "decode":
        return launch_of(rows_of_tile(form.heads // form.kv_heads, form.dtype), head_dim, form.dtype)
    tile: Tile = getattr(configuration(form.dtype, head_dim, architecture(torch.device(form.device))), kernel)
    return tile


def candidates(
    kernel: str, head_dim: int, in_use: Tile | Launch, others: Sequence[Tile | Launch] | None = None
) -> list[Tile | Launch]:
    """The tile in use, then those of 32 to 128 queries and keys; of 32 queries only for dkdv, of 32 keys only for the
    others; with three or four stages, since with two nothing is copied ahead; and only what may fit. For decoding, 64
    or 128 keys and two to eight programs a multiprocessor."""
    if kernel == "decode" and others is None:
        others = [Launch(*fields) for fields in itertools.product((64, 128), (4, 8), (3, 4), (2, 4, 8))]
    sizes = [(128, 128), (128, 64), (64, 128), (64, 64)] + ([(32, 128), (32, 64)] if "dkdv" in kernel else [(128, 32)])
    if others is None:
        tiles = [Tile(m, n, warps, stages) for (m, n), warps, stages in itertools.product(sizes, (4, 8), (3, 4))]
        others = [tile for tile in tiles if may_fit(kernel, tile, head_dim)]
    return list(dict.fromkeys([in_use, *others]))


def may_fit(kernel: str, tile: Tile, head_dim: int) -> bool:
    """Whether a tile of 16-bit operands leaves a block the shared memory that it may have on Hopper, and a thread
    enough of its 255 registers. Others would take the compiler the longest, up to 48 s each, and then not launch, or
    spill.
    """
    m, n = tile.m, tile.n
    if kernel == "forward":  # q stays, k and v come; out and scores are summed up
        kept, coming, sums = m, 2 * n, m * head_dim + m * n
    elif kernel.startswith("dq"):  # q and dout stay, k and v come; dq, scores and their gradients
        kept, coming, sums = 2 * m, 2 * n, m * head_dim + 2 * m * n
    else:  # k and v stay, q and dout come; dk, dv, scores and their gradients
        kept, coming, sums = 2 * n, 2 * m, 2 * n * head_dim + 2 * m * n
    return 2 * head_dim * (kept + tile.stages * coming) <= SHARED_BYTES and sums < 255 * 32 * tile.warps


def attention_with(p: Problem, kernel: str, tile: Tile | Launch) -> Attend:
    """Tidal's kernels in the form that launches `kernel`, with this tile in place of the one in use."""
    if isinstance(tile, Launch):
        return lambda q, k, v: decode(q, k, v, *p.rest, q.shape[3] ** -0.5, None, list(tile))
    chosen = configuration(p.q.dtype, p.q.shape[3], architecture(p.q.device))
    config: Config = chosen._replace(**{kernel: tile})
    plan = TilePlan.build(p.ranges, p.k.shape[2])
    slopes = p.slopes.clone().requires_grad_(kernel == "dq_slopes")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[3] ** -0.5
        return attend(
            q, k, v, p.ranges, p.q_position, p.k_position, slopes, scale, plan, config, kernel == "dkdv_atomic"
        )

    return run


def compile_one(form: Form, kernel: str, head_dim: int, tile: Tile | Launch) -> None:
    """In a process of its own: run it once on little, so that Triton's cache has it; failures come again later."""
    decoding = kernel == "decode"  # over enough keys to split them
    p = decode_problem(1, 4096, 1, head_dim, form) if decoding else problem("causal", 256, 1, head_dim, form)
    try:
        out = attention_with(p, kernel, tile)(p.q, p.k, p.v)
        if kernel not in ("forward", "decode"):
            torch.autograd.grad(out.sum(), (p.q, p.k, p.v))
    except FAILURES as reason:  # comes again, and is reported, where it is timed
        print(f"{kernel} D {head_dim} {tuple(tile)}: {type(reason).__name__}", file=sys.stderr)


def compare(p: Problem, kernel: str, tiles: list[Tile | Launch], clock: Clock, repeats: int) -> dict[str, Any]:
    """The candidates of a kernel, the one in use first among them, from the fastest on."""
    head_dim, check = p.q.shape[3], Check(p, backward=kernel != "decode")
    runs: dict[str, Attend] = {}
    labels: dict[str, Tile | Launch] = {}
    failed: dict[str, str] = {}
    for tile in tiles:
        label = f"{tile.m}×{tile.n}" if isinstance(tile, Tile) else f"{tile.n} keys, {tile.per_core} a core"
        label += f", {tile.warps} warps, {tile.stages} stages" + " (now)" * (tile == tiles[0])
        labels[label] = tile
        try:
            attention = attention_with(p, kernel, tile)
            bad = wrong(check.errors(attention), p.q.dtype)
        except FAILURES as reason:
            failed[label] = said(reason)
            continue
        if bad:
            failed[label] = f"wrong result: errors {bad}"
        else:
            runs[label] = attention
    part = {"forward": "forward_ms", "decode": "decode_ms"}.get(kernel, "backward_ms")
    if part != "backward_ms":
        works: dict[str, Callable[[], Tensor]] = {
            label: functools.partial(run, p.q, p.k, p.v) for label, run in runs.items()
        }
        times = median_times(clock, works, repeats)
    else:
        times = {label: t[part] for label, t in times_of(p, runs, clock, repeats).items()}
    times = {label: float(f"{t:.5g}") for label, t in sorted(times.items(), key=lambda item: item[1])}
    for label, t in times.items():
        slower = t / min(times.values())
        print(f"{kernel:<12} D {head_dim:>3}  {label:<42} {t:>9.3f} ms  × {slower:.2f}", flush=True)
    for label, why in failed.items():
        print(f"{kernel:<12} D {head_dim:>3}  {label:<42} {why}", flush=True)
    fastest = labels[next(iter(times))] if times else None
    return {"kernel": kernel, "head_dim": head_dim, "of": part, "times": times, "fastest": fastest, "failed": failed}


if __name__ == "__main__":
    main()
