"""The triton backend against the float64 reference: output and every gradient, in memory full of NaN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, eager_in_same_dtype, out_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, NAMES, STRUCTURES, TILE, TOLERANCE, exact, fused, poisoned, triton_case, worst_excess

from tidal.kernels import interval_attention, triton_backward

LOW = (torch.bfloat16, torch.float16)


def assert_right(case: Case) -> None:
    excess, name = worst_excess(case)
    assert excess <= 1, f"{name} is off by {excess} times what {case.q.dtype} allows"


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**30),
    structure=st.sampled_from(STRUCTURES),
    dtype=st.sampled_from([torch.float32, *LOW]),
    n_batch=st.integers(1, 2),
    n_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    q_tiles=st.floats(0.05, 1.6),
    k_tiles=st.floats(0.05, 2.6),
)
def test_random_problems(
    seed: int, structure: str, dtype: torch.dtype, n_batch: int, n_kv_heads: int, group: int, q_tiles: float,
    k_tiles: float,
) -> None:  # fmt: skip
    assert_right(triton_case(seed, structure, dtype, n_batch, n_kv_heads * group, n_kv_heads, q_tiles, k_tiles))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structures(structure: str, dtype: torch.dtype) -> None:
    assert_right(triton_case(3, structure, dtype, q_tiles=1.3, k_tiles=2.7))  # as in the search for planted bugs


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    assert_right(triton_case(2, "blocks", dtype, q_tiles=1.2, k_tiles=2.2, head_dim=head_dim))


@pytest.mark.parametrize("structure", ["packed", "streams"])
def test_two_runs_with_full_tiles(structure: str) -> None:
    assert_right(triton_case(3, structure, torch.float16, 1, 1, 1, q_tiles=4.4, k_tiles=8.8))


@pytest.mark.parametrize("structure", ["random", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_low_precision_error(structure: str, dtype: torch.dtype) -> None:
    """Against float64, at most twice the error of eager PyTorch in the same dtype.

    The largest error of a single case is luck, most of all in float32: those of several are added up.
    """
    error, of_eager = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for seed in range(8 if dtype == torch.float32 else 2):
        case = triton_case(seed, structure, dtype, 1, 2, 1, q_tiles=0.9, k_tiles=2.4)
        wanted, got, eager = exact(case), fused(case), eager_in_same_dtype(case)
        for name in NAMES:
            assert got[name].dtype == eager[name].dtype
            error[name] += float((got[name].double() - wanted[name]).abs().max())
            of_eager[name] += float((eager[name].double() - wanted[name]).abs().max())
    ratios = {name: error[name] / of_eager[name] for name in NAMES}
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [1e-3, 64 / TILE, 30.0])
def test_far_positions(dtype: torch.dtype, slope: float) -> None:
    """A document far into a long text, and slopes for which the shifted form needs its origin, or costs precision."""
    case = triton_case(4, "causal", dtype, 1, 1, 1, q_tiles=2.0, k_tiles=3.0)
    case = replace(case, q_position=case.q_position + 2**20, k_position=case.k_position + 2**20)
    assert_right(replace(case, slopes=torch.full_like(case.slopes, slope).requires_grad_()))


def test_keys_of_a_tile_that_lie_far_apart() -> None:
    """The shifted form would add millions to the scores of those that are near."""
    case = triton_case(4, "causal", torch.bfloat16, 1, 1, 1, q_tiles=1.0, k_tiles=1.0)
    index = torch.arange(TILE, device=DEVICE).float()[None]
    ranges = torch.zeros_like(case.ranges)
    ranges[:, :, 0, 1] = TILE
    position = torch.where(index < TILE // 2, index - 2**20, index)
    slopes = torch.full_like(case.slopes, 64 / TILE).requires_grad_()
    assert_right(replace(case, ranges=ranges, q_position=index + TILE, k_position=position, slopes=slopes))


def test_fixed_slopes_use_the_shifted_form_backward_too() -> None:
    """With learned slopes dq needs distances; here it does not."""
    case = triton_case(5, "causal", torch.bfloat16, 1, 2, 2)
    fixed, wanted = replace(case, slopes=case.slopes.detach()), exact(case)
    with poisoned():
        out = interval_attention(*fixed.inputs(), backend="triton")
        gradients = torch.autograd.grad(out, (fixed.q, fixed.k, fixed.v), fixed.weight)
    for name, value in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert (value - wanted[name]).abs().max() <= 2e-2 * wanted[name].abs().max(), name


def atomic_excess(structure: str, dtype: torch.dtype, **sizes: float) -> float:
    """The largest error of dq, dk and dv that `triton-atomic` makes, over what is allowed."""
    case = triton_case(5, structure, dtype, **sizes)  # type: ignore[arg-type]
    fixed, wanted = replace(case, slopes=case.slopes.detach()), exact(case)
    with poisoned():
        out = interval_attention(*fixed.inputs(), backend="triton-atomic")
        gradients = torch.autograd.grad(out, (fixed.q, fixed.k, fixed.v), fixed.weight)
    excess = [
        float((value.double() - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1)) / TOLERANCE[dtype]
        for name, value in zip(("dq", "dk", "dv"), gradients, strict=True)
    ]
    return max(math.inf if math.isnan(x) else x for x in excess)


DTYPES = itertools.cycle((torch.float32, torch.bfloat16))
ATOMIC = [*zip(STRUCTURES, DTYPES, strict=False), ("causal", torch.float32), ("streams", torch.bfloat16)]


@pytest.mark.parametrize(("structure", "dtype"), ATOMIC)
def test_atomic_gradients(structure: str, dtype: torch.dtype) -> None:
    """dq added up by the programs of the keys; a group of three heads, and lengths that fill no tile."""
    assert atomic_excess(structure, dtype, n_heads=3, q_tiles=1.3, k_tiles=2.7) <= 1


@pytest.mark.parametrize("bug", ["not scaled", "not from zero", "not added", "dv not written"])
def test_planted_bugs_in_atomic_gradients(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched with another scale, with a buffer that is not zeros, without the additions, or with memory of its own
    for dv, so that the caller's stays as it was: full of NaN."""
    kernel = triton_backward.dkdv_kernel

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **constants: Any) -> None:
                values = list(arguments)
                if bug == "not scaled":
                    values[-1] = 1.0
                if bug == "not from zero":
                    values[8].fill_(1.0)
                if bug == "dv not written":
                    values[7] = torch.empty_like(values[7])
                kernel[grid](*values, **constants | ({"ATOMIC": False} if bug == "not added" else {}))

            return launch

    monkeypatch.setattr(triton_backward, "dkdv_kernel", Launcher())
    assert atomic_excess("causal", torch.float32, q_tiles=1.3, k_tiles=1.3) > 1.5


