"""Compiled ahead of time, the kernels neither spill registers nor want more shared memory than there is.

In a process of its own, where Triton does not interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import kernel_resources
from benchmarks.kernel_resources import ARCHITECTURES, SHARED_LIMIT
from tests.commands import ROOT, run
from tidal.kernels.aot import Resources, kernel_specs, resources
from tidal.kernels.triton_tiles import INTERPRETED

PROGRAM = """
import json, sys, torch
from tidal.kernels import triton_attention
from tidal.kernels.aot import copies_ahead, kernel_specs, resources
from tidal.kernels.api import BACKENDS
print("devices:", *BACKENDS["triton"].devices, file=sys.stderr)
for dtype, head_dim, arch, kernels, tile in json.loads(sys.argv[1]):
    if tile:
        triton_attention.configuration = lambda *_: triton_attention.Config(*[triton_attention.Tile(*tile)] * 5)
    for spec in kernel_specs(getattr(torch, dtype), head_dim, arch):
        if not kernels or spec.name in kernels:
            loose = [p.name for p in spec.kernel.params if spec.types[p.name] == "i32" and not p.do_not_specialize]
            assert not {*loose} - {*spec.aligned}, (spec.name, loose)  # 1 and multiples of 16 would be compiled anew
            found = resources(spec, arch)
            ahead = copies_ahead(found.ttgir)
            print(json.dumps([arch, spec.name, spec.tile, found.registers, found.spills, found.shared, ahead]))
"""
ATTENTION = ["forward", "delta", "dq", "dkdv", "dkdv_atomic"]
PLAN = ["columns", "rows", "rows twice", "order"]  # of integers: much the same on every architecture

Found = tuple[int, str, str, int, int, int, list[int]]
"""architecture, name, tile, registers, spilled bytes, bytes of shared memory, copies ahead in each loop over scores"""


def compiled(*requests: tuple[str, int, int, list[str], list[int]]) -> list[Found]:
    """Each request: dtype, head dimension, architecture, kernels (all if empty), tile (the chosen one if empty)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "devices: cuda\n" in done.stderr  # uninterpreted, the backend is not for the CPU
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def assert_fits(found: list[Found]) -> None:
    for arch, name, tile, registers, spills, shared, _ in found:
        assert 16 <= registers <= 255, (name, tile)
        assert spills == 0, f"{name} {tile} spills {spills} bytes on sm_{arch}"
        assert shared <= SHARED_LIMIT[arch], f"{name} {tile} wants {shared} bytes of shared memory on sm_{arch}"


def assert_copies_ahead(found: list[Found]) -> None:
    """While a tile is computed, the next is on its way."""
    for arch, name, tile, *_, ahead in found:
        if name.startswith(("forward", "dq", "dkdv")):
            assert len(ahead) >= 3
            assert min(ahead) > 0, f"{name} {tile} waits for what it has just asked for on sm_{arch}: {ahead}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a GPU's time for what needs none; -m slow compiles all")
def test_training_at_the_default_head_dimension() -> None:
    """And the measurements themselves: 128 × 128 in four warps is known to spill, two stages not to copy ahead."""
    once = [*PLAN, "decode 4 rows", "decode merge"]
    kernels = {arch: [*ATTENTION, *(once if arch == 90 else ())] for arch in ARCHITECTURES}
    requests = [("bfloat16", 32, arch, names, []) for arch, names in kernels.items()]
    *found, too_large, late = compiled(*requests, ("bfloat16", 64, 90, ["forward"], [128, 128, 4, 3]),
                                       ("bfloat16", 32, 90, ["dkdv"], [32, 64, 4, 2]))  # fmt: skip
    compiled_for = list(dict.fromkeys((arch, name) for arch, name, *_ in found))
    assert compiled_for == [(arch, name) for arch, names in kernels.items() for name in names]
    assert_fits(found)
    with pytest.raises(AssertionError, match=r"forward 128×128 spills \d+ bytes on sm_90"):
        assert_fits([too_large])
    assert_copies_ahead([one for one in found if one[0] == 90])
    with pytest.raises(AssertionError, match=r"dkdv 32×64 waits for what it has just asked for on sm_90: \[0, 0"):
        assert_copies_ahead([late])


