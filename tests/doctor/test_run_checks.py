"""Checks 19 to 22 on made-up figures: what is no illness gives no alarm, and what is damaged hides nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.doctor.bugs_training import pairs
from tests.doctor.trained import rewritten, train_tiny
from tests.train.runs import short_samples
from tidal import checkpoint
from tidal.config import TidalConfig
from tidal.doctor import Document, Result, checks_run, checks_weights, run
from tidal.doctor.examine import examine_checkpoint
from tidal.doctor.patient import Feed
from tidal.doctor.specimen import make
from tidal.infer.engine import Completion
from tidal.model import TidalTransformer
from tidal.train.loop import make_recipe, train

MODEL, TOKENIZER = make()


def result(number: int, texts: Sequence[Document] = (), folder: Path | None = None) -> Result:
    report = run(MODEL, TOKENIZER, texts=texts, checks=[number], quick=True, trained=True, checkpoint=folder)
    return report.results[0]


# ------------------------------------------------------------------------------------------- the weights' file


def test_without_room_for_a_copy_the_weights_are_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would refuse to start."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "free_bytes", lambda path: 0)
        found = run(MODEL, TOKENIZER, checks=[19], quick=True).results[0]
    assert (found.verdict, found.message[:16]) == ("skipped", "no room in TMPDI")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    found = run(MODEL, TOKENIZER, checks=[19], quick=True).results[0]
    assert (found.verdict, "No such file or directory" in found.message) == ("skipped", True)


@pytest.mark.parametrize(("attention", "idle"), [("memory", {1}), ("block", {0, 1})])
def test_queries_and_keys_that_cannot_matter_are_not_asked_to_learn(attention: str, idle: set[int],
                                                                    tmp_path: Path) -> None:  # fmt: skip
    """Where a step sees itself alone; those of layers that see more must learn."""
    run = train_tiny(tmp_path / "run", 30, step_window=1, writer_layers=2, writer_attention=attention)
    folder = checkpoint.resolve(run)
    found = examine_checkpoint(folder, quick=True, checks=[19]).results[0]
    assert found.verdict == "well", found
    shape = TidalConfig.from_dict(checkpoint.read_checkpoint(folder)[0]).shape
    assert {int(name.split(".")[1]) for name in checks_weights._idle(shape)} == idle
    assert not checks_weights._idle(dataclasses.replace(shape, step_window=2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("trained") / "run", 20)


def of_weights(run: Path, to: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Result:
    """Check 19 of a copy of a run, with other weights and settings."""
    shutil.copytree(run, to)
    rewritten(lambda tensors, config, trainer: change(tensors, trainer["settings"]))(to)
    return examine_checkpoint(checkpoint.resolve(to), quick=True, checks=[19]).results[0]


@pytest.mark.parametrize("scale", [10.0, 0.0])
def test_tables_whose_rate_is_zero_are_not_asked_to_learn(scale: float, trained: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        settings["optim"]["table_lr_scale"] = scale
        torch.manual_seed(settings["seed"])
        fresh = TidalTransformer(TidalConfig.from_dict(checkpoint.read_checkpoint(checkpoint.resolve(trained))[0]))
        tensors |= {name: t for name, t in fresh.state_dict().items() if "embedding" in name}

    found = of_weights(trained, tmp_path / "run", change)
    assert found.verdict == ("finding" if scale else "well"), found
    assert ("embedding.weight is as it was at first" in found.message) == bool(scale)


@pytest.mark.parametrize(("source", "said"), [
    ("trained", "reader.0.mlp.up.weight is as it was at first; 20 steps have not changed it"),
    ("gone", "not compared with what it began with: "), ("run", "not compared with what it began with: "),
])  # fmt: skip
def test_fine_tuning_is_compared_with_what_it_began_with(source: str, said: str, trained: Path,
                                                         tmp_path: Path) -> None:  # fmt: skip
    """Where that is still there, and not the run itself, under another's old name."""
    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        settings["init_from"] = str(trained if source == "trained" else tmp_path / source)
        if source != "run":
            tensors |= {name: 1.01 * t for name, t in tensors.items() if name != "reader.0.mlp.up.weight"}

    found = of_weights(trained, tmp_path / "run", change)
    assert found.verdict == ("finding" if source == "trained" else "well"), found
    assert found.message.startswith(said)


