"""`python -m tidal.report`: pages, pictures, tables, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import tidal
from tests.test_report import look_at, make
from tidal.cli import UserError
from tidal.report.__main__ import run as report
from tidal.report.runs import newest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs, which is the current one."""
    make(tmp_path / "runs/a")
    time.sleep(0.01)
    make(tmp_path / "runs/b", lr=0.01, held_out=1.5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_figures_as_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(["runs/a", "runs/b", "--json"])
    printed = capsys.readouterr().out
    report(["runs/a", "--json", "runs/b"])
    assert capsys.readouterr().out == printed
    runs = json.loads(printed)["runs"]
    assert [r["run"] for r in runs] == ["a", "b"]
    assert runs[1] == {
        "run": "b", "recipe": "text", "step": 300, "max_steps": 300, "seconds": 45.0, "warnings": [],
        "loss": pytest.approx(6 * 0.95**28 + 1), "bits_per_byte": pytest.approx(1.8 * (6 * 0.95**28 + 1)),
        "held_out_bits_per_byte": pytest.approx(1.5 + 1 / 30), "best_quality": pytest.approx(-1.5 - 1 / 30),
        "best_step": 300, "units_per_second": 9015.5, "memory_mib": 400.0,
    }  # fmt: skip


def test_in_the_terminal(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(["runs/a", "runs/b"])
    said = capsys.readouterr().out
    assert "Held-out bits per byte, bits, against step" in said
    assert re.search(r"^run +a +b$", said, re.MULTILINE)
    assert re.search(r"^best quality +-2.033 +-1.533$", said, re.MULTILINE)
    assert newest().name == "b"
    report([])
    assert re.search(r"^run +b$", capsys.readouterr().out, re.MULTILINE)
    for path in ("runs/a/checkpoints", "runs/a/checkpoints/step-000010"):
        report([path])
        assert re.search(r"^run +a$", capsys.readouterr().out, re.MULTILINE)


def test_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(["runs/a", "--out", "one.html"])
    report(["runs/a", "runs/b", "runs/a", "--out", "three.html"])
    report(["runs/a", "runs/b", "--out", "both.png"])
    assert capsys.readouterr().out == ""
    look_at((home / "one.html").read_text(encoding="utf-8"))
    assert "a (2)" in look_at((home / "three.html").read_text(encoding="utf-8")).text
    assert (home / "both.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_name_that_is_no_text(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename("runs/b", b"runs/caf\xe9")
    name = os.fsdecode(b"runs/caf\xe9")
    report([name])
    assert "caf\\xe9" in capsys.readouterr().out
    report(["runs/a", name, "--out", "both.png"])
    for out, runs in {"one.html": [name], "both.html": ["runs/a", name]}.items():
        report([*runs, "--out", out])
        assert "caf\\xe9" in look_at((home / out).read_text(encoding="utf-8")).text


def test_a_picture_that_cannot_be_written_leaves_the_old_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(["runs/a", "--out", "a.png"])
    before = (home / "a.png").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "fsync", full)  # when it is written, and before it is in its place
    with pytest.raises(UserError, match=r"cannot write a\.png: File too large"):
        report(["runs/b", "--out", "a.png"])
    assert (home / "a.png").read_bytes() == before


def test_where_nothing_is_finite(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "runs/a/metrics.csv").write_text(f"{FOUR}\n10,1,nan,nan\n")
    report(["runs/a", "--json"])
    assert json.loads(capsys.readouterr().out)["runs"][0]["loss"] is None
    report(["runs/a"])
    assert re.search(r"^loss +nan$", capsys.readouterr().out, re.MULTILINE)
    report(["runs/a", "--out", "a.html"])
    with pytest.raises(UserError, match=r"cannot draw a\.png: there is nothing to draw"):
        report(["runs/a", "--out", "a.png"])


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere"], "nowhere is no run: it has no metrics.csv"),
    (["runs/a", "--out", "a.pdf"], "--out is a.pdf; it must end in .html or .png"),
    (["runs/a", "--out", "no/such/a.html"], "cannot write no/such/a.html"),
    (["runs/a", "--out", "no/such/a.png"], "cannot write no/such/a.png"),
    (["runs/a", "--ouf", "x"], "unknown flag '--ouf'; did you mean '--out'"),
])  # fmt: skip
def test_what_cannot_be_done(arguments: list[str], said: str, home: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        report(arguments)


FOUR = "step,seconds,loss,bits_per_byte"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda run: (run / "metrics.csv").write_text(""), "has no figures yet"),
    "header": (lambda run: (run / "metrics.csv").write_text("step,loss\n"), "has no figures yet"),
    "no loss": (lambda run: (run / "metrics.csv").write_text("step,x\n1,2\n"), "has no bits_per_byte, loss, seconds"),
    "a word": (lambda run: (run / "metrics.csv").write_text("step,loss\n1,x\n"), "could not convert"),
    "a field more": (lambda run: (run / "metrics.csv").write_text("step,loss\n1,2,3\n"), "cannot be read"),
    "NULs": (lambda run: (run / "metrics.csv").write_text("step,loss\n" + 200_000 * "\0" + "\n"), "cannot be read"),
    "no JSON": (lambda run: (run / "config.json").write_text("{"), "cannot be read"),
    "a list": (lambda run: (run / "doctor.json").write_text("[]"), "doctor.json must hold an object"),
    "no result": (lambda run: (run / "doctor.json").write_text('{"results":[1]}'), "its results must be objects"),
    "no object": (lambda run: (run / "config.json").write_text("[]"), "config.json must hold an object"),
    "no steps": (lambda run: (run / "config.json").write_text('{"max_steps": null}'), "max_steps None, which is no"),
    "no step": (lambda run: (run / "metrics.csv").write_text(f"{FOUR}\nnan,2,3,4\n"), "a row .* has step nan"),
    "no sample": (lambda run: (run / "samples.jsonl").write_text('{"step": "x", "prompt": "", "completion": ""}\n'),
                  "samples.jsonl has step 'x', which is no whole number"),
    "samples": (lambda run: (run / "samples.jsonl").write_text("[1\n"), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_runs_are_refused(name: str, home: Path) -> None:
    damage, said = DAMAGE[name]
    damage(home / "runs/a")
    with pytest.raises(UserError, match=said):
        report(["runs/a", "--json"])


def test_as_a_process(home: Path) -> None:
    done = tidal("report", "runs/a", "--json", cwd=home)
    assert json.loads(done.out)["runs"][0]["step"] == 300
    failed = tidal("report", "nowhere", cwd=home, fails=True)
    assert (failed.code, failed.out, failed.err.count("\n")) == (2, "", 1)
