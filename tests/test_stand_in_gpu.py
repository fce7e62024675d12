"""Everything that runs on a GPU, on a stand-in for one (tests/stand_in_gpu.py): nothing is left on the other device,
and the host waits where it must, once a step."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import attention, decoding
from tests.commands import SMALL_TEXT, Ran
from tests.infer.test_engine import same
from tests.infer.test_recorded import FUSED
from tests.infer.test_requests import SETTINGS as SAMPLINGS
from tests.stand_in_gpu import GPU, OnGpu, stand_in_gpu
from tests.strategies import random_model, tiny_copy, tokenizers
from tests.train import runs
from tests.train.test_gpu_step import SHAPE, apart, gradients_on
from tidal.blocks import BlockTable, passage
from tidal.device import upload
from tidal.foretold import Foretold
from tidal.infer import recorded
from tidal.infer.beam import beam_search
from tidal.infer.completion import Limits
from tidal.infer.decoder import Decoder
from tidal.infer.engine import Engine, generate
from tidal.infer.score import bits_per_byte, unit_log_probs
from tidal.kernels.api import BACKENDS
from tidal.train.loop import Run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real thing is here")
PROMPTS = ["the cat", "", "a dog sat on the mat and"]


def of_tidal(waits: list[str]) -> list[str]:
    return [line for line in waits if line.startswith("tidal/")]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where the host waited; attention by the reference, which is quicker than Triton's interpreter."""
    monkeypatch.setenv("TIDAL_ATTENTION_BACKEND", "reference")
    with stand_in_gpu() as waits:
        yield waits


# -- the stand-in itself

X, AT = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])
MIXED: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda x: x + X, "a product": lambda x: x @ X.mT, "a choice": lambda x: torch.where(x > 1, x, X),
    "a list": lambda x: torch.cat([x, X]), "in place": X.clone().add_, "rows": lambda x: X.gather(1, x.long()),
    "an index of a GPU": lambda x: X[x[0].long()], "an embedding": lambda x: torch.embedding(X, x.long()),
    "in place, no dimensions": lambda x: torch.zeros(()).add_(x[0, 0]),
    "no dimensions, but no pointwise operation": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
}  # fmt: skip
WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(), "tolist": lambda x: x.tolist(), "float": lambda x: float(x.sum()),
    "if": lambda x: bool((x > 1).all()), "cpu": lambda x: x.cpu(), "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 1], "list": lambda x: x[[1, 0]], "index": lambda x: x[AT],
    "assigned": lambda x: x.index_put_((AT,), x.clone()), "new_tensor": lambda x: x.new_tensor([1.0]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device), "pageable": lambda x: X.to(x.device, non_blocking=True),
    "blocking": lambda x: X.pin_memory().to(x.device), "copied": lambda x: x.copy_(X), "fetched": X.clone().copy_,
    "repeated": lambda x: torch.repeat_interleave(x[0].long()), "equal": lambda x: torch.equal(x, x),
}  # fmt: skip
DOES_NOT: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: (x + 1) * torch.tensor(2.0), "made there": lambda x: torch.zeros(3, device=x.device) + x,
    "like it": lambda x: x.new_zeros(2, 3) + torch.ones_like(x), "pinned": lambda x: upload([1.0, 2, 3], x.device) + x,
    "index": lambda x: x[upload([1, 0], x.device)], "slices": lambda x: x[1:, :2].contiguous().view(-1),
    "same place": lambda x: x.to(x.device).to(torch.float64).to(x.device),
    "as_tensor": lambda x: torch.as_tensor(x, device=x.device),
    "repeated": lambda x: torch.repeat_interleave(x[0].long(), output_size=3),
}  # fmt: skip


@pytest.mark.parametrize("what", MIXED)
def test_two_devices_are_refused(what: str, gpu: list[str]) -> None:
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        MIXED[what](X.to("cuda"))


