"""Runs and prepared data that lie in a folder of data are not data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.commands import SMALL
from tidal.cli import UserError
from tidal.prepare.__main__ import run as prepare
from tidal.prepare.documents import read_documents
from tidal.prepare.reading import read_parts
from tidal.train import __main__ as training
from tidal.train.disk import prepare_run_dir

TEXT = "".join(f"The tide of day {i} came in and went out.\n" for i in range(60))
FLAGS = ("--data", ".", "--vocab-size", "300", "--reader-budget", "64", "--suffix-rows", "9", "--max-steps", "2",
         "--validate-every", "1", "--rows", "2", "--device", "cpu", "--workers", "0", *SMALL)  # fmt: skip


@pytest.fixture(params=["a.txt", "a.py"])  # by its name text, or not: then every file is looked at
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one file of text, which is the current one."""
    (tmp_path / request.param).write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_in_the_folder_of_its_data(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the same data when it is continued, and for the next run."""
    assert training.run([*FLAGS]) == 0
    assert "leaving out" not in capsys.readouterr().err
    assert training.run([*FLAGS, "--resume", "never"]) == 0
    assert "leaving out runs/text, which Tidal made" in capsys.readouterr().err
    digests = [json.loads(next((project / run).glob("checkpoints/*-000002/trainer.json")).read_text())["data"]
               for run in ("runs/text", "runs/text-2")]  # fmt: skip
    assert digests[0] == digests[1]
    assert [os.path.realpath(d.source) for d in read_documents(["."])] == [str(next(project.glob("a.*")))]


def test_a_run_that_has_only_begun(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right after its folder was made."""
    def killed(self: object, out: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tidal.tokenizer.MixedTokenizer.save", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run([*FLAGS])
    assert os.listdir("runs/text")
    assert [d.completion for d in read_documents(["."])] == [TEXT]


def test_prepared_data_in_the_folder_of_their_data(project: Path) -> None:
    """Data are read again when the first files of the folder are there."""
    for _ in range(2):
        prepare(["--data", ".", "--out", "shards", "--vocab-size", "300", "--workers", "1"])
    assert [d.completion for d in read_documents(["."])] == [TEXT]
    with pytest.raises(UserError, match="'shards' is prepared data, not text; train on it by --prepared"):
        list(read_documents([".", "shards"]))


def test_a_run_is_no_data_but_its_files_may_be(project: Path) -> None:
    (prepare_run_dir(project / "run") / "config.json").write_text('{"recipe": "text", "max_steps": 1, "optim": {}}')
    (project / "run/more.txt").write_text("more")
    with pytest.raises(UserError, match="'run' is a run, not data; to learn what is in its files, name them"):
        list(read_documents(["run"]))
    told: list[str] = []
    assert [part.text for part in read_parts(["*", "r*n/*.txt"], told.append)] == [TEXT, "more"]
    assert told == ["leaving out run, which Tidal made: a run, or prepared data"]
    assert [d.completion for d in read_documents(["."])] == [TEXT]


@pytest.mark.parametrize("content", ["{", "[]", '{"recipe": "soup"}', '{"max_steps": 1}', "\0", None])
def test_folders_of_others_are_data(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("config.json", "plan.json"):
        if content is None:
            os.mkfifo(tmp_path / "theirs" / name)
        else:
            (tmp_path / "theirs" / name).write_text(content)
    (tmp_path / "theirs/a.txt").write_text("text")
    assert [d.completion for d in read_documents([str(tmp_path)])] == ["text"]
    (tmp_path / "theirs/a.txt").write_text(" ")
    with pytest.raises(UserError, match="no text in"):
        list(read_documents([str(tmp_path)]))
