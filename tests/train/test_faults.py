"""Losses that are not finite, no memory: training stops in order, or goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import faults, forgeries
from tests.train.runs import EVERY, SETTINGS, STEPS, Hooked, apart, gradient, quick, results, unequal, whole
from tidal import checkpoint
from tidal.cli import UserError
from tidal.model import Losses, TidalTransformer
from tidal.ranks import OwnError
from tidal.streams import Batch
from tidal.train import gradient as gradient_of_a_step
from tidal.train import parallel as parallel_module
from tidal.train.loop import train
from tidal.train.memory import out_of_memory
from tidal.train.parallel import Parallel
from tidal.train.recipes.addition import AdditionRecipe
from tidal.train.records import parts_of
from tidal.train.resume import look_in

# ------------------------------------------------------------------------------------------ not finite


@pytest.mark.usefixtures("one_a_row")
@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_is_written_down(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TidalTransformer.forward

    def forward(model: TidalTransformer, batch: Batch) -> Losses:
        losses = real(model, batch)
        if recipe.step < 4:
            return losses
        root = (model.token_embedding.weight * 0).sqrt().sum()  # zero, and its gradient is infinite
        bad = losses.units * math.inf if which == "loss" else losses.units + root
        return Losses(bad, losses.n_units, losses.aux, losses.n_aux)

    monkeypatch.setattr(TidalTransformer, "forward", forward)
    recipe = Hooked()
    with pytest.raises(UserError, match=r"step 4: loss .* and gradient norm nan; .*bad-batch\.json"):
        train(SETTINGS, recipe, tmp_path)
    assert look_in(tmp_path).folder.name == "step-000003"
    said = json.loads((tmp_path / "bad-batch.json").read_text())
    assert (said["step"], said["seed"], said["grad_norm"]) == (4, 0, "nan")
    assert (said["loss"] == "inf") == (which == "loss")
    assert [(row["batch"], row["row"]) for row in said["rows"]] == [(4, r) for r in range(4)]
    for row in said["rows"]:
        a, b, c = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\n", row["text"]).groups())  # type: ignore[union-attr]
        assert a + b == c
        assert row["loss"] == "inf" if which == "loss" else 0 < row["loss"] < 10


# -------------------------------------------------------------------------------------------- no memory


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_parts_give_the_same_gradient(parts: int) -> None:
    (wanted, figures), (found, its) = gradient(step=0), gradient(dataclasses.replace(SETTINGS, parts=parts), step=0)
    assert len({int(n) for n in (Hooked().batch(0).targets >= 0).sum(1)}) > 1  # rows differ in length
    assert apart(wanted, found) < 1e-13
    assert its == pytest.approx(figures, rel=1e-12)


def test_planted_bug_parts_that_weigh_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradient(step=0)[0]

    def equal_parts(batch: Batch, n: int) -> list[Batch]:
        return parts_of(batch, n)[:1] * n

    monkeypatch.setattr(gradient_of_a_step, "parts_of", equal_parts)
    assert apart(wanted, gradient(dataclasses.replace(SETTINGS, parts=2), step=0)[0]) > 1e-6


def memory_for(rows: int, monkeypatch: pytest.MonkeyPatch, error: type[Exception] = torch.OutOfMemoryError) -> None:
    real = TidalTransformer.forward

    def forward(model: TidalTransformer, batch: Batch) -> Losses:
        if len(batch.targets) > rows:
            if torch.is_grad_enabled():  # not where the loop probes
                real(model, batch).units.backward()  # whatever was left behind must not count
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return real(model, batch)

    monkeypatch.setattr(TidalTransformer, "forward", forward)


@pytest.mark.usefixtures("one_a_row")
@pytest.mark.parametrize(("rows", "parts"), [(3, 2), (1, 4)])
def test_out_of_memory_halves_the_batch(rows: int, parts: int, tmp_path: Path, alone: dict[str, Any],
                                        monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    memory_for(rows, monkeypatch)
    found = whole(tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("OUT OF MEMORY (CUDA out of memory. Tried to allocate 2.00 GiB.)") == int(math.log2(parts))
    assert f"batches of 4 rows are computed in {parts} parts" in said
    assert look_in(tmp_path / "run").saved.parts == parts
    assert unequal(found, alone) != []  # rounding
    for row, its in zip(found["metrics"], alone["metrics"], strict=True):
        assert float(row["loss"]) == pytest.approx(float(its["loss"]), rel=1e-3)


def test_out_of_memory_with_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The four documents of a batch are in two rows: it cannot be cut into four parts. Of several processes, the one
    that has no memory must say so itself."""
    memory_for(0, monkeypatch)
    with pytest.raises(OwnError, match="out of memory with one row at a time"):
        train(SETTINGS, Hooked(), tmp_path)
    said = capsys.readouterr().err
    assert said.count("OUT OF MEMORY") == said.count("batches of 2 rows are computed in 2 parts") == 1


