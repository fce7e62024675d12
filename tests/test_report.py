"""Pages of runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidal.report import page
from tidal.report.draw import COLOURS, Panel, png
from tidal.report.page import comparison_panels, figures_table, render_comparison, render_run, run_panels, visible
from tidal.report.runs import Run, read
from tidal.train.figures import COLUMNS
from tidal.train.recipes.characters import TASKS

HOSTILE = "</style><script>alert(1)</script>\u202e\x00\x1b[2J&lt;<img src=http://evil.test/x onerror=alert(2)>"


def make(folder: Path, n: int = 30, lr: float = 0.002, held_out: float = 2.0, sample: str = " out\n") -> Path:
    """A run folder as training leaves it, with made-up figures: validation every tenth row."""
    folder.mkdir(parents=True)
    names = ["step", "seconds", "loss", "bits_per_byte", "grad_norm", "lr", "units_per_second", "memory_mib",
             "quality", "held_out_bits_per_byte", "context_gain"]  # fmt: skip
    lines, samples = [",".join(names)], []
    for i in range(1, n + 1):
        loss, best = 6 * 0.95**i + 1, held_out + 1 / i
        figures: list[Any] = [10 * i, f"{1.5 * i:g}", loss, 1.8 * loss, 0.5, lr, 9000 + i, 400]
        lines.append(",".join(map(str, [*figures, *([-best, best, 0.3] if i % 10 == 0 else ["", "", ""])])))
        if i % 10 == 0:
            samples.append(json.dumps({"step": 10 * i, "prompt": "the sea", "completion": sample}))
    (folder / "metrics.csv").write_text("\r\n".join(lines) + "\r\n")
    (folder / "samples.jsonl").write_text("\n".join(samples) + "\n", encoding="utf-8")
    config = {"recipe": "text", "max_steps": 10 * n, "model": {"d_model": 64}, "optim": {"lr": lr, "warmup_steps": 100}}
    (folder / "config.json").write_text(json.dumps({**config, "text": {"data": [sample]}}))
    return folder


class Checked(HTMLParser):
    """Collects tags and text, and looks that what is opened is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "td", "th", "tr"):  # whose end may be left out
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("td", "th", "tr"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def look_at(source: str) -> Checked:
    """A page that is whole, and needs nothing from elsewhere."""
    checked = Checked(source)
    assert checked.open == []
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in checked.tags}
    named = {name for _, attributes in checked.tags for name in attributes}
    assert not {"src", "href", "srcset", "data", "action"} & named
    assert not [name for name in named if name.startswith("on")]
    style = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    assert len(style) == 1
    assert not re.search(r"url\(|@import|expression", style[0])
    assert "default-src 'none'" in source
    for drawing in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(drawing)
    return checked


# ------------------------------------------------------------------------------------------------ pages


def test_the_page_of_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "sea", n=100)
    (folder / "doctor.json").write_text(json.dumps({"ok": True, "findings": 0, "results": [
        {"number": 7, "check": "one builder", "verdict": "well", "measured": 0, "limit": "inf"},
        {"number": 20, "check": "substance", "verdict": "skipped", "measured": 0, "limit": 0}]}))  # fmt: skip
    checked = look_at(render_run(read(folder)))
    for said in ("recipe text · step 1,000 of 1,000 · 2 min", "Loss", "Bits per byte", "Gradient norm", "Learning rate",
                 "Throughput", "the sea out", "one builder", "all well (1 well, 1 skipped)", "d-model",
                 "units a second"):  # fmt: skip
        assert said in checked.text, said
    assert "Warnings" not in checked.text
    assert sum(tag == "svg" for tag, _ in checked.tags) == 6
    own = [attributes for tag, attributes in checked.tags if attributes.get("class") == "own"]
    assert len(own) == 3  # width, data and rate; all others are the defaults
    assert render_run(read(folder)) == render_run(read(folder))


def test_print_cuts_no_columns(tmp_path: Path) -> None:
    rules = render_comparison([read(make(tmp_path / name)) for name in "ab"]).partition("@media print")[2]
    assert ".wide td, .wide th { white-space: normal" in rules.partition("</style>")[0]


def test_warnings_are_on_the_page(tmp_path: Path) -> None:
    folder = make(tmp_path / "sea")
    lines = (folder / "metrics.csv").read_text().replace(",0.3\n", ",0.0001\n")
    (folder / "metrics.csv").write_text(lines)
    checked = look_at(render_run(read(folder)))
    assert "Warnings" in checked.text
    assert "collapsed (step 200): what is written does not depend on what is read" in checked.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = make(tmp_path / "a b&<i>", sample=HOSTILE)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, HOSTILE: HOSTILE}))
    for source in (render_run(read(folder)), render_comparison([read(folder), read(folder)])):
        checked = look_at(source)
        assert "\u202e" not in source
        assert "\x1b" not in source
        assert "\x00" not in source
        assert "a b&<i>" in checked.text
    assert r"</style><script>alert(1)</script>\u202e\x00\x1b[2J" in look_at(render_run(read(folder))).text


