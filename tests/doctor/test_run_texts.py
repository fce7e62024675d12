"""Where the doctor takes texts from that a run was trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Ran
from tidal import checkpoint
from tidal.cli import UserError
from tidal.config import Text
from tidal.doctor.specimen import make
from tidal.doctor.texts import of_run
from tidal.prepare.make import prepare, prepare_for_training
from tidal.prepare.survey import survey
from tidal.train.presets import PRESETS
from tidal.train.recipes.characters import TASKS


def test_problems_like_those_that_a_run_was_trained_on() -> None:
    own = dataclasses.replace(PRESETS["addition"].addition, operations="-*", digits=3)
    settings = dataclasses.asdict(dataclasses.replace(PRESETS["addition"], addition=own))
    documents, _ = of_run({"settings": settings})
    assert {d.prompt.split()[1] for d in documents} == {"-", "*"}
    for document in documents:
        a, operation, b, _ = document.prompt.split()
        assert document.completion == f" {int(a) - int(b) if operation == '-' else int(a) * int(b)}\n"


def test_questions_like_those_that_a_run_was_trained_on() -> None:
    documents, source = of_run({"settings": dataclasses.asdict(PRESETS["characters"])})
    assert "held out" in source
    assert {d.prompt.split()[0] for d in documents[:9]} == set(TASKS)
    assert all(d.ends and d.completion.startswith(" ") for d in documents)


@pytest.mark.parametrize("prepared", [False, True])
def test_text_like_that_a_run_was_trained_on(tmp_path: Path, prepared: bool) -> None:
    """Of the held-out documents, prompts included; what changed since then is called so."""
    lines = [{"prompt": f"{i} is", "completion": f" the number {i}."} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Text(data=(str(tmp_path / "data.jsonl"),), hold_out=0.2, vocab_size=300)
    made = prepare_for_training(text, 0)
    if prepared:
        prepare(survey(text.data, 0.2, 0), made.tokenizer, tmp_path / "shards")
        text = dataclasses.replace(text, data=(), prepared=str(tmp_path / "shards"))
    settings = dataclasses.asdict(dataclasses.replace(PRESETS["text"], text=text, seed=0))
    documents, source = of_run({"settings": settings, "data": made.digest})
    assert source == "the run's held-out text"
    assert 4 <= len(documents) <= 12
    known = {(line["prompt"], line["completion"]) for line in lines}
    assert {(d.prompt, d.completion) for d in documents} <= known
    assert "not the same" in of_run({"settings": settings, "data": "another"})[1]
    assert of_run({"settings": {**settings, "text": {"data": ["gone.txt"]}}}) == ([], "")


@pytest.mark.parametrize("settings", [
    [1], "text", {"recipe": "text"}, {"recipe": "addition", "seed": 0, "addition": {"operations": ""}},
    {"recipe": "addition", "seed": 0, "addition": {"digits": 10**9}}, {"recipe": [], "seed": 0},
    {"recipe": "text", "seed": 0, "text": {"hold_out": "much"}},
])  # fmt: skip
def test_settings_that_cannot_be_read(settings: object) -> None:
    with pytest.raises(UserError, match=r"settings cannot be read: .*; give --data"):
        of_run({"settings": settings})


def test_data_that_cannot_be_read_any_more_keep_no_one_from_the_laws(tmp_path: Path,
                                                                     command: Callable[..., Ran]) -> None:  # fmt: skip
    """The model is as it was, whatever has been put beside its data."""
    (data := tmp_path / "data").mkdir()
    for i in range(9):
        (data / f"{i}.txt").write_text(f"the light and the {i} foxes\n" * 9)
    text = Text(data=(str(data),), hold_out=0.2)
    settings = dataclasses.asdict(dataclasses.replace(PRESETS["text"], text=text))
    assert of_run({"settings": settings})[0]
    (data / "bad.txt").write_bytes(b"\xff")
    model, tokenizer = make()
    checkpoint.write_checkpoint(tmp_path / "run", 1, tensors=model.state_dict(), config=model.config.to_dict(),
                                trainer={"settings": settings}, tokenizer=tokenizer)  # fmt: skip
    checkpoint.set_pointer(tmp_path / "run", "latest", "step-000001")
    done = command("doctor", str(tmp_path / "run"), "--checks", "1", "14", "--quick")
    assert done.code == 0, done.err
    assert f"texts: a built-in list (the run's data cannot be used: {data / 'bad.txt'} is not text: " in done.err
