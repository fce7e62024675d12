"""Bugs that show in a trained model or in its files, for checks 19 to 22: a tiny run, spoilt in one way at a time."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.doctor.bugs_training import pairs
from tests.doctor.plant import Patch, Plant, everywhere, in_packing, replacing
from tests.train.runs import short_samples
from tidal import checkpoint
from tidal.config import Addition, Shape, Train
from tidal.infer import sampling
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer
from tidal.train.loop import make_recipe, train
from tidal.train.presets import PRESETS

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, dict[str, Any], dict[str, Any]], None]
"""of the tensors, the config and trainer.json of a checkpoint"""
STEPS = 300


@dataclass(frozen=True)
class Spoilt:
    """A bug in files (`files`, given the run folder) or in the package while it is examined (`plant`)."""

    name: str
    check: int
    files: Callable[[Path], None] = lambda folder: None
    plant: Plant = lambda patch: None
    of: str = "sums"
    """which of the runs of `train_all`"""
    quick: bool = True
    """quick checks find it"""


def train_tiny(out: Path, steps: int = STEPS, **other: Any) -> Path:
    """A run that adds numbers of one or two digits, tolerably; with `other` settings of the shape."""
    shape = dataclasses.replace(
        Shape(d_model=32, n_heads=2, n_kv_heads=2, reader_layers=1, writer_layers=1, reader_ff=64, writer_ff=64,
              suffix_rows=50, place_jitter=3), **other)  # fmt: skip
    preset = PRESETS["addition"]
    settings = dataclasses.replace(
        preset, out=str(out), max_steps=steps, rows=24, validate_every=steps, threads=1, device="cpu", model=shape,
        optim=dataclasses.replace(preset.optim, warmup_steps=20), addition=Addition(digits=2, max_block_units=16),
    )  # fmt: skip
    assert isinstance(settings, Train)
    out.mkdir(parents=True)
    with short_samples():
        return train(settings, make_recipe(settings), out)


def train_text(folder: Path) -> Path:
    """A run that has learnt a little of a few texts."""
    settings = dataclasses.replace(pairs(folder), out=str(folder / "run"), max_steps=60, validate_every=60, threads=1,
                                   device="cpu")  # fmt: skip
    (folder / "run").mkdir()
    with short_samples():
        return train(settings, make_recipe(settings), folder / "run")


def leak(batch: Batch) -> dict[str, Tensor]:
    """Steps are fed what they are to write."""
    return {"writer_ids": torch.where(batch.targets > 1, batch.targets, batch.writer_ids)}


# -------------------------------------------------------------------------------------- how to spoil files


def rewritten(change: Change) -> Callable[[Path], None]:
    """Another checkpoint in the place of the run's, intact by its manifest."""

    def spoil(folder: Path) -> None:
        found = checkpoint.resolve(folder)
        config, tensors, trainer = checkpoint.read_checkpoint(found)
        tokenizer = MixedTokenizer.load(found / "tokenizer")
        change(tensors, config, trainer)
        checkpoint.write_checkpoint(folder, trainer["step"], tensors=tensors, config=config, trainer=trainer,
                                    tokenizer=tokenizer)  # fmt: skip

    return spoil


