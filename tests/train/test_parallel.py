"""Several processes come to what one comes to, whatever happens to one of them. On CPUs, over gloo."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.commands import ENVIRONMENT, SMALL, SMALL_TEXT, children, wait_for
from tests.train import together as work
from tests.train.runs import SETTINGS, Hooked, apart, as_process, gradient, refused, results, train_step, whole
from tests.train.together import TWICE, Job, eager_blocks, processes, run_jobs, together
from tidal import checkpoint, load
from tidal.config import Text
from tidal.layers import Layer
from tidal.streams import Batch
from tidal.train.loop import model_for, train
from tidal.train.optim import Optimizer
from tidal.train.parallel import Parallel, joined
from tidal.train.recipes.text import TextRecipe
from tidal.train.resume import look_in

SHORT = dataclasses.replace(TWICE, max_steps=3)
BF16 = dataclasses.replace(SHORT, precision="bf16", checkpoint_activations=True)
ALL = dataclasses.replace(BF16, compile=True)
"""Every option that touches the step; a short run, since compiling takes seconds."""

LOSS_APART, NORM_APART, WEIGHT_APART = 1e-5, 1e-5, 2e-4
"""How far float32 runs of 9 steps may be apart: in each loss and gradient norm (relatively), in each weight
(absolutely; the rates are 1e-2, of tables 1e-1). In float64 gradients agree to 1e-12 (below), so what is left is
rounding: sums in another order differ in the last bits, 1e-7 of a gradient, and AdamW's first updates are as large for
an entry that is nearly zero as for any. Measured: docs/training.md."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def two(home: Path) -> dict[str, float]:
    """Two processes do many things, since starting them is what takes the time."""
    others = [work.ddp_apart, work.fsdp_apart, work.ddp_with_options_apart, work.fsdp_with_options_apart,
              work.bug_own_units, work.bug_mean, work.bug_same_rows, work.bug_never_reduced]  # fmt: skip
    (home / "there").mkdir()
    stop = work.Stop()
    with pytest.raises(work.Stopped):
        train(SETTINGS, Hooked(hook=work.stop_at(stop, "batch", 1)), home / "there", stop=stop)
    jobs = [Job("ddp-2"), Job("fsdp-2", "fsdp"), Job("there", "fsdp", resume=True, until=5),
            Job("back", "ddp", until=4), Job("bf16-ddp", "ddp", BF16), Job("bf16-fsdp", "fsdp", BF16)]  # fmt: skip
    found = together(2, home, run_jobs, jobs, home, others)
    return dict(zip((other.__name__ for other in others), found[1], strict=True))


@pytest.fixture(scope="module")
def four(home: Path, two: dict[str, float]) -> dict[str, float]:
    """Four processes, which go on with what two have begun."""
    others = [work.ddp_apart, work.fsdp_apart, work.muon_apart, work.torchs_muon_apart]
    jobs = [Job("ddp-4"), Job("fsdp-4", "fsdp"), Job("there", "ddp", resume=True),
            Job("back", "fsdp", resume=True, until=7)]  # fmt: skip
    found = together(4, home, run_jobs, jobs, home, others)
    return dict(zip((other.__name__ for other in others), found[3], strict=True))


