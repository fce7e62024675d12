"""What looks on while a run is trained: columns, probes, warnings on planted illnesses, TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import importlib.machinery
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.commands import tidal
from tests.train.runs import SETTINGS, Hooked, stop_at
from tidal.blocks import BlockTable, passage
from tidal.config import Train
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train import loop, watch
from tidal.train.figures import COLUMNS
from tidal.train.health import Alarm, Health
from tidal.train.loop import model_for, train
from tidal.train.resume import look_in
from tidal.train.stop import Stop, Stopped
from tidal.train.watch import Watch

Row = dict[str, float]


def rows(losses: Sequence[float], **columns: float) -> list[Row]:
    """A row every ten steps."""
    return [{"step": 10 * i, "loss": loss, "lr": 1e-3, **columns} for i, loss in enumerate(losses, start=1)]


def kinds(some: Sequence[Row], max_steps: int = 1000, warmup_steps: int = 100) -> dict[str, int]:
    """What is warned of, and at which step."""
    return {alarm.kind: alarm.step for alarm in Health(max_steps, warmup_steps, some).alarms.values()}


FALLING = [6.0 * 0.97**i + 1.0 + 0.1 * (-1) ** i for i in range(60)]
PLATEAU = [5.0, 4.0, 2.4, 1.8, 1.5, *[1.1] * 20, *[0.9 * 0.8**i for i in range(40)]]
"""A task that is understood all at once, after a while (addition)."""


# ------------------------------------------------------------------------------------- rules, on made-up figures


HEALTHY = {
    "falling": FALLING, "plateau": PLATEAU, "spike": [*FALLING, 30.0, 30.0, *FALLING[-20:]],
    "noise near zero": [6, 5, 4, 3, 2, 1.5, 1.2, 1, 0.9, 0.8, *[1e-5 * (1 + i % 9) for i in range(50)]],
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_health_is_not_warned_of(name: str) -> None:
    figures = {"units_per_second": 9e3, "context_gain": 0.5, "typo_gain": -3.0, "bits_per_byte": 1.5,
               "held_out_bits_per_byte": 1.9}  # fmt: skip
    assert kinds(rows(HEALTHY[name], **figures)) == {}


def test_flat() -> None:
    noise = [6.0 + 0.2 * math.sin(7 * i) for i in range(30)]
    assert kinds(rows(noise)) == {"flat": 110}  # after ten rows, and the warm-up
    assert kinds(rows(noise), warmup_steps=250) == {"flat": 260}
    assert kinds(rows(noise[:9])) == {}


def test_diverging() -> None:
    assert kinds(rows([*FALLING, *[4.5] * 5])) == {"diverging": 630}  # three of five rows
    assert kinds(rows([3.0, 5.0, 9.0, *[20.0] * 9])) == {"diverging": 60}
    assert kinds(rows([20.0] * 15)) == {"diverging": 110}  # it was over before the first row


def test_implausibly_low() -> None:
    assert kinds(rows([3.0, 0.05, 0.05, 0.04])) == {"implausibly low": 30}
    assert kinds(rows(FALLING, typo_gain=0.6)) == {"implausibly low": 10}
    assert kinds(rows(FALLING, bits_per_byte=0.9, held_out_bits_per_byte=2.0)) == {"implausibly low": 10}
    assert kinds(rows(FALLING, bits_per_byte=0.01, held_out_bits_per_byte=0.2)) == {}
    assert kinds(rows(PLATEAU)) == {}  # as low as that, but later


def test_collapsed() -> None:
    assert kinds(rows(FALLING, context_gain=0.0001)) == {"collapsed": 250}
    assert kinds(rows(FALLING, context_gain=0.01)) == {}


def test_throughput_halved() -> None:
    some = rows(FALLING)
    for i, row in enumerate(some):
        row["units_per_second"] = 1000.0 if i in (3, 8) or i >= 40 else 2500.0
    assert kinds(some) == {"slow": 450}


def test_each_is_said_once_and_not_again_after_resuming() -> None:
    some = rows([6.0] * 40, context_gain=0.0)
    health, said = Health(1000, 100), []
    for row in some[:30]:
        said += health.look(row)
    assert [alarm.kind for alarm in said] == ["flat", "collapsed"]
    assert said[0] == Alarm("flat", 110, "the loss does not fall: 6 nats a unit, 6 at first; the learning rate is "
                            "0.001, maybe too small or far too large")  # fmt: skip
    continued = Health(1000, 100, [{name: f"{value:.6g}" for name, value in row.items()} for row in some[:30]])
    assert continued.alarms == health.alarms
    assert [continued.look(row) for row in some[30:]] == [[]] * 10


def test_a_row_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="needs step and loss"):
        Health(10, 1).look({"step": 1, "loss": ""})


# ---------------------------------------------------------------------------------- the same, in training


class Sums(Hooked):
    """Nothing but sums, of which the model must look at the operands."""

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        return {"quality": 0.0}


def trained(out: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 24, rate: float = 1e-2) -> Path:
    """A run of the tiny settings with a row every step and validation twice. Steps take equally long, unless the test
    has another clock: the machine may be slow for a while."""
    if watch.time is time:
        ticks = itertools.count()
        monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr(watch, "LEAST_TYPOS", 16)
    optim = dataclasses.replace(SETTINGS.optim, lr=rate, decay_fraction=0.0)
    settings = dataclasses.replace(SETTINGS, max_steps=steps, validate_every=steps // 2, rows=48, optim=optim)
    out.mkdir()
    return train(settings, Sums(settings), out)


def metrics(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def warned(said: str) -> list[str]:
    """Kinds of the warnings on stderr, in order."""
    return [line.split("WARNING, ")[1].split(":")[0] for line in said.splitlines() if "WARNING, " in line]


def test_a_healthy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run", monkeypatch, steps=60)
    assert warned(capsys.readouterr().err) == []
    found = metrics(out)
    assert tuple(found[0])[: len(COLUMNS)] == COLUMNS
    for row in found:
        assert float(row["units_per_second"]) > 0
        assert 50 < float(row["memory_mib"]) < 1e5
        assert (row["typo_gain"] != "") == (row["context_gain"] != "") == (row["quality"] != "")
    assert [int(row["step"]) for row in found if row["quality"]] == [30, 60]
    assert float(found[-1]["typo_gain"]) < 0 < float(found[-1]["context_gain"])


@pytest.mark.parametrize(("rate", "kind"), [(0.0, "flat"), (30.0, "diverging")])
def test_a_rate_that_does_not_learn(rate: float, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    trained(tmp_path / "run", monkeypatch, rate=rate)
    assert kind in warned(capsys.readouterr().err)


def test_a_target_that_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The shift by one that everybody forgets once: the writer is fed what it shall write."""
    honest = TidalTransformer._writer_states

    def states(self: TidalTransformer, batch: Batch, *rest: Any) -> torch.Tensor:
        return honest(self, dataclasses.replace(batch, writer_ids=batch.targets.clamp(min=0)), *rest)

    monkeypatch.setattr(TidalTransformer, "_writer_states", states)
    out = trained(tmp_path / "run", monkeypatch, steps=60)
    assert "implausibly low" in warned(capsys.readouterr().err)
    assert float(metrics(out)[-1]["typo_gain"]) > 0.5


