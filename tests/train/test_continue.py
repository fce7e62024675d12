"""Which run a command continues, which it leaves alone, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import SMALL, tree
from tests.train.runs import SETTINGS, quick, refused, results, unequal
from tidal import checkpoint
from tidal.cli import parse
from tidal.config import Addition, Optim, Shape, Text, Train
from tidal.streams import Batch
from tidal.train import disk, loop
from tidal.train.__main__ import run
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.resume import HARMLESS, differences


def flags(*more: str) -> list[str]:
    return ["--no-doctor", "--max-steps", "4", "--validate-every", "2", "--rows", "2", "--digits", "1",
            "--max-block-units", "8", "--warmup-steps", "1", "--device", "cpu", "--out", "run", *SMALL,
            *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdditionRecipe, "validate", quick)
        assert run([*flags(), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def here(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run, `run`."""
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AdditionRecipe, "validate", quick)
    return tmp_path


def undo(folder: Path) -> None:
    """Make a run unfinished: its last checkpoint goes."""
    shutil.rmtree(checkpoint.checkpoints(folder)[-1])


def test_a_finished_run_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (here / "run/metrics.csv").read_bytes()
    assert run(flags()) == 0
    assert "run is finished: 4 steps" in capsys.readouterr().err
    for same in (["run"], ["run", "--out", "./run/"], ["run", "--out", str(here / "run")], ["run/checkpoints"]):
        assert run(["--resume", *same]) == 0
        assert "run is finished" in capsys.readouterr().err
    assert run(["--resume", "run/checkpoints/step-000002", "--max-seconds", "0.000001"]) == 0
    said = capsys.readouterr().err
    assert "run/checkpoints/step-000002 is finished: 2 steps" in said
    assert f"tidal.infer --checkpoint {here}/run/checkpoints/step-000002 " in said
    assert (here / "run/metrics.csv").read_bytes() == before
    assert not (here / "run-2").exists()


def test_a_run_that_was_killed_in_its_last_validation_is_not_finished(here: Path) -> None:
    with open(here / "run/metrics.csv", "rb+") as file:
        file.truncate(file.seek(0, 2) - 2)
    assert run(flags()) == 0
    assert (here / "run/metrics.csv").read_bytes().endswith(b"\r\n")