def metrics(change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(change(rows))

    return spoil


def with_loss(loss: Callable[[int, float], float]) -> Callable[[Path], None]:
    return metrics(lambda rows: [{**row, "loss": f"{loss(i, float(row['loss'])):.6g}"} for i, row in enumerate(rows)])


def as_initialised(name: str) -> Change:
    """The optimizer never had this tensor."""

    def change(tensors: Tensors, config: dict[str, Any], trainer: dict[str, Any]) -> None:
        from tidal.config import TidalConfig

        torch.manual_seed(0)
        tensors[name] = TidalTransformer(TidalConfig.from_dict(config)).state_dict()[name]

    return change


def square_transposed(tensors: Tensors, config: dict[str, Any], trainer: dict[str, Any]) -> None:
    """A saver that mixes up rows and columns, where both are as many."""
    tensors |= {name: t.T.contiguous() for name, t in tensors.items() if t.ndim == 2 and t.shape[0] == t.shape[1]}


def favour(unit: int, by: float) -> Plant:
    """A head that is biased towards or against a unit."""

    def wrap(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def bugged(self: TidalTransformer, states: Tensor) -> Tensor:
            logits = head(self, states).clone()
            logits[..., unit] += by
            return logits

        return bugged

    return replacing(TidalTransformer, "head", wrap)


def damaged(folder: Path) -> None:
    weights = checkpoint.resolve(folder) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


def loaded_half(load: Callable[..., Any]) -> Callable[..., Any]:
    """Weights that are rounded on their way into the model."""
    return lambda self, tensors, **how: load(self, {k: v.half().float() for k, v in tensors.items()}, **how)


def prompt_forgotten(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *rest: torch.zeros_like(read(self, *rest))


def always_the_first(right: Callable[..., Tensor]) -> Callable[..., list[int]]:
    """A sampler stuck on the lowest unit that the grammar allows beyond the bytes, ending every block after one."""

    def bugged(logits: Tensor, allowed: Tensor, *rest: Any) -> list[int]:
        return [0 if bool(mask[0]) else int(mask[258:].nonzero()[5]) + 258 for mask in allowed]

    return bugged


def far_too_hot(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, allowed, settings, *rest: right(
        logits, allowed, [dataclasses.replace(how, temperature=50.0 if how.temperature else 0.0) for how in settings],
        *rest)  # fmt: skip


SPOILT: tuple[Spoilt, ...] = (
    Spoilt("one bit of the weights' file is wrong", 19, damaged),
    Spoilt("weights are rounded when they are loaded", 19,
           plant=replacing(TidalTransformer, "load_state_dict", loaded_half)),
    Spoilt("one matrix was never updated", 19, rewritten(as_initialised("reader.0.mlp.up.weight"))),
    Spoilt("the tables were never updated", 19, rewritten(as_initialised("token_embedding.weight"))),
    Spoilt("a stored weight is not a number", 19,
           rewritten(lambda tensors, *_: tensors.update({"writer_norm.weight": torch.full((32,), math.nan)}))),
    Spoilt("every completion ends at once", 20, plant=favour(1, 60.0)),
    Spoilt("documents never end", 20, plant=favour(1, -60.0)),
    Spoilt("one block for ever", 20, plant=everywhere(sampling.choose, always_the_first(sampling.choose))),
    Spoilt("a loss was not a number", 21, with_loss(lambda i, loss: math.nan if i == 7 else loss)),
    Spoilt("the loss is flat", 21, with_loss(lambda i, loss: 2.0 + 0.01 * (i % 3))),
    Spoilt("the loss is that of guessing", 21, with_loss(lambda i, loss: max(loss, 5.6 - 0.01 * i))),
    Spoilt("training stopped after a tenth of its steps", 21,
           rewritten(lambda tensors, config, trainer: trainer["settings"].update(max_steps=10 * STEPS))),
    Spoilt("the writer was trained on its targets", 21, plant=in_packing(leak), of="leaky"),
    Spoilt("the prompt has no influence", 21, plant=replacing(TidalTransformer, "read", prompt_forgotten)),
    Spoilt("square weights were saved transposed, after training", 21, rewritten(square_transposed), of="text",
           quick=False),
    Spoilt("samples are drawn far too hot", 22, plant=everywhere(sampling.choose, far_too_hot(sampling.choose))),
    Spoilt("a model trained on a leak writes without it", 22, of="leaky"),
)  # fmt: skip


def spoilt_copy(spoilt: Spoilt, runs: dict[str, Path], to: Path) -> Path:
    """A copy of the run, with the bug in its files."""
    shutil.copytree(runs[spoilt.of], to)
    spoilt.files(to)
    return to


def train_all(folder: Path, patch: Patch) -> dict[str, Path]:
    """Healthy runs of both kinds, and one that was trained with a leak."""
    healthy = {"sums": train_tiny(folder / "healthy"), "text": train_text(folder / "text")}
    with patch.context() as inner:
        in_packing(leak)(inner)
        return {**healthy, "leaky": train_tiny(folder / "leaky", 120)}  # a copy is soon learnt
