"""`--init-from`: a new run that begins with the weights of another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tidal import checkpoint
from tidal.cli import UserError, flag_of
from tidal.config import Train
from tidal.infer.load import load
from tidal.model import TidalTransformer
from tidal.prepare.again import also_trained_on, training_of
from tidal.train.presets import PRESETS

UNSEEN = ("n_heads", "n_kv_heads", "rotary_places")
"""Of a shape, what the sizes of weights need not show, and what they mean depends on."""


def defaults_from(path: Path) -> Train:
    """Settings of a new run that begins with the weights in `path`, a run or a checkpoint.

    Recipe, shape, and how it was trained (rate, rows, rules of the data) are as there; data, steps and all else as in
    any new run. Raises UserError where no settings can be read.
    """
    try:
        file = checkpoint.resolve(path) / "trainer.json"
    except UserError as error:
        raise UserError(f"--init-from: {error}; a run that has begun goes on without it: --resume and its folder"
                        ) from error  # fmt: skip
    try:
        there = Train.from_dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
        preset = PRESETS[there.recipe]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--init-from: {file} cannot be read: {error!r}") from error
    rules = dataclasses.replace(there.text, data=(), validation_data=(), prepared=None, cache=Train().text.cache,
                                tokenizer=None)  # fmt: skip
    return dataclasses.replace(preset, init_from=str(path), rows=there.rows, model=there.model,
                               optim=there.optim, addition=there.addition, characters=there.characters,
                               text=rules)  # fmt: skip


def maybe_learnt(settings: Train, digest: str, source: Path) -> list[str]:
    """Files of the data, by their real paths, of which the checkpoint `source`, or one that it began with, may have
    learnt what is held out now.

    None of those that were trained on the same data with the same part held out, which their `digest` shows. Files of
    prepared data are not known. Documents are held out by their numbers, so with one more file they are others.
    """
    held_out, seen = settings.text.validation_data or settings.text.data, set[Path]()
    while settings.recipe == "text" and source not in seen:
        seen.add(source)
        try:
            trainer = json.loads((source / "trainer.json").read_text(encoding="utf-8"))
            there, before = training_of(trainer), trainer["settings"].get("init_from")
            if trainer.get("data") != digest and (files := also_trained_on(held_out, there.text)):
                return files
            source = checkpoint.resolve(Path(before)) if before else source
        except (UserError, OSError, ValueError, TypeError, RecursionError):  # it is gone
            return []
    return []


def load_weights(model: TidalTransformer, source: Path) -> None:
    """Give `model` the weights of the checkpoint `source`. Raises UserError where its tokenizer or shape is another."""
    there, _ = load(source)
    ours, theirs = (dataclasses.asdict(m.config) for m in (model, there))
    try:
        model.config.check_tokenizer(there.config.fingerprint)
        if any(ours["shape"][name] != theirs["shape"][name] for name in UNSEEN):
            raise ValueError("another shape")
        model.load_state_dict(there.state_dict())
    except (ValueError, RuntimeError) as error:
        shapes = ours.pop("shape"), theirs.pop("shape")
        changed = [f"{flag_of(name)} {value} (there {shapes[1][name]})"
                   for name, value in shapes[0].items() if value != shapes[1][name]]  # fmt: skip
        why = ", ".join(changed) if ours == theirs else error
        raise UserError(f"--init-from {source} does not fit: {why}") from error
