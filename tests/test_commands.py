"""The commands end to end, each once in a real process: what they print, what they write, and that they agree."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tidal as package
from benchmarks import packing
from tests.commands import SMALL, Ran, Terminal, figures, objects, run, tidal, tree
from tests.laws import check_scores
from tidal import checkpoint
from tidal.config import Optim
from tidal.train.optim import learning_rate

Command = Callable[..., Ran]
KEYS = ["prompt", "completion", "text", "blocks", "stop_reason", "log_prob", "units", "degenerate", "seconds"]
TRAIN = ("--max-steps", "30", "--validate-every", "15", "--rows", "8", "--lr", "1e-2", "--warmup-steps", "5", *SMALL)


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A folder in which `python -m tidal.train` has just run."""
    folder = tmp_path_factory.mktemp("addition")
    return folder, tidal("train", *TRAIN, cwd=folder)


@pytest.fixture
def home(addition: tuple[Path, Ran]) -> Iterator[Path]:
    """The folder of `addition`; what does not train there must leave it as it is."""
    before = tree(addition[0])
    yield addition[0]
    assert tree(addition[0]) == before


def without_seconds(lines: list[str]) -> list[dict[str, object]]:
    return [{**values, "seconds": 0} for values in objects(lines)]


# ------------------------------------------------------------------------------------------- training


def test_training_writes_a_whole_run_folder(home: Path) -> None:
    out = home / "runs" / "addition"
    tokenizer = {"tokenizer/tokenizer.json", "tokenizer/tokenizer.model"}
    inside = {"model.safetensors", "config.json", "optimizer.safetensors", "trainer.json", "manifest.json", *tokenizer}
    steps = {f"checkpoints/step-0000{n}/{name}" for n in (15, 30) for name in inside}
    written = {"config.json", "metrics.csv", "samples.jsonl", "report.html", "loss.png", "latest", "best"}
    files = written | tokenizer | steps
    assert {name for name, digest in tree(out).items() if digest} == files
    for n in (15, 30):
        checkpoint.verify(out / "checkpoints" / f"step-0000{n}")
        for name in tokenizer:
            assert (out / "checkpoints" / f"step-0000{n}" / name).read_bytes() == (out / name).read_bytes()
    assert (out / "latest").read_text() == "step-000030\n"
    assert (out / "best").read_text() in ("step-000015\n", "step-000030\n")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "recipe addition · step 30 of 30" in report
    assert report.count("<svg") == 7
    config = json.loads((out / "config.json").read_text())
    assert (config["recipe"], config["max_steps"], config["rows"]) == ("addition", 30, 8)
    assert config["model"]["d_model"] == 16
    assert config == json.loads((out / "checkpoints/step-000030/trainer.json").read_text())["settings"]


