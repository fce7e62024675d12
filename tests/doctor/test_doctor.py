"""The command, the report, the hook of training, and healthy models of all shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import ROOT, SMALL, tree
from tests.doctor import healthy
from tests.doctor.mutants import MUTANTS
from tests.doctor.table import examine_mutant
from tests.train.runs import short_samples
from tidal.cli import UserError, main
from tidal.doctor import Document, checks_kernels, examine, run
from tidal.doctor import __main__ as command
from tidal.doctor.checks_run import _compare_n_grams
from tidal.doctor.patient import Feed
from tidal.doctor.registry import CHECKS
from tidal.doctor.report import Found, Meter, Where
from tidal.doctor.specimen import SHAPE, make
from tidal.kernels import api
from tidal.train import __main__ as training_command

TRAIN = (*(flag for flag in SMALL if flag != "--no-doctor"), "--max-steps", "2", "--rows", "2", "--threads", "1")
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


@pytest.mark.parametrize("seed", [1, 3])  # float64, bfloat16; training examines models in float32
def test_no_false_alarms(seed: int) -> None:
    """`python -m tests.doctor.healthy` runs 200 of these, and sees that each model is left as it was."""
    report = healthy.examine(seed)
    assert report.ok, f"{report.subject}\n{report.table()}"


def test_a_reader_that_is_sure_is_no_false_alarm() -> None:
    """Shares of what it rules out are differences of sums that are nearly equal."""
    model, tokenizer = make()
    with torch.no_grad():
        model.token_embedding.weight *= 8
    report = run(model, tokenizer, quick=True, checks=[13, 14, 15, 16])
    assert report.ok, report.table()


def test_an_empty_document_is_no_false_alarm() -> None:
    """There is nothing to cut in it; nor is anything asked, where it does not end, either."""
    model, tokenizer = make()
    texts = [Document("", ""), Document("the light", "", ends=False)]
    report = run(model, tokenizer, texts=texts, quick=True, checks=[1, 11])
    assert report.ok, report.table()


@pytest.mark.parametrize("without", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_gradients_that_are_not_wanted_are_no_false_alarm(without: Callable[[], AbstractContextManager[Any]]) -> None:
    """Frozen weights, and wherever the doctor is called."""
    with without():
        model, tokenizer = make()
        model.requires_grad_(False)
        report = run(model, tokenizer, quick=True, checks=[10, 13, 17], trained=True)
    assert report.ok, report.table()
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("overlap", [False, True])
def test_n_grams_are_compared_where_texts_are_apart(overlap: bool) -> None:
    """Of a few short texts all windows have most in common, whatever the model, and no sample has."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abc "), 200 if overlap else 20_000))
    starts = rng.integers(0, len(text) - 100, 16).tolist()
    documents = [Document(text[n : n + 50], text[n + 50 : n + 100], False) for n in starts]
    meter = Meter()
    _compare_n_grams(documents, [d.completion for d in documents], meter, Where())
    if overlap:
        _compare_n_grams(documents, ["xyz" * 16] * 16, meter, Where())
        assert "the texts overlap" in " ".join(meter.notes)
    else:
        with pytest.raises(Found, match="samples lack"):
            _compare_n_grams(documents, ["xyz" * 16] * 16, meter, Where())


# -------------------------------------------------------------------------------------------- the command


