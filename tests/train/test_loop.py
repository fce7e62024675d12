"""The training loop."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.runs import CPU, Hooked, apart, gradient, train_step
from tidal import checkpoint
from tidal.blocks import BlockTable, Passage, passage
from tidal.cli import UserError
from tidal.config import Addition, Optim, Shape, Train
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train import loop
from tidal.train.figures import COLUMNS
from tidal.train.loop import Run, model_for, train
from tidal.train.optim import Optimizer
from tidal.train.presets import PRESETS
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.records import Metrics
from tidal.train.stop import Stop

SHAPE = Shape(d_model=16, n_heads=2, n_kv_heads=1, reader_layers=1, writer_layers=1, reader_ff=24, writer_ff=24,
              suffix_rows=50, place_jitter=3)  # fmt: skip
SETTINGS = dataclasses.replace(
    PRESETS["addition"], max_steps=4, rows=4, validate_every=2, device="cpu", model=SHAPE,
    optim=Optim(lr=1e-2, warmup_steps=2, aux_weight=0.3), addition=Addition(digits=2, max_block_units=16),
)  # fmt: skip


class Scripted(AdditionRecipe):
    """Sums, with held-out figures made up beforehand."""

    def __init__(self, settings: Train, qualities: list[float]) -> None:
        super().__init__(settings)
        self.qualities: Iterator[float] = iter(qualities)

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        return {"quality": next(self.qualities), "exact_2": 0.25}

    def sample_prompts(self, step: int) -> list[str]:
        return ["1 + 2 ="]


def trained(out: Path, settings: Train = SETTINGS, qualities: list[float] | None = None) -> Path:
    out.mkdir()
    return train(settings, Scripted(settings, qualities or [0.0] * 99), out)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_checkpoint(folder)[1]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------- training


def test_the_seed_decides_every_bit(tmp_path: Path) -> None:
    folders = [trained(tmp_path / name) for name in "ab"]
    one, other = (checkpoint.resolve(folder, "latest") for folder in folders)
    assert same(weights_of(one), weights_of(other))
    assert same(checkpoint.read_optimizer(one) or {}, checkpoint.read_optimizer(other) or {})
    samples = [[json.loads(line) for line in (f / "samples.jsonl").read_text().splitlines()] for f in folders]
    assert [{**s, "seconds": 0} for s in samples[0]] == [{**s, "seconds": 0} for s in samples[1]]
    tokenizer = AdditionRecipe(SETTINGS).tokenizer
    at_first = [model_for(dataclasses.replace(SETTINGS, seed=n), tokenizer).token_embedding.weight for n in (0, 0, 1)]
    assert torch.equal(at_first[0], at_first[1])
    assert not torch.equal(at_first[0], at_first[2])
    different = trained(tmp_path / "c", dataclasses.replace(SETTINGS, seed=1))
    mine, theirs = weights_of(one), weights_of(checkpoint.resolve(different, "latest"))
    assert not any(torch.equal(mine[name], theirs[name]) for name in mine if mine[name].ndim > 1)


def test_validation_and_samples_leave_no_trace_in_training(tmp_path: Path) -> None:
    often, seldom = (trained(tmp_path / str(n), dataclasses.replace(SETTINGS, validate_every=n)) for n in (1, 4))
    assert same(weights_of(checkpoint.resolve(often, "latest")), weights_of(checkpoint.resolve(seldom, "latest")))


def test_training_learns() -> None:
    recipe = AdditionRecipe(SETTINGS)
    model = model_for(SETTINGS, recipe.tokenizer)
    optimizer = Optimizer(model, SETTINGS.optim)
    losses = [train_step(model, optimizer, recipe, step, 1e-2, SETTINGS, CPU)["loss"] for step in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(
    ("qualities", "best"),
    [([0.1, 0.9, 0.3, 0.2], 2), ([0.9, 0.1, 0.3, 0.2], 1), ([-9.0, -8.0, -7.0, -6.0], 4), ([0.0, 0.5, 0.5, 0.1], 3),
     ([0.2, math.nan, 0.1, math.nan], 1)],
)  # fmt: skip
def test_best_is_the_checkpoint_of_the_highest_quality(qualities: list[float], best: int, tmp_path: Path) -> None:
    out = trained(tmp_path / "run", dataclasses.replace(SETTINGS, validate_every=1, keep=1), qualities)
    assert (out / "latest").read_text() == "step-000004\n"
    assert (out / "best").read_text() == f"step-00000{best}\n"
    assert [folder.name for folder in checkpoint.checkpoints(out)] == sorted({f"step-00000{best}", "step-000004"})
    assert checkpoint.resolve(out).name == f"step-00000{best}"


def test_the_time_limit_ends_training_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()  # every look at the clock takes one: the loop's start, then once a step
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    settings = dataclasses.replace(SETTINGS, max_steps=1000, validate_every=400, max_seconds=5.0)
    out = trained(tmp_path / "run", settings)
    assert (out / "latest").read_text() == (out / "best").read_text() == "step-000005\n"
    with open(out / "metrics.csv", newline="") as file:
        assert [(row["step"], row["seconds"]) for row in csv.DictReader(file)] == [("5", "5")]


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    recipe = AdditionRecipe(SETTINGS)
    model = model_for(SETTINGS, recipe.tokenizer)
    optimizer = Optimizer(model, SETTINGS.optim)
    train_step(model, optimizer, recipe, 0, 1e-2, SETTINGS, CPU)
    with torch.no_grad():
        model.reader[0].mlp.up.weight[0, 0] = math.inf  # type: ignore[index, union-attr]
    weights, moments = copy.deepcopy(model.state_dict()), {k: v.clone() for k, v in optimizer.state().items()}
    with pytest.raises(UserError, match="step 7: loss nan"):
        train_step(model, optimizer, recipe, 7, 1e-2, SETTINGS, CPU)
    assert same(model.state_dict(), weights)
    assert same(optimizer.state(), moments)


def test_a_loss_that_is_not_finite_with_a_gradient_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = AdditionRecipe(SETTINGS)
    model = model_for(SETTINGS, recipe.tokenizer)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: (it := forward(batch))._replace(units=it.units + math.inf))
    with pytest.raises(UserError, match=r"step 7: loss inf and gradient norm \d"):
        train_step(model, Optimizer(model, SETTINGS.optim), recipe, 7, 1e-2, SETTINGS, CPU)


@pytest.mark.parametrize("compiled", [True, False])
def test_compiling_without_a_compiler(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\nSet …"
    monkeypatch.setattr(TidalTransformer, "forward", mock.Mock(side_effect=RuntimeError(text)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: None)
    with pytest.raises(UserError if compiled else RuntimeError) as raised:
        train(dataclasses.replace(SETTINGS, compile=compiled), Scripted(SETTINGS, [0.0]), tmp_path)
    assert str(raised.value) == ("--compile: No working C++ compiler found; install g++ (and gcc), or leave it out"
                                 if compiled else text)  # fmt: skip


@pytest.mark.parametrize(("precision", "told"), [("float32", True), ("bf16", False)])
def test_float32_on_a_gpu_is_told_of_tensor_cores(precision: Any, told: bool, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    settings = dataclasses.replace(SETTINGS, precision=precision, workers=0)
    run = Run(settings, Scripted(settings, []), tmp_path, Stop())
    run.device = torch.device("cuda")
    run.open(None)
    assert ("tensor cores; --precision bf16 does" in capsys.readouterr().err) == told


# --------------------------------------------------------------------------------------- accumulation


class Fixed:
    """The same batches again and again; the optimizer's update is left out, so that gradients can be read."""

    def __init__(self, tokenizer: MixedTokenizer, batches: list[list[list[Passage]]], table: BlockTable) -> None:
        self.tokenizer, self.batches, self.table = tokenizer, batches, table

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        return pack(self.batches[step], self.table)


