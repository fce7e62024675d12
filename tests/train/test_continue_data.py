"""A run goes on with its data moved or in another form, and not with other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import SMALL
from tests.train.runs import refused, results, unequal
from tests.train.test_continue import undo
from tidal.prepare.__main__ import run as prepare
from tidal.train.__main__ import run


def test_moved_data_may_be_continued_on_and_changed_data_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "".join(f"The tide of day {i} came in and went out.\n" for i in range(60))
    Path("a.txt").write_text(text)
    more = ["--data", "a.txt", "--vocab-size", "300", "--reader-budget", "64", "--suffix-rows", "9", "--no-doctor"]
    base = ["--max-steps", "2", "--validate-every", "1", "--rows", "2", "--device", "cpu", *SMALL]
    assert run([*base, *more]) == 0
    wanted = results(Path("runs/text"))
    undo(Path("runs/text"))
    Path("a.txt").rename("b.txt")
    monkeypatch.setattr("tidal.tokenizer.MixedTokenizer.train", None)  # the run's own is taken
    more[1] = "b.txt"
    assert run([*base, *more]) == 0
    assert unequal(results(Path("runs/text")), wanted) == []
    undo(Path("runs/text"))
    assert "--hold-out 0.05 (now 0.1)" in refused(run, [*base, *more, "--hold-out", "0.1"])
    Path("b.txt").write_text(text.replace("day 59", "day 60"))
    assert "the data hold other text" in refused(run, [*base, *more])


def test_a_run_goes_on_with_its_data_in_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"The tide of day {i} came in and went out.\n" for i in range(60)))
    prepare(["--data", "a.txt", "--out", "shards", "--vocab-size", "300", "--workers", "1"])
    base = ["--max-steps", "2", "--validate-every", "1", "--rows", "2", "--device", "cpu", *SMALL,
            "--reader-budget", "64", "--suffix-rows", "9"]  # fmt: skip
    files, shards = ["--data", "a.txt"], ["--prepared", "shards"]
    assert run([*base, *files, "--vocab-size", "300", "--out", "files"]) == 0
    assert run([*base, *shards, "--out", "shards-run"]) == 0
    wanted = results(Path("files"))
    for folder, other in (("files", shards), ("shards-run", files)):
        undo(Path(folder))
        assert run(["--resume", folder, *other]) == 0
        assert unequal(results(Path(folder)), wanted) == []
        undo(Path(folder))
        assert "leave --data out" in refused(run, ["--resume", folder, *files, *shards])


@pytest.mark.parametrize("held_out", [["--hold-out", "0.2"], ["--validation-data", "b.txt"]], ids=" ".join)
def test_a_run_on_shards_that_hold_out_others_goes_on_with_the_files(
        held_out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """And one on the files with the shards."""
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("Another day, another tide.\n" * 9)
    Path("a.txt").write_text("".join(f"The tide of day {i} came in and went out.\n" for i in range(60)))
    prepare(["--data", "a.txt", "--out", "shards", "--vocab-size", "300", "--workers", "1", *held_out])
    base = ["--max-steps", "2", "--validate-every", "1", "--rows", "2", "--device", "cpu", *SMALL,
            "--reader-budget", "64", "--suffix-rows", "9"]  # fmt: skip
    assert run([*base, "--prepared", "shards", "--out", "run"]) == 0
    wanted = results(Path("run"))
    undo(Path("run"))
    said = refused(run, ["--resume", "run", "--data", "a.txt"])
    assert "--hold-out and --seed (also of tidal.prepare) hold out another part" in said
    assert run(["--resume", "run", "--data", "a.txt", *held_out]) == 0
    assert "other settings" not in capsys.readouterr().err  # the setting is new, but what is held out is not
    assert unequal(results(Path("run")), wanted) == []
    assert run([*base, "--data", "a.txt", *held_out, "--vocab-size", "300", "--out", "other"]) == 0
    undo(Path("other"))
    assert run(["--resume", "other", "--prepared", "shards"]) == 0
    assert unequal(results(Path("other")), wanted) == []
