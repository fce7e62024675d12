"""The commands, their files and their flags."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations, length, quality
from benchmarks.contestants import Texts, TidalRunner, runner
from benchmarks.entries import KINDS, Entry, entries_of
from benchmarks.switches import Switches
from tests.commands import ROOT, run
from tests.quality.tiny import CPU, TINY, entry
from tidal import checkpoint
from tidal.blocks import passage, windows
from tidal.cli import UserError, parse
from tidal.config import Train
from tidal.corpora.__main__ import Corpora
from tidal.corpora.build import CORPORA
from tidal.evaluate.__main__ import Bits
from tidal.infer.__main__ import Infer
from tidal.infer.score import bits_per_byte
from tidal.train.presets import PRESETS


@pytest.mark.parametrize(("specs", "common", "said"), [
    (["gpt"], [], "'gpt' is no contestant"),
    (["tidal:layers=3"], [], "tidal has no setting 'layers'"),
    (["token:suffix-rows=3"], [], "token has no setting 'suffix-rows'"),
    (["token"], ["suffix-rows=3"], "no contestant has a setting 'suffix-rows'"),
    (["tidal:lr=fast"], [], "lr='fast' cannot be"),
    (["tidal:d-model=30"], [], "not a multiple of n_heads"),
    (["tidal:write-order=up"], [], "choose one of backward, forward"),
    (["tidal", "tidal"], [], "named twice"),
])  # fmt: skip
def test_bad_contestants(specs: list[str], common: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        entries_of(specs, common)


def test_entries() -> None:
    tidal, token = entries_of(["tidal:lr=1e-3,qk_norm=off", "token:layers=5"], ["rows=3", "suffix-rows=9"])
    assert (tidal.train.optim.lr, tidal.train.model.qk_norm, tidal.train.model.suffix_rows) == (1e-3, False, 9)
    assert (token.baseline.layers, token.train.rows, tidal.train.rows) == (5, 3, 3)
    assert token.train.model == PRESETS["text"].model


def test_quality_runs(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "q.json", tmp_path / "q.png"
    flags = ["--seconds", "0.2", "--teraflops", "0.0003", "--evaluations", "2", "--turn", "0.1", "--every", "2",
             "--seeds", "3", "--cuts", "9", "--contestants", "tidal", "token", "--set", *TINY]  # fmt: skip
    flags += ["--corpus", str(corpus), "--out", str(out), "--picture", str(picture)]
    quality.run(flags)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["budget"]["of"], r["contestant"], len(r["seeds"])) for r in line["results"]] == [
        (of, kind, 1) for of in ("seconds", "teraflops") for kind in KINDS[:2]]  # fmt: skip
    races = json.loads(out.read_text())["races"]
    for raced in races:
        for label in KINDS[:2]:
            points = [p for p in raced["points"] if p["contestant"] == label]
            assert [p["final"] for p in points] == [False] * (len(points) - 1) + [True]
            assert {p["seed"] for p in points} == {3}
            assert [p["boundary"]["cuts"] for p in points if "boundary" in p] == [9]
            used = [p[raced["budget"]["of"]] for p in points]
            assert used[-1] >= raced["budget"]["amount"] > max([0, *used[:-1]])
    assert picture.stat().st_size > 10_000


def test_summary_is_of_the_ends_of_all_seeds() -> None:
    def point(label: str, seed: int, bits: float, final: bool = True) -> quality.Point:
        return {"contestant": label, "seed": seed, "final": final, "bits_per_byte": 9.0, "final_bits_per_byte": bits,
                "steps": 4, "step_ms": 2.0, "teraflops": 1.0, "parameters": 7}  # fmt: skip

    points = [point("a", 0, 5.0, False), point("a", 0, 2.0), point("b", 0, 3.0), point("a", 1, 4.0)]
    one, other = quality.summary({"budget": {}, "points": points}, ["a", "b", "c"])
    assert (one["bits_per_byte"], one["seeds"], one["times_the_first"]) == (3.0, [2.0, 4.0], 1.0)
    assert (other["bits_per_byte"], other["seeds"], other["times_the_first"]) == (3.0, [3.0], 1.0)


def test_ablations_run_and_go_on(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    flags = ["--corpus", str(corpus), "--steps", "2", "--set", *TINY, "--out", str(out), "--only", "aux 0", "baselines"]
    ablations.run([*flags[:-2], "aux 0", "token transformer"])
    shown, first = capsys.readouterr().out, ["default", "not foretold, aux 0", "aux 0.1", "token transformer"]
    assert [r["variant"] for r in json.loads(out.read_text())] == first
    assert re.search(r"\| aux 0\.1 \| \d+\.\d{4} \| [+-]\d+\.\d\d% \| 1 \| × ", shown)
    others = ["token transformer, bf16", "token model that recalls", "byte transformer"]
    ablations.run([*flags, "--cuts", "9"])  # only what is missing
    added = json.loads(out.read_text())[4:]
    assert [r["variant"] for r in added] == ["default", *others]
    assert [r["boundary"]["cuts"] for r in added] == [9, 9, 9, 9]
    assert f"| {added[2]['boundary']['gap_per_unit']:.3f} |" in capsys.readouterr().out
    with pytest.raises(UserError, match="--cuts not negative"):
        ablations.run([*flags, "--cuts", "-1"])
    ablations.run([*flags, "--table"])
    assert "byte transformer" in capsys.readouterr().out
    with pytest.raises(UserError, match="no variant and no group 'magic'"):
        ablations.run(["--only", "magic"])
    assert {group for group, _, _ in ablations.choose(["text"])} == {"text"}, "and not what has it in its name"
    assert [name for _, name, _ in ablations.choose(["writer ff 256"])] == ["writer ff 256"], "a whole name is itself"


def ablation(variant: str, bits: float, **conditions: object) -> quality.Point:
    """As much of a run as the table shows."""
    return {"variant": variant, "corpus": "kjv", "set": "", "budget": {"of": "steps", "amount": 2}, "seed": 0,
            "held_out_bytes": 100, "final_bits_per_byte": bits, "times_default_step": 1.0, "teraflops": 1.0,
            "parameters": 7, "threads": 1} | conditions  # fmt: skip


def test_ablations_are_compared_on_one_held_out_set() -> None:
    some = [ablation("default", 2.0), ablation("aux 1", 1.0)]
    more = [ablation("default", 4.0, held_out_bytes=900), ablation("aux 1", 5.0, held_out_bytes=900)]
    shown = ablations.markdown([*some, *more], {"aux 1": ""})
    assert re.findall(r"aux 1 \| (\S+) \| (\S+)%", shown) == [("1.0000", "-50.00"), ("5.0000", "+25.00")]


def test_ablations_of_other_settings_are_others(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured, and have a table of their own. What a run of long ago does not name is what it had then."""

    def race(entries: Sequence[Entry], *args: Any, **_: Any) -> None:
        for one in entries:
            args[4]({"contestant": one.label, "seed": args[1], "final_bits_per_byte": 2.0, "step_ms": 3.0,
                     "teraflops": 1.0, "parameters": 7})  # fmt: skip

    monkeypatch.setattr(ablations, "race", race)
    out = tmp_path / "a.json"
    flags = ["--corpus", str(corpus), "--only", "aux 1", "--out", str(out), "--clock", "cpu", "--threads", "1",
             "--device", "cpu"]  # fmt: skip
    for added, n in (([], 2), ([], 2), (["--context", "9"], 4), (["--clock", "wall"], 6), (["--threads", "2"], 8)):
        ablations.run([*flags, *added])
        results = json.loads(out.read_text())
        assert len(results) == n
    assert ablations.markdown(results, {}).count("| default |") == 4
    old = [{k: v for k, v in r.items() if k not in ablations.UNNAMED} for r in results[:2]]
    out.write_text(json.dumps(old))
    ablations.run(flags)
    assert json.loads(out.read_text()) == old


