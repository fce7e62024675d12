"""Each of these bugs, planted in the source of the triton backend, must be noticed by the comparison with float64."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import SMALL, triton_case, worst_excess

import tidal.kernels
from tidal.kernels import api
from tidal.kernels.triton_tiles import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="a GPU would compile all kernels anew for each bug")

MODULES = ("tiles", "plan", "forward", "backward", "attention")
number = itertools.count()

BUGS: dict[str, tuple[str, str, str, str]] = {
    # name: (module, mask that shows it, what stands there, what is planted)
    "wrong sign of ALiBi": ("tiles", "causal", "scale, -slope * tl.abs(", "scale, slope * tl.abs("),
    "signed distance": ("tiles", "random", "tl.abs(q_position - k_position)", "(q_position - k_position)"),
    "end of a range inclusive": ("tiles", "random", "(key < end_1)", "(key <= end_1)"),
    "start of a range off by one": ("tiles", "streams", "(key >= start) &", "(key > start) &"),
    "row numbers from one on": ("tiles", "causal", "tl.int32), 0) - 1", "tl.int32), 0)"),
    "results of the wrong tile": ("tiles", "causal", "n_tiles * SIZE", "n_tiles * (0 if AGAIN else SIZE)"),
    "second range ignored": ("tiles", "touching", "| ((key >= start_1) & (key < end_1))", ""),
    "the other run's range": ("forward", "streams", "one_range(bounds, i >= segments[1])", "one_range(bounds, i < 0)"),
    "the other run's range in dq": (
        "backward", "streams", "one_range(bounds, i >= segments[1])", "one_range(bounds, i < segments[1])",
    ),
    "the other run's range in dkdv": ("backward", "streams", "entry & 1, key_n1", "1 - (entry & 1), key_n1"),
    "both runs' tiles told of one": ("plan", "touching", "(column + N_BOTH, n_both)", "(column + N_BOTH, 0)"),
    "runs never merged": ("plan", "touching", "merged = (lo_0 < hi_1) & (lo_1 < hi_0)", "merged = lo_0 < 0"),
    "partial tiles called full": ("plan", "causal", "tl.maximum(tl.min(end, 0), 0)", "tl.max(end, 0)"),
    "last key tile forgotten": (
        "plan", "one_key", "hi = tl.cdiv(tl.max(tl.where(seen, end, 0), 0), TILE_K)", "hi = tl.max(end, 0) // TILE_K",
    ),
    "full tiles missing from the transpose": ("plan", "causal", "full = (full_0 | full_1) &", "full = full_1 &"),
    "short last tile without a mask": ("plan", "causal", "= (t + 1) * TILE_Q > n_queries,", "= t < 0,"),
    "mixed tiles said to lie in the past": ("plan", "positions", "tl.where(past,", "tl.where(True,"),
    "shift not taken off log Σ exp": ("forward", "causal", "highest - shift + logarithm", "highest + logarithm"),
    "running sum not rescaled": ("forward", "causal", "total * decay + tl.sum", "total + tl.sum"),
    "log Σ exp in the wrong base": ("forward", "causal", "logarithm(total, FAST)", "tl.log2(total) * 0.69314718"),
    "queries without keys divided by zero": ("forward", "packed", "tl.where(blind, 1.0, total)", "total"),
    "keys of the wrong head": ("forward", "causal", "stride_kb + head // group", "stride_kb + 0"),
    "delta forgotten": ("backward", "causal", "dscore = weight * (dweight - delta)", "dscore = weight * dweight"),
    "dk not scaled": ("backward", "causal", "state[0] * scale, N", "state[0], N"),
    "sign of the slopes' gradient": (
        "backward", "causal", "of_scores * of_weights - of_both", "of_both - of_scores * of_weights",
    ),
    "no origin where the keys are": ("tiles", "causal", "tl.fma(k_position, slope, -origin)", "slope * k_position"),
    "shift of the wrong sign in dkdv": ("backward", "causal", "lse_m += tl.fma", "lse_m -= tl.fma"),
    "only the first head of a group": ("attention", "causal", "dk_part.view(by_group).sum(2)", "dk_part[:, ::group]"),
    "memory not written": ("attention", "causal", "dv.copy_(dv_part", "dk.copy_(dv_part"),
}  # fmt: skip


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that swaps the backend for a copy with one change in its source, under other operator names."""

    def plant(module: str, old: str, new: str) -> None:
        package = f"planted_{next(number)}"
        (tmp_path / package).mkdir()
        for name in MODULES:
            source = (Path(tidal.kernels.__file__).parent / f"triton_{name}.py").read_text()
            if name == module:
                assert old in source, f"{old!r} does not stand in triton_{name}.py"
                source = source.replace(old, new)
            for other in MODULES:
                source = source.replace(f"tidal.kernels.triton_{other} ", f"{package}.triton_{other} ")
            source = source.replace(
                "from tidal.kernels import triton_backward, triton_decode, triton_forward",
                f"from tidal.kernels import triton_decode\nfrom {package} import triton_backward, triton_forward",
            ).replace('operator("tidal::', f'operator("{package}::')
            (tmp_path / package / f"triton_{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        attention = importlib.import_module(f"{package}.triton_attention")
        attention.INTERPRETER = SMALL
        monkeypatch.setitem(api.BACKENDS, "triton", api.Backend(attention.attend))

    yield plant
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


def excess(structure: str, n_kv_heads: int = 1) -> float:
    """Of bfloat16 (base 2, shifted form) and one and a bit tiles of queries on more than two tiles of keys."""
    case = triton_case(3, structure, torch.bfloat16, 1, 2 * n_kv_heads, n_kv_heads, q_tiles=1.3, k_tiles=2.7)
    return worst_excess(case)[0]


def test_sound_without_a_bug(planted: Any) -> None:
    """A copy is as good as the original, of which tests/kernels/test_triton_attention.py asks this for all masks."""
    planted("tiles", "", "")
    assert excess("causal") <= 1


@pytest.mark.parametrize("bug", BUGS)
def test_check_catches(bug: str, planted: Any) -> None:
    module, structure, old, new = BUGS[bug]
    planted(module, old, new)
    assert excess(structure, n_kv_heads=2 if "head" in bug else 1) > 1.5