def far(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart: losses (relatively), weights and moments (absolutely)."""
    assert found.keys() == wanted.keys()
    assert [row["step"] for row in found["metrics"]] == [row["step"] for row in wanted["metrics"]]
    rows = list(zip(found["metrics"], wanted["metrics"], strict=True))
    apart = {name: max(abs(float(a[name]) / float(b[name]) - 1) for a, b in rows) for name in ("loss", "grad_norm")}
    assert all(float(a["exact_2"]) == pytest.approx(float(b["exact_2"]), rel=1e-2) for a, b in rows)  # validation
    for kind in ("weights", "moments"):
        its, ours = found[kind], wanted[kind]
        assert {name: (t.shape, t.dtype) for name, t in its.items()} == {name: (t.shape, t.dtype)
                                                                         for name, t in ours.items()}  # fmt: skip
        apart[kind] = max((its[name].double() - ours[name].double()).abs().max().item() for name in ours)
    return apart


def check_close(apart: dict[str, float]) -> None:
    """Within the tolerances."""
    assert apart["loss"] < LOSS_APART, apart
    assert apart["grad_norm"] < NORM_APART, apart
    assert max(apart["weights"], apart["moments"]) < WEIGHT_APART, apart


# ------------------------------------------------------------------------------------------ agreement


def test_gradients_are_those_of_one_process(two: dict[str, float], four: dict[str, float]) -> None:
    assert max(two["ddp_apart"], two["fsdp_apart"], four["ddp_apart"], four["fsdp_apart"]) < 1e-12


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_options_leave_the_gradient_of_several_as_it_is(engine: str, two: dict[str, float]) -> None:
    assert two[f"{engine}_with_options_apart"] < 1e-12


@pytest.mark.parametrize("bug", ["bug_own_units", "bug_mean", "bug_same_rows", "bug_never_reduced"])
def test_planted_bugs_are_noticed(bug: str, two: dict[str, float]) -> None:
    assert two[bug] > 1e-4


@pytest.mark.parametrize("run", ["ddp-2", "fsdp-2", "ddp-4", "fsdp-4"])
def test_the_loss_curve_is_that_of_one_process(
    run: str, home: Path, alone: dict[str, Any], four: dict[str, float]
) -> None:
    check_close(far(results(home / run), alone))


def test_runs_go_on_with_other_numbers_of_processes(home: Path, alone: dict[str, Any], four: dict[str, float]) -> None:
    """There: 1 process, 2 by FSDP, 4 by DDP. Back: 2 by DDP, 4 by FSDP, 1. Each stop is by a signal to one of them."""
    assert look_in(home / "back").saved.step == 7
    train(SETTINGS, Hooked(), home / "back", found=look_in(home / "back"))
    for run in ("there", "back"):
        check_close(far(results(home / run), alone))


def test_sharded_muon_is_muon(four: dict[str, float]) -> None:
    """To the rounding of one addition. Torch's own, given sharded matrices, is not."""
    assert four["muon_apart"] < 1e-6
    assert four["torchs_muon_apart"] > 1e-4


def test_bfloat16_and_all_other_options(home: Path, two: dict[str, float], tmp_path: Path) -> None:
    """bfloat16 has 8 bits: losses agree to a few of its roundings. Gradients are compared without it, above."""
    with eager_blocks():
        wanted = whole(tmp_path / "run", ALL)
    for run in ("bf16-ddp", "bf16-fsdp"):
        assert far(results(home / run), wanted)["loss"] < 2e-2
    plain = whole(tmp_path / "plain", SHORT)
    assert 1e-5 < far(wanted, plain)["loss"] < 5e-2
    assert {t.dtype for t in wanted["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("option", ["checkpoint_activations", "compile"])
def test_options_leave_the_gradient_as_it_is(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [0], Layer.forward

    def forward(layer: Layer, *x: Any) -> torch.Tensor:
        calls[0] += 1
        return real(layer, *x)

    monkeypatch.setattr(Layer, "forward", forward)
    wanted, plain = gradient()[0], calls[0]
    torch.compiler.reset()
    with eager_blocks():
        found = gradient(dataclasses.replace(SETTINGS, **{option: True}))[0]  # type: ignore[arg-type]
    assert apart(found, wanted) < 1e-12
    assert calls[0] - plain == 2 * plain if option == "checkpoint_activations" else calls[0] > plain


# ----------------------------------------------------------------------------------------------- data


def rows_of(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """What is read and written in each row, and at which places, without the padding."""
    read = [ids[sees[:, 1] > 0].tolist() for ids, sees in zip(batch.reader_ids, batch.reader_sees, strict=True)]
    there = batch.targets >= 0
    written, places = ([values[at].tolist() for values, at in zip(of_all, there, strict=True)]
                       for of_all in (batch.targets, batch.writer_places))  # fmt: skip
    return list(zip(read, written, places, strict=True))


def text_recipe(folder: Path) -> TextRecipe:
    (folder / "file.txt").write_text("\n".join(f"The sea came in, and went out {i} times." for i in range(300)))
    text = Text(data=(str(folder / "file.txt"),), vocab_size=320, reader_budget=32, cut_probability=0.5)
    return TextRecipe(dataclasses.replace(SETTINGS, recipe="text", rows=8, text=text))


@pytest.mark.usefixtures("one_a_row")
@pytest.mark.parametrize("make", [lambda folder: Hooked(dataclasses.replace(SETTINGS, rows=8)), text_recipe])
def test_shares_make_up_the_batch(make: Callable[[Path], Any], tmp_path: Path) -> None:
    recipe = make(tmp_path)
    for step in (0, 3):
        batch = recipe.batch(step)
        for n in (2, 4):
            shares = [recipe.batch(step, (i, n)) for i in range(n)]
            assert [row for share in shares for row in rows_of(share)] == rows_of(batch)
            assert sum(share.n_units for share in shares) == batch.n_units
            assert sum(share.n_bytes for share in shares) == batch.n_bytes
    assert rows_of(recipe.batch(0)) != rows_of(recipe.batch(3))


# -------------------------------------------------------------------------------------------- devices


def test_a_process_takes_its_gpu_before_it_meets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(3, 4, 2, monkeypatch)
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda engine, **more: done.append(engine))
    with pytest.raises(KeyError), joined("fsdp", torch.device("cuda:1")):
        raise KeyError
    assert done == [torch.device("cuda:1"), "cpu:gloo,cuda:nccl"]


def test_processes_that_wait_wake_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """They sleep, and look; what they oversleep is a tenth of what they have waited."""
    for needed in (1e-4, 1e-2, 0.1):
        clock, pauses = [0.0], list[float]()

        def sleep(seconds: float, clock: list[float] = clock, pauses: list[float] = pauses) -> None:
            pauses.append(seconds)
            clock[0] += seconds

        done = SimpleNamespace(is_completed=lambda clock=clock, needed=needed: clock[0] >= needed, wait=lambda: None)
        monkeypatch.setattr(time, "sleep", sleep)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, how, async_op, done=done: done)
        assert Parallel(0, 2).all_reduce_sum([1.0, 2.0]) == [1.0, 2.0]
        assert needed <= clock[0] < 1.2 * needed
        assert len(pauses) < 120


# --------------------------------------------------------------------------------------------- errors


def test_what_all_processes_meet_is_said_once(tmp_path: Path) -> None:
    with processes(2, tmp_path, work.run_command, ["--rows", "3", *SMALL], tmp_path) as started:
        (_, first), (other, second) = started
        assert first.recv() == 2
        assert other.is_alive()
        assert not second.poll()
        said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said == ["tidal.train: error: --rows is 3; it must be a multiple of 2, the number of processes\n", ""]


def test_one_process_without_memory_says_what_to_do(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, work.one_without_memory, tmp_path)
    assert "process 1 is out of memory (CUDA out of memory)" in second
    assert "the same command with --parts 2 goes on" in second
    assert first.startswith("another process of this run has ended")


def test_others_wait_until_what_was_not_finite_is_written_down(tmp_path: Path) -> None:
    """Or torchrun would end the first process in the middle of that."""
    first, second = together(2, tmp_path, work.not_finite, tmp_path)
    assert first[0].startswith("step 0: loss nan and gradient norm nan")
    assert "bad-batch.json" in first[0]
    assert second[0].startswith("step 0: loss nan")
    assert first[1]
    assert second[1]


def test_no_memory_in_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are half updated are not saved; what was saved before stays, and continues."""
    real, steps = Optimizer.step, [0]

    def step(self: Optimizer, rate: float) -> None:
        steps[0] += 1
        if steps[0] == 5:
            self.parts[0].step()  # type: ignore[no-untyped-call]
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        said = refused(train, SETTINGS, Hooked(), tmp_path)
    assert said.startswith("out of memory (CUDA out of memory) for the optimizer's update")
    assert look_in(tmp_path).folder.name == "step-000003"
    train(SETTINGS, Hooked(), tmp_path, found=look_in(tmp_path))


def test_moments_are_allocated_before_the_first_step() -> None:
    recipe = Hooked()
    model = model_for(SETTINGS, recipe.tokenizer)
    optimizer = Optimizer(model, SETTINGS.optim)
    before = {name: (t.shape, t.dtype, t.data_ptr()) for name, t in optimizer.state().items()}
    train_step(model, optimizer, recipe, 0, 1e-2, SETTINGS, work.CPU)
    assert {name: (t.shape, t.dtype, t.data_ptr()) for name, t in optimizer.state().items()} == before


# ------------------------------------------------------------------------------------------- commands


def test_a_text_by_two_processes(tmp_path: Path) -> None:
    """The second takes the tokenizer that the first has trained; both come to an end."""
    (tmp_path / "file.txt").write_text("Once upon a time there was a sea, and the sea came in and went out.\n" * 150)
    flags = ["--recipe", "text", "--data", "file.txt", "--out", "two", "--parallel", "fsdp", "--device", "cpu",
             "--max-steps", "2", *SMALL_TEXT]  # fmt: skip
    assert together(2, tmp_path, work.run_command, flags, tmp_path) == [0, 0]
    assert look_in(tmp_path / "two").saved.step == 2
    tune = ["--init-from", "two", "--data", "file.txt", "--out", "tuned", "--parallel", "fsdp", "--device", "cpu",
            "--max-steps", "1", "--lr", "0", "--no-doctor"]  # fmt: skip
    assert together(2, tmp_path, work.run_command, tune, tmp_path) == [0, 0]
    one, other = (load(tmp_path / name)[0].state_dict() for name in ("two", "tuned"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


RUN = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--monitor-interval", "2", "-m",
       "tidal.train", *SMALL, "--rows", "4", "--digits", "1", "--max-block-units", "8", "--max-steps", "100000",
       "--validate-every", "2", "--parallel", "fsdp", "--device", "cpu", "--out", "run"]  # fmt: skip


@contextlib.contextmanager
def torchrun(home: Path, log: str) -> Iterator[subprocess.Popen[bytes]]:
    """At the end nothing is left: the workers, which are in sessions of their own, would outlive the agent."""
    with open(home / log, "wb") as said:
        agent = subprocess.Popen(RUN, cwd=home, env=ENVIRONMENT, stderr=said, start_new_session=True)
    try:
        yield agent
    finally:
        if agent.poll() is None:
            for worker in children(agent.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            agent.kill()
            agent.wait()


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_torchrun_a_killed_worker_ends_the_run_and_a_signal_saves_it(tmp_path: Path) -> None:
    with torchrun(tmp_path, "first.txt") as agent:
        wait_for((tmp_path / "run/best").exists, agent, tmp_path / "first.txt", work.SECONDS)
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(work.SECONDS) == 1
    said = (tmp_path / "first.txt").read_text()
    assert said.count("tidal.train: error: another process of this run has ended") == 1
    assert said.count("tidal.train: error:") == 1
    assert "Signal 9 (SIGKILL)" in said  # torchrun says which
    assert "RuntimeError" not in said
    last = look_in(tmp_path / "run").saved.step

    def further() -> bool:
        return checkpoint.checkpoints(tmp_path / "run")[-1].name > checkpoint.name_of(last)

    with torchrun(tmp_path, "second.txt") as agent:
        wait_for(further, agent, tmp_path / "second.txt", work.SECONDS)
        agent.send_signal(signal.SIGTERM)
        agent.wait(work.SECONDS)
    said = (tmp_path / "second.txt").read_text()
    assert f"continuing at step {last} of 100000" in said
    saved = look_in(tmp_path / "run").saved.step
    assert said.count(f"saved run/checkpoints/{checkpoint.name_of(saved)}; the same command continues it") == 1
    assert said.count("tidal.train: terminated") == 1
    assert "tidal.train: error" not in said