def test_other_errors_are_no_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(0, monkeypatch, RuntimeError)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        train(SETTINGS, Hooked(), tmp_path)
    with pytest.raises((RuntimeError, MemoryError)) as raised:  # what the CPU says in earnest
        torch.empty(1 << 60)
    assert out_of_memory(raised.value)


@pytest.mark.parametrize("said", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "Triton Error [CUDA]: out of memory",
])  # fmt: skip
def test_out_of_memory_outside_of_torchs_allocator(said: str) -> None:
    """RuntimeErrors of CUDA's libraries, its driver and Triton, as they word them."""
    assert out_of_memory(RuntimeError(said))


def test_validation_without_memory_is_left_out(tmp_path: Path, alone: dict[str, Any],
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def hook(what: str, step: int) -> None:
        if what != "batch" and step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    train(SETTINGS, Hooked(hook=hook), tmp_path)
    said = capsys.readouterr().err
    assert "OUT OF MEMORY in validation (CUDA out of memory); left out" in said
    assert "OUT OF MEMORY in sampling" in said
    found = results(tmp_path)
    assert set(unequal(found, alone)) <= {"metrics", "samples", "best"}
    assert [row["exact_2"] != "" for row in found["metrics"]] == [False, True, True]


@pytest.fixture
def no_room_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop examines a whole copy, as under FSDP, which the device has no memory for."""
    unsharded, to, moved = Parallel.unsharded, TidalTransformer.to, [0]

    def copied(parallel: Parallel, model: TidalTransformer) -> TidalTransformer:
        with mock.patch.object(parallel_module, "is_sharded", return_value=True):
            return unsharded(parallel, model)

    def once(model: TidalTransformer, device: torch.device) -> TidalTransformer:
        moved[0] += 1
        if moved[0] > 1:  # the first is that of the model itself
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(model, device)

    monkeypatch.setattr(Parallel, "unsharded", copied)
    monkeypatch.setattr(TidalTransformer, "to", once)


@pytest.mark.usefixtures("no_room_for_a_copy")
def test_a_whole_copy_without_memory_is_left_out(tmp_path: Path, alone: dict[str, Any],
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    train(SETTINGS, Hooked(), tmp_path)
    said = capsys.readouterr().err
    for what in ("validation", "probing", "sampling"):
        assert said.count(f"OUT OF MEMORY in {what} (CUDA out of memory); left out\n") == STEPS // EVERY
    assert set(unequal(results(tmp_path), alone)) == {"metrics", "samples"}


@pytest.mark.usefixtures("no_room_for_a_copy")
def test_without_memory_for_a_copy_a_loss_that_is_not_finite_is_still_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_of_a_step.math, "isfinite", lambda value: False)
    with pytest.raises(UserError, match=r"step 0: loss .*; try a smaller --lr, with --resume never$"):
        train(SETTINGS, Hooked(), tmp_path)
    assert not (tmp_path / "bad-batch.json").exists()


def test_what_was_not_validated_is_not_the_best(tmp_path: Path) -> None:
    def hook(what: str, step: int) -> None:
        if what == "validate" and step > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    train(SETTINGS, Hooked(hook=hook), tmp_path)
    assert (tmp_path / "best").read_text() == "step-000003\n"


# ----------------------------------------------------------------------------------------- the benchmark


def test_faults_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILLs and all the rest, in small: `benchmarks/faults.py`."""
    monkeypatch.setattr(AdditionRecipe, "validate", quick)  # also in the forks
    out = tmp_path / "new" / "faults.json"
    assert faults.command(["--quick", "--out", str(out)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads(out.read_text())
    assert line["survived"]
    assert line["kills"]["kills"] >= 2
    assert line["kills"]["runs"] >= 1
    assert line["kills"]["runs_that_differ"] == 0
    assert (line["damage"]["flips"], line["damage"]["truncations"], line["damage"]["missed"]) == (20, 10, [])
    assert line["forged"]["forgeries"] > 15
    assert line["forged"]["accepted"] == []


def test_the_benchmark_notices_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: damage that is not looked for, and links that are followed."""
    train(SETTINGS, Hooked(), tmp_path / "run")
    last = tmp_path / "run/checkpoints" / checkpoint.name_of(STEPS)
    rng = np.random.default_rng(0)
    assert forgeries.damage(last, 14, 7, rng)["missed"] == []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify", lambda folder: None)
        missed = forgeries.damage(last, 14, 7, rng)["missed"]
        assert len(missed) == 21
        assert any(text.endswith("loaded") for text in missed)
        real = forgeries.forgeries
        patch.setattr(forgeries, "forgeries", lambda outside: {
            name: forge for name, forge in real(outside).items() if name != "named pipe"})  # it would wait for ever
        accepted = forgeries.forged(tmp_path, last)["accepted"]
    assert {"name that climbs out", "link to a file outside", "link to a folder outside"} <= set(accepted)
    assert "pickle as weights" not in accepted