def test_atomic_is_only_for_fixed_slopes() -> None:
    case = triton_case(5, "causal", torch.float32, q_tiles=1.0, k_tiles=1.0)
    with pytest.raises(ValueError, match=r"^backend 'triton-atomic' has no gradient of slopes; take 'triton'$"):
        interval_attention(*case.inputs(), backend="triton-atomic")


def test_blind_queries_give_zeros() -> None:
    case = triton_case(6, "random", n_batch=2)
    blind = slice(TILE // 2, 2 * TILE)  # a tile and a half
    case.ranges[0, blind] = torch.tensor([[7, 7], [9, 3]], dtype=torch.int32, device=DEVICE)
    case.ranges[1] = 0
    result = fused(case)
    for name in ("out", "dq"):
        assert result[name][0, :, blind].eq(0).all()
        assert result[name][1].eq(0).all()
    for name in ("dk", "dv"):
        assert result[name][1].eq(0).all()
        assert result[name][0].ne(0).any()
    assert_right(case)


@pytest.mark.parametrize("sizes", [(0, 1.5, 1.5), (1, 0, 1.5), (1, 1.5, 0)])
def test_nothing_to_do(sizes: tuple[int, float, float]) -> None:
    n_batch, n_queries, n_keys = sizes[0], round(sizes[1] * TILE), round(sizes[2] * TILE)
    case = triton_case(7, "causal", q_tiles=1.5, k_tiles=1.5)
    case = Case(
        *(x[:n_batch, :, :length].detach().requires_grad_() for x, length in
          ((case.q, n_queries), (case.k, n_keys), (case.v, n_keys))),
        case.ranges[:n_batch, :n_queries].clamp(max=n_keys), case.q_position[:n_batch, :n_queries],
        case.k_position[:n_batch, :n_keys], case.slopes, case.weight[:n_batch, :, :n_queries],
    )  # fmt: skip
    for name, value in fused(case).items():
        assert value.eq(0).all(), name


@pytest.mark.parametrize("garbage", [1e15, -1e15])
def test_hidden_keys_have_no_influence(garbage: float) -> None:
    case, hidden = triton_case(8, "random"), round(1.7 * TILE)
    case.ranges[..., 1].clamp_(max=hidden)
    clean = fused(case)
    with torch.no_grad():
        case.k[:, :, hidden:] = garbage
        case.v[:, :, hidden:] = garbage
        case.k_position[:, hidden:] = 1e9
    for name, value in fused(case).items():
        assert torch.equal(value, clean[name]), name


def test_any_strides() -> None:
    """Sliced, expanded and transposed tensors are read where they lie."""
    case = triton_case(9, "packed", n_heads=2, n_kv_heads=2)
    wanted = fused(case)

    def column_major(x: torch.Tensor) -> torch.Tensor:
        return x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()

    def every_other(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]

    moved = Case(
        column_major(case.q), torch.cat([case.k, case.k], 2).detach()[:, :, : case.k.shape[2]].requires_grad_(),
        case.v.detach().contiguous().requires_grad_(), every_other(case.ranges), every_other(case.q_position),
        every_other(case.k_position), case.slopes, column_major(case.weight).detach(),
    )  # fmt: skip
    for name, value in fused(moved).items():
        assert torch.equal(value, wanted[name]), name
    out = interval_attention(*case.inputs(), backend="triton")
    (expanded,) = torch.autograd.grad(out.sum(), case.q)
    out = interval_attention(*case.inputs(), backend="triton")
    assert torch.equal(expanded, torch.autograd.grad(out, case.q, torch.ones_like(out))[0])


def test_few_queries_without_gradients_are_decoded() -> None:
    case = triton_case(10, "streams", q_tiles=0.5)
    wanted = exact(case)["out"]
    with torch.no_grad(), poisoned():
        out = interval_attention(*case.inputs(), backend="triton")
    assert (out - wanted).abs().max() <= 1e-5


def test_ranges_beyond_the_keys_are_cut_where_nothing_checks_them() -> None:
    case = triton_case(11, "causal", q_tiles=3.3)
    wanted = fused(case)
    case.ranges[..., 0, 1] += (case.ranges[..., 0, 1] == case.k.shape[2]).int() * 1000
    for name, value in fused(case).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("structure", ["packed", "streams", "random"])
def test_a_hundred_runs_give_the_same_bits(structure: str) -> None:
    case = triton_case(12, structure, torch.bfloat16, 2, 8, 2, q_tiles=8.3, k_tiles=11.7, head_dim=64)
    wanted = out_and_gradients(case, "triton")
    for _ in range(100):
        for name, value in out_and_gradients(case, "triton").items():
            assert torch.equal(value, wanted[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_offsets_beyond_32_bits() -> None:
    """Keys of one row lie more than 2^31 elements apart."""
    case = triton_case(13, "causal", torch.bfloat16, 1, 1, 1, q_tiles=1.0, k_tiles=2.0, head_dim=64)
    n_keys, stride = case.k.shape[2], 2**24
    wide = torch.zeros(n_keys * stride, dtype=torch.bfloat16, device=DEVICE).as_strided(
        case.k.shape, (n_keys * stride, n_keys * stride, stride, 1)
    )
    assert (n_keys - 1) * stride > 2**31
    wide.copy_(case.k.detach())
    wanted = fused(case)
    for name, value in fused(replace(case, k=wide.requires_grad_())).items():
        assert torch.equal(value, wanted[name]), name


def test_more_batch_rows_than_the_smaller_limit_of_a_grid() -> None:
    """A launch may have 2^31 − 1 programs along its first axis, 65,535 along the others. (The interpreter: any number,
    so that a few rows do.)"""
    n_rows = 5 if DEVICE == "cpu" else 66_000
    case = triton_case(14, "causal", torch.bfloat16, 1, 1, 1, q_tiles=0.1, k_tiles=0.1, head_dim=32)
    wanted = fused(case)
    many = Case(*(x if x is case.slopes else x.expand(n_rows, *x.shape[1:]).clone() for x in vars(case).values()))
    for name, value in fused(many).items():
        if name == "dslopes":
            torch.testing.assert_close(value, n_rows * wanted[name], rtol=1e-3, atol=0)
        else:
            assert torch.equal(value, wanted[name].expand_as(value)), name
