"""Check 19: the files."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidal import checkpoint as checkpoints
from tidal.blocks import NOTHING
from tidal.cli import UserError
from tidal.config import Shape, TidalConfig
from tidal.doctor.patient import Patient
from tidal.doctor.registry import check
from tidal.doctor.report import Meter, Skip, Where
from tidal.infer.load import load
from tidal.model import TidalTransformer

Tensors = dict[str, Tensor]


@check(19, "weights are the file's", "weights not loaded, the wrong file, the wrong dtype, a config of other weights")
def weights(patient: Patient, meter: Meter) -> None:
    """What is in memory is, bit for bit, what the verified file holds; all of it finite; all of it learnt.

    Without a checkpoint, one is written and loaded again.
    """
    model = patient.model
    for name, tensor in model.state_dict().items():
        meter.holds(bool(tensor.isfinite().all()), f"{name} has {int((~tensor.isfinite()).sum())} values that are not "
                    "finite", Where(tensor=name))  # fmt: skip
        meter.same("dtypes", patient.dtype, tensor.dtype, Where(tensor=name, sides=("most", name),
                   values=(str(patient.dtype), str(tensor.dtype))), ("most", name))  # fmt: skip
    meter.same("fingerprints", model.config.fingerprint, patient.tokenizer.fingerprint, Where(), ("model", "tokenizer"))
    if patient.checkpoint is not None:
        _as_stored(patient, meter, patient.checkpoint)
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stored = checkpoints.write_checkpoint(
                folder, 1, tensors=model.state_dict(), config=model.config.to_dict(), trainer={"step": 1},
                tokenizer=patient.tokenizer)  # fmt: skip
        except (OSError, checkpoints.DiskFullError) as error:
            raise Skip(f"no room in TMPDIR to save a copy of the model: {error}") from error
        again, tokenizer = load(stored, dtype=patient.dtype)
        meter.same("fingerprints", patient.tokenizer.fingerprint, tokenizer.fingerprint, Where(), ("saved", "loaded"))
        _same_tensors(meter, model.state_dict(), again.state_dict(), ("saved", "loaded"))


def _as_stored(patient: Patient, meter: Meter, folder: Path) -> None:
    values, tensors, trainer = checkpoints.read_checkpoint(folder)
    config = TidalConfig.from_dict(values)
    meter.same("configs", config, patient.model.config, Where(), ("file", "model"))
    _same_tensors(meter, {name: t.to(patient.dtype) for name, t in tensors.items()}, patient.model.state_dict(),
                  ("file", "model"))  # fmt: skip
    _learnt(patient, meter, folder, trainer, tensors)


def _same_tensors(meter: Meter, left: Tensors, right: Tensors, sides: tuple[str, str]) -> None:
    meter.same("names of tensors", sorted(left), sorted(right), Where(), sides)
    for name, tensor in left.items():
        mine = right[name].cpu()
        meter.same(f"shapes of {name}", list(tensor.shape), list(mine.shape), Where(tensor=name), sides)
        differs = (tensor.cpu() != mine) & ~(tensor.cpu().isnan() & mine.isnan())
        at = Where(tensor=name)
        if bool(differs.any()):
            index = tuple(differs.nonzero()[0].tolist())
            at = Where(tensor=f"{name}{list(index)}", sides=sides,
                       values=(f"{tensor[index].item():.9g}", f"{mine[index].item():.9g}"))  # fmt: skip
        meter.holds(not bool(differs.any()), f"{int(differs.sum())} values of {name} differ", at)


def _learnt(patient: Patient, meter: Meter, folder: Path, trainer: dict[str, Any], tensors: Tensors) -> None:
    """No tensor is still what the run began with: what its seed made, or what `--init-from` gave it."""
    try:
        step, settings = int(trainer["step"]), trainer["settings"]
        seed, source, of_tables = int(settings["seed"]), settings["init_from"], settings["optim"]["table_lr_scale"]
    except (LookupError, TypeError, ValueError):
        return  # not of a run
    if not step:
        return
    config = patient.model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = TidalTransformer(config)
    initial, idle = fresh.state_dict(), _idle(config.shape)
    if source is not None:
        initial = _given(meter, source, folder)
    if of_tables == 0:
        idle |= {name for name, weight in fresh.named_parameters() if any(weight is table for table in fresh.tables())}
    if not _has_suffixes(patient):
        idle.add("suffix_embedding.weight")
    for name, tensor in tensors.items():
        same = name in initial and name not in idle and torch.equal(initial[name].float(), tensor.float())
        meter.holds(not same, f"{name} is as it was at first; {step} steps have not changed it",
                    Where(tensor=name))  # fmt: skip


def _given(meter: Meter, source: str, folder: Path) -> Tensors:
    """The weights of the checkpoint that the run in whose `folder` we are began with, if it is still there."""
    try:
        if (there := checkpoints.resolve(source)).resolve().parent == folder.resolve().parent:
            raise UserError(f"{source} is this run")
        return checkpoints.read_checkpoint(there)[1]
    except UserError as error:
        meter.note(f"not compared with what it began with: {error}")
        return {}


def _has_suffixes(patient: Patient) -> bool:
    """Whether some step of what it was trained on has one: else their table learns nothing. Digits have none."""
    if patient.feed is not None:
        return bool((patient.feed.batch.suffixes != NOTHING).any())
    return any(max(step.suffixes) >= 0 for document in patient.samples for step in patient.layout(document).steps)


def _idle(shape: Shape) -> set[str]:
    """Tensors of queries and keys alone in layers whose steps see one key, themselves: its weight is 1 whatever they
    are, so nothing is learnt of them.
    """
    first = 1 if shape.writer_attention == "memory" else 0  # the first layer sees the text before, too
    layers = range(first, shape.writer_layers if shape.step_window == 1 else first)
    return {f"writer.{i}.{name}.weight" for i in layers for name in ("query", "norm_query", "norm_key")}