def test_an_unfinished_run_is_continued(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = results(here / "run")
    undo(here / "run")
    assert run(flags("--threads", "1", "--keep", "5")) == 0
    said = capsys.readouterr().err
    assert "continuing at step 2 of 4, from step-000002" in said
    assert "continuing with other settings: --keep 2 (now 5), --threads 0 (now 1)" in said
    assert unequal(results(here / "run"), wanted) == []
    undo(here / "run")
    assert run(["--resume", "run", "--no-doctor"]) == 0  # with the run's own settings
    assert unequal(results(here / "run"), wanted) == []
    assert json.loads((here / "run/config.json").read_text())["max_steps"] == 4
    assert run(["--resume", "run/checkpoints/step-000002"]) == 0
    assert unequal(results(here / "run"), wanted) == []


def test_another_run_is_begun_beside_it(here: Path) -> None:
    undo(here / "run")
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    assert run(flags("--resume", "never")) == 0
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before
    assert (here / "run-2/latest").read_text() == "step-000004\n"


def test_what_an_earlier_run_left_is_not_taken_for_a_new_ones(here: Path) -> None:
    """It ended before its first checkpoint: the new run has its folder."""
    (here / "begun").mkdir()
    left = [here / "begun" / name for name in ("doctor.json", "bad-batch.json")]
    for path in left:
        path.write_text("{}")
    assert run(flags("--out", "begun")) == 0
    assert not any(map(Path.exists, left))
    assert checkpoint.checkpoints(here / "begun") != []
    for path in left:
        path.write_text("{}")
    undo(here / "begun")
    assert run(flags("--out", "begun")) == 0  # goes on: what the doctor said is still true
    assert [path.exists() for path in left] == [True, False]


def test_a_finished_run_with_other_settings_is_left_alone(here: Path) -> None:
    assert run(flags("--seed", "1")) == 0
    assert (here / "run-2/latest").read_text() == "step-000004\n"


def test_the_same_command_continues_a_run_that_was_begun_beside_another(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(flags("--seed", "1")) == 0
    assert run(flags("--seed", "2")) == 0
    wanted = results(here / "run-2")
    undo(here / "run-2")
    assert run(flags("--seed", "1")) == 0
    assert "continuing at step 2 of 4, from step-000002" in capsys.readouterr().err
    assert unequal(results(here / "run-2"), wanted) == []
    assert run(flags("--seed", "2")) == 0
    assert "run-3 is finished: 4 steps" in capsys.readouterr().err
    assert not (here / "run-4").exists()
    undo(here / "run-2")
    with disk.locked(here / "run-2"):  # in use: it is nobody's concern
        assert run(flags("--seed", "3")) == 0
    assert (here / "run-4/latest").read_text() == "step-000004\n"


@pytest.mark.parametrize("how", [["--resume", "never"], ["--resume", "run"]])
def test_an_interrupted_run_says_what_continues_it(how: list[str], here: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    undo(here / "run")
    real, stopping = AdditionRecipe.batch, True

    def batch(recipe: AdditionRecipe, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        if stopping and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(recipe, step, share)

    monkeypatch.setattr(AdditionRecipe, "batch", batch)
    assert run([*(flags() if "never" in how else ["--no-doctor"]), *how, "--workers", "0"]) == 143
    folder = "run-2" if "never" in how else "run"
    assert f"saved run/checkpoints/step-000003; --resume {folder} continues it".replace("run/", f"{folder}/") in (
        capsys.readouterr().err
    )
    stopping = False
    assert run(["--resume", folder, "--no-doctor"]) == 0
    assert "continuing at step 3 of 4" in capsys.readouterr().err


def test_parts_may_be_fewer_again(here: Path) -> None:
    for asked, found in (("4", 4), ("1", 1)):
        undo(here / "run")
        assert run(flags("--parts", asked)) == 0
        trainer = json.loads((checkpoint.checkpoints(here / "run")[-1] / "trainer.json").read_text())
        assert (trainer["settings"]["parts"], trainer["parts"]) == (int(asked), found)


def test_names_need_not_be_utf_8(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert run(flags("--out", name)) == 0
    assert run(["--resume", name]) == 0


def test_other_settings_are_refused(here: Path) -> None:
    said = "--max-steps 4 (now 5), which only checkpoints up to step 3 can go on with. Repeat them"
    assert said in refused(run, ["--resume", "run", "--max-steps", "5"])
    undo(here / "run")
    said = refused(run, flags("--seed", "1", "--lr", "0.5", "--keep", "9"))
    assert "--seed 0 (now 1), --lr 0.003 (now 0.5)." in said
    assert "keep" not in said
    assert "--resume run, or start a new run with --resume never" in said
    assert "leave one of them out" in refused(run, ["--resume", "run", "--out", "elsewhere"])
    assert "--out is empty; give a folder" in refused(run, flags("--out", ""))
    assert "--recipe addition (now text)" in refused(run, ["--resume", "run", "--recipe", "text"])


def test_more_time_continues_a_run_that_ran_out_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = flags("--max-seconds", "0.000001", "--out", "short")
    assert run(short) == 0
    assert Path("short/latest").read_text() == "step-000001\n"
    assert run(short) == 0
    assert "is finished: 1 steps" in capsys.readouterr().err
    assert run(flags("--out", "short")) == 0
    assert Path("short/latest").read_text() == "step-000004\n"


def test_what_is_no_run_is_refused(here: Path) -> None:
    assert "missing has no checkpoints" in refused(run, ["--resume", "missing"])
    assert ". has no checkpoints" in refused(run, ["--resume", "."])
    assert "give auto, never, a run folder" in refused(run, ["--resume", ""])
    with disk.locked(here / "run"):
        assert "is being trained by another process" in refused(run, flags())
        assert "is being trained by another process" in refused(run, ["--resume", "run/checkpoints/step-000004"])
    for folder in checkpoint.checkpoints(here / "run"):
        (folder / "config.json").write_text("{}")
    assert "no intact checkpoint" in refused(run, flags())
    assert "is damaged: config.json" in refused(run, ["--resume", "run/checkpoints/step-000004"])
    (here / "run/checkpoints/step-000004/manifest.json").unlink()
    assert "is damaged: manifest.json is missing" in refused(run, ["--resume", "run/checkpoints/step-000004"])
    assert "manifest.json is missing" in refused(run, ["--resume", "run/checkpoints/../checkpoints/step-000004"])


def test_what_another_process_trained_meanwhile_is_not_undone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds a run while its data are prepared."""
    shutil.copytree(here / "run", here / "done")
    real, newest = loop.make_recipe, "checkpoints/step-000004"

    def slowly(settings: Train) -> loop.Recipe:
        if not (here / "run" / newest).exists():
            shutil.copytree(here / "done" / newest, here / "run" / newest)
        return real(settings)

    monkeypatch.setattr(loop, "make_recipe", slowly)
    said = "run has changed while the data were prepared: it holds step-000004 now; the same command looks again"
    for command in (flags(), ["--resume", "run"], ["--resume", "run/checkpoints/step-000002"]):
        undo(here / "run")
        assert said in refused(run, command)
        assert (here / "run" / newest).exists()
    assert run(["--resume", "run/checkpoints/step-000002"]) == 0  # now that it is known

    def begun(out: Path) -> Path:
        return Path(shutil.copytree(here / "done", out.with_name("run-2")))

    monkeypatch.setattr(disk, "prepare_run_dir", begun)
    before = tree(here / "done")
    assert "run-2 has changed while the data were prepared" in refused(run, flags("--resume", "never"))
    assert tree(here / "run-2") == before


def test_a_run_that_another_process_has_only_begun_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.json").write_text("theirs")
    before = tree(tmp_path)
    with disk.locked(Path("run")):
        assert "run is being trained by another process" in refused(run, flags())
    assert tree(tmp_path) == before


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a checkpoint, and its manifest with it."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    step = json.loads((folder / "manifest.json").read_text())["step"]
    (folder / "manifest.json").write_text(checkpoint._manifest(step, checkpoint._hashes(folder)))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("trainer.json", lambda v: v.pop("metrics"), "it has no metrics; the version that wrote it could not resume"),
        ("trainer.json", lambda v: v.update(step="3"), "step is '3'"),
        ("trainer.json", lambda v: v.update(step=3), "holds step 3"),
        ("trainer.json", lambda v: v.update(seconds=-1.0), "seconds -1.0"),
        ("trainer.json", lambda v: v.update(parts=0), "parts 0"),
        ("trainer.json", lambda v: v.update(due={"step": "x"}), "its rows of metrics are none"),
        ("trainer.json", lambda v: v.update(metrics=[7]), "its rows of metrics are none"),
        ("trainer.json", lambda v: v["settings"].update(colour="blue"), "Train has unknown keys ['colour']"),
        ("trainer.json", lambda v: v["settings"].update(rows="4"), "rows is '4', which is no int"),
        ("trainer.json", lambda v: v["settings"].update(model=None), "Shape is None; it must be an object"),
        ("trainer.json", lambda v: v["settings"]["model"].update(n_heads=3), "is not a multiple of n_heads 3"),
        ("trainer.json", lambda v: v["settings"]["text"].update(data=[1]), "data is"),
        ("trainer.json", lambda v: v.update(data="ab"), "the data hold other text"),
        ("trainer.json", lambda v: v.pop("data"), "the data hold other text"),
        ("config.json", lambda v: v["shape"].update(reader_ff=25), "is of another model: shape would differ"),
        ("config.json", lambda v: v.update(fingerprint="0" * 64), "is of another model: fingerprint would differ"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    name: str, change: Callable[[dict[str, Any]], object], said: str, here: Path
) -> None:
    undo(here / "run")
    edited(here / "run/checkpoints/step-000002", name, change)
    assert said in refused(run, ["--resume", "run"])


def test_a_checkpoint_without_an_optimizer_is_not_trained_on(here: Path) -> None:
    undo(here / "run")
    folder = here / "run/checkpoints/step-000002"
    (folder / checkpoint.OPTIMIZER).unlink()
    edited(folder, "trainer.json", lambda v: None)
    before = tree(here)
    assert "has no optimizer state" in refused(run, ["--resume", "run"])
    assert tree(here) == before


def test_missing_settings_have_their_defaults() -> None:
    values = json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    assert Train.from_dict(values) == SETTINGS
    del values["resume"], values["model"]["step_stride"], values["text"]
    assert Train.from_dict(values) == SETTINGS
    values["optim"]["lr"] = 1  # JSON of another language may drop the point
    assert Train.from_dict(values).optim.lr == 1.0


def test_every_setting_is_harmless_or_refused() -> None:
    """What is not in the table means another run; the table names only settings that there are."""
    assert set(HARMLESS) <= {f.name for kind in (Train, Text) for f in dataclasses.fields(kind)}
    base = Train()
    for kind, part in ((Train, None), (Shape, "model"), (Optim, "optim"), (Addition, "addition")):
        for f in dataclasses.fields(kind):  # type: ignore[arg-type]
            old = getattr(base if part is None else getattr(base, part), f.name)
            if dataclasses.is_dataclass(old) or f.name == "recipe":
                continue
            new: Any = {"n_heads": 8, "n_kv_heads": 2, "d_model": 64, "writer_attention": "none"}.get(
                f.name, not old if isinstance(old, bool) else f"{old}x" if isinstance(old, str | None) else old + 1)
            changed = base if part else dataclasses.replace(base, **{f.name: new})
            if part:
                changed = dataclasses.replace(base, **{part: dataclasses.replace(getattr(base, part), **{f.name: new})})
            assert list(differences(base, changed)) == [f.name]
    assert differences(base, dataclasses.replace(base, text=Text(vocab_size=9))) == {}  # of another recipe
    text = dataclasses.replace(base, recipe="text")
    assert list(differences(text, dataclasses.replace(text, text=Text(vocab_size=9)))) == ["vocab_size"]


def test_the_default_is_auto() -> None:
    assert parse(Train, [], "tidal.train").resume == "auto"
    assert parse(Train, ["--resume", "never"], "tidal.train").resume == "never"