@given(st.text())
def test_what_is_visible_is_harmless(text: str) -> None:
    shown = visible(text, most=10_000)
    assert not re.search(r"<(?!/?i>)", shown)
    assert all(c.isprintable() or c == "\n" for c in shown)
    plain = Checked(shown).text
    if text.isprintable():
        assert plain == text


def test_pages_of_what_there_is(tmp_path: Path) -> None:
    """No settings, samples, validation or doctor; one row; figures that are no numbers."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/metrics.csv"
    for rows in ("1,0.5,2,3", "1,0.5,nan,inf", "1,1,2,3\n2,2,nan,nan\n3,3,2,1\n4,4"):
        path.write_text(f"step,seconds,loss,bits_per_byte\n{rows}\n")
        found = read(tmp_path / "run")
        assert [row["step"] for row in found.rows] == [float(line.split(",")[0]) for line in rows.split("\n")
                                                       if line != "4,4"]  # fmt: skip
        look_at(render_run(found))
        look_at(render_comparison([found, found]))
        png([*run_panels(found), Panel("nothing", "", [])], tmp_path / "a.png")


def test_comparison(tmp_path: Path) -> None:
    runs = [read(make(tmp_path / name, lr=lr)) for name, lr in (("a", 0.002), ("b", 0.01))]
    panels = comparison_panels(runs)
    assert [(panel.title, panel.x) for panel in panels] == [
        (title, x) for title in ("Held-out bits per byte", "Training loss") for x in ("step", "seconds")]  # fmt: skip
    assert [curve.points[-1] for curve in panels[1].curves] == [(45.0, 2.0 + 1 / 30)] * 2
    checked = look_at(render_comparison(runs))
    assert re.search(r"Settings that differ\s*setting\s*a\s*b\s*lr\s*0.002\s*0.01", checked.text)
    assert "d-model" not in checked.text


def test_runs_that_differ_by_a_little_look_different(tmp_path: Path) -> None:
    """By less than 0.2% of their bits; and a run's loss is not that of its last batch, unless it diverged."""
    runs = [read(make(tmp_path / name, held_out=held_out - 1 / 30)) for name, held_out in (("a", 1.302), ("b", 1.304))]
    names, *rows = figures_table(runs)
    assert [row[names.index("held out bits per byte")] for row in rows] == ["1.302", "1.304"]
    for run in runs:
        assert f"<dd>{run.final()['held_out_bits_per_byte']:.3f}</dd>" in render_run(run)
    steady = runs[0].final()["loss"]
    runs[0].rows[-1]["loss"] *= 1.5
    assert runs[0].final()["loss"] == pytest.approx(steady, rel=0.1)
    runs[0].rows[-2]["loss"] = math.inf
    assert runs[0].final()["loss"] == runs[0].rows[-1]["loss"]


def test_the_page_takes_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    now, written = [0.0], []

    def render(_: Run) -> str:
        now[0] += 2.0
        written.append(now[0])
        return "the page"

    make(tmp_path / "run")
    monkeypatch.setattr(page, "render_run", render)
    monkeypatch.setattr(page, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pages = page.Pages()
    for _ in range(50):
        now[0] += 10.0
        pages.write(tmp_path / "run")
    assert len(written) == 3  # 2 s in 200 s, of 500 s
    pages.write(tmp_path / "run", last=True)
    assert len(written) == 4
    assert (tmp_path / "run" / "report.html").read_text() == "the page"
    monkeypatch.undo()
    page.Pages().write(tmp_path)  # there is no run
    assert "no report.html: " in capsys.readouterr().err


def test_there_are_colours_for_both_pages() -> None:
    assert len(COLOURS) == len(set(COLOURS)) == len(page.COLOURS_ON_DARK)


@pytest.mark.parametrize(("names", "others"), [
    (("exact_5", "exact_6", "exact_7"), ("quality", "context_gain")),
    (tuple(TASKS), ("quality", "context_gain", "typo_gain")),
    (("held_out_bits_per_byte",), ("quality", "context_gain", "typo_gain")),
    ((), ()),  # before the first validation
])  # fmt: skip
def test_every_figure_of_validation_is_shown(names: tuple[str, ...], others: tuple[str, ...], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whatever the recipe calls it."""
    run, rows = tmp_path / "run", range(1, 21)
    run.mkdir()
    extra = [*names, *others]
    lines = [",".join([*COLUMNS, *extra])]
    for i in rows:
        lines.append(",".join(map(str, [10 * i, i, 5 / i, 6 / i, 1, 0.01, 900, 400, *(i / 25 for _ in extra)])))
    (run / "metrics.csv").write_text("\r\n".join([*lines, ""]))
    found = read(run)
    assert found.held_out == list(names)
    curves = [curve for panel in run_panels(found) for curve in panel.shown()]
    assert len(curves) == 5 + len(names) + ("context_gain" in others)
    drawn: list[Sequence[Panel]] = []
    monkeypatch.setattr(page, "png", lambda panels, path: drawn.append(panels))
    page.draw(run)
    assert drawn == [run_panels(found)]
