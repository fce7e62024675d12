"""The decode kernel against the float64 reference: any shape it takes, NaN in what it has not written, planted bugs."""

import heapq
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_cases import Case, eager_in_same_dtype, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tidal.kernels import reference, triton_attention, triton_decode
from tidal.kernels.triton_tiles import INTERPRETED

DEVICE = "cpu" if INTERPRETED.value else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
empty = torch.empty


def nan_filled(*size, **kind):  # type: ignore[no-untyped-def]
    x = empty(*size, **kind)
    return x.fill_(float("nan")) if x.is_floating_point() else x


def decode(case: Case, module: ModuleType = triton_decode, n_splits: int | None = None) -> Tensor:
    """The kernel's answer; it is given memory full of NaN."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "empty", nan_filled)
        if n_splits:
            patch.setattr(module, "count_splits", lambda *_: n_splits)
        out: Tensor = module.decode(*(x.to(DEVICE) for x in case.inputs()), case.q.shape[-1] ** -0.5)
        return out.cpu()


def truth(case: Case) -> Tensor:
    """The reference in float64."""
    wide = case.to(torch.float64)
    return reference.attend(*wide.inputs(), case.q.shape[-1] ** -0.5).detach()


def excess(case: Case, module: ModuleType = triton_decode, n_splits: int | None = None) -> float:
    """The kernel's error against float64 as a multiple of eager PyTorch's.

    Of a few values eager PyTorch may by luck get all right, so it is taken to err by two units in the last place.
    """
    wanted = truth(case)
    got = decode(case, module, n_splits).double()
    if got.isnan().any():
        return float("inf")
    least = 2 * torch.finfo(case.q.dtype).eps * wanted.abs().max().item()
    eager = eager_in_same_dtype(case)["out"].double()
    return (got - wanted).abs().max().item() / max((eager - wanted).abs().max().item(), least, 1e-12)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**30),
    n_batch=st.integers(1, 2),
    n_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    n_queries=st.sampled_from([1, 2, 5, 7, 19]),
    n_keys=st.integers(1, 140),
    head_dim=st.sampled_from([32, 64]),
    dtype=st.sampled_from(DTYPES),
    structure=st.sampled_from(["random", "random", "causal"]),
    n_splits=st.sampled_from([None, 1, 2, 3]),
)
def test_decode_is_the_reference(
    seed: int, n_batch: int, n_kv_heads: int, group: int, n_queries: int, n_keys: int, head_dim: int,
    dtype: torch.dtype, structure: str, n_splits: int | None,
) -> None:  # fmt: skip
    case = make_case(seed, n_batch, n_kv_heads * group, n_kv_heads, n_queries, n_keys, head_dim, structure=structure)
    assert excess(case.to(dtype), n_splits=n_splits) <= 4  # of a few values, the largest error is a matter of luck


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_error_is_at_most_twice_that_of_eager_pytorch(dtype: torch.dtype, head_dim: int) -> None:
    case = make_case(7, 1, 4, 2, 9, 200, head_dim, structure="streams").to(dtype)
    assert excess(case) <= 2


def test_the_most_queries() -> None:
    assert excess(make_case(8, 1, 6, 2, 64, 100, 32, structure="causal").to(torch.bfloat16)) <= 2


def ranges_of(case: Case, *rows: tuple[int, int, int, int]) -> Case:
    """The same two ranges for all queries of a batch row."""
    for b, row in enumerate(rows):
        case.ranges[b] = torch.tensor(row, dtype=torch.int32).view(2, 2)
    return case


def test_rows_of_different_lengths_and_without_keys() -> None:
    """Ranges that overlap, nest and touch; a row that sees nothing gives zeros, however many splits there are."""
    case = make_case(1, 5, 2, 1, 3, 160, 32, dtype=torch.float32)
    rows = ranges_of(case, (0, 160, 0, 0), (0, 0, 150, 160), (5, 70, 30, 40), (0, 32, 32, 33), (9, 9, 7, 3))
    rows.ranges[0, 1] = 0
    wanted = truth(rows)
    for n_splits in (1, 3, 9):
        out = decode(rows, n_splits=n_splits)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-6)
        assert out[4].eq(0).all()
        assert out[0, :, 1].eq(0).all()


def test_only_tiles_that_are_seen_are_read() -> None:
    """NaN in all others would show."""
    case = ranges_of(make_case(2, 1, 2, 1, 4, 400, 32, dtype=torch.float32), (40, 60, 290, 310))
    wanted = decode(case)
    tile = triton_decode.launch_of(16, 32, torch.float32).n
    for x in (case.k, case.v):
        for first in range(0, 400, tile):
            if not any(first < end and start < first + tile for start, end in ((40, 60), (290, 310))):
                x.data[:, :, first : first + tile] = float("nan")
    assert case.k.isnan().any()
    torch.testing.assert_close(decode(case), wanted, rtol=0, atol=0)


def test_slices_of_a_cache_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 2, 4, 2, 2, 90, 32, dtype=torch.float32)
    wanted = decode(case)
    # What lies behind the slice has no influence. Slices are made on the device: to move one would copy it.
    cache, k_position = torch.full((2, 2, 2, 128, 32), 1e30, device=DEVICE), torch.full((2, 128), 1e30, device=DEVICE)
    cache[0, :, :, :90], cache[1, :, :, :90] = case.k.detach(), case.v.detach()
    k_position[:, :90] = case.k_position
    q = case.q.detach().to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)  # as projections lie in memory
    positions = case.q_position, k_position[:, :90]
    sliced = Case(q, *cache[:, :, :, :90].unbind(0), case.ranges, *positions, case.slopes, case.weight)
    contiguous = Tensor.contiguous

    def watched(x: Tensor) -> Tensor:
        assert x.dim() < 4 or x.dtype == torch.int32, "a cache is copied"
        return contiguous(x)

    monkeypatch.setattr(Tensor, "contiguous", watched)
    assert decode(sliced).equal(wanted)


def test_columns_next_to_each_other_are_copied() -> None:
    case = make_case(3, 2, 4, 2, 2, 40, 32, dtype=torch.float32)
    turned = [x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in (case.q, case.k, case.v)]
    assert turned[1].stride(-1) != 1
    assert decode(Case(*turned, *case.inputs()[3:], case.weight)).equal(decode(case))


def test_nothing_to_attend_to() -> None:
    for n_batch, n_keys in ((0, 5), (2, 0)):
        q, k = torch.randn(n_batch, 2, 3, 32, device=DEVICE), torch.randn(n_batch, 1, n_keys, 32, device=DEVICE)
        ranges = torch.zeros(n_batch, 3, 2, 2, dtype=torch.int32, device=DEVICE)
        positions = torch.zeros(n_batch, 3, device=DEVICE), torch.zeros(n_batch, n_keys, device=DEVICE)
        out = triton_decode.decode(q, k, k, ranges, *positions, torch.ones(2, device=DEVICE), 1.0)
        assert out.shape == q.shape
        assert out.eq(0).all()


def test_operator_is_sound() -> None:
    case = make_case(4, head_dim=32, dtype=torch.float32)
    inputs = [x.detach().to(DEVICE) for x in case.inputs()]
    torch.library.opcheck(triton_decode.decode, (*inputs, 0.5), test_utils=("test_schema", "test_faketensor"))


def test_which_queries_are_decoded() -> None:
    few, many, keys = (torch.empty(1, 1, n, 64) for n in (64, 65, 9))
    assert triton_attention.decodes(few, keys, keys, torch.ones(1))
    assert not triton_attention.decodes(many, keys, keys, torch.ones(1))
    assert not triton_attention.decodes(few, keys, keys, torch.ones(1, requires_grad=True))


def test_splits_keep_a_gpu_busy_and_depend_on_shapes_alone() -> None:
    assert triton_decode.count_splits(n_programs=8, n_tiles=512, n_wanted=264) == 33
    assert triton_decode.count_splits(n_programs=1000, n_tiles=512, n_wanted=264) == 1
    assert triton_decode.count_splits(n_programs=1, n_tiles=512, n_wanted=264) == triton_decode.MOST_SPLITS
    assert triton_decode.count_splits(n_programs=1, n_tiles=5, n_wanted=264) == 2
    assert triton_decode.count_splits(n_programs=1, n_tiles=1, n_wanted=264) == 1


def test_rows_of_different_lengths_leave_few_multiprocessors_idle() -> None:
    """8 rows of 8,192 to 32,768 keys, 16 heads, on the 132 multiprocessors of an H200, two programs on each at a time,
    begun in the order of the grid: done in at most a quarter more time than if all were busy to the end."""
    launch = triton_decode.launch_of(16, 64, torch.bfloat16)
    tiles = [-(-(8192 + 24576 * row // 7) // launch.n) for row in range(8) for _ in range(16)]
    n_splits = triton_decode.count_splits(len(tiles), max(tiles), launch.per_core * 132)
    free_at = [0] * (2 * 132)
    for split in range(n_splits):
        for n in tiles:
            share = -(-n // n_splits)
            heapq.heappush(free_at, heapq.heappop(free_at) + max(0, min(share, n - split * share)))
    assert max(free_at) <= 1.25 * sum(tiles) / len(free_at)


BUGS = {
    "signed distance": ("tl.abs(q_position_m[:, None] - k_position_n[None, :])",
                        "(q_position_m[:, None] - k_position_n[None, :])"),
    "slopes in base e": (".to(tl.float32) * LOG2E", ".to(tl.float32)"),
    "range end inclusive": ("(key_n[None, :] < end_0m[:, None])", "(key_n[None, :] <= end_0m[:, None])"),
    "second range ignored": ("tl.where(seen_0mn | seen_1mn,", "tl.where(seen_0mn,"),
    "a tile visited twice": ("(first_0 <= stop_1) & (first_1 <= stop_0)", "(first_0 == stop_1 + 1000)"),
    "second run misplaced": ("first_1 + t - n_first", "first_1 + t"),
    "last tile of a split dropped": ("tl.minimum(split * share + share, n_tiles)",
                                     "tl.minimum(split * share + share, n_tiles - 1)"),
    "one slope for a group": ("tl.load(slopes + head_m,", "tl.load(slopes + kv_head * GROUP + 0 * head_m,"),
    "sum not rescaled": ("sum_m * shrink_m + tl.sum(weight_mn, 1)", "sum_m + tl.sum(weight_mn, 1)"),
    "blind queries divide by zero": ("sum_m = tl.where(blind_m, 1.0, sum_m)", "sum_m = sum_m"),
    "splits weigh the same": ("weight_s = tl.exp2(lse_s - base)", "weight_s = tl.where(there_s, 1.0, 0.0)"),
    "log-sum-exp without the sum": ("top_m + tl.log2(sum_m)", "top_m"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    overlapping = make_case(5, 2, 4, 2, 5, 170, 32, dtype=torch.float32)
    apart = ranges_of(make_case(6, 2, 2, 1, 3, 170, 32, dtype=torch.float32), (3, 60, 150, 169), (0, 0, 5, 9))
    assert all(excess(case, n_splits=3) <= 2 for case in (overlapping, apart))  # sound without a bug
    return [overlapping, apart]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BUGS)
def test_check_catches(name: str, cases: list[Case], tmp_path: Path) -> None:
    """The kernels' source with one thing changed, as a module of its own."""
    number, (old, new) = list(BUGS).index(name), BUGS[name]
    source = Path(triton_decode.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / f"decode_bug_{number}.py"
    path.write_text(source.replace(old, new).replace("tidal::", f"tidal_bug_{number}::"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    assert max(excess(case, module, n_splits=3) for case in cases) > 100
