"""The plan on the device against the dense mask, and what is remembered of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import DEVICE, STRUCTURES, exact, fused, poisoned, structured, triton_case

from tidal.kernels import TilePlan, triton_attention
from tidal.kernels.reference import visible_keys
from tidal.kernels.triton_plan import (
    HEAD,
    LOW,
    MERGED,
    N_BOTH,
    N_FULL,
    N_SINGLE,
    PARTIAL,
    ROW,
    SPREAD,
    interval_plan,
)
from tidal.kernels.triton_tiles import work_of

EMPTY, FIRST, SECOND, BOTH, FULL = range(5)
"""what is done with a tile: nothing, the mask of range 0, of range 1, of both, no mask"""
INT32_MAX = 2**31 - 1


def states_of_rows(rows: Tensor, n_key_tiles: int, short: bool = False) -> Tensor:
    """[B, Tq, Tk] from the segments; fails where a tile is visited twice. If `short`, the last tile of queries is not
    called full."""
    states = torch.zeros(*rows.shape[:2], n_key_tiles, dtype=torch.int64)
    for b, t in torch.cartesian_prod(*map(torch.arange, rows.shape[:2])).tolist():
        bounds = rows[b, t, PARTIAL.value : ROW.value].view(6, 2).tolist()
        kinds = [BOTH] * 4 if rows[b, t, MERGED.value] else [FIRST, FIRST, SECOND, SECOND]
        full = [kinds[0], kinds[2]] if short and t == rows.shape[1] - 1 else [FULL, FULL]
        for state, (start, end) in zip(kinds + full, bounds, strict=True):
            assert 0 <= start <= end <= n_key_tiles or start == end
            assert (states[b, t, start:end] == EMPTY).all(), "a tile is visited twice"
            states[b, t, start:end] = state
    return states


def states_of_columns(columns: Tensor) -> Tensor:
    """[B, Tq, Tk] from the lists."""
    n_batch, n_key_tiles, n_query_tiles = *columns.shape[:2], (columns.shape[2] - HEAD.value) // 2
    states = torch.zeros(n_batch, n_query_tiles, n_key_tiles, dtype=torch.int64)
    for b, t in torch.cartesian_prod(torch.arange(n_batch), torch.arange(n_key_tiles)).tolist():
        n_single, n_full, n_both = (int(columns[b, t, at.value]) for at in (N_SINGLE, N_FULL, N_BOTH))
        entries, both = columns[b, t, HEAD.value :].view(2, -1).tolist()
        visited = [(x // 2, FIRST + x % 2) for x in entries[:n_single]] + [(x, BOTH) for x in both[:n_both]]
        visited += [(x, FULL) for x in entries[n_query_tiles - n_full :]]
        assert len({x for x, _ in visited}) == len(visited), "a tile is visited twice"
        assert not any([*entries[n_single : n_query_tiles - n_full], *both[n_both:]]), "something is left over"
        for tile, state in visited:
            states[b, tile, t] = state
    return states


def tiled(x: Tensor, fill: float, tile_q: int, tile_k: int) -> Tensor:
    """[B, Lq, Lk] → [B, Tq, Tk, tile_q · tile_k]."""
    n_q, n_k = -(-x.shape[1] // tile_q), -(-x.shape[2] // tile_k)
    padded = torch.full((x.shape[0], n_q * tile_q, n_k * tile_k), fill)
    padded[:, : x.shape[1], : x.shape[2]] = x
    return padded.view(-1, n_q, tile_q, n_k, tile_k).transpose(2, 3).flatten(3)


def check_positions(table: Tensor, position: Tensor, tile: int, past: Tensor) -> None:
    """What rows or columns say of the positions of their own tile."""
    low, high = (tiled(sign * position[:, :, None], math.inf, tile, 1).amin((2, 3)) * sign for sign in (1, -1))
    spread, lowest = (table[..., at.value].contiguous().view(torch.float32) for at in (SPREAD, LOW))
    assert torch.equal(lowest, low)
    assert torch.equal(spread, torch.where(past, high - low, math.inf))


def check_plan(ranges: Tensor, q_position: Tensor, k_position: Tensor, tile_q: int, tile_k: int) -> None:
    n_keys = k_position.shape[1]
    on_device = [x.to(DEVICE) for x in (ranges, q_position, k_position)]
    with poisoned():
        rows, rows_order, columns, columns_order = (
            x.cpu() for x in interval_plan(*on_device, [tile_q, tile_k, 0, tile_q, tile_k, 1])
        )
    states = states_of_rows(rows, -(-n_keys // tile_k))
    # The last queries are loaded under a mask where they fill no tile.
    by_columns = states_of_rows(rows, -(-n_keys // tile_k), short=len(q_position[0]) % tile_q > 0)
    assert torch.equal(states_of_columns(columns), by_columns)

    visible = visible_keys(ranges, n_keys).float()
    some = tiled(visible, 0.0, tile_q, tile_k).amax(-1) > 0
    assert (states[some] != EMPTY).all(), "a tile with visible keys is missing"
    # Queries that are not there do not count, keys that are not there do: full tiles are loaded without a mask.
    n_real = (torch.arange(len(visible[0])) // tile_q).bincount() * tile_k
    covered = [visible, *(visible_keys(ranges[:, :, [r]], n_keys).float() for r in (0, 1))]
    for state, other in ((FIRST, covered[2]), (SECOND, covered[1])):
        hidden = tiled(other, 0.0, tile_q, tile_k).amax(-1) == 0
        assert hidden[by_columns == state].all(), "a tile is masked by one range that two reach"
    by_both, by_first, by_second = (tiled(x, 0.0, tile_q, tile_k).sum(-1) == n_real[:, None] for x in covered)
    assert by_both[states == FULL].all(), "a tile is called full that is not"
    assert (states[by_first | by_second] == FULL).all(), "a tile that one range covers is not called full"

    ahead = (k_position[:, None, :] > q_position[:, :, None]).float()
    mixed = tiled(ahead, 0.0, tile_q, tile_k).amax(-1) > 0
    check_positions(rows, q_position, tile_q, past=~(mixed & (states == FULL)).any(2))
    check_positions(columns, k_position, tile_k, past=~(mixed & (by_columns == FULL)).any(1))
    for order, work in ((rows_order, (states > 0).sum(2)), (columns_order, (states > 0).sum(1))):
        wanted = work.flatten().argsort(descending=True, stable=True)
        assert torch.equal(order.long(), wanted), "not the longest first"


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**30),
    structure=st.sampled_from(STRUCTURES),
    n_queries=st.integers(1, 40),
    n_keys=st.integers(1, 60),
    tile_q=st.sampled_from([8, 16]),
    tile_k=st.sampled_from([8, 16]),
)
def test_plan_of_random_ranges(
    seed: int, structure: str, n_queries: int, n_keys: int, tile_q: int, tile_k: int
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    check_plan(*structured(structure, 1, n_queries, n_keys, g), tile_q, tile_k)


@settings(max_examples=25)
@given(data=st.data())
def test_plan_of_two_runs(data: st.DataObject) -> None:
    """All queries alike: runs and full cores that overlap, touch, nest, in either order."""
    bounds = data.draw(st.lists(st.integers(0, 40), min_size=4, max_size=4))
    jitter = data.draw(st.integers(0, 6))
    g = torch.Generator().manual_seed(jitter)
    ranges = torch.tensor(bounds).view(1, 1, 2, 2).expand(1, 10, 2, 2)
    ranges = (ranges + torch.randint(-jitter, jitter + 1, (1, 10, 2, 2), generator=g)).clamp(0, 41).to(torch.int32)
    check_plan(ranges, torch.arange(10.0)[None], torch.arange(41.0)[None], 16, 4)


def test_plans_made_at_once_are_those_made_alone() -> None:
    """Of two and three shapes of tiles, and of one, whose launches have one or two parts."""
    g = torch.Generator().manual_seed(0)
    geometry = [x.to(DEVICE) for x in structured("packed", 3, 300, 70, g)]
    wanted = [(16, 8, 0), (4, 8, 1), (8, 16, 0), (16, 8, 1)]
    for n in (1, 2, 3, 4):
        alone = [x for one in wanted[:n] for x in interval_plan(*geometry, one)]
        with poisoned():
            together = interval_plan(*geometry, [x for one in wanted[:n] for x in one])
        assert len(together) == len(alone) == 2 * n
        assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ((1, 23), (0, 0), [FIRST, FULL, FIRST]),  # alone, up to the last tile
        ((24, 24), (1, 23), [SECOND, FULL, SECOND]),
        ((1, 16), (16, 23), [FIRST, FULL, SECOND]),  # next to each other
        ((1, 16), (15, 23), [BOTH, FULL, BOTH]),
    ],
)
def test_runs_are_merged_only_where_they_share_a_tile(
    first: tuple[int, int], second: tuple[int, int], wanted: list[int]
) -> None:
    ranges = torch.tensor([first, second], dtype=torch.int32).expand(1, 8, 2, 2)
    on_device = [x.to(DEVICE) for x in (ranges, torch.zeros(1, 8), torch.zeros(1, 24))]
    assert states_of_rows(interval_plan(*on_device, [8, 8, 0])[0].cpu(), 3).tolist() == [[wanted]]


def test_empty_ranges_may_start_anywhere() -> None:
    """And end anywhere: rounding up to a tile must not go beyond 32 bits. Their neighbours see all keys."""
    g = torch.Generator().manual_seed(0)
    _, q_position, k_position = structured("causal", 1, 16, 40, g)
    for start, end in ((INT32_MAX, 0), (INT32_MAX, -INT32_MAX - 1), (INT32_MAX - 3, 5), (-INT32_MAX - 1, 0)):
        ranges = torch.tensor([[start, end], [0, 40]], dtype=torch.int32).expand(1, 16, 2, 2).clone()
        check_plan(ranges, q_position, k_position, 8, 8)
        ranges[:, 8:, 1] = 0
        check_plan(ranges, q_position, k_position, 8, 8)


def test_more_tiles_than_one_step_looks_at() -> None:
    g = torch.Generator().manual_seed(0)
    check_plan(*structured("packed", 1, 12, 550, g), 8, 8)
    check_plan(*structured("packed", 1, 550, 12, g), 8, 8)


@triton.jit
def launch_order_kernel(order, found):  # type: ignore[no-untyped-def]  # Triton's compiler looks at annotations
    slot, batch, head, first = work_of(order, 2, 16)
    n = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)  # GPUs start the programs in this order
    tl.store(found + 4 * n, head)
    tl.store(found + 4 * n + 1, slot)
    tl.store(found + 4 * n + 2, batch)
    tl.store(found + 4 * n + 3, first)


def test_programs_start_head_by_head_and_longest_first() -> None:
    order, n_heads = torch.tensor([3, 0, 2, 1, 4], dtype=torch.int32, device=DEVICE), 3
    found = torch.full((n_heads * len(order), 4), -1, device=DEVICE)
    launch_order_kernel[(len(order), n_heads)](order, found)
    expected = itertools.product(range(n_heads), order.tolist())
    assert found.tolist() == [[head, slot, slot // 2, slot % 2 * 16] for head, slot in expected]


def test_one_plan_for_many_layers() -> None:
    case = triton_case(0, "streams")
    plan = TilePlan.build(case.ranges, case.k.shape[2])
    with torch.inference_mode():  # what is remembered here must serve layers that learn, too
        triton_attention.prepare(plan, case.ranges, case.q_position, case.k_position, case.q.dtype, case.q.shape[-1])
    first = fused(case, plan)
    remembered = {key: value[2] for key, value in plan.memo.items() if key.startswith("triton")}
    assert len(remembered) == 2  # rows alone, and all that is needed to learn
    for name, value in fused(case, plan).items():
        assert torch.equal(value, first[name])
    assert all(plan.memo[key][2] is value for key, value in remembered.items())
    moved = triton_case(0, "positions")
    moved = type(case)(*case.inputs()[:4], moved.q_position, moved.k_position[:, : case.k.shape[2]], *(
        case.slopes, case.weight))  # fmt: skip
    assert (fused(moved, plan)["out"] - exact(moved)["out"]).abs().max() < 1e-5  # the memo must notice


def test_a_plan_on_a_device_waits_for_nothing() -> None:
    ranges = torch.zeros(2, 5, 2, 2, dtype=torch.int32, device="meta")  # there are no values to look at
    plan = TilePlan.build(ranges, 7)
    assert plan.shape == (2, 5, 7)
    assert plan.slices.numel() == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_no_host_synchronisation() -> None:
    case = triton_case(0, "streams", torch.bfloat16, q_tiles=4.0, k_tiles=8.0, head_dim=64)
    fused(case)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = TilePlan.build(case.ranges, case.k.shape[2])
        out = triton_attention.attend(*case.inputs(), 0.125, plan)
        torch.autograd.grad(out, (case.q, case.k, case.v, case.slopes), case.weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