def test_the_kernel_of_a_test() -> None:
    """Triton's compiler refuses more than its interpreter does."""
    program = (
        "from test_triton_plan import launch_order_kernel as kernel\n"
        "from tidal.kernels.aot import KernelSpec, resources\n"
        "resources(KernelSpec('order', kernel, {'order': '*i32', 'found': '*i64'}, {}, 4, 3), 90)"
    )
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/kernels'}"}
    done = run([sys.executable, "-c", program], ROOT, env=environment)
    assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kernel(dtype: str, head_dim: int) -> None:
    found = compiled(*((dtype, head_dim, arch, [], []) for arch in ARCHITECTURES))
    assert len(found) >= len(ARCHITECTURES) * (len(ATTENTION) + len(PLAN) + 3)
    assert_fits(found)
    if dtype != "float32":
        assert_copies_ahead([one for one in found if one[0] == 90])


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton does not interpret here")
def test_interpreted_kernels_are_refused() -> None:
    spec = kernel_specs(torch.bfloat16, 64, 90)[0]
    with pytest.raises(ValueError, match=r"^kernels cannot be compiled while TRITON_INTERPRET is set: unset it$"):
        resources(spec, 90)


# ---------------------------------------------------------------------------- benchmarks.kernel_resources


def test_kernel_resources_prints_a_table() -> None:
    flags = ["--archs", "90", "--head-dims", "64", "--kernels", "decode", "forward"]
    done = run([sys.executable, "-m", "benchmarks.kernel_resources", *flags], ROOT, env={"TRITON_INTERPRET": "0"})
    assert done.code == 0, done.err
    line = json.loads(done.lines[-1])
    assert [k["kernel"] for k in line["kernels"]] == [
        "forward", "decode 4 rows", "decode 4 whole", "decode 256 rows", "decode 256 whole", "decode merge"
    ]  # fmt: skip
    shifted, full, one_range, both = line["kernels"][0]["instructions_per_score"]
    assert 5 < shifted < full < one_range < both < 50
    assert (line["spilling"], line["too_large"]) == (0, 0)
    for kernel in line["kernels"]:
        assert 16 <= kernel["registers"] <= 255
        assert kernel["shared_bytes"] <= kernel["shared_limit"] == 227 * 1024
        assert kernel["resident_blocks"] >= 1
        assert (kernel["copies_ahead"] or 0) > 0 or kernel["kernel"] == "decode merge"
    assert done.lines[-2] == "6 kernels: 0 spill, 0 want more shared memory than there is"
    assert len(done.lines) == 9


def test_blocks_that_a_multiprocessor_holds() -> None:
    """By registers, which come in units of 256 a warp, by shared memory, by warps, and at most 32; on sm_86 16."""
    found = [kernel_resources.resident_blocks(warps, Resources(registers, 0, kilobytes * 1024, b""), arch)
             for warps, registers, kilobytes, arch in
             ((8, 234, 83, 90), (4, 121, 10, 90), (4, 128, 100, 90), (8, 32, 1, 90), (1, 16, 0, 90), (1, 16, 0, 86),
              (4, 16, 228, 90))]  # fmt: skip
    assert found == [1, 4, 2, 8, 32, 16, 0]


def test_kernel_resources_of_a_gpu_whose_limits_are_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        kernel_resources.main(["--archs", "89", "--head-dims", "64", "--kernels", "none"])
    assert stop.value.code == 2
    assert "--archs: invalid choice: 89 (choose from 80, 86, 90, 100)" in capsys.readouterr().err


def test_kernel_resources_needs_the_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resources(*_: object) -> None:
        raise ValueError("kernels cannot be compiled while TRITON_INTERPRET is set: unset it")

    monkeypatch.setattr(kernel_resources, "resources", resources)
    with pytest.raises(SystemExit) as stop:
        kernel_resources.main([])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET is set: unset it" in capsys.readouterr().err