def test_examining_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command.run(["--quick"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    numbers = [int(line[:2]) for line in lines if re.match(r"[ \d]\d  ", line)]
    assert numbers == sorted(CHECKS)
    assert lines[-1].startswith("0 findings, 19 well, 3 skipped; ")
    assert "no checkpoint given" in said.err
    assert tree(tmp_path) == {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs that have learnt nothing, one of them examined first."""
    folder = tmp_path_factory.mktemp("home")
    with short_samples():
        training_command.run([*TRAIN, "--out", str(folder / "run")])
        training_command.run([*TRAIN, "--out", str(folder / "unexamined"), "--no-doctor"])
    return folder


def test_examining_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its laws hold (the others were examined before it was trained), its output is judged."""
    before = tree(home)
    assert command.run([str(home / "run"), "--quick", "--json", "--checks", "1", "11", "19", "21"]) == 1
    report = json.loads(capsys.readouterr().out)
    verdicts = {r["number"]: r["verdict"] for r in report["results"]}
    assert not report["ok"]
    assert verdicts == {1: "well", 11: "well", 19: "well", 21: "finding"}, report
    assert "guessing" in report["results"][3]["message"]
    assert not report["results"][1]["message"]  # what it was fed was examined
    assert tree(home) == before


def test_examining_with_other_text(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("my own text, 12 + 34 = 46\n" * 9)
    data = "--data", str(tmp_path / "mine.txt")
    assert command.run([str(home / "run/checkpoints/step-000002"), *data, "--checks", "1", "14", "--quick"]) == 0
    said = capsys.readouterr()
    assert "0 findings, 2 well" in said.out
    assert "texts: the texts given" in said.err


def test_examining_a_damaged_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    weights = tmp_path / "run/checkpoints/step-000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert command.run([str(tmp_path / "run")]) == 1
    assert "model.safetensors has SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (("nowhere",), "nowhere does not exist"),
    (("--quik",), "did you mean '--quick'"),
    (("--checks", "23"), "--checks 23: there is no such check; they are numbered 1 to 22"),
    (("--data", "nothing.txt"), "no such file or folder: 'nothing.txt'"),
    (("--device", "tpu9"), "'tpu9' cannot be used"),
    (("--checkpoint", "nowhere"), "nowhere does not exist"),
    (("--quick", "nowhere"), "nowhere does not exist"),
    (("--checks", "1", "--json", "nowhere"), "nowhere does not exist"),
    (("nowhere", "--checkpoint", "there"), "both 'nowhere' and --checkpoint 'there' are given; choose one"),
    (("nowhere", "--quick", "there"), "unexpected argument 'there'"),
])  # fmt: skip
def test_what_cannot_run(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.run, "tidal.doctor", arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1]
    assert not out


# ---------------------------------------------------------------------------------------------- training


def test_training_is_the_same_with_the_doctor(home: Path) -> None:
    """Bit for bit."""
    one, other = (home / name / "checkpoints/step-000002/model.safetensors" for name in ("run", "unexamined"))
    assert one.read_bytes() == other.read_bytes()


def test_training_refuses_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    BY_NAME["supervision one block late"].plant(monkeypatch)
    with pytest.raises(UserError, match=r"checks .*11 \(targets and supervision\).*train with --no-doctor"):
        training_command.run([*TRAIN, "--out", str(tmp_path / "run")])
    assert "FINDING" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_spell_itself_is_found() -> None:
    """What the recipe is about to feed is looked at, whatever made it."""
    model, tokenizer = make()
    patient = examine._patient(model, tokenizer, [], True, False, None)
    batch = patient.pack([[Document("12 +", " 34 = 46\n")], [Document("", "the light")]])
    assert run(model, tokenizer, quick=True, checks=[11], feed=Feed(batch)).ok
    batch.targets[0, 0] = 2 + ord("?")
    assert [r.message for r in run(model, tokenizer, quick=True, checks=[11], feed=Feed(batch)).findings] == [
        "blocks of the training batch differ"
    ]


# ------------------------------------------------------------------------------------------------ reports


def where(name: str, check: int) -> Where:
    found = examine_mutant(BY_NAME[name], [check]).findings[0].where
    assert found is not None
    return found


def test_what_a_model_does_not_look_at_is_the_same_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without suffix rows, training and decoding still name the same suffixes."""
    subject = make(dataclasses.replace(SHAPE, suffix_rows=0))
    assert run(*subject, quick=True, checks=[9]).ok
    BY_NAME["suffixes from the wrong side, in decoding only"].plant(monkeypatch)
    found = run(*subject, quick=True, checks=[9]).findings[0].where
    assert found is not None
    assert found.tensor == "suffixes"


def test_the_first_difference_is_named() -> None:
    """Text, block, step, layer, tensor and both values."""
    first = where("the reader is causal inside blocks, in decoding only", 14)
    assert first.text
    assert (first.layer, first.sides) == ("reader.0", ("training", "decoding"))
    assert re.fullmatch(r"state\[\d+\]", first.tensor)
    assert float(first.values[0]) != float(first.values[1])

    first = where("the writer's place counts from 1, in decoding only", 14)
    assert (first.layer, first.tensor, first.values) == ("fed to the model", "writer places", ("0", "1"))
    assert (first.step, first.block) == (0, "Once")

    first = where("suffix rows off by one, in training and decoding", 13)
    assert first.layer == "writer.0"
    assert first.step is not None

    first = where("the second of equal blocks is told something else, in training", 13)
    assert (first.block, first.layer) == (" a", "writer.0")

    first = where("the context is the state after the block's first token", 13)
    assert (first.layer, first.step) == ("context", 0)

    first = where("a writer step sees the next one", 7)
    assert first.layer.startswith("writer.")
    assert re.fullmatch(r"attention to key \d+", first.tensor)
    assert (first.sides, first.values[0]) == (("must be", "training"), "0")
    assert 0 < float(first.values[1]) <= 1

    first = where("positions off by one from the second block on", 9)
    assert (first.tensor, first.values) == ("reader positions", ("2.0", "3.0"))


def test_bad_arguments() -> None:
    model, tokenizer = make()
    with pytest.raises(ValueError, match=r"no checks \[0, 99\]; they are numbered 1 to 22"):
        run(model, tokenizer, checks=[0, 3, 99])
    with pytest.raises(ValueError, match="texts is the string 'the'; give a list"):
        run(model, tokenizer, texts="the")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="surrogate"):
        run(model, tokenizer, texts=["\ud800"], quick=True)
    assert torch.get_num_threads() == 2, "all is left as it was"
    torch.set_num_threads(threads)


def test_the_commands_of_the_docs_are_these() -> None:
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("doctor.md", "garbage.md"))
    told = set(re.findall(r"python -m ((?:tidal\.doctor|tests\.doctor\.\w+)(?: [\w./-]+)*)", text))
    fields = [*dataclasses.fields(command.Doctor), *dataclasses.fields(healthy.Healthy)]
    own = {f"--{field.name}" for field in fields}
    assert {flag for line in told for flag in re.findall(r"--[a-z-]+", line)} <= own
    assert told


def test_too_little_memory_is_no_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(CHECKS, 5, dataclasses.replace(CHECKS[5], run=full))
    with pytest.raises(SystemExit) as stop:
        main(command.run, "tidal.doctor", ["--checks", "5"])
    assert stop.value.code == 2
    assert "out of memory (DefaultCPUAllocator" in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_looked_at_is_no_finding() -> None:
    """A document that asks for nothing; heads that cannot be told apart."""
    model, tokenizer = make(dataclasses.replace(SHAPE, d_model=8, n_kv_heads=1))
    report = run(model, tokenizer, texts=[Document("the light", "", ends=False)], quick=True, checks=[7, 8, 9, 10])
    assert [r.verdict for r in report.results] == ["skipped", "skipped", "well", "skipped"], report.table()


@pytest.mark.parametrize("wrong", [None, torch.float32, torch.bfloat16])
def test_fused_kernels_are_measured(monkeypatch: pytest.MonkeyPatch, wrong: torch.dtype | None) -> None:
    """In both precisions: bfloat16 takes other ways than float32."""
    pytest.importorskip("triton")
    from tidal.kernels.triton_tiles import INTERPRETED

    triton = api.BACKENDS["triton"]

    def bent(*arguments: Any, **more: Any) -> torch.Tensor:
        return triton.attend(*arguments, **more) * (1.1 if arguments[0].dtype == wrong else 1.0)

    monkeypatch.setitem(api.BACKENDS, "triton", dataclasses.replace(triton, attend=bent))
    monkeypatch.setattr(checks_kernels, "CASES", checks_kernels.CASES[:1])
    monkeypatch.setattr(checks_kernels, "FUSED_ON", "cpu" if INTERPRETED.value else "cuda")
    monkeypatch.setattr(checks_kernels, "available_backends", lambda: ("triton",))
    model, tokenizer = make(dataclasses.replace(SHAPE, d_model=32, n_heads=1, n_kv_heads=1))
    report = run(model, tokenizer, quick=True, checks=[17])
    assert report.ok == (wrong is None), report.table()
    if wrong is not None:
        assert str(wrong).removeprefix("torch.") in str(report.findings[0].where)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_examining_on_a_gpu() -> None:
    """Heads are 32 wide, which the fused kernels have."""
    model, tokenizer = make(dataclasses.replace(SHAPE, d_model=64, n_heads=2, n_kv_heads=1))
    report = run(model.cuda(), tokenizer, quick=True)
    assert report.ok, report.table()
