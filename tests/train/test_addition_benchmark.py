"""The benchmark of the recipe `addition`: what it measures, and that it trains and asks as the commands do."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import addition as benchmark
from benchmarks.addition_results import markdown
from benchmarks.switches import Switches
from tests.train.test_addition import TINY, settings, texts
from tidal.cli import UserError, parse
from tidal.config import Train
from tidal.train.__main__ import run as train
from tidal.train.loop import model_for
from tidal.train.recipes.addition import AdditionRecipe, answer_of, prompt_of

pytestmark = pytest.mark.usefixtures("one_a_row")


def test_the_benchmark_measures_each_part_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    flags = ["--seeds", "0", "1", "--samples", "40", "--sample-digits", "2", "--sample-steps", "2", "--digits", "3",
             "--exact-steps", "2", "--pairs", "12", "--length-digits", "2", "--length-steps", "2", "--lengths", "2",
             "5", "--count", "10", "--set", *TINY, "--out", str(out)]  # fmt: skip
    benchmark.run([*flags, "--parts", "samples", "exact"])
    first = json.loads(out.read_text())
    assert [(r["part"], r["variant"], r["seed"]) for r in first] == [
        (part, "backward", seed) for part in ("samples", "exact") for seed in (0, 1)
    ]
    benchmark.run([*flags, "--parts", "samples", "length", "--contrasts", "--picture", str(picture)])
    runs = json.loads(out.read_text())
    assert runs[:4] == first  # not measured again
    assert [(r["part"], r["variant"]) for r in runs[4::2]] == [
        ("samples", "forward"), ("samples", "no places"), ("length", "backward"), ("length", "forward"),
        ("length", "no places"),
    ]  # fmt: skip
    for r in runs:
        assert {"cpu_seconds", "wall_seconds", "steps", "seed", "processor", "torch", "python", "date"} <= set(r)
        assert r["train"]["addition"]["digits"] == {"samples": 2, "exact": 3, "length": 2}[r["part"]]
    assert list(runs[8]["exact_match"]) == ["2", "5"]
    assert runs[0]["samples"] == 40
    assert runs[2]["n_edge_cases"] > 100
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1])["runs"] == len(runs) == 14
    assert "| forward | 40 | 0.00% (0.00%) |" in shown


def test_runs_that_are_asked_otherwise_have_a_table_of_their_own() -> None:
    flags = ["--parts", "samples", "length", "--samples", "40", "--seeds", "0"]
    runs = [{**planned, "steps": 2, "parameters": 7, "cpu_seconds": 1.0, "exact_match": found}
            for more, match in ((["--lengths", "2"], {"2": 0.5}), (["--count", "3", "--lengths", "3"], {"3": 0.25}))
            for planned, found in zip(benchmark.planned(parse(benchmark.Settings, [*flags, *more], "")), (1.0, match),
                                      strict=True)]  # fmt: skip
    shown = markdown(runs)
    assert re.findall(r"; ([\d,]+) sums asked", shown) == ["1,000", "1,000", "3", "3"]
    assert re.findall(r"\| endless \| (\S+) \| 1 \|", shown) == ["50.00%", "25.00%"]


@pytest.mark.parametrize(("part", "flag"), [("samples", "--sample-digits"), ("exact", "--digits")])
def test_more_digits_than_can_be_drawn_are_refused_before_training(part: str, flag: str, tmp_path: Path) -> None:
    flags = ["--seeds", "0", "--sample-steps", "1", "--exact-steps", "1", "--pairs", "2", "--count", "2", "--samples",
             "9", "--set", *TINY, "--out", str(tmp_path / "a.json")]  # fmt: skip
    with pytest.raises(UserError, match=f"^the part {part} asks for numbers of at most 18 digits, not 19$"):
        benchmark.run(["--parts", part, flag, "19", *flags])


def test_edge_cases_hold_what_is_hard() -> None:
    cases = benchmark.edge_cases(10)
    assert len(set(cases)) == len(cases)
    assert max(max(pair) for pair in cases) == 10**10 - 1
    assert min(min(pair) for pair in cases) == 0
    assert {(0, 0), (9999999999, 1), (1, 9999999999), (9999999999, 9999999999), (9999999999, 30000)} <= set(cases)
    assert {longest_carry(a, b) for a, b in cases} == set(range(11))
    random = np.random.default_rng(0).integers(0, 10**10, (1000, 2)).tolist()
    assert max(longest_carry(a, b) for a, b in random) < 10 == max(longest_carry(a, b) for a, b in cases)


def longest_carry(a: int, b: int) -> int:
    """Places in a row that carry."""
    longest = run = carry = 0
    for place in range(12):
        carry = int(a // 10**place % 10 + b // 10**place % 10 + carry > 9)
        run = run + 1 if carry else 0
        longest = max(longest, run)
    return longest


@pytest.fixture(scope="module")
def half_learnt() -> tuple[Any, AdditionRecipe]:
    """A model that knows some sums of one digit."""
    own = settings(rows=32, digits=1, lengths="equal")
    own = dataclasses.replace(own, max_steps=150, optim=dataclasses.replace(own.optim, lr=1e-2, warmup_steps=5))
    recipe = benchmark.recipe_of(own, Switches())
    return benchmark.learn(own, recipe, "half")[0], recipe


def test_asking_in_one_pass_is_asking_the_decoder(half_learnt: tuple[Any, AdditionRecipe]) -> None:
    model, recipe = half_learnt
    problems = [(prompt_of(a, b), answer_of(a, b)) for a in range(10) for b in range(10)]
    decoded, wrong = benchmark.ask(model, recipe, problems, decode=True)
    packed, missed = benchmark.ask(model, recipe, problems, decode=False, rows=30)
    assert 0 < decoded < 1
    assert packed == decoded
    assert [text.split(" =")[0] + " =" for text in wrong] == missed


def test_training_is_that_of_the_loop(tmp_path: Path) -> None:
    """The same seed gives the weights that `python -m tidal.train` saves."""
    import tidal

    tiny = (*TINY, "warmup-steps=1")  # so that the rate falls within the three steps
    flags = [f"--{flag}" for flag in (*tiny, "max-steps=3", "digits=2", "validate-every=3", "no-doctor")]
    train([*flags, "--out", str(tmp_path / "run")])
    saved, _ = tidal.load(tmp_path / "run")
    own = benchmark.planned(benchmark.Settings(parts=("exact",), seeds=(0,), digits=2, exact_steps=3, set=tiny))[0]
    settings = Train.from_dict(own["train"])
    recipe = benchmark.recipe_of(settings, Switches())
    model, _ = benchmark.learn(settings, recipe, "same")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    fresh = model_for(settings, recipe.tokenizer).state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_contrasts_feed_what_they_say() -> None:
    own = settings()
    plain, forward, nowhere = (benchmark.recipe_of(own, s).batch(0) for s in (
        Switches(), Switches(write_order="forward"), Switches(places="off")))  # fmt: skip
    assert torch.equal(plain.reader_ids, forward.reader_ids)
    assert not torch.equal(plain.targets, forward.targets)
    assert not nowhere.reader_places.any()
    assert not nowhere.writer_places.any()
    assert torch.equal(nowhere.targets, plain.targets)
    tokenizer = AdditionRecipe(own).tokenizer
    row = forward.targets[0].tolist()
    end = row.index(tokenizer.eob_id)
    answer = texts(forward, tokenizer)[0].split(" =")[1].strip("\n")
    assert row[:end] == list(tokenizer.write_units(answer))[::-1]