def test_suffixes_that_are_never_met_are_not_asked_to_learn(tmp_path: Path) -> None:
    """Digits have none."""
    settings = pairs(tmp_path)
    lines = [{"text": f"{n} {n * n} {7 * n}"} for n in range(40)]
    Path(settings.text.data[0]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = dataclasses.replace(settings, out=str(tmp_path / "run"), max_steps=3, validate_every=3, device="cpu")
    (tmp_path / "run").mkdir()
    with short_samples():
        folder = checkpoint.resolve(train(settings, make_recipe(settings), tmp_path / "run"))
    assert not checkpoint.read_checkpoint(folder)[1]["suffix_embedding.weight"].any()
    found = examine_checkpoint(folder, quick=True, checks=[19]).results[0]
    assert found.verdict == "well", found
    Path(settings.text.data[0]).unlink()
    found = examine_checkpoint(folder, texts=["12 34"], quick=True, checks=[19]).results[0]
    assert found.verdict == "well", found


# ---------------------------------------------------------------------------------------- what is written


SHORT = [Document(f"{n} + 2 =", f" {n + 2}\n") for n in range(12)]
LONG = [Document(f"chapter {n}:", " the light and the fox met 12 dogs in the night" * 9) for n in range(12)]
SILENT = [Document(f"say nothing, {n}:", "") for n in range(16)]
ZEROS = [Document("0\n" * n, "0\n" * 99) for n in range(1, 13)]


def written(monkeypatch: pytest.MonkeyPatch, completion: str, ends: bool) -> None:
    """What sampling gives for every prompt."""
    def generate(model: object, tokenizer: object, prompts: Sequence[str], **how: Any) -> list[Completion]:
        blocks, reason = TOKENIZER.split(completion), "eos" if ends else "length"
        return [Completion.of(prompt, blocks, reason, [], [], 0.1) for prompt in prompts]  # type: ignore[arg-type]

    monkeypatch.setattr(checks_run, "generate", generate)


@pytest.mark.parametrize(("texts", "completion", "ends", "said"), [
    (SHORT, " the light", True, ""),
    (SHORT, " the light", False, "the share of never ending completions is 1, more than 0.5"),
    ([*SHORT[:1], *LONG], " the light", False, ""),  # of one short answer among long ones none need be written
    ([*SHORT, *LONG[:4]], " the light", False, "the share of never ending completions is 1, more than 0.625"),
    ([*SHORT[:8], *SILENT], "", True, ""),  # which to answer need not be known
    ([*SHORT, *SILENT[:4]], "", True, "the share of empty completions is 1, more than 0.625"),
    ([*SHORT, *SILENT[:4]], " ", True, "the share of empty completions is 1, more than 0.625"),
    (ZEROS, "0\n" * 30, False, ""),
    ([*LONG, *ZEROS[:4]], "0\n" * 30, False, "the share of repeating completions is 1, more than 0.625"),
])  # fmt: skip
def test_samples_are_compared_with_the_data(texts: list[Document], completion: str, ends: bool, said: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    written(monkeypatch, completion, ends)
    found = result(20, texts)
    assert found.verdict == ("finding" if said else "well"), found
    assert said in found.message


@pytest.mark.parametrize(("n", "said"), [
    (12, ", less than 0.002"),
    (2, "what the prompt is worth is not judged: 12 texts have 2 different prompts"),
])  # fmt: skip
def test_few_templates_need_say_nothing_of_what_follows(n: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a model that makes no difference between prompts."""
    read = TidalTransformer.read
    monkeypatch.setattr(TidalTransformer, "read", lambda *rest: torch.zeros_like(read(*rest)))
    found = result(21, [Document(f"question {i % n}:", f" the answer is {i}\n") for i in range(12)])
    assert found.verdict == ("finding" if n == 12 else "well"), found
    assert said in found.message


def test_held_out_text_that_costs_far_more_than_samples_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    written(monkeypatch, " the light", True)
    costs = iter((0.5, 5.0))
    monkeypatch.setattr(checks_run, "_bits_per_byte", lambda *_: next(costs))
    found = result(22, LONG)
    assert "learnt by heart" in found.message


# -------------------------------------------------------------------------------------------- the figures


def a_run(folder: Path, losses: Sequence[float | str], end: str = "", **settings: object) -> Path:
    """A checkpoint folder of a run with these figures, whose metrics.csv ends in `end`."""
    (found := folder / "checkpoints/step-000200").mkdir(parents=True)
    trainer = {"step": 200, "settings": {"max_steps": 200, "max_seconds": 0.0, **settings}}
    (found / "trainer.json").write_text(json.dumps(trainer))
    rows = [f"{10 * i},{i},{loss}" for i, loss in enumerate(losses, start=1)]
    (folder / "metrics.csv").write_text("\r\n".join(["step,seconds,loss", *rows, end]))
    return found


FELL = [5.0 * 0.9**i for i in range(20)]


@pytest.mark.parametrize(("losses", "end", "said"), [
    (FELL, "", ""), (FELL, "210,21", ""), (FELL, "2", ""), (FELL, "210,21,0.", ""),
    ([*FELL[:9], "nan", *FELL[10:]], "210,2", "step 100: loss not finite"),
    ([*FELL[:9], "torn", *FELL[10:]], "", "the run's figures cannot be read: ValueError"),
    (FELL[:4], "50,5", "40 steps were done of 200 planned"),
])  # fmt: skip
def test_a_row_that_is_torn_hides_nothing(losses: list[float | str], end: str, said: str, tmp_path: Path) -> None:
    found = result(21, folder=a_run(tmp_path, losses, end))
    assert found.verdict == ("finding" if said else "well"), found
    assert said in found.message
    assert said or "what the prompt is worth needs 4 texts of the kind it was trained on" in found.message


@pytest.mark.parametrize("source", [None, "runs/other"])
def test_fine_tuning_may_begin_near_its_end(source: str | None, tmp_path: Path) -> None:
    found = result(21, folder=a_run(tmp_path, [0.5] * 20, init_from=source))
    assert found.verdict == ("finding" if source is None else "well"), found


def test_the_figures_are_found_from_inside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_run(tmp_path, [*FELL[:9], "nan", *FELL[10:]])
    for here, path in ((folder.parent, folder.name), (folder, "."), (folder, "../step-000200")):
        monkeypatch.chdir(here)
        assert "step 100: loss not finite" in result(21, folder=Path(path)).message


def test_a_copy_does_not_take_the_figures_of_others(tmp_path: Path) -> None:
    """Those of a checkpoint's run are two folders above it only where the run wrote it."""
    a_run(tmp_path, ["no figures"])
    (tmp_path / "checkpoints").rename(tmp_path / "models")
    found = result(21, folder=tmp_path / "models/step-000200")
    assert (found.verdict, found.message[:14]) == ("well", "no metrics.csv")


SAVED = "how far the validation of step 200, done again, is from what metrics.csv says is "


@pytest.mark.parametrize(("recipe", "then", "now", "said"), [
    ("addition", 0.5, 0.485, ""), ("addition", 0.5, 0.53, SAVED + "0.03, more than 0.02: other weights were saved"),
    ("text", -0.5, -0.508, ""), ("text", -0.5, -0.52, SAVED + "0.02, more than 0.01"),
    ("text", -4.0, -3.965, ""), ("text", -4.0, -4.05, SAVED + "0.05, more than 0.04"),
    ("text", -4.0, float("nan"), SAVED + "nan, more than 0.04"),
])  # fmt: skip
def test_what_was_saved_is_what_was_validated(recipe: str, then: float, now: float, said: str, tmp_path: Path) -> None:
    folder = a_run(tmp_path, FELL, recipe=recipe)
    head, *rows, last = (tmp_path / "metrics.csv").read_text().splitlines()
    lines = f"{head},quality", *(f"{row}," for row in rows), f"{last},{then}", ""
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    feed = Feed(None, validate=lambda model: {"quality": now})  # type: ignore[arg-type]
    low = copy.deepcopy(MODEL).bfloat16()
    for model, quick, feeds, why in ((MODEL, False, feed, ""), (MODEL, True, feed, "--quick"),
                                     (MODEL, False, None, "the data are gone"), (low, False, feed, "it is in float32")):
        report = run(model, TOKENIZER, checks=[21], quick=quick, trained=True, checkpoint=folder, feed=feeds,
                     not_examined="" if feeds else "the data are gone")  # fmt: skip
        found = report.results[0]
        assert found.verdict == ("finding" if said and not why else "well"), found
        assert (f"validation was not done again: {why}" if why else said or f"quality {now} (in") in found.message
