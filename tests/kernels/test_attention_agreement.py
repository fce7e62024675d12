"""reference against the definition, cpu against reference: output and every gradient."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_agrees, eager_in_same_dtype, make_case, out_and_gradients, triple_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from tidal.kernels import TilePlan, cpu, interval_attention

torch.set_num_threads(1)

NAMES = ("out", "dq", "dk", "dv", "dslopes")


@pytest.mark.parametrize("structure", ["random", "streams", "causal"])
@pytest.mark.parametrize("seed", range(3))
def test_reference_is_the_definition(seed: int, structure: str) -> None:
    case = make_case(seed, n_queries=5, n_keys=9, head_dim=3, structure=structure)
    out = interval_attention(*case.inputs(), scale=0.7, backend="reference")
    torch.testing.assert_close(out, triple_loop(case, 0.7), rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**30),
    n_batch=st.integers(1, 3),
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    n_queries=st.integers(1, 40),
    n_keys=st.integers(1, 50),
    tile_q=st.sampled_from([1, 4, 7, 64]),
    structure=st.sampled_from(["random", "random", "causal"]),
    dense=st.booleans(),
)
def test_cpu_is_the_reference(
    seed: int,
    n_batch: int,
    n_kv_heads: int,
    group: int,
    n_queries: int,
    n_keys: int,
    tile_q: int,
    structure: str,
    dense: bool,
) -> None:
    case = make_case(seed, n_batch, n_kv_heads * group, n_kv_heads, n_queries, n_keys, head_dim=4, structure=structure)
    assert_agrees(case, tile_q, dense)


@pytest.mark.parametrize("tile_q", [3, 8, 64])
@pytest.mark.parametrize("structure", ["streams", "causal"])
def test_real_masks(tile_q: int, structure: str) -> None:
    case = make_case(5, n_queries=150, n_keys=230, head_dim=8, structure=structure)
    assert_agrees(case, tile_q, dense=False)
    assert_agrees(case, tile_q, dense=True)


def test_full_tiles_need_no_mask() -> None:
    case = make_case(1, n_queries=9, n_keys=12)
    case.ranges[:, :, 0] = torch.tensor([0, 5], dtype=torch.int32)
    case.ranges[:, :, 1] = torch.tensor([7, 12], dtype=torch.int32)
    assert TilePlan.build(case.ranges, 12).slices.tolist() == [[[0, 5, 1], [7, 12, 1]]]
    assert_agrees(case, 4, dense=False)


@pytest.mark.parametrize("dense", [True, False])
def test_blind_queries_give_zeros(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 2**60 if dense else -1)
    case = make_case(0)
    case.ranges[:, 3:8] = 2
    case.ranges[1] = 0
    for backend in ("cpu", "reference"):
        result = out_and_gradients(case, backend)
        assert not any(x.isnan().any() for x in result.values())
        for name in ("out", "dq"):
            assert result[name][:, :, 3:8].eq(0).all()
            assert result[name][1].eq(0).all()
        assert result["dk"][1].eq(0).all()
        assert result["dv"][1].eq(0).all()


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("dense", [True, False])
def test_nothing_to_do(sizes: tuple[int, int, int], dense: bool) -> None:
    n_batch, n_queries, n_keys = sizes
    case = make_case(0, n_batch=2, n_queries=5, n_keys=5)
    case = Case(
        *(x[:n_batch, :, :length].detach().requires_grad_() for x, length in
          ((case.q, n_queries), (case.k, n_keys), (case.v, n_keys))),
        case.ranges[:n_batch, :n_queries].clamp(max=n_keys),
        case.q_position[:n_batch, :n_queries],
        case.k_position[:n_batch, :n_keys],
        case.slopes,
        case.weight[:n_batch, :, :n_queries],
    )  # fmt: skip
    assert_agrees(case, 4, dense)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("garbage", [1e15, -1e15])
def test_hidden_keys_have_no_influence(dense: bool, garbage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 2**60 if dense else -1)
    for dtype in (torch.float64, torch.float32):
        case = make_case(3, n_queries=20, n_keys=30).to(dtype)
        case.ranges[..., 1].clamp_(max=20)
        clean = {name: out_and_gradients(case, name) for name in ("cpu", "reference")}
        with torch.no_grad():
            case.k[:, :, 20:] = garbage
            case.v[:, :, 20:] = garbage
            case.k_position[:, 20:] = 1e9
        for backend, wanted in clean.items():
            for name, value in out_and_gradients(case, backend).items():
                assert torch.equal(value, wanted[name]), (backend, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("structure", ["random", "streams"])
def test_low_precision_error(dtype: torch.dtype, dense: bool, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, at most twice the error of eager PyTorch in the same dtype.

    The largest error of a single case is luck (in float32 either side wins by up to 3×, and the slopes are only four
    numbers): the largest errors of ten cases are added up.
    """
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 2**60 if dense else -1)
    error, allowed = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for seed in range(10):
        low = make_case(seed, n_queries=60, n_keys=90, head_dim=16, structure=structure).to(dtype)
        low = replace(low, slopes=low.slopes.detach().float().requires_grad_())
        exact = replace(low.to(torch.float64), slopes=low.slopes.detach().double().requires_grad_())
        wanted, got, eager = (
            out_and_gradients(exact, "reference"),
            out_and_gradients(low, "cpu"),
            eager_in_same_dtype(low),
        )
        for name in NAMES:
            assert got[name].dtype == eager[name].dtype
            error[name] += float((got[name].double() - wanted[name]).abs().max())
            allowed[name] += float((eager[name].double() - wanted[name]).abs().max())
    assert all(error[name] <= 2 * allowed[name] for name in NAMES), (error, allowed)
