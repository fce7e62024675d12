"""Compiling the Triton kernels ahead of time, on any machine, and reading what they need of a GPU.

    for spec in kernel_specs(torch.bfloat16, head_dim=64, arch=90):
        print(spec.name, spec.tile, resources(spec, arch=90))

``kernel_specs`` lists the kernels as the launcher would start them; ``resources`` compiles one of them with the
ptxas that ships inside the triton package, and reads registers and spills with its cuobjdump; ``score_loops`` counts
instructions. No GPU is needed. Triton's own interpreter must be off (TRITON_INTERPRET unset before triton is imported).
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tidal.kernels import triton_attention, triton_backward, triton_decode, triton_forward, triton_plan

TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""what Triton calls the element types that the kernels take"""


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
    ttgir: str = field(default="", repr=False)
    """Triton's own code for GPUs, in which copies are scheduled"""


def kernel_specs(dtype: torch.dtype, head_dim: int, arch: int) -> list[KernelSpec]:
    """Every kernel of the ``triton`` backend, in the tile configuration that it has on this architecture.

    Args:
        dtype: bfloat16, float16 or float32.
        head_dim: 32, 64 or 128.
        arch: compute capability × 10, such as 90.
    """
    config = triton_attention.configuration(dtype, head_dim, arch)
    return [*attention_specs(dtype, head_dim, arch), *plan_specs(config), *decode_specs(dtype, head_dim)]


def attention_specs(dtype: torch.dtype, head_dim: int, arch: int) -> list[KernelSpec]:
    """The kernels of the forward and backward passes."""
    config = triton_attention.configuration(dtype, head_dim, arch)
    q = torch.empty(0, head_dim, dtype=dtype)
    found = []
    for name, tile, more in (
        ("forward", config.forward, {}),
        ("delta", triton_attention.DELTA, {}),
        ("dq", config.dq, {"SLOPES": False}),
        ("dq_dslopes", config.dq_slopes, {"SLOPES": True}),
        ("dkdv", config.dkdv, {"ATOMIC": False}),
        ("dkdv_grouped", config.dkdv, {"ATOMIC": False}),
        ("dkdv_atomic", config.dkdv_atomic, {"ATOMIC": True}),
    ):
        kernel = getattr(triton_forward if name == "forward" else triton_backward, name.split("_")[0] + "_kernel")
        chosen = {**triton_attention.constants(q, tile), **more}
        types = {argument: argument_type(argument, name, TRITON_NAMES[dtype]) for argument in kernel.arg_names}
        aligned = tuple(x for x, kind in types.items() if kind[0] == "*" or x.startswith("stride"))
        values = {x: chosen[x] for x in kernel.arg_names if x in chosen}
        size = f"{tile.m}×{tile.n}" if tile.n else f"{tile.m}"
        found.append(KernelSpec(name, kernel, types, values, tile.warps, tile.stages, size, aligned))
    return found


def argument_type(argument: str, kernel: str, dtype: str) -> str:
    """Triton's name for the type of a kernel's argument, told by the argument's name."""
    if argument.isupper():
        return "constexpr"
    if argument.startswith(("n_", "stride_")) or argument == "group":
        return "i32"
    if argument in ("dk", "dv"):
        return "*fp32" if kernel == "dkdv_grouped" else "*" + dtype
    if argument == "dq" and kernel == "dkdv_atomic":
        return "*fp32"
    if argument in ("q", "k", "v", "out", "dout", "dq"):
        return "*" + dtype
    if argument in ("ranges", "rows", "order", "columns"):
        return "*i32"
    return "fp32" if argument == "scale" else "*fp32"


def plan_specs(config: triton_attention.Config) -> list[KernelSpec]:
    """The kernels that plan for these tiles, whatever is learned: rows of one shape or of two, columns, the order."""
    wanted = [triton_attention.needed(config.forward, config.dq, config.dkdv, learning=False)]
    for atomic, slopes in ((False, False), (False, True), (True, False)):
        backward = triton_attention.backward_tiles(config, atomic, slopes)
        wanted.append(triton_attention.needed(config.forward, *backward, learning=True))
    rows = {pair for tables in wanted for pair in triton_plan.in_pairs(triton_plan.sizes_of_rows(tables))}
    columns = {(tile_q, tile_k) for tables in wanted for tile_q, tile_k, transpose in tables if transpose}
    launches: list[tuple[str, Any, tuple[int, ...]]] = [
        *(("rows twice" if more else "rows", triton_plan.rows_kernel, (*one, *(more or one))) for one, more in rows),
        *(("columns", triton_plan.columns_kernel, size) for size in columns),
    ]
    found = []
    for name, kernel, sizes in (*sorted(launches, key=lambda x: (x[0], x[2])), ("order", triton_plan.order_kernel, ())):
        constants = dict(zip((x for x in kernel.arg_names if x.isupper()), sizes, strict=True))
        types = {x: "*fp32" if x in ("q_position", "k_position") else "*i32" for x in kernel.arg_names}
        types |= {x: "i32" for x in kernel.arg_names if x in triton_plan.LENGTHS}
        types |= dict.fromkeys(constants, "constexpr")
        pointers = tuple(x for x, kind in types.items() if kind[0] == "*")
        tile = "×".join(map(str, sizes[:2]))
        found.append(KernelSpec(name, kernel, types, constants, 4, 3, tile, pointers))
    return found