def test_metrics_are_sensible(home: Path) -> None:
    with open(home / "runs/addition/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 15, 20, 30]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    losses = [float(row["loss"]) for row in rows]
    assert 10 > losses[0] > losses[-1] > 0.1
    optim = Optim(**json.loads((home / "runs/addition/config.json").read_text())["optim"])
    assert (optim.lr, optim.warmup_steps) == (1e-2, 5)
    for row in rows:
        rate = learning_rate(int(row["step"]) - 1, 30, optim)
        assert float(row["lr"]) == pytest.approx(rate, rel=1e-4)
        assert 0.1 < float(row["bits_per_byte"]) < 30
        assert 0 < float(row["grad_norm"]) < 1000
        shares = [row[f"exact_{n}"] for n in (5, 6, 7)]
        assert all(0 <= float(share) <= 1 for share in shares) if int(row["step"]) % 15 == 0 else not any(shares)


def test_samples_are_stored(home: Path) -> None:
    samples = objects((home / "runs/addition/samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert [sample["step"] for sample in samples] == [15] * 3 + [30] * 3
    for sample in samples:
        assert list(sample) == ["step", *KEYS]
        assert re.fullmatch(r"(\d+) \+ (\d+) =", str(sample["prompt"]))
        assert sample["text"] == f"{sample['prompt']}{sample['completion']}"
        assert "".join(sample["blocks"]) == sample["completion"]  # type: ignore[arg-type]


def test_training_prints_plain_lines_and_no_results(addition: tuple[Path, Ran]) -> None:
    done = addition[1]
    assert done.out == ""
    assert not re.search(r"[\r\x1b]", done.err)
    lines = done.err.splitlines()
    assert re.fullmatch(r"runs/addition: [\d,]+ parameters .*, addition, on \w+, 1 CPU threads", lines[0])
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == ["step 15", "step 30"]
    assert sum(" → " in line for line in lines) == 6
    assert re.match(r"train 30/30 steps  loss \d", lines[-2])
    assert lines[-1] == 'done; try: python -m tidal.infer --checkpoint runs/addition --prompt "54663 + 132 ="'


def test_a_second_run_on_a_terminal(
    addition: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes to NAME-2, leaves the first alone, is what `infer` then takes, and shows a bar and a plot."""
    shutil.copytree(addition[0], tmp_path, dirs_exist_ok=True)
    first = tree(tmp_path / "runs/addition")
    shorter = ("--seed", "1", "--max-steps", "15")
    with Terminal([sys.executable, "-m", "tidal.train", *TRAIN, *shorter], tmp_path) as terminal:
        code, shown = terminal.end()
    assert code == 0, shown
    assert "runs/addition already holds a run; writing to runs/addition-2" in shown
    assert re.search(r"train: +\d+%\|.*15/15", shown)
    assert "Loss, nats a unit" in shown
    assert tree(tmp_path / "runs/addition") == first
    second = tree(tmp_path / "runs/addition-2")
    assert second.keys() == {name for name in first if "step-000030" not in name}
    weights = "checkpoints/step-000015/model.safetensors"
    assert second[weights] != first[weights]
    monkeypatch.chdir(tmp_path)
    assert checkpoint.resolve(None).parts[:2] == ("runs", "addition-2")


def test_training_of_the_default_size_can_be_interrupted(tmp_path: Path) -> None:
    """With no flags at all it is run by tests/test_readme.py."""
    with Terminal([sys.executable, "-m", "tidal.train", "--no-doctor"], tmp_path) as terminal:
        terminal.read_until("| 0/")
        terminal.process.send_signal(signal.SIGINT)
        code, shown = terminal.end()
    assert code == 130
    assert shown.rstrip().endswith("tidal.train: interrupted")
    assert "Traceback" not in shown


# ------------------------------------------------------------------------------------------ inference


def test_infer_takes_the_newest_run_and_documents_its_json(home: Path, command: Command,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    prompts = ["1 + 1 =", "😀 今天天气很好 é", "", "1 + 1 ="]
    flags = ("--json", "--prompt", *prompts, "--num-samples", "2", "--temperature", "1", "--seed", "3",
             "--max-new-units", "40")  # fmt: skip
    done = tidal("infer", *flags, cwd=home)
    best = (home / "runs/addition/best").read_text().strip()
    assert done.err == f"using runs/addition/checkpoints/{best}\n"
    answers = objects(done.lines)
    assert [a["prompt"] for a in answers] == [p for p in prompts for _ in range(2)]
    assert [(a["index"], a["sample"]) for a in answers] == [(i, k) for i in range(4) for k in range(2)]
    for answer in answers:
        assert list(answer) == ["index", "sample", *KEYS]
        assert answer["text"] == f"{answer['prompt']}{answer['completion']}"
        assert "".join(answer["blocks"]) == answer["completion"]  # type: ignore[arg-type]
        assert answer["stop_reason"] in ("eos", "length")
        assert isinstance(answer["units"], int)
        assert 0 <= answer["units"] <= 40
        assert isinstance(answer["log_prob"], float)
        assert answer["log_prob"] <= 0
        assert isinstance(answer["seconds"], float)
    assert len({a["log_prob"] for a in answers}) > 4  # samples differ, and so do equal prompts

    monkeypatch.chdir(home)
    again = command("infer", *flags)
    assert without_seconds(again.lines) == without_seconds(done.lines)
    model, tokenizer = package.load(home / "runs/addition")
    asked = [p for p in prompts for _ in range(2)]
    here = package.generate(model, tokenizer, asked, temperature=1.0, seed=3, max_new_units=40)
    for answer, completion in zip(answers, here, strict=True):
        assert answer["completion"] == completion.completion
        assert answer["log_prob"] == pytest.approx(completion.log_prob, abs=1e-3)
    others = package.generate(model, tokenizer, asked, temperature=1.0, seed=4, max_new_units=40)
    assert [c.log_prob for c in others] != [c.log_prob for c in here]


def test_prompts_from_standard_input_and_files(home: Path, tmp_path: Path, command: Command,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "prompts.txt").write_bytes("\ufeff1 + 1 =\r\n\n今天 2 =".encode())  # some editors put it first
    prompts = ["1 + 1 =", "", "今天 2 ="]
    flags = ("--json", "--max-new-units", "12")
    monkeypatch.chdir(home)
    by_file = command("infer", "--prompt-file", str(tmp_path / "prompts.txt"), *flags)
    assert [a["prompt"] for a in objects(by_file.lines)] == prompts
    piped = "1 + 1 =\n\n今天 2 =\n"
    for source in ((), ("--prompt-file", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode()), encoding="utf-8"))
        assert without_seconds(command("infer", *source, *flags).lines) == without_seconds(by_file.lines)


def test_conversation_on_a_terminal(home: Path, tmp_path: Path) -> None:
    """Neither one bad prompt nor Ctrl-C during an answer ends it, and what is redirected holds results only."""
    answers = tmp_path / "answers.jsonl"
    flags = "--json --max-new-units 5 --temperature 1 --num-samples 9999"  # which takes long
    command = f"exec '{sys.executable}' -m tidal.infer {flags} > '{answers}'"

    def interrupt(prompt: str) -> str:
        while prompt.encode() not in answers.read_bytes():  # the answer has begun
            assert terminal.process.poll() is None
            time.sleep(0.01)
        terminal.process.send_signal(signal.SIGINT)
        return terminal.read_until("> ")

    with Terminal(["sh", "-c", command], home) as terminal:
        assert "type a prompt" in terminal.read_until("> ")
        terminal.type("1 + 1 =\n")
        assert "interrupted" in interrupt("1 + 1 =")
        terminal.type(b"\xff\n")
        assert re.search("not UTF-8|lone surrogate", terminal.read_until("> "))
        terminal.type("今天 😀\n")
        assert "interrupted" in interrupt("今天 😀")
        terminal.type("\x04")
        code, _ = terminal.end()
    assert code == 0
    prompts = [str(a["prompt"]) for a in objects(answers.read_text(encoding="utf-8").splitlines())]
    assert [prompt for prompt, _ in itertools.groupby(prompts)] == ["1 + 1 =", "今天 😀"]
    assert len(prompts) < 9999


# ----------------------------------------------------------------------------------------- evaluation


def test_evaluate_addition(home: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("addition", "--digits", "2", "--count", "20", "--batch-size", "7")
    monkeypatch.chdir(home)
    done = command("evaluate", *flags, "--json")
    (line,) = done.lines
    assert done.err.startswith("using runs/addition/checkpoints/step-0000")
    values = json.loads(line)
    kinds = ["wrong", "empty", "repeating", "endless"]
    assert list(values) == ["digits", "count", "seed", "exact_match", *kinds, "seconds"]
    assert values["wrong"] == round(20 * (1 - values["exact_match"])) >= max(values[kind] for kind in kinds[1:])
    assert (values["digits"], values["count"], values["seed"]) == (2, 20, 1234)
    assert 0 <= values["exact_match"] <= 1
    done = command("evaluate", *flags)
    assert "seed           1234" in done.lines
    plain = figures(done.lines)
    assert list(plain) == list(values)
    assert plain["exact_match"] == pytest.approx(values["exact_match"], abs=1e-4)


# --------------------------------------------------------------------------------------------- python


def test_three_ways_to_score_agree_on_a_trained_run(home: Path) -> None:
    check_scores(*package.load(home / "runs/addition"))


# ----------------------------------------------------------------------------------------- help, bench


@pytest.mark.parametrize("arguments", ["train", "infer", "doctor", "prepare", "evaluate", "evaluate addition",
                                       "evaluate bits-per-byte", "evaluate samples"])  # fmt: skip
def test_help_imports_no_torch(arguments: str, tmp_path: Path) -> None:
    """Which takes seconds; help is there at once."""
    module, *subcommand = arguments.split()
    done = run([sys.executable, "-X", "importtime", "-m", f"tidal.{module}", *subcommand, "--help"], tmp_path)
    assert done.code == 0
    assert f"python -m tidal.{module}" in done.out
    imported = re.findall(r"\|\s*([\w.]+)$", done.err, re.MULTILINE)
    assert "tidal.cli" in imported
    assert not {"torch", "numpy", "sentencepiece", "matplotlib"} & {name.split(".")[0] for name in imported}
    assert not tree(tmp_path)


def test_the_packing_benchmark_ends_in_json(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["packing", "--tokens", "64", "--repeats", "1"])
    packing.main()
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (values["benchmark"], values["tokens"]) == ("packing", 64)
    assert values["ratio"] > 0
    assert values["max_difference"] < 1e-9
    assert values["units"] > 100


def test_beams_and_streams(home: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    beams = objects(command("infer", "--prompt", "1 + 1 =", "--num-beams", "3", "--num-samples", "2",
                            "--max-new-units", "12", "--json").lines)  # fmt: skip
    assert [b["prompt"] for b in beams] == ["1 + 1 ="] * 2
    assert [(b["index"], b["sample"], "degenerate" in b) for b in beams] == [(0, 0, True), (0, 1, True)]
    assert beams[0]["score"] >= beams[1]["score"]  # type: ignore[operator]
    streamed = objects(command("infer", "--prompt", "1 + 1 =", "2 + 2 =", "--stream", "--json", "--log-probs",
                               "--temperature", "1", "--max-new-blocks", "3").lines)  # fmt: skip
    whole = [line for line in streamed if "completion" in line]
    assert len(whole) == 2
    for completion in whole:
        mine = [line for line in streamed if line["index"] == completion["index"]]
        assert [line["block"] for line in mine if "block" in line] == completion["blocks"]
        assert mine[-1] == completion
        assert len(completion["log_probs"]) == completion["units"]  # type: ignore[arg-type]
        assert len(completion["unit_names"]) == completion["units"]  # type: ignore[arg-type]
    samples = objects(command("infer", "--prompt", "1 + 1 =", "2 + 2 =", "--stream", "--json", "--num-samples", "2",
                              "--temperature", "1", "--max-new-blocks", "3").lines)  # fmt: skip
    for done in (line for line in samples if "completion" in line):
        mine = [line for line in samples if (line["index"], line["sample"]) == (done["index"], done["sample"])]
        assert [line["block"] for line in mine if "block" in line] == done["blocks"]


def test_a_greedy_recipe_is_not_sampled(home: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    done = command("infer", "--prompt", "1 + 1 =", "--seed", "3")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("error: --seed does nothing with --temperature 0, which this recipe is asked with; "
                             "leave it out, or give a higher --temperature\n")  # fmt: skip
