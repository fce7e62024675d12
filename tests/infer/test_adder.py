"""Batches and beams on a model that has learnt something: random weights hide what only certainty shows."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.infer.beams import check_beams, check_greedy
from tests.infer.test_engine import check_batch
from tests.train.runs import train_step
from tidal.config import Addition
from tidal.infer.beam import beam_search
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer
from tidal.train.loop import model_for
from tidal.train.optim import Optimizer, learning_rate
from tidal.train.presets import PRESETS
from tidal.train.recipes.addition import AdditionRecipe, prompt_of, random_sums

STEPS = 250


@functools.cache
def adder() -> tuple[TidalTransformer, MixedTokenizer]:
    """The addition recipe, smaller: sums of one digit, five seconds."""
    preset = PRESETS["addition"]
    settings = replace(preset, rows=32, max_steps=STEPS, addition=Addition(digits=1),
                       optim=replace(preset.optim, lr=1e-2),
                       model=replace(preset.model, d_model=32, query_gain=1.0, reader_ff=64, writer_ff=64))  # fmt: skip
    recipe, threads = AdditionRecipe(settings), torch.get_num_threads()
    torch.set_num_threads(1)
    model = model_for(settings, recipe.tokenizer)
    optimizer = Optimizer(model, settings.optim)
    for step in range(STEPS):
        rate = learning_rate(step, STEPS, settings.optim)
        train_step(model, optimizer, recipe, step, rate, settings, torch.device("cpu"))
    torch.set_num_threads(threads)
    return model.eval(), recipe.tokenizer


def sums(count: int, seed: int = 0) -> list[str]:
    """Prompts of one digit, as learnt, to four, and some cut inside."""
    rng = np.random.default_rng(seed)
    prompts = [prompt_of(*random_sums(rng, 1 + i % 4, 1)[0]) for i in range(count)]
    return [p[: -(i % 3)] if i % 4 == 3 and i % 3 else p for i, p in enumerate(prompts)]


def test_it_has_learnt_to_add() -> None:
    model, tokenizer = adder()
    rng = np.random.default_rng(1)
    pairs = random_sums(rng, 1, 50)
    done = generate(model, tokenizer, [prompt_of(a, b) for a, b in pairs], max_new_units=12)
    right = sum(c.completion == f" {a + b}\n" for c, (a, b) in zip(done, pairs, strict=True))
    assert right >= 45


@pytest.mark.parametrize(("temperature", "dtype", "tolerance"),
                         [(1.0, torch.float64, 1e-9), (0.0, torch.float32, 1e-4)])  # fmt: skip
def test_sixty_four_sums_as_one_at_a_time(temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    model, tokenizer = adder()
    try:
        check_batch(model.to(dtype), tokenizer, sums(64), tolerance, temperature=temperature, max_new_units=20)
    finally:
        model.float()


def test_beams_on_sums() -> None:
    """Cached = recomputed, one beam = greedy, and more beams never find less than greedy."""
    model, tokenizer = adder()
    model.double()
    try:
        check_beams(model, tokenizer, sums(8), num_beams=4, max_new_units=12)
        check_greedy(model, tokenizer, sums(12))
        prompts = sums(40, seed=2)
        greedy = generate(model, tokenizer, prompts, max_new_units=20)
        beams = beam_search(model, tokenizer, prompts, num_beams=4, max_new_units=20, length_penalty=0.0)
        for one, found in zip(greedy, beams, strict=True):
            assert one.stop_reason != "eos" or found[0].log_prob >= one.log_prob - 1e-9
    finally:
        model.float()
