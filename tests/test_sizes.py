"""What the sizes cost, by the code, is what is counted: against PyTorch's own counter, autograd and the optimizer."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, tidal
from torch.utils.flop_counter import FlopCounterMode

from tidal import layers, sizes
from tidal.blocks import BlockTable, passage
from tidal.cli import UserError
from tidal.config import Optim, Shape, TidalConfig, Train
from tidal.model import TidalTransformer
from tidal.sizes import Cost, activation_bytes, aux_flops, cost, is_matrix, markdown, update_flops
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train.__main__ import run as train
from tidal.train.optim import Optimizer
from tidal.train.presets import PRESETS, SIZES

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; " * 5
SMALL_SIZES = [pytest.param(SIZES[name].model, id=name) for name in ("tiny", "mini")]
ODD = dataclasses.replace(SIZES["tiny"].model, n_kv_heads=1, writer_layers=2, reader_ff=200, writer_ff=96)
OTHERS = [pytest.param(dataclasses.replace(ODD, writer_attention=how), id=how) for how in ("memory", "block", "none")]
SHAPES = [*SMALL_SIZES, *OTHERS]


@pytest.fixture(scope="module")
def tokenizer() -> MixedTokenizer:
    return MixedTokenizer.train([TEXT])


def made(shape: Shape, tokenizer: MixedTokenizer) -> tuple[TidalTransformer, Batch]:
    """A model with the vocabulary and head of `tidal.sizes`, and a row without padding."""
    table = BlockTable(tokenizer)
    batch = pack([[passage(table, "", TEXT)]], table, steps=shape.steps)
    config = TidalConfig(2048, sizes.N_WRITABLE, sizes.N_HEAD, 32, tokenizer.fingerprint, shape)
    return TidalTransformer(config, tokenizer.spelling), batch


def counted(do: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        do()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("shape", SHAPES)
def test_work_is_what_pytorch_counts(shape: Shape, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but attention's own products, which backends do tile by tile; those are in the next test."""

    def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q + k.mean() + v.mean()  # no products, but a gradient for each

    monkeypatch.setattr(layers, "interval_attention", mixed)
    model, batch = made(shape, tokenizer)
    n_tokens, n_steps = batch.reader_ids.shape[1], batch.targets.shape[1]
    n_aux = int((batch.aux_targets >= 0).sum())
    assert batch.n_units == n_steps
    forward = model.flops(n_tokens, n_steps, 0, n_aux)
    if not shape.foretell:
        forward += aux_flops(model, n_aux)
    kept: list[torch.Tensor] = []

    def losses() -> None:
        found = model(batch)
        kept.append(found.units + found.aux)

    first = 2 * n_aux * model.foretold.n_first * shape.d_model if model.foretold else 0  # only the table learns
    assert counted(losses) == forward + first
    assert counted(kept[0].backward) == 2 * forward + first


@pytest.mark.parametrize("shape", SMALL_SIZES)
def test_attention_is_what_the_ranges_say(shape: Shape, tokenizer: MixedTokenizer) -> None:
    """Two products, with the keys and with the values, for every key that is seen."""
    model, batch = made(shape, tokenizer)
    seen = int((batch.reader_sees[..., 1] - batch.reader_sees[..., 0]).sum())
    remembered = int((batch.sees_reader[..., 1] - batch.sees_reader[..., 0]).sum())
    n_tokens, n_steps, context = batch.reader_ids.shape[1], batch.targets.shape[1], 100
    pairs = context * (shape.reader_layers * n_tokens + model.has_memory * n_steps)
    wanted = model.flops(n_tokens, n_steps, 0) + 2 * 2 * shape.d_model * pairs  # a multiply-add for each of d, twice
    assert model.flops(n_tokens, n_steps, context) == wanted
    assert remembered / n_steps == pytest.approx(n_tokens / 2, rel=0.1)  # half a row: what `cost` takes for the mean
    assert seen / n_tokens == pytest.approx(n_tokens / 2, rel=0.1)


@pytest.mark.parametrize("shape", SMALL_SIZES)
def test_updates_are_what_pytorch_counts(shape: Shape, tokenizer: MixedTokenizer) -> None:
    model, _ = made(shape, tokenizer)
    optimizer = Optimizer(model, Optim())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    assert counted(lambda: optimizer.step(1e-3)) == update_flops(model)


