"""RMSNorm with its own gradient is torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tidal import norm
from tidal.norm import RMSNorm


def made(dtype: torch.dtype = torch.float64) -> RMSNorm:
    torch.manual_seed(0)
    layer = RMSNorm(6, eps=1e-6, dtype=dtype)
    torch.nn.init.normal_(layer.weight)
    return layer


def out_and_gradients(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    out = layer(x)
    return [out, *torch.autograd.grad(out, (x, *layer.parameters()), torch.sin(torch.arange(out.numel()).view_as(out)))]


def torchs(layer: RMSNorm) -> torch.nn.RMSNorm:
    theirs = torch.nn.RMSNorm(6, eps=1e-6, dtype=layer.weight.dtype)
    theirs.load_state_dict(layer.state_dict())
    return theirs


def assert_as_torch(layer: RMSNorm, x: Tensor, tolerance: float) -> None:
    for ours, theirs in zip(out_and_gradients(layer, x), out_and_gradients(torchs(layer), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


INPUTS = {
    "plain": lambda: torch.randn(3, 5, 6),
    "one row": lambda: torch.randn(6),
    "heads": lambda: torch.randn(2, 5, 3, 6).transpose(1, 2),
    "a part": lambda: torch.randn(2, 5, 12)[..., 6:],
    "zeros": lambda: torch.zeros(2, 6),
    "none": lambda: torch.randn(0, 6),
    "large and small": lambda: torch.randn(4, 6) * torch.tensor([[1e15], [1.0], [1e-4], [1e-9]]),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_as_torch(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    layer, x = made(dtype), INPUTS[kind]().to(dtype).requires_grad_()
    assert_as_torch(layer, x, tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torchs(layer)(x), rtol=tolerance, atol=tolerance)


def test_gradient() -> None:
    layer, x = made(), torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: norm._Norm.apply(x, w, 1e-6), (x, layer.weight))


@pytest.mark.parametrize("bug", ["mean forgotten", "weight forgotten", "scale forgotten"])
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    vecdot, original = torch.linalg.vecdot, norm._Norm.backward

    def backward(ctx, g):  # type: ignore[no-untyped-def]
        dx, dw, nothing = original(ctx, g)
        _, r, w = ctx.saved_tensors
        return {"weight forgotten": (dx / w, dw, nothing), "scale forgotten": (dx / r, dw, nothing)}[bug]

    if bug == "mean forgotten":
        monkeypatch.setattr(torch.linalg, "vecdot", lambda a, b: 0 * vecdot(a, b))
    else:
        monkeypatch.setattr(norm._Norm, "backward", staticmethod(backward))
    with pytest.raises(AssertionError):
        assert_as_torch(layer, x, 1e-5)


def test_under_autocast_norms_stay_precise() -> None:
    layer, x = made(torch.float32), torch.randn(3, 5, 6, requires_grad=True)
    wanted = out_and_gradients(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = out_and_gradients(layer, x)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_where_torch_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes and compiled graphs; a copy keeps working."""
    layer, x = made(torch.float32), torch.randn(2, 6, requires_grad=True)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with monkeypatch.context() as patch:
        patch.setattr(norm._Norm, "apply", None)
        assert torch.equal(layer(x.double()), torchs(layer)(x.double()))