def test_a_writer_that_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    honest = TidalTransformer.read
    monkeypatch.setattr(TidalTransformer, "read", lambda self, *given: 0 * honest(self, *given))
    out = trained(tmp_path / "run", monkeypatch)
    assert warned(capsys.readouterr().err) == ["collapsed"]
    assert abs(float(metrics(out)[-1]["context_gain"])) < 1e-5


def test_a_machine_that_slows_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    count = itertools.count()
    clock = (float(i if i < 20 else 20 + 4 * (i - 20)) for i in count)  # two looks a step; then four times as slow
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trained(tmp_path / "run", monkeypatch, steps=40)
    assert warned(capsys.readouterr().err) == ["slow"]


# ------------------------------------------------------------------------------------------------ probes


@pytest.mark.usefixtures("one_a_row")
def test_probes_touch_nothing_and_repeat(tmp_path: Path) -> None:
    recipe = Sums(dataclasses.replace(SETTINGS, rows=128))
    model = model_for(SETTINGS, recipe.tokenizer)
    look = Watch(tmp_path, SETTINGS, recipe.tokenizer, torch.device("cpu"), [])
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    first = look.probes(model, recipe.batch(0))
    assert look.probes(model, recipe.batch(0)) == first
    assert look.probes(model, recipe.batch(0), 50) == pytest.approx(first, rel=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert first.keys() == {"typo_gain", "context_gain"}
    one = dataclasses.replace(SETTINGS, rows=1)
    assert look.probes(model, Sums(one).batch(0)) == {}  # no other row to read, and hardly a letter


TEXTS = ["The sea, 1234 miles wide; it comes IN and goes out.\n" * 4] * 6


def test_what_is_misspelt() -> None:
    """Letters and digits, a sixth of them, each other than it was; all else is as it was, so the blocks are, too."""
    tokenizer = MixedTokenizer.train(TEXTS)
    table = BlockTable(tokenizer)
    batch = pack([[passage(table, "", text)] for text in TEXTS], table)
    right, wrong = watch.misspelt(batch, tokenizer, SETTINGS)
    assert torch.equal(right.reader_ids, batch.reader_ids)
    typos = right.targets != wrong.targets
    there, instead = ([tokenizer.id_bytes[unit].decode() for unit in b.targets[typos].tolist()] for b in (right, wrong))
    kinds = ("abcdefghijklmnopqrstuvwxyz", "0123456789")
    assert all(any(a in kind and b in kind for kind in kinds) for a, b in zip(there, instead, strict=True))
    assert len(there) == pytest.approx(sum(c.islower() or c.isdecimal() for text in TEXTS for c in text) / 6, rel=0.2)
    assert {c for c in instead if c.isdecimal()} > {"0", "5", "9"}
    for name in ("sees_writer", "writer_places"):
        assert torch.equal(getattr(right, name), getattr(wrong, name))


class Knows:
    """Stands in for a model: logits that are a function of what is right and what stands there instead."""

    def __init__(self, right: Batch, wrong: Batch, n_head: int, seen: float, known: float) -> None:
        """`seen` and `known`: logits of the letter that stands there (a leak), and of the right one (understanding)."""
        self.logits = torch.randn(*right.targets.shape, n_head, generator=torch.Generator().manual_seed(0))
        for batch, more in ((wrong, seen), (right, known)):
            at = batch.targets.clamp(min=0)[..., None]
            self.logits.scatter_add_(2, at, torch.full(at.shape, float(more)))

    def states(self, batch: Batch) -> tuple[None, torch.Tensor]:
        return None, self.logits

    def head(self, states: torch.Tensor) -> torch.Tensor:
        return states


@pytest.mark.parametrize(("seen", "known", "least", "most"), [(0, 0, -1.0, 0.0), (0, 20, -1.0, 0.0), (3, 0, 0.8, 3.3),
                                                              (3, 20, 0.8, 3.3)])  # fmt: skip
def test_the_gain_is_of_what_leaks_not_of_what_is_known(seen: float, known: float, least: float, most: float) -> None:
    tokenizer = MixedTokenizer.train(TEXTS)
    table = BlockTable(tokenizer)
    pair = watch.misspelt(pack([[passage(table, "", text)] for text in TEXTS], table), tokenizer, SETTINGS)
    model = Knows(*pair, tokenizer.n_head, seen, known)
    gain = watch.typo_gain(model, *pair, tokenizer, torch.device("cpu"))  # type: ignore[arg-type]
    assert gain is not None
    assert least < gain < most


# -------------------------------------------------------------------------------------------- TensorBoard


class Writer:
    """Stands in for torch's SummaryWriter, which needs a package that the tests do without."""

    made: list[Writer] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    """A TensorBoard that is installed, as far as can be seen, and the writers that were made."""
    package, ours = ModuleType("tensorboard"), ModuleType("torch.utils.tensorboard")
    package.__spec__ = importlib.machinery.ModuleSpec("tensorboard", None)
    ours.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ours)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