@pytest.mark.parametrize("what", WAITS)
def test_waiting_is_seen(what: str, gpu: list[str]) -> None:
    x = X.to("cuda")
    gpu.clear()
    WAITS[what](x)
    assert len(gpu) == 1


@pytest.mark.parametrize("what", DOES_NOT)
def test_what_need_not_wait(what: str, gpu: list[str]) -> None:
    x = X.to("cuda")
    gpu.clear()
    made = DOES_NOT[what](x)
    assert not gpu
    assert isinstance(made, OnGpu)
    assert made.device == GPU
    assert made.is_cuda
    assert torch.equal(made.cpu(), DOES_NOT[what](X))


def test_it_computes(gpu: list[str]) -> None:
    """Gradients, views, updates in place, modules that are moved; there is no way round `.cpu()` to the values."""
    torch.manual_seed(0)
    here, there = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    there.load_state_dict(here.state_dict())
    there.to("cuda")
    for linear, x in ((here, X), (there, X.to(GPU))):
        linear(x)[:, 1].pow(2).sum().backward()
        with torch.no_grad():
            linear.weight.view(-1)[2:4] -= linear.weight.grad.view(-1)[2:4]  # type: ignore[union-attr]
    assert torch.equal(there.weight.detach().cpu(), here.weight)
    assert torch.equal(there.weight.grad.cpu(), here.weight.grad)  # type: ignore[union-attr,arg-type]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.weight.detach().numpy()


# -- steps: of training, of decoding, of beams