def decode_specs(dtype: torch.dtype, head_dim: int) -> list[KernelSpec]:
    """The decode kernels for groups of four heads, with one query and with 64; "whole" where the keys are not split, so
    that the results go into the caller's tensor in its dtype. Those are without `kv_rows`, as most steps are."""
    name = TRITON_NAMES[dtype]
    pointers = {"q": name, "k": name, "v": name, "ranges": "i32", "q_position": "fp32", "k_position": "fp32",
                "slopes": "fp32", "kv_rows": "i32", "out": "fp32", "lse": "fp32"}  # fmt: skip
    strides = [f"stride_{axis}" for axis in ("qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "pb")]
    counts = ["n_queries", "n_keys", "n_splits", "n_kv_heads"]
    numbers = {**dict.fromkeys(strides + counts, "i32"), "scale_log2e": "fp32"}
    listed = []
    for n_rows, whole in itertools.product((4, 256), (False, True)):
        tile_m = triton_decode.rows_of_tile(n_rows, dtype)
        tile_n, num_warps, num_stages, _ = triton_decode.launch_of(tile_m, head_dim, dtype)
        constants: dict[str, Any] = {"GROUP": 4, "HEAD_DIM": head_dim, "TILE_M": tile_m, "TILE_N": tile_n}
        pointers["out"] = name if whole else "fp32"
        if whole:
            constants["kv_rows"] = None
        types = {**{p: f"*{t}" for p, t in pointers.items()}, **numbers, **dict.fromkeys(constants, "constexpr")}
        aligned = tuple(x for x in (*pointers, *strides[:-1]) if x not in constants)
        label = f"decode {n_rows} {'whole' if whole else 'rows'}"
        listed.append(KernelSpec(label, triton_decode.partial_kernel, types, constants, num_warps, num_stages,
                                 f"{tile_m}×{tile_n}", aligned))  # fmt: skip
    merge = {"part": "*fp32", "lse": "*fp32", "out": f"*{name}", "n_rows": "i32", "n_splits": "i32"}
    constants = {"HEAD_DIM": head_dim, "CHUNK": 16}
    types = {**merge, **dict.fromkeys(constants, "constexpr")}
    aligned = ("part", "lse", "out")
    return [*listed, KernelSpec("decode merge", triton_decode.merge_kernel, types, constants, 1, 1, "16", aligned)]


# ------------------------------------------------------------------------------------------ compiling and reading


def resources(spec: KernelSpec, arch: int) -> Resources:
    """Compile for an architecture (seconds; Triton keeps what it compiled) and read what the kernel takes.

    Raises:
        ValueError: TRITON_INTERPRET was set when triton was imported, so that there is nothing to compile.
    """
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
    return Resources(registers, stack + local, compiled.metadata.shared, cubin, compiled.asm["ttgir"])


def copies_ahead(ttgir: str) -> list[int]:
    """How many copies to shared memory may still be under way when a turn of each loop over scores begins.

    0: the loop asks for a tile and waits for it at once, so that no multiplication hides the memory's latency. Triton
    copies ahead only with three stages or more, and only what is found by an index that the same turn does not load.
    """
    open_loops: list[tuple[int, list[int], list[str]]] = []  # indent, numbers of its waits, its lines
    found = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            open_loops.append((indent, [], []))
        elif open_loops:
            start, waits, lines = open_loops[-1]
            lines.append(line)
            if wait := re.search(r"ttg\.async_wait .*num = (\d+)", line):
                waits.append(int(wait[1]))
            if indent == start and line.lstrip().startswith("}"):
                open_loops.pop()
                if any("exp2" in x for x in lines):
                    found.append(waits[0] if waits else 0)
    return found


def score_loops(cubin: bytes) -> list[int]:
    """How many machine instructions a warp issues in one turn of each loop over scores, in the order of the program.

    A loop goes from a label to the first jump back to it. Loops over scores take exponentials (MUFU.EX2), and lie one
    after another. A jump from behind such a loop back into it belongs to waiting for memory, and is not counted.
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
    """What the only group of a pattern matches. Raises ValueError where the pattern does not occur."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in: {text}")
    return found.group(1)


def disassemble(cubin: bytes, tool: str, *flags: str) -> str:
    """The output of ``cuobjdump`` or ``nvdisasm``, which the triton package brings along, for a compiled kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *flags, file.name], check=True, capture_output=True, text=True).stdout
