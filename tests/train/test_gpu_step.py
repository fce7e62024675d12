"""One training step on a GPU, fused kernels and all, is the step that the CPU takes in float32."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.strategies import random_model
from tests.train.runs import SETTINGS
from tidal.config import Shape
from tidal.model import TidalTransformer
from tidal.train import muon
from tidal.train.gradient import gradients
from tidal.train.optim import Optimizer
from tidal.train.recipes.addition import AdditionRecipe

SHAPE = Shape(d_model=64, n_heads=2, n_kv_heads=1, reader_layers=2, writer_layers=2, reader_ff=48, writer_ff=48,
              suffix_rows=50, foretell=True, recall=True, qk_norm=True)  # fmt: skip
"""heads of 32, which the fused kernels have"""

TOLERANCE = {"float32": 1e-4, "bf16": 5e-2}
OF_WEIGHTS = 5e-3
"""Muon orthogonalises in bfloat16 on a GPU: a sixth of an update, which itself is a sixtieth of the weights."""

devices = pytest.mark.parametrize("device", [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu,
                                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
])  # fmt: skip


def model_and_recipe() -> tuple[TidalTransformer, AdditionRecipe]:
    recipe = AdditionRecipe(dataclasses.replace(SETTINGS, model=SHAPE))
    return random_model(recipe.tokenizer, SHAPE, torch.float32).train(), recipe


def gradients_on(device: str, precision: str, aux_weight: float = 0.3) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter, on the CPU."""
    model, recipe = model_and_recipe()
    settings = dataclasses.replace(recipe.settings, precision=precision,
                                   optim=dataclasses.replace(SETTINGS.optim, aux_weight=aux_weight))  # fmt: skip
    optimizer = Optimizer(model.to(device), settings.optim)
    figures = gradients(model, optimizer, recipe, 0, settings, torch.device(device))
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.tensor([figures["loss"]]), **found}


def weights_on(device: str, of_gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer makes of the weights in two steps with these gradients, on the CPU."""
    model, recipe = model_and_recipe()
    optimizer = Optimizer(model.to(device), recipe.settings.optim)
    for _ in range(2):
        for name, p in model.named_parameters():
            p.grad = of_gradients[name].to(device)
        optimizer.step(1e-2)
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest distance of a tensor from what it should be, over the length of that (or a hundredth of the
    longest)."""
    assert found.keys() == wanted.keys()
    least = 1e-2 * max(float(x.norm()) for x in wanted.values())
    distances = [float((found[name] - x).norm()) / max(float(x.norm()), least) for name, x in wanted.items()]
    return max(math.inf if math.isnan(x) else x for x in distances)


@devices
@pytest.mark.parametrize("precision", TOLERANCE)
def test_gradients_are_those_of_the_cpu(device: str, precision: str) -> None:
    wanted = gradients_on("cpu", "float32")
    assert len(wanted) == 1 + len(list(model_and_recipe()[0].parameters()))
    distance = apart(gradients_on(device, precision), wanted)
    assert distance < TOLERANCE[precision]
    assert (distance > TOLERANCE["float32"]) == (precision == "bf16"), "whose products are rounded"


@devices
def test_updates_are_those_of_the_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = gradients_on("cpu", "float32")
    wanted = weights_on("cpu", given)
    if device == "cpu":  # as on a GPU
        real = muon.newton_schulz
        monkeypatch.setattr(muon, "newton_schulz", lambda g: real(g.bfloat16()).to(g.dtype))
    assert 0 < apart(weights_on(device, given), wanted) < OF_WEIGHTS


def test_another_step_shows() -> None:
    """Planted bugs: the auxiliary loss left out, a loss that is not a number, tables or matrices that stay."""
    wanted = gradients_on("cpu", "float32")
    assert apart(gradients_on("cpu", "float32", aux_weight=0.0), wanted) > TOLERANCE["bf16"]
    assert apart({**wanted, "loss": wanted["loss"] * torch.nan}, wanted) == math.inf
    weights = weights_on("cpu", wanted)
    for kind in ("token_embedding.weight", "reader.0.query.weight"):
        stays = {**wanted, kind: torch.zeros_like(wanted[kind])}
        assert apart(weights_on("cpu", stays), weights) > OF_WEIGHTS
