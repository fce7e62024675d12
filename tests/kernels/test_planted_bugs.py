"""The agreement check must catch each of these bugs, in the dense tile and in the loop over tiles."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import assert_agrees, make_case, worst_difference
from torch import Tensor

from tests.doctor.mutants import MUTANTS
from tests.doctor.plant import Plant
from tidal.kernels import api, cpu

torch.set_num_threads(1)

tile_geometry = cpu.tile_geometry


def geometry(change: Callable[..., tuple[Tensor, Tensor | None]]) -> Plant:
    return lambda patch: patch.setattr(cpu, "tile_geometry", change)


def signed_distance(ranges, q_position, k_position, index_k, dtype):  # type: ignore[no-untyped-def]
    _, mask = tile_geometry(ranges, q_position, k_position, index_k, dtype)
    return (q_position.to(dtype)[:, :, None] - k_position.to(dtype)[:, None, :])[:, None, None], mask


def end_off_by_one(ranges, *args):  # type: ignore[no-untyped-def]
    return tile_geometry(ranges - torch.tensor([0, 1], dtype=torch.int32), *args)


def second_range_ignored(ranges, *args):  # type: ignore[no-untyped-def]
    return tile_geometry(ranges * torch.tensor([[1], [0]], dtype=torch.int32), *args)


def masked_with_zero(*args):  # type: ignore[no-untyped-def]
    distance, mask = tile_geometry(*args)
    return distance, None if mask is None else torch.zeros_like(mask)


def overlap_counted_twice(ranges, q_position, k_position, index_k, dtype):  # type: ignore[no-untyped-def]
    distance, mask = tile_geometry(ranges, q_position, k_position, index_k, dtype)
    if index_k is None or mask is None:
        return distance, mask
    inside = (index_k >= ranges[..., 0, None]) & (index_k < ranges[..., 1, None])
    return distance, mask + inside.all(dim=2)[:, None, None].to(dtype) * 0.6931471805599453


def dslopes_sign(patch: pytest.MonkeyPatch) -> None:
    class Flip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, dx):  # type: ignore[no-untyped-def]
            return -dx

    attend = cpu.attend
    patch.setitem(api.BACKENDS, "cpu", api.Backend(
        lambda q, k, v, r, qp, kp, slopes, *rest: attend(q, k, v, r, qp, kp, Flip.apply(slopes), *rest)
    ))  # fmt: skip


OF_THE_DOCTOR = {mutant.name: mutant.plant for mutant in MUTANTS}
BUGS: dict[str, Plant] = {
    **{name: OF_THE_DOCTOR[name] for name in ("ALiBi with the wrong sign", "the kernel takes range ends as inclusive",
                                              "queries without keys take the mean")},
    "signed distance": geometry(signed_distance),
    "range end off by one": geometry(end_off_by_one),
    "second range ignored": geometry(second_range_ignored),
    "masked with 0": geometry(masked_with_zero),
    "overlap counted twice": geometry(overlap_counted_twice),
    "dslopes sign": dslopes_sign,
}  # fmt: skip
TILED_BUGS = {name: OF_THE_DOCTOR[name] for name in ("tiles use their first slice of keys only",
                                                     "tiles are taken to be full")}  # fmt: skip
VARIANTS = [(name, dense) for name in BUGS for dense in (True, False)] + [(name, False) for name in TILED_BUGS]


@pytest.mark.parametrize(("name", "dense"), VARIANTS)
def test_check_catches(name: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [make_case(4), make_case(4, n_queries=24, n_keys=40, structure="streams")]
    for case in cases:
        assert_agrees(case, 5, dense)  # sound before the bug
    {**BUGS, **TILED_BUGS}[name](monkeypatch)
    assert max(worst_difference(case, 5, dense)[0] for case in cases) > 1e-3
