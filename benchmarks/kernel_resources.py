"""What each Triton kernel takes of a GPU: registers, spills, shared memory, instructions; on a machine without one.

    python -m benchmarks.kernel_resources [--archs 90] [--head-dims 64 128] [--dtypes bfloat16 float32]

Every kernel is compiled as it would be launched (tidal/kernels/aot.py), once for each architecture, dtype and head
dimension; a "!" marks one that spills or wants more shared memory than a block may have. The last column counts the
machine instructions that a thread issues for each of its scores, in the loops over tiles that are shifted, full, and
partial with the mask of one range and of both (docs/kernels.md), as the kernel has them; "blocks" is how many a
multiprocessor holds at a time; "ahead" how many copies of the next tiles may be under way while one is computed, in the
loop that has the fewest (0: none). Ends in one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from tidal.kernels.aot import KernelSpec, Resources, copies_ahead, kernel_specs, resources, score_loops

ARCHITECTURES = (80, 90, 100)
"""compute capabilities (× 10) that are tried: A100, H100 and H200, B200"""

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""bytes of shared memory that one block may have (CUDA C++ Programming Guide, "Compute Capabilities")"""
RESERVED, REGISTERS, WARPS = 1024, 65536, {86: 48}
"""of a multiprocessor: bytes of shared memory that each block takes besides, registers, warps (64 on others)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=list(ARCHITECTURES), choices=list(SHARED_LIMIT),
                        help="compute capability × 10")  # fmt: skip
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32, 64, 128], choices=[32, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kernels", nargs="+", help="only those whose names begin so")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, too")
    args = parser.parse_args(argv)

    print(f"{'arch':<6} {'dtype':<9} {'D':>3}  {'kernel':<16} {'tile':>8} {'warps':>5} {'stages':>6}"
          f" {'registers':>9} {'spills':>7} {'shared':>9} {'of limit':>8} {'blocks':>6} {'ahead':>5}"
          "  a score")  # fmt: skip
    kernels: list[dict[str, Any]] = []
    for arch in args.archs:
        for dtype in args.dtypes:
            for head_dim in args.head_dims:
                for spec in kernel_specs(getattr(torch, dtype), head_dim, arch):
                    if args.kernels and not spec.name.startswith(tuple(args.kernels)):
                        continue
                    try:
                        found = resources(spec, arch)
                    except ValueError as reason:  # the interpreter is on
                        parser.error(str(reason))
                    per_score = instructions_per_score(spec, found.cubin)
                    ahead = min(copies_ahead(found.ttgir)) if per_score else None
                    share = found.shared / SHARED_LIMIT[arch]
                    blocks = resident_blocks(spec.num_warps, found, arch)
                    mark = "  !" if found.spills or share > 1 else ""
                    print(f"sm_{arch:<3} {dtype:<9} {head_dim:>3}  {spec.name:<16} {spec.tile:>8} {spec.num_warps:>5}"
                          f" {spec.num_stages:>6} {found.registers:>9} {found.spills:>5} B {found.shared:>7} B"
                          f" {share:>8.0%} {blocks:>6} {'' if ahead is None else ahead:>5} "
                          f" {' '.join(f'{x:.1f}' for x in per_score)}{mark}", flush=True)  # fmt: skip
                    kernels.append({
                        "arch": arch, "dtype": dtype, "head_dim": head_dim, "kernel": spec.name, "tile": spec.tile,
                        "warps": spec.num_warps, "stages": spec.num_stages, "registers": found.registers,
                        "spill_bytes": found.spills, "shared_bytes": found.shared, "shared_limit": SHARED_LIMIT[arch],
                        "resident_blocks": blocks, "copies_ahead": ahead, "instructions_per_score": per_score,
                    })  # fmt: skip
    spilling = sum(k["spill_bytes"] > 0 for k in kernels)
    too_large = sum(k["shared_bytes"] > k["shared_limit"] for k in kernels)
    print(f"{len(kernels)} kernels: {spilling} spill, {too_large} want more shared memory than there is")
    record.write({"benchmark": "kernel-resources", "kernels": kernels, "spilling": spilling, "too_large": too_large,
                  **record.machine()}, args.out)  # fmt: skip


def resident_blocks(num_warps: int, found: Resources, arch: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at a time: as many as its registers, which a warp gets in
    units of 256, its shared memory and its warps allow. 0 where not even one fits."""
    of_a_warp = -(-found.registers * 32 // 256) * 256
    return min(
        REGISTERS // (of_a_warp * num_warps),
        (SHARED_LIMIT[arch] + RESERVED) // (found.shared + RESERVED),
        WARPS.get(arch, 64) // num_warps,
        32 if arch in (80, 90, 100) else 16,
    )


def instructions_per_score(spec: KernelSpec, cubin: bytes) -> list[float]:
    """How many instructions each loop over scores issues for one score of a thread; none for kernels without."""
    if "×" not in spec.tile:
        return []
    m, n = map(int, spec.tile.split("×"))
    return [round(length * 32 * spec.num_warps / (m * n), 2) for length in score_loops(cubin)]


if __name__ == "__main__":
    main()
