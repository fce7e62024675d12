"""The optimizer and the learning rate."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from tests.train.runs import CPU, train_step
from tests.train.test_loop import SETTINGS, same, weights_of
from tidal import checkpoint
from tidal.config import Optim
from tidal.train.loop import model_for
from tidal.train.optim import Optimizer, learning_rate
from tidal.train.recipes.addition import AdditionRecipe

# -------------------------------------------------------------------------------------- learning rate


def test_learning_rate_at_its_corners() -> None:
    settings = Optim(lr=2.0, warmup_steps=10, decay_fraction=0.4)
    rate = [learning_rate(step, 100, settings) for step in range(101)]
    assert rate[0] == pytest.approx(0.2)  # not zero: the first step learns something
    assert rate[4] == pytest.approx(1.0)
    assert rate[8] == pytest.approx(1.8)
    assert rate[9:61] == [2.0] * 52
    assert rate[61] < 2.0
    assert rate[80] == pytest.approx(1.0)
    assert rate[99] == pytest.approx(2.0 / 40)  # the last step, still above zero
    assert rate[100] == 0.0
    assert all(abs(a - b) <= 0.2 + 1e-12 for a, b in itertools.pairwise(rate))
    assert [learning_rate(step, 100, settings) for step in reversed(range(101))] == rate[::-1]


@pytest.mark.parametrize("warmup", [0, 1, 3, 1000])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("max_steps", [1, 2, 50])
def test_learning_rate_lies_between_zero_and_its_highest(warmup: int, decay: float, max_steps: int) -> None:
    settings = Optim(lr=0.5, warmup_steps=warmup, decay_fraction=decay)
    rates = [learning_rate(step, max_steps, settings) for step in range(max_steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    if warmup <= 1 and decay == 0:
        assert rates == [0.5] * max_steps


# ------------------------------------------------------------------------------------------ optimizer


def test_optimizer_state_continues_bit_for_bit(tmp_path: Path) -> None:
    """Through a checkpoint on disk, into a fresh model and optimizer."""
    recipe = AdditionRecipe(SETTINGS)
    model = model_for(SETTINGS, recipe.tokenizer)
    optimizer = Optimizer(model, SETTINGS.optim)
    for step in range(3):
        train_step(model, optimizer, recipe, step, 1e-2, SETTINGS, CPU)
    folder = checkpoint.write_checkpoint(tmp_path, 3, tensors=model.state_dict(), config=model.config.to_dict(),
                                         trainer={}, tokenizer=recipe.tokenizer,
                                         optimizer=optimizer.state())  # fmt: skip

    resumed = model_for(dataclasses.replace(SETTINGS, seed=5), recipe.tokenizer)
    resumed.load_state_dict(weights_of(folder))
    moments = checkpoint.read_optimizer(folder)
    assert moments is not None
    assert len(moments) >= 3 * len(model.tables()) + 1
    fresh = Optimizer(resumed, SETTINGS.optim)
    fresh.load_state(moments)
    forgetful = copy.deepcopy(resumed)
    without = Optimizer(forgetful, SETTINGS.optim)
    for step in range(3, 6):
        for a_model, an_optimizer in ((model, optimizer), (resumed, fresh), (forgetful, without)):
            train_step(a_model, an_optimizer, recipe, step, 1e-2, SETTINGS, CPU)
    assert same(resumed.state_dict(), model.state_dict())
    assert same(fresh.state(), optimizer.state())
    assert not same(forgetful.state_dict(), model.state_dict())  # the state matters


def test_every_parameter_is_learnt_in_its_group() -> None:
    model = model_for(SETTINGS, AdditionRecipe(SETTINGS).tokenizer)
    settings = dataclasses.replace(SETTINGS.optim, lr=0.5, table_lr_scale=10.0, weight_decay=0.5, sharpen=0.25)
    optimizer = Optimizer(model, settings)
    groups = [group for part in optimizer.parts for group in part.param_groups]
    learnt = [p for group in groups for p in group["params"]]
    assert len(learnt) == len({id(p) for p in learnt}) == len(list(model.parameters()))
    tables = {id(p) for p in model.tables()}
    of_queries = {id(p) for name, p in model.named_parameters() if "norm_query" in name}
    assert of_queries
    for group in groups:
        for p in group["params"]:
            assert group["scale"] == (10.0 if id(p) in tables else 1.0)
            if id(p) not in of_queries:
                assert group["weight_decay"] == (0.5 if p.ndim == 2 and id(p) not in tables else 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for rate, growth in ((0.5, 0.0), (0.25, 0.125)):  # queries: while the rate is at its highest, and at half of it
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer.step(rate)
        assert sorted({group["lr"] for group in groups}) == [rate, 10 * rate]
        for name, p in model.named_parameters():  # without gradients, only decay moves them, and growth
            moved = 1 + rate * (growth if id(p) in of_queries else -0.5 if p.ndim == 2 and id(p) not in tables else 0)
            torch.testing.assert_close(p, moved * before[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_rarely_met_learn_as_fast(dtype: torch.dtype) -> None:
    """The more units a step has, the smaller is the gradient of a row that one of them meets; Adam undoes that."""
    model = model_for(SETTINGS, AdditionRecipe(SETTINGS).tokenizer).to(dtype)
    optimizer, table = Optimizer(model, SETTINGS.optim), model.suffix_embedding.weight  # all zeros
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert table.grad is not None
    table.grad[5], table.grad[6] = 1e-3, 1e-9
    others = {"token_embedding.weight": model.token_embedding.weight, "reader_norm.weight": model.reader_norm.weight}
    before = {name: p.clone() for name, p in others.items()}
    optimizer.step(1e-2)
    torch.testing.assert_close(table[6], table[5], rtol=1e-2, atol=0)
    assert table[5].abs().min() > 1e-2
    assert not table[7:].any(), "a row that was not met moves"
    assert same(others, before)


def test_tables_and_gains_learn_as_adamw_has_them() -> None:
    settings = dataclasses.replace(SETTINGS.optim, table_lr_scale=10.0, beta2=0.7)
    model = model_for(SETTINGS, AdditionRecipe(SETTINGS).tokenizer)
    optimizer, generator = Optimizer(model, settings), torch.Generator().manual_seed(0)
    learnt = (model.token_embedding.weight, 0.1), (model.reader_norm.weight, 0.01)
    alone = {weight: torch.nn.Parameter(weight.detach().clone()) for weight, _ in learnt}
    wanted = torch.optim.AdamW([{"params": [alone[weight]], "lr": rate} for weight, rate in learnt],
                               betas=(0.9, 0.7), eps=1e-12, weight_decay=0.0)  # fmt: skip
    for _ in range(3):
        for weight, one in alone.items():
            weight.grad = one.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step(0.01)
        wanted.step()
    for weight, one in alone.items():
        torch.testing.assert_close(weight, one)


def test_a_rate_of_zero_moves_nothing() -> None:
    recipe, settings = AdditionRecipe(SETTINGS), dataclasses.replace(SETTINGS.optim, lr=0.0, sharpen=1.0)
    model = model_for(SETTINGS, recipe.tokenizer)
    before = copy.deepcopy(model.state_dict())
    train_step(model, Optimizer(model, settings), recipe, 0, learning_rate(0, 4, settings), SETTINGS, CPU)
    assert same(model.state_dict(), before)


def test_moments_of_another_model_are_refused() -> None:
    model = model_for(SETTINGS, AdditionRecipe(SETTINGS).tokenizer)
    optimizer = Optimizer(model, SETTINGS.optim)
    moments = optimizer.state()
    for wrong, said in ((("0.0.momentum_buffer", torch.zeros(3, 2)), r"momentum_buffer is \[3, 2\], not \[16, 16\]"),
                        (("1.0.step", torch.zeros(1)), r"1\.0\.step is \[1\], not "),
                        (("1.99.step", torch.zeros(())), r"knows nothing of 1\.99\.step")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            optimizer.load_state({**moments, wrong[0]: wrong[1]})
    del moments["1.0.step"]
    with pytest.raises(ValueError, match=r"1\.0\.step is missing"):
        optimizer.load_state(moments)