def gradients(batches: list[list[str]], accumulate: int) -> list[torch.Tensor]:
    """Gradients of one step over `accumulate` batches of one text a row, without clipping, in float64."""
    optim = dataclasses.replace(SETTINGS.optim, accumulate=accumulate, clip=1e9)
    settings = dataclasses.replace(SETTINGS, optim=optim)
    tokenizer = AdditionRecipe(SETTINGS).tokenizer
    table = BlockTable(tokenizer)
    model = model_for(settings, tokenizer).double()
    recipe = Fixed(tokenizer, [[[passage(table, "", text)] for text in texts] for texts in batches], table)
    still = SimpleNamespace(zero_grad=model.zero_grad, step=lambda rate: None)
    train_step(model, still, recipe, 0, 0.0, settings, CPU)  # type: ignore[arg-type]
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_accumulated_batches_are_one_large_batch() -> None:
    texts = ["1 + 1 = 2\n", "12345 + 11111 = 23456\n", "99 + 17 = 116\n", "40 + 58 = 98\n"]  # not as many units
    together = gradients([texts], 1)
    assert apart(gradients([texts[:2], texts[2:]], 2), together) < 1e-12
    assert apart(gradients([[text] for text in texts], 4), together) < 1e-12
    assert apart(gradients([texts[:2]], 1), together) > 1e-3


