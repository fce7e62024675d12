"""Muon: what it does to singular values, and that it is torch's where that can be said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tidal.train import muon
from tidal.train.muon import COEFFICIENTS, ITERATIONS, Muon, newton_schulz

SHAPES = [(32, 16), (16, 48), (24, 24), (3, 8), (1, 5), (5, 1)]


def by_svd(g_mn: Tensor) -> Tensor:
    """The definition: each singular value goes through the polynomial on its own."""
    u, s, vt = torch.linalg.svd(g_mn, full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_nothing_else_changes(shape: tuple[int, int]) -> None:
    g = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.stack([g, 3 * g.flip(0) + 1])
    for one, update in zip(g, newton_schulz(g), strict=True):  # each on its own
        torch.testing.assert_close(update, by_svd(one), rtol=0, atol=1e-11)
    torch.testing.assert_close(newton_schulz(g.float())[0], by_svd(g[0]).float(), rtol=0, atol=1e-4)
    assert newton_schulz(g.float()).dtype == torch.float32
    if min(shape) != max(shape):  # a square one may have a singular value near zero
        s = torch.linalg.svdvals(newton_schulz(g)[0])
        assert s.min() > 0.6
        assert s.max() < 1.25


def test_a_small_gradient_is_as_large_an_update_and_none_is_none() -> None:
    g = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(1e-6 * g), newton_schulz(g))
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("together", [1, 1000, 1 << 24])
def test_many_matrices_are_updated_as_each_alone(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of a shape go into one product: of 16 × 48, one, one, or all three."""
    monkeypatch.setattr(muon, "TOGETHER", together)
    generator, some = torch.Generator().manual_seed(2), [(16, 48), (32, 16), (16, 48), (5, 1), (16, 48)]
    starts, grads = ([torch.randn(shape, dtype=torch.float64, generator=generator) for shape in some] for _ in range(2))
    weights = [nn.Parameter(start.clone()) for start in starts]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    optimizer = Muon([{"params": weights[:3]}, {"params": weights[3:]}], 0.1, 0.1)
    optimizer.step()
    optimizer.step()
    for weight, start, grad in zip(weights, starts, grads, strict=True):
        alone = nn.Parameter(start.clone())
        wanted = update_by(Muon([{"params": [alone]}], 0.1, 0.1), alone, torch.stack([grad, grad]))
        torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-12)


def update_by(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: Tensor) -> Tensor:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_is_torchs_own(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum, decay and size of the updates are, therefore; in float32 only the rounding differs."""
    start, *grads = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    theirs, ours, float32 = (nn.Parameter(start.clone()) for _ in range(3))
    wanted = update_by(torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs,
                       torch.stack(grads))  # fmt: skip
    exact = update_by(Muon([{"params": [float32]}], 0.1, 0.1), float32, torch.stack(grads))
    real = muon.newton_schulz
    monkeypatch.setattr(muon, "newton_schulz", lambda g: real(g.bfloat16()).to(g.dtype))
    found = update_by(Muon([{"params": [ours]}], 0.1, 0.1), ours, torch.stack(grads))
    moved = (wanted - start).norm()
    assert (found - wanted).norm() < 1e-2 * moved  # products are rounded in another order
    assert (exact - wanted).norm() < 5e-2 * moved
    assert not torch.equal(exact, wanted)


@pytest.mark.parametrize("bug", ["momentum", "decay", "scale"])
def test_planted_bugs_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, *grads = torch.randn(5, 16, 48, generator=torch.Generator().manual_seed(1))
    weight, right = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    wanted = update_by(torch.optim.Muon([right], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), right,
                       torch.stack(grads))  # fmt: skip
    real = muon.newton_schulz
    if bug == "momentum":
        monkeypatch.setattr(muon, "MOMENTUM", 0.5)
    if bug == "scale":
        monkeypatch.setattr(muon, "newton_schulz", lambda g: real(g) * (16 / 48) ** 0.5)
    found = update_by(Muon([{"params": [weight]}], 0.1, -0.1 if bug == "decay" else 0.1), weight, torch.stack(grads))
    assert (found - wanted).norm() > 5e-2 * (wanted - start).norm()
