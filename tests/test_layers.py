"""Products by the quick way equal those by the plain one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tidal import layers

SHAPES = [(1,), (2,), (3, 1), (2, 5), (128,), (43, 3), (0,), (0, 4)]


def whole(*size: int) -> torch.Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-3, 4, size, generator=torch.Generator().manual_seed(len(size))).float()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_are_those_of_linear(shape: tuple[int, ...], dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = (whole(*size).to(dtype) for size in ((*shape, 256), (260, 256), (260,)))
    with torch.no_grad():
        found = layers.product(x, weight, bias if biased else None)
    torch.testing.assert_close(found, F.linear(x, weight, bias if biased else None), rtol=0, atol=0)


def test_rows_with_strides_of_their_own() -> None:
    weight, x = whole(256, 256), whole(256, 2, 7).permute(1, 2, 0)
    with torch.no_grad():
        torch.testing.assert_close(layers.product(x, weight), F.linear(x, weight), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "columns", "gradients", "quick"), [
    (2, 256, False, True), (256, 256, False, True), (1, 256, False, False), (257, 256, False, False),
    (2, 255, False, False), (2, 256, True, False),
])  # fmt: skip
def test_which_way_is_taken(rows: int, columns: int, gradients: bool, quick: bool) -> None:
    layer = layers.Linear(columns, 256)
    with mock.patch.object(torch, "mm", wraps=torch.mm) as mm, torch.set_grad_enabled(gradients):
        layer(torch.randn(rows, columns))
    assert mm.called == quick


def test_few_rows_that_lie_the_other_way_round_are_turned() -> None:
    """As those that another such product gives; BLAS takes three times as long for up to eight of them."""
    weight = whole(256, 256)
    for n_rows in (2, 8, 9):
        with mock.patch.object(torch, "mm", wraps=torch.mm) as mm, torch.no_grad():
            layers.product(layers.product(whole(n_rows, 256), weight), weight)
        assert mm.call_args.args[1].t().is_contiguous() == (n_rows <= 8)


def test_how_many_rows_are_multiplied_quickly() -> None:
    assert [layers.filled(n) for n in range(1, 18)] == [1, 2, 4, 4, 5, 6, 8, 8, *[16] * 8, 24]
    assert all(0 <= layers.filled(n) - n < 8 and layers.filled(n) % 8 == 0 for n in range(7, 300))
    assert layers.filled(0) == 0


def test_gradients_are_those_of_linear() -> None:
    layer, x = layers.Linear(256, 256), torch.randn(4, 256, requires_grad=True)
    layer(x).square().sum().backward()
    plain, y = torch.nn.Linear(256, 256, bias=False), x.detach().requires_grad_()
    plain.load_state_dict(layer.state_dict())
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
