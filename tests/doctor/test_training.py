"""What training feeds is compared with its data, before training and of a run; nothing that a recipe may do alarms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.doctor.bugs_training import SHAPE, in_bf16, pairs, prompts_are_learnt, sums
from tests.doctor.plant import Patch
from tidal.config import Text, Train
from tidal.doctor import Report, examine, recipes, run, texts
from tidal.doctor.examine import _patient
from tidal.doctor.feeding import compare_batch
from tidal.doctor.patient import Patient
from tidal.doctor.recipes import feed_of, feed_of_run, precision_of_run
from tidal.doctor.report import Found, Meter
from tidal.prepare.make import prepare
from tidal.prepare.survey import survey
from tidal.train.loop import Recipe, make_recipe, model_for
from tidal.train.presets import PRESETS

CHARACTERS = dataclasses.replace(PRESETS["characters"], rows=3, model=SHAPE)


def patient_of(settings: Train, recipe: Recipe) -> Patient:
    return _patient(model_for(settings, recipe.tokenizer), recipe.tokenizer, [], True, False, None)


@pytest.mark.parametrize("settings", [
    sums, lambda folder: sums(folder, elsewhere=0.5, stretch=1.0, problems=3, operations="+-*", terms=4),
    pairs, lambda folder: pairs(folder, cut_probability=0.6), lambda folder: pairs(folder, cut_probability=0.0),
    lambda folder: pairs(folder, reader_budget=16),
    lambda folder: dataclasses.replace(pairs(folder, reader_budget=9000), rows=1),  # all of them in one row
    lambda folder: CHARACTERS,
])  # fmt: skip
def test_what_recipes_feed_is_no_false_alarm(settings: Callable[[Path], Train], tmp_path: Path) -> None:
    """Strays, stretched distances, windows in the middle of documents, cut blocks, long prompts."""
    wanted = settings(tmp_path)
    recipe = make_recipe(wanted)
    feed, patient, meter = feed_of(wanted, recipe), patient_of(wanted, recipe), Meter()
    for step in range(6):
        compare_batch(patient, meter, dataclasses.replace(feed, batch=recipe.batch(step)))
    assert meter.compared > 1000


def test_prompts_that_are_learnt_show_in_the_batch(tmp_path: Path, monkeypatch: Patch) -> None:
    prompts_are_learnt(monkeypatch)
    settings = pairs(tmp_path)
    recipe = make_recipe(settings)
    feed = feed_of(settings, recipe)
    with pytest.raises(Found, match=r"0 characters of a document of the training batch are a prompt, not \d"):
        compare_batch(patient_of(settings, recipe), Meter(), feed)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_run_is_compared_where_its_data_are(prepared: bool, tmp_path: Path) -> None:
    settings = pairs(tmp_path)
    made = make_recipe(settings)
    made.tokenizer.save(tmp_path / "run/tokenizer")
    lines = map(json.loads, Path(settings.text.data[0]).read_text(encoding="utf-8").splitlines())
    pair = next(line for line in lines if "prompt" in line)
    text = settings.text
    if prepared:
        prepare(survey(text.data, text.hold_out, settings.seed), made.tokenizer, tmp_path / "shards")
        text = dataclasses.replace(text, data=(), prepared=str(tmp_path / "shards"))
    trainer = {"settings": dataclasses.asdict(dataclasses.replace(settings, text=text)), "data": made.digest}
    trainer = json.loads(json.dumps(trainer))
    feed, why = feed_of_run(trainer, tmp_path / "run", made.tokenizer)
    assert (feed is not None, why) == (True, "")
    assert feed is not None
    assert feed.prompt_of(pair["prompt"] + pair["completion"]) == pair["prompt"]
    assert feed_of_run({**trainer, "data": "another"}, tmp_path / "run", made.tokenizer) == (
        None, "the run's data are not the same any more")  # fmt: skip
    if prepared:
        Path(settings.text.data[0]).unlink()  # the prompts are not known, but what is fed is
        feed, why = feed_of_run(trainer, tmp_path / "run", made.tokenizer)
        assert feed is not None
        assert feed.prompt_of(pair["prompt"] + pair["completion"]) is None
    gone = dataclasses.asdict(dataclasses.replace(settings, text=Text(data=("gone.txt",))))
    assert feed_of_run({"settings": gone}, tmp_path, made.tokenizer) == (None, "the run's data are gone")
    assert feed_of_run({"settings": {"model": 3}}, tmp_path, made.tokenizer)[1].startswith("the run's settings cannot")
    assert feed_of_run({}, tmp_path, made.tokenizer) == (None, "")


@pytest.mark.parametrize(("name", "said"), [
    ("run/model.txt", ""), (".hidden.txt", ""), ("more.csv", ""), ("more.txt", "the run's data have more than"),
])  # fmt: skip
def test_only_files_that_are_read_count_as_data(name: str, said: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Of `--data .`, where the run is in the same folder."""
    settings = pairs(tmp_path)
    settings = dataclasses.replace(settings, text=dataclasses.replace(settings.text, data=(str(tmp_path),)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    made = make_recipe(settings)
    made.tokenizer.save(tmp_path / "run/tokenizer")
    trainer = {"settings": dataclasses.asdict(settings), "data": made.digest}
    monkeypatch.setattr(recipes, "IN_MEMORY", 100_000)
    (tmp_path / name).write_bytes(bytes(200_000))
    feed, why = feed_of_run(trainer, tmp_path / "run", made.tokenizer)
    assert (feed is None, why[:29]) == (bool(said), said)


def test_training_hands_over_what_it_feeds_and_its_precision(tmp_path: Path, monkeypatch: Patch) -> None:
    given: dict[str, Any] = {}

    def noted(*_: object, **how: Any) -> Report:
        given.update(how)
        return Report(())

    monkeypatch.setattr(examine, "run", noted)
    settings = in_bf16(tmp_path)
    recipe = make_recipe(settings)
    examine.examine_before_training(settings, recipe)
    assert given["precision"] == "bf16"
    assert given["feed"].batch.n_units == recipe.batch(0).n_units
    assert precision_of_run({"settings": dataclasses.asdict(settings)}) == "bf16"
    assert precision_of_run({}) == "float32"


@pytest.mark.parametrize(("reader_budget", "least"), [(64, texts.LONG_IF_QUICK), (900, 901), (10**6, 5000)])
def test_a_prompt_is_longer_than_rows_of_training(reader_budget: int, least: int, tmp_path: Path,
                                                  monkeypatch: Patch) -> None:  # fmt: skip
    """But for rows that are too long to be examined in float64."""
    monkeypatch.setattr(texts, "MOST_LONG", 5000)
    settings = pairs(tmp_path)
    recipe = make_recipe(settings)
    feed, patient = feed_of(settings, recipe), patient_of(settings, recipe)
    reader_ids = torch.zeros(1, reader_budget, dtype=torch.int32)
    patient.feed = dataclasses.replace(feed, batch=dataclasses.replace(feed.batch, reader_ids=reader_ids))
    n_tokens = len(patient.layout(texts.long_prompt(patient)).tokens)
    assert least < n_tokens < least + 200


def test_it_is_said_that_a_run_is_not_compared(tmp_path: Path) -> None:
    settings = sums(tmp_path)
    recipe = make_recipe(settings)
    model = model_for(settings, recipe.tokenizer)
    report = run(model, recipe.tokenizer, quick=True, checks=[11], not_examined="the run's data are gone")
    assert report.ok
    assert "training batches not examined: the run's data are gone" in report.table()