def test_a_batch_without_text_is_learnt() -> None:
    """Of completions that are all empty, the end."""
    assert any(gradient.any() for gradient in gradients([[""]], 1))


def test_a_gradient_by_hand() -> None:
    """Of the mean over units, and of `aux_weight` of that over the blocks that were asked about."""
    settings = dataclasses.replace(SETTINGS, optim=dataclasses.replace(SETTINGS.optim, clip=1e9, accumulate=2))
    found, figures = gradient(settings, step=3)
    recipe = Hooked(settings)
    model, batches = model_for(settings, recipe.tokenizer).double(), [recipe.batch(i) for i in (6, 7)]
    sums = [model(batch) for batch in batches]
    units, asked = sum(s.n_units for s in sums), sum(s.n_aux for s in sums)
    loss = sum(s.units for s in sums) / units + settings.optim.aux_weight * sum(s.aux for s in sums) / asked
    wanted = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert apart(found, [g for g in wanted if g is not None]) < 1e-13
    nats = sum(s.units.item() for s in sums)
    assert figures["loss"] == pytest.approx(nats / units, rel=1e-12)
    n_bytes = sum(b.n_bytes for b in batches)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)
    assert figures["units"] == units
    assert len({units, asked, n_bytes}) == 3


# -------------------------------------------------------------------------------------------- metrics


def test_metrics_are_written_anew_when_columns_appear(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path)
    metrics.add(step=10, seconds=1.0, lr=0.5, loss=2.123456789, bits_per_byte=1.0, grad_norm=0.1)
    metrics.add(step=20, seconds=2.0, lr=0.5, loss=1.5, bits_per_byte=1.0, grad_norm=0.1, quality=0.5)
    metrics.add(step=30, seconds=3.0, lr=0.5, loss=1.25, bits_per_byte=1.0, grad_norm=0.1)
    lines = path.read_text().splitlines()  # on disk at once, not only when the run ends
    metrics.add(step=40, seconds=4.0, lr=0.5, loss=1.0, bits_per_byte=1.0, grad_norm=0.1, other=-1.0, quality=1.0)
    assert lines[0] == ",".join([*COLUMNS, "quality"])
    assert len(lines) == 4
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10", "20", "30", "40"]
    assert [row["loss"] for row in rows] == ["2.12346", "1.5", "1.25", "1"]
    assert [row["quality"] for row in rows] == ["", "0.5", "", "1"]
    assert [row["other"] for row in rows] == ["", "", "", "-1"]