def test_every_variant_can_be_built() -> None:
    variants = [spec for group in ablations.VARIANTS.values() for spec in group.values()]
    assert len(set(variants)) == len(variants)
    for spec in variants:
        (made,) = entries_of([spec if spec.partition(":")[0] in KINDS else f"tidal:{spec}"])
        assert (made.train, made.switches, made.kind) != (PRESETS["text"], Switches(), "tidal")


def test_length_by_hand(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes at every length, charged as the package charges them."""
    r = runner(entry("tidal"), texts, 0, CPU)
    assert isinstance(r, TidalRunner)
    table, whole = r.recipe.table, [passage(r.recipe.table, "", text) for text in texts.held_out]
    for times in (1, 2, 4):
        found = length.measure(r.model, table, whole, 160, 40 * times, 40)
        longest = [w for p in whole for w in windows(p, table, 160, 1 << 40)]
        rows = [[w] for p in longest for w in windows(dataclasses.replace(p), table, 40 * times, 1 << 40)]
        assert found["bits_per_byte"] == pytest.approx(bits_per_byte(r.model, rows, table)[0], rel=1e-6)
        assert found["bytes"] == sum(n for _, _, n in found["by_position"]) == texts.held_out_bytes
        assert max(at for at, _, _ in found["by_position"]) == {1: 32, 2: 64, 4: 128}[times]
        total = sum(bits * n for _, bits, n in found["by_position"])
        assert total / texts.held_out_bytes == pytest.approx(found["bits_per_byte"])
    half = length.measure(r.model, table, whole, 160, 40, 40, overlap=20)
    assert half["bytes"] == texts.held_out_bytes
    cut = windows
    monkeypatch.setattr("tidal.blocks.windows", lambda *a, **k: cut(*a, **k)[: 1 if a[2] == 40 else None])
    with pytest.raises(RuntimeError, match="do not add up"):
        length.measure(r.model, table, whole, 160, 40, 40)


def test_length_runs(corpus: Path, texts: Texts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r, out, picture = runner(entry("tidal"), texts, 0, CPU), tmp_path / "run", tmp_path / "length.png"
    assert isinstance(r, TidalRunner)
    name = checkpoint.write_checkpoint(out, 2, tensors=r.model.state_dict(), config=r.model.config.to_dict(),
                                       trainer={"settings": dataclasses.asdict(r.train)},
                                       tokenizer=r.recipe.tokenizer, optimizer={}).name  # fmt: skip
    checkpoint.set_pointer(out, "latest", name)
    length.run(["--checkpoint", str(out), "--data", str(corpus / "held-out"), "--times", "1", "4",
                "--bytes", "2000", "--picture", str(picture), "--out", str(tmp_path / "length.json")])  # fmt: skip
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "length.json").read_text())
    assert line["trained"] == 48
    assert [r["times"] for r in line["results"]] == [1, 4]
    assert line["results"][0]["bytes"] == line["results"][1]["bytes"] == line["overlapping"]["bytes"]
    assert picture.stat().st_size > 10_000
    length.run(["--checkpoint", str(out), "--data", str(corpus / "held-out"), "--times", "1", "--bytes", "2000"])
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.count("nothing beyond") for line in table] == [1, 1]
    assert json.loads(last)["overlapping"]["beyond_the_first"] is None, "NaN would be no JSON"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_text_demo() -> None:
    """Each command takes what the one before it made, and its flags are known."""
    done = run(["make", "-n", "text-demo", "TEXT_STEPS=7"], ROOT)
    assert done.code == 0, done.err
    commands = {module: shlex.split(flags) for module, flags in re.findall(r"python -m tidal\.(\w+) (.*)", done.out)}
    assert list(commands) == ["corpora", "train", "evaluate", "infer"]
    name, measured = commands["corpora"].pop(0), commands["evaluate"].pop(0)
    assert (name in CORPORA, measured) == (True, "bits-per-byte")
    folder = parse(Corpora, commands["corpora"], "tidal.corpora").out
    training = parse(Train, commands["train"], "tidal.train", default=PRESETS["text"])
    assert (training.recipe, training.text.data, training.max_steps) == ("text", (f"{folder}/train",), 7)
    bits = parse(Bits, commands["evaluate"], "tidal.evaluate")
    assert (bits.checkpoint, bits.data) == (training.out, (f"{folder}/held-out",))
    asked = parse(Infer, commands["infer"], "tidal.infer")
    assert (asked.checkpoint, len(asked.prompt)) == (training.out, 2)


def test_documents_name_what_there_is() -> None:
    text = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ python -m (benchmarks\.\w+)(.*)$", text, re.MULTILINE)
    assert {module for module, _ in commands} == {f"benchmarks.{m}" for m in ("quality", "ablations", "length")}
    settings = {"benchmarks.quality": quality.Quality, "benchmarks.ablations": ablations.Ablations,
                "benchmarks.length": length.Length}  # fmt: skip
    for module, flags in commands:
        parse(settings[module], shlex.split(flags), module)  # type: ignore[type-var]
