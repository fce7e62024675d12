"""Compiling the Triton kernels ahead of time, on any machine, and reading what they need of a GPU.

    for spec in kernel_specs(torch.bfloat16, head_dim=64, arch=90):
        print(spec.name, spec.tile, resources(spec, arch=90))

``kernel_specs`` lists the kernels as the launcher would start them; ``resources`` compiles one of them with the
ptxas that ships inside the triton package, and reads registers and spills with its cuobjdump; ``score_loops`` counts
instructions. No GPU is needed. Triton's own interpreter must be off (TRITON_INTERPRET unset before triton is imported).
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
"""compute capabilities (× 10) that are tried: A100, H100 and H200, B200"""

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""bytes of shared memory that one block may have (CUDA C++ Programming Guide, "Compute Capabilities")"""

TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel as it is launched: all that ``triton.compile`` has to know."""

    name: str
    """for tables, such as "forward"; tells apart what is launched in different ways"""
    kernel: Any
    """the ``triton.jit`` function"""
    types: Mapping[str, str]
    """argument → Triton type, in the order of the function: "*bf16", "*i32", "i32", "fp32", "constexpr" """
    constants: Mapping[str, Any]
    """values of the constexpr arguments"""
    num_warps: int
    num_stages: int
    tile: str = ""
    """for tables, such as "128×64" """
    aligned: tuple[str, ...] = ()
    """pointers and strides known to be multiples of 16, without which loads are not asynchronous"""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int
    """per thread, at most 255"""
    spills: int
    """bytes per thread in local memory because registers ran out (stack included)"""
    shared: int
    """bytes of shared memory per block"""
    cubin: bytes = field(repr=False)


def kernel_specs(dtype: torch.dtype, head_dim: int, arch: int) -> list[KernelSpec]:
    """Every kernel of the ``triton`` backend, in the tile configuration that it has on this architecture.

    Args:
        dtype: bfloat16, float16 or float32.
        head_dim: 32, 64 or 128.
        arch: compute capability × 10, such as 90.
    """
    from tidal.kernels import triton_attention, triton_decode, triton_plan

    config = triton_attention.configuration(dtype, head_dim, arch)
    sizes = {name: (tile.m, tile.n) for name, tile in config._asdict().items()}
    columns = {size for name, size in sizes.items() if name.startswith("dkdv")}
    attention, decode = (module.specs(dtype, head_dim, arch) for module in (triton_attention, triton_decode))
    return [*attention, *triton_plan.specs(sizes.values(), columns), *decode]


def resources(spec: KernelSpec, arch: int) -> Resources:
    """Compile for an architecture (seconds; Triton keeps what it compiled) and read what the kernel takes.

    Raises:
        ValueError: TRITON_INTERPRET was set when triton was imported, so that there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(spec.kernel, JITFunction):
        raise ValueError("kernels cannot be compiled while TRITON_INTERPRET is set: unset it")
    names = list(spec.types)
    source = ASTSource(
        fn=spec.kernel,
        signature=dict(spec.types),
        constexprs={(names.index(name),): value for name, value in spec.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin: bytes = compiled.asm["cubin"]
    usage = disassemble(cubin, "cuobjdump", "--dump-resource-usage")
    registers, stack, local = (int(read(usage, f"{name}:(\\d+)")) for name in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, compiled.metadata.shared, cubin)


def score_loops(cubin: bytes) -> list[int]:
    """How many machine instructions a warp issues in one turn of each loop over scores, in the order of the program.

    A loop goes from a label to the first jump back to it; those over scores take exponentials (MUFU.EX2), and lie one
    after another. Jumps back from behind them, out of waiting for memory, are none.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    lengths, end = [], 0
    for line in disassemble(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            jump = re.search(r"BRA.*\(\.(L_\w+)\)", instruction[1])
            start = labels.get(jump[1], 0) if jump else 0
            if start > end and any("MUFU.EX2" in x for x in instructions[start:]):
                end = len(instructions)
                lengths.append(end - start)
    return lengths


def read(text: str, pattern: str) -> str:
    """The only group of a pattern that must be there."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in: {text}")
    return found.group(1)


def disassemble(cubin: bytes, tool: str, *flags: str) -> str:
    """What ``cuobjdump`` or ``nvdisasm`` of the triton package says about a compiled kernel."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *flags, file.name], check=True, capture_output=True, text=True).stdout