def test_tensorboard_gets_every_figure(tensorboard: list[Writer], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    settings: Train = dataclasses.replace(SETTINGS, tensorboard=True)
    out, stop = tmp_path / "run", Stop()
    out.mkdir()
    with pytest.raises(Stopped):
        train(settings, Sums(settings, stop_at(stop, "batch", 4)), out, stop=stop)
    train(settings, Sums(settings), out, found=look_in(out))
    assert [(Path(w.folder), w.purge_step, w.closed) for w in tensorboard] == [(out / "tensorboard", step, True)
                                                                              for step in (1, 5)]  # fmt: skip
    scalars = [scalar for writer in tensorboard for scalar in writer.scalars]
    wanted = [(name, float(value), int(row["step"])) for row in metrics(out) for name, value in row.items()
              if name != "step" and value]  # fmt: skip
    assert sorted(scalars) == sorted(wanted)
    assert [(name, step) for w in tensorboard for name, _, step in w.texts] == [("sample 0", n) for n in (3, 6, 9)]
    assert all(text.startswith("    1 + 2 =") for w in tensorboard for _, text, _ in w.texts)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_without_the_package_nothing_begins(tmp_path: Path) -> None:
    done = tidal("train", "--tensorboard", cwd=tmp_path, fails=True)
    assert done.code == 2
    wanted = '--tensorboard needs the package tensorboard: pip install -e ".[tensorboard]"'
    assert done.err == f"tidal.train: error: {wanted}\n"
    assert not list(tmp_path.iterdir())
