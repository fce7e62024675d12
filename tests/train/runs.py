"""A tiny run that can be stopped anywhere and continued, and what it must then be equal to."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tidal import checkpoint
from tidal.cli import UserError
from tidal.config import Addition, Optim, Shape, Train
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.train import loop
from tidal.train.figures import MEASURED
from tidal.train.gradient import gradients
from tidal.train.loop import Recipe, model_for, train
from tidal.train.optim import Optimizer
from tidal.train.parallel import Parallel, full_tensor
from tidal.train.presets import PRESETS
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.resume import look_in
from tidal.train.stop import Stop, Stopped

CPU = torch.device("cpu")
STEPS, EVERY = 9, 3
SHAPE = Shape(d_model=16, n_heads=2, n_kv_heads=1, reader_layers=1, writer_layers=1, reader_ff=24, writer_ff=24,
              suffix_rows=50, place_jitter=3)  # fmt: skip
SETTINGS = dataclasses.replace(
    PRESETS["addition"], max_steps=STEPS, rows=4, validate_every=EVERY, device="cpu", model=SHAPE,
    workers=0,  # hooks are called in this process
    optim=Optim(lr=1e-2, warmup_steps=2, aux_weight=0.3), addition=Addition(digits=2, max_block_units=8),
)  # fmt: skip

Hook = Callable[[str, int], None]
"""Called as hook("batch" or "validate" or "samples", step)."""


def nothing(what: str, step: int) -> None:
    """A hook that does nothing."""


class Hooked(AdditionRecipe):
    """Sums; validation is quick, and a function of the weights."""

    def __init__(self, settings: Train = SETTINGS, hook: Hook = nothing) -> None:
        super().__init__(settings)
        self.hook, self.step = hook, 0

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        self.step = step // self.settings.optim.accumulate  # from 0: the step that is being computed
        self.hook("batch", self.step)
        return super().batch(step, share)

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        self.hook("validate", self.step)
        table = model.token_embedding.weight.detach()
        return {"quality": float((1000 * table[10:20].sum()).sin()), "exact_2": float(table.std())}

    def sample_prompts(self, step: int) -> list[str]:
        self.hook("samples", self.step)
        return ["1 + 2 ="]


def quick(recipe: AdditionRecipe, model: TidalTransformer) -> dict[str, float]:
    """Validation that takes no time, for `AdditionRecipe`."""
    return {"quality": 0.0, "exact_1": model.token_embedding.weight.std().item()}


def short_samples() -> Any:
    """A model that has learnt nothing does not end a text: samples would take half of a tiny run's time."""
    return mock.patch.object(loop, "generate", partial(generate, max_new_units=12))


def results(out: Path) -> dict[str, Any]:
    """All that a run has come to, but for times."""
    last = checkpoint.checkpoints(out)[-1]
    _, weights, trainer = checkpoint.read_checkpoint(last)
    with open(out / "metrics.csv", newline="") as file:
        metrics = [{**row, **dict.fromkeys(MEASURED, "")} for row in csv.DictReader(file)]
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "step": trainer["step"], "weights": _copied(weights), "moments": _copied(checkpoint.read_optimizer(last) or {}),
        "metrics": metrics,
        "samples": [{**json.loads(line), "seconds": 0} for line in lines],
        "best": (out / "best").read_text(), "latest": (out / "latest").read_text(),
    }  # fmt: skip


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apart from the file, which safetensors only maps."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of `results` in which two runs differ, in any bit."""
    parts = []
    for name, value in one.items():
        if name in ("weights", "moments"):
            same = value.keys() == other[name].keys() and all(torch.equal(value[k], other[name][k]) for k in value)
        else:
            same = value == other[name]
        if not same:
            parts.append(name)
    return parts


def whole(out: Path, settings: Train = SETTINGS, make: Callable[..., Recipe] = Hooked) -> dict[str, Any]:
    """The results of the run that is left alone."""
    out.mkdir()
    train(settings, make(settings), out)
    return results(out)


def stop_at(stop: Stop, what: str, step: int) -> Hook:
    """A hook that signals once, at the given moment."""

    def hook(now: str, at: int) -> None:
        if (now, at) == (what, step) and stop.signal is None:
            stop._came(signal.SIGTERM, None)

    return hook


def stopped_and_continued(out: Path, what: str, step: int, settings: Train = SETTINGS,
                          make: Callable[..., Recipe] = Hooked) -> dict[str, Any]:  # fmt: skip
    """The results of a run that is stopped at that moment, and continued by fresh objects from what is on the disk."""
    out.mkdir()
    stop = Stop()
    recipe = make(settings, stop_at(stop, what, step))
    try:
        train(settings, recipe, out, stop=stop)
    except Stopped:
        pass
    else:
        raise AssertionError(f"{what} {step} did not stop the run")
    torch.rand(7)  # the process that continues has a generator in some other state
    train(settings, make(settings), out, found=look_in(out))
    return results(out)


def as_process(rank: int, size: int, here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The surroundings that torchrun gives one of `size` processes, of which so many are on this machine."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here,
                        "TORCHELASTIC_RUN_ID": "tests"}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))


def refused(function: Callable[..., object], *arguments: object, **more: object) -> str:
    """What a call says that must raise UserError."""
    with pytest.raises(UserError) as raised:
        function(*arguments, **more)
    return str(raised.value)


def gradient(settings: Train = SETTINGS, step: int = 1,
             parallel: Parallel | None = None) -> tuple[list[torch.Tensor], dict[str, float]]:  # fmt: skip
    """The whole gradient of one step, in float64, and its figures."""
    recipe, parallel = Hooked(settings), parallel or Parallel()
    model = model_for(settings, recipe.tokenizer).double()
    wrapped, optimizer = parallel.wrap(model, settings), Optimizer(model, settings.optim)
    figures = gradients(wrapped, optimizer, recipe, step, settings, CPU, settings.parts, parallel)
    return [full_tensor(p.grad) for p in model.parameters() if p.grad is not None], figures


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference of two entries."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def train_step(model: TidalTransformer, optimizer: Optimizer, recipe: Recipe, step: int, rate: float,
               settings: Train, device: torch.device) -> dict[str, float]:  # fmt: skip
    """One step by hand: `gradients`, and the update."""
    figures = gradients(model, optimizer, recipe, step, settings, device)
    optimizer.step(rate)
    return figures