# ----------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_saves(shape: Shape, tokenizer: MixedTokenizer) -> None:
    model, batch = made(shape, tokenizer)
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    n_tokens, n_steps = batch.reader_ids.shape[1], batch.targets.shape[1]
    wanted = activation_bytes(shape, n_tokens, n_steps, losses.n_aux, model.config.vocab_size)
    assert wanted == pytest.approx(found, rel=0.02)


def test_state_is_what_training_holds(tokenizer: MixedTokenizer) -> None:
    settings = SIZES["tiny"]
    found = cost("tiny", settings)
    model, batch = made(settings.model, tokenizer)
    optimizer = Optimizer(model, settings.optim)
    model(batch).units.backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step(1e-3)
    parameters = list(model.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.weights == sum(p.nbytes for p in parameters)
    assert found.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert found.moments == sum(t.nbytes for name, t in optimizer.state().items() if not name.endswith(".step"))
    assert sum(is_matrix(model, p) for p in parameters) == len(optimizer.parts[0].param_groups[0]["params"])


def test_rows_that_fit() -> None:
    some = Cost("x", 0, 0, 0.0, 0.0, 0.0, 0.0, weights=100, gradients=100, moments=200, row=50, rows=8, cache=1)
    assert [some.rows_at_once(n) for n in (100, 449, 450, 700, 10_000)] == [0, 0, 1, 6, 8]


# ------------------------------------------------------------------------------------------------ sizes


def test_sizes_grow_and_the_largest_has_its_name() -> None:
    found = [cost(name, size) for name, size in SIZES.items()]
    counts = [c.parameters for c in found]
    assert counts == sorted(counts)
    assert counts[-1] == pytest.approx(1.3e9, rel=0.03)
    assert SIZES["tiny"] == PRESETS["text"]
    for name, size in SIZES.items():
        assert size.model.d_model // size.model.n_heads in (32, 64, 128), name  # what the kernels have


def test_the_documentation_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """What `python -m tidal.sizes` prints is in docs/training.md, line by line."""
    sizes.run([])
    printed = capsys.readouterr().out.strip()
    assert printed == markdown([cost(name, size) for name, size in SIZES.items()])
    documented = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    for table in printed.split("\n\n"):
        assert table in documented, f"docs/training.md needs\n{table}"


def test_sizes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes.run(["--json"])
    values = json.loads(capsys.readouterr().out)["sizes"]
    assert [value["name"] for value in values] == list(SIZES)
    assert all(math.isfinite(value["training"]) and value["training"] > 2 * value["writing"] for value in values)


def settings_of(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> Train:
    """The settings with which `python -m tidal.train` would train."""
    found: list[Train] = []
    monkeypatch.setattr("tidal.train.__main__._train", lambda settings, *_: found.append(settings))
    assert train(list(arguments)) == 0
    return found[0]


def test_model_size_gives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of("--data", "x.txt", "--model-size=small", "--rows", "3", monkeypatch=monkeypatch)
    wanted = SIZES["small"]
    assert found.model == wanted.model
    assert (found.optim, found.rows, found.model_size) == (wanted.optim, 3, "small")
    assert found.text == dataclasses.replace(wanted.text, data=("x.txt",))
    assert settings_of("--data", "x.txt", monkeypatch=monkeypatch).model == SIZES["tiny"].model


@pytest.mark.parametrize("arguments", [("--model-size", "tiny"), ("--data", "x.txt", "--model-size", "huge"),
                                       ("--recipe", "addition", "--model-size=mini"), ("--model-size",)])  # fmt: skip
def test_model_size_that_makes_no_sense(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = tidal("train", *arguments, cwd=tmp_path, fails=True)
    assert done.code == 2
    assert re.fullmatch(r"tidal.train: error: --model-size.*\n", done.err)
    assert not list(tmp_path.iterdir())


def test_the_smallest_trains_and_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text(TEXT * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tidal.train.loop.generate", lambda *_, **__: [])
    flags = ["--data", "x.txt", "--model-size", "tiny", "--rows", "1", "--reader-budget", "32", "--no-doctor"]
    assert train([*flags, "--max-steps", "2", "--device", "cpu", "--threads", "1"]) == 0
    assert json.loads((tmp_path / "runs/text/config.json").read_text())["model_size"] == "tiny"
    with pytest.raises(UserError, match="--model-size mini: the model of runs/text has its size"):
        train(["--resume", "runs/text", "--model-size", "mini"])