@pytest.mark.parametrize("how", [{}, {"precision": "bf16", "parts": 2}, {"workers": 1}], ids=str)
def test_a_step_of_training_waits_once(how: dict[str, Any], tmp_path: Path, gpu: list[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """For the loss and the norm of the gradient, at its end."""
    counts, step = list[list[str]](), Run._step

    def counted(self: Run, rate: float) -> dict[str, float]:
        gpu.clear()
        figures = step(self, rate)
        counts.append(of_tidal(gpu))
        return figures

    monkeypatch.setattr(Run, "_step", counted)
    optim = dataclasses.replace(runs.SETTINGS.optim, accumulate=2)
    settings = dataclasses.replace(runs.SETTINGS, device="cuda", optim=optim, model=SHAPE, max_steps=3, **how)
    with runs.short_samples():
        runs.whole(tmp_path / "run", settings)
    assert len(counts) == 3
    assert all(len(waits) == 1 and "norms.double()" in waits[0] for waits in counts), counts


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, gpu: list[str]) -> None:
    settings = dataclasses.replace(runs.SETTINGS, device="cuda")
    with runs.short_samples():
        wanted = runs.whole(tmp_path / "whole", settings)
        assert not runs.unequal(runs.stopped_and_continued(tmp_path / "stopped", "batch", 5, settings), wanted)
        on_cpu = runs.whole(tmp_path / "cpu")
    assert apart(wanted["weights"], on_cpu["weights"]) < 0.05, "Muon rounds to bfloat16 on a GPU"


def test_what_calls_the_fused_kernels_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are what a GPU takes where nothing else is asked for."""
    triton = pytest.importorskip("tidal.kernels.triton_attention")
    if not triton.INTERPRETED.value:
        pytest.skip("Triton does not interpret here")
    chosen, attend = list[bool](), triton.attend
    monkeypatch.setitem(BACKENDS, "triton", dataclasses.replace(
        BACKENDS["triton"], attend=lambda *args, **how: chosen.append(args[0].is_cuda) or attend(*args, **how)))
    wanted = gradients_on("cpu", "float32")
    model, tokenizer = random_model(tokenizers()["english"], FUSED, torch.float32), tokenizers()["english"]
    written = generate(model, tokenizer, PROMPTS, max_new_units=6)
    assert not chosen
    with stand_in_gpu() as waits:
        assert apart(gradients_on("cuda", "float32"), wanted) < 1e-4
        assert len(of_tidal(waits)) == 1
        assert len(chosen) == 4
        model.to("cuda")
        waits.clear()
        steps, step = list[int](), Decoder.step
        monkeypatch.setattr(Decoder, "step", lambda self, *args, **how: steps.append(0) or step(self, *args, **how))
        for one, other in zip(generate(model, tokenizer, PROMPTS, max_new_units=6), written, strict=True):
            same(one, other, 1e-4)
    assert len(of_tidal(waits)) == len(steps) > 6, set(waits)
    assert len(chosen) > 4
    assert all(chosen)


@pytest.mark.parametrize("graphs", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("shape", ["memory", "block", "none"])
def test_a_step_of_decoding_waits_once(shape: str, graphs: bool, gpu: list[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whatever its rows are asked for, join or leave; also one that reads. And all is as on the CPU."""
    monkeypatch.setattr(recorded, "record", lambda function, device: function)  # in place of a graph, it runs again
    model, tokenizer = tiny_copy("english", shape)
    asked = [(PROMPTS[i % 3], how, Limits(10 + i), i) for i, how in enumerate(SAMPLINGS)]

    def answers(graphs: bool) -> dict[int, Any]:
        engine = Engine(model, tokenizer, batch_size=4, cuda_graphs=graphs)
        numbers, done = [engine.submit(*request) for request in asked], dict[int, Any]()
        while engine.unfinished:
            gpu.clear()
            done |= dict(event for event in engine.step() if not isinstance(event[1], str))
            waits.append(len(of_tidal(gpu)))
        assert numbers == sorted(done)
        return done

    waits: list[int] = []
    expected = answers(False)
    waits.clear()
    model.to("cuda")
    for number, one in answers(graphs).items():
        same(one, expected[number], 1e-9)
    assert set(waits) == {1}


def test_a_step_of_beams_waits_once(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_copy("english", "memory")
    expected = beam_search(model, tokenizer, PROMPTS, num_beams=3, max_new_units=12)
    steps, step = list[int](), Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args, **how: steps.append(0) or step(self, *args, **how))
    model.to("cuda")
    gpu.clear()
    found = beam_search(model, tokenizer, PROMPTS, num_beams=3, max_new_units=12)
    assert len(of_tidal(gpu)) == len(steps) > 5
    for mine, theirs in zip(found, expected, strict=True):
        assert [h.completion for h in mine] == [h.completion for h in theirs]
        assert [h.score for h in mine] == pytest.approx([h.score for h in theirs], abs=1e-9)


def test_evaluation_waits_once(gpu: list[str]) -> None:
    """Not after each batch: the next is built while the GPU computes."""
    model, tokenizer = tiny_copy("english", "none")
    table = BlockTable(tokenizer)
    passages = [passage(table, "", f"the light is {n} and the cat saw the land") for n in range(12)]
    measure = [lambda: bits_per_byte(model, [[p] for p in passages], table, 3)[0],
               lambda: float(np.concatenate(unit_log_probs(model, passages, table, 40)).sum())]  # fmt: skip
    expected = [do() for do in measure]
    model.to("cuda")
    for do, value in zip(measure, expected, strict=True):
        gpu.clear()
        assert do() == pytest.approx(value, rel=1e-12)
        assert len(of_tidal(gpu)) == 1


def test_what_is_left_behind_or_asked_for_shows(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs: an operand that stays on the CPU; a value that is asked for in the middle of a step."""
    model, tokenizer = tiny_copy("english", "memory")
    model.to("cuda")
    with monkeypatch.context() as patch:
        patch.setattr("tidal.infer.decoder.upload", lambda x, device, dtype=None: torch.tensor(x, dtype=dtype))
        with pytest.raises(RuntimeError, match="at least two devices"):
            generate(model, tokenizer, PROMPTS)
    sums = Foretold.sums
    monkeypatch.setattr(Foretold, "sums", lambda self, x: sums(self, x + 0 * x.max().item()))
    gpu.clear()
    gradients_on("cuda", "float32")
    assert sum("x.max().item()" in line for line in gpu) == 1


# -- commands


@pytest.fixture(scope="module")
def run_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on text, which a GPU trained in bfloat16 after the doctor had seen it."""
    folder = tmp_path_factory.mktemp("gpu")
    lines = [f"the {a} saw the {b} and the {c} in {n} days.\n" for n in range(40)
             for a, b, c in itertools.permutations(("cat", "dog", "light"))]  # fmt: skip
    (folder / "text.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch, stand_in_gpu(), runs.short_samples():
        patch.setenv("TIDAL_ATTENTION_BACKEND", "reference")
        importlib.import_module("tidal.train.__main__").run(
            ["--recipe", "text", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), "--device", "cuda",
             "--max-steps", "4", "--validate-every", "2", "--precision", "bf16", *SMALL_TEXT[:-1], "2"])  # fmt: skip
    return folder


@pytest.mark.parametrize("line", [
    "infer --prompt the a",
    "infer --prompt the a --stream --json",
    "infer --prompt the --num-beams 3",
    "infer --prompt the --trace -",
    "evaluate bits-per-byte",
    "evaluate boundary --count 5",
    "evaluate samples --count 3",
])
def test_commands(line: str, run_of_text: Path, command: Callable[..., Ran], gpu: list[str]) -> None:
    """Say on a GPU what they say on the CPU, but for times and rounding."""
    module, *arguments = line.split()
    arguments += ["--checkpoint", str(run_of_text / "run"), *["--max-new-units", "12"] * (module == "infer")]
    on_cpu, on_gpu = (command(module, *arguments, "--device", where) for where in ("cpu", "cuda"))
    assert on_gpu.code == on_cpu.code == 0, on_gpu.err
    assert gpu
    (mine, my_words), (theirs, their_words) = taken_apart(on_gpu.out), taken_apart(on_cpu.out)
    assert my_words == their_words
    assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def taken_apart(out: str) -> tuple[list[float], str]:
    """The numbers with a decimal point, and the rest, without times."""
    out, number = re.sub(r"seconds\W+[\d.e-]+", "", out), r"-?\d+\.\d+(?:e-?\d+)?"
    return [float(x) for x in re.findall(number, out)], re.sub(number, "", out)


def test_the_doctor(run_of_text: Path, command: Callable[..., Ran], gpu: list[str]) -> None:
    checks = ["9", "13", "14", "17", "19"]
    done = command("doctor", str(run_of_text / "run"), "--device", "cuda", "--quick", "--checks", *checks)
    assert done.code == 0, done.out
    assert "0 findings, 5 well" in done.out
    assert gpu


def test_benchmarks(tmp_path: Path, gpu: list[str], monkeypatch: pytest.MonkeyPatch,
                    capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What a GPU that is lent for minutes is asked first (benchmarks/first_gpu_session.sh)."""
    monkeypatch.setattr(recorded, "record", lambda function, device: function)
    (tmp_path / "text").write_text("the cat and the dog saw a light, and the land was far away. " * 60)
    decoding.main(["--device", "cuda", "--cuda-graphs", "--precision", "bf16", "--batch", "2", "--context", "64",
                   "--new-chars", "12", "--repeats", "1", "--models", "token", "--d-model", "16", "--layers", "3",
                   "--suffix-rows", "50", "--vocab-size", "300", "--text", str(tmp_path / "text")])  # fmt: skip
    attention.main(["--device", "cuda", "--tiny", "--masks", "two-stream", "--lengths", "96", "--rivals", "sdpa",
                    "--decode-queries", "1", "--decode-contexts", "96", "--repeats", "1",
                    "--backend", "reference"])  # fmt: skip
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in lines] == ["decoding", "attention"]
    assert not any(line.get("failed") for line in lines)
    assert any("benchmarks/" in line for line in gpu)
