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

from benchmarks.kernel_resources import ARCHITECTURES, SHARED_LIMIT
from tidal.kernels.aot import kernel_specs, resources
from tidal.kernels.triton_tiles import INTERPRETED

PROGRAM = """
import json, sys, torch
from tidal.kernels import triton_attention
from tidal.kernels.aot import kernel_specs, resources
from tidal.kernels.api import BACKENDS
print("devices:", *BACKENDS["triton"].devices, file=sys.stderr)
for dtype, head_dim, arch, kernels, tile in json.loads(sys.argv[1]):
    if tile:
        triton_attention.configuration = lambda *_: triton_attention.Config(*[triton_attention.Tile(*tile)] * 5)
    for spec in kernel_specs(getattr(torch, dtype), head_dim, arch):
        if not kernels or spec.name in kernels:
            found = resources(spec, arch)
            print(json.dumps([arch, spec.name, spec.tile, found.registers, found.spills, found.shared]))
"""
TRAINING = ["forward", "delta", "dq", "dkdv", "dkdv_atomic", "rows", "columns", "order"]

Found = tuple[int, str, str, int, int, int]
"""architecture, name, tile, registers, spilled bytes, bytes of shared memory"""


def compiled(*requests: tuple[str, int, int, list[str], list[int]]) -> list[Found]:
    """Each request: dtype, head dimension, architecture, kernels (all if empty), tile (the chosen one if empty)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "devices: cuda\n" in done.stderr  # uninterpreted, the backend is not for the CPU
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def assert_fits(found: list[Found]) -> None:
    for arch, name, tile, registers, spills, shared in found:
        assert 16 <= registers <= 255, (name, tile)
        assert spills == 0, f"{name} {tile} spills {spills} bytes on sm_{arch}"
        assert shared <= SHARED_LIMIT[arch], f"{name} {tile} wants {shared} bytes of shared memory on sm_{arch}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a GPU's time for what needs none; -m slow compiles all")
def test_training_at_the_default_head_dimension() -> None:
    """And the measurement itself: 128 × 128 in four warps is known to spill."""
    requests = [("bfloat16", 32, arch, TRAINING, []) for arch in ARCHITECTURES]
    *found, too_large = compiled(*requests, ("bfloat16", 64, 90, ["forward"], [128, 128, 4, 3]))
    names = list(dict.fromkeys((arch, name) for arch, name, *_ in found))
    assert names == [(arch, name) for arch in ARCHITECTURES for name in TRAINING]
    assert_fits(found)
    with pytest.raises(AssertionError, match=r"forward 128×128 spills \d+ bytes on sm_90"):
        assert_fits([too_large])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kernel(dtype: str, head_dim: int) -> None:
    found = compiled(*((dtype, head_dim, arch, [], []) for arch in ARCHITECTURES))
    assert len(found) >= len(ARCHITECTURES) * (len(TRAINING) + 3)
    assert_fits(found)


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton does not interpret here")
def test_interpreted_kernels_are_refused() -> None:
    spec = kernel_specs(torch.bfloat16, 64, 90)[0]
    with pytest.raises(ValueError, match=r"^kernels cannot be compiled while TRITON_INTERPRET is set: unset it$"):
        resources(spec, 90)
