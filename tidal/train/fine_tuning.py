"""`--init-from`: a new run that begins with the weights of another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tidal import checkpoint
from tidal.cli import UserError
from tidal.config import Train
from tidal.infer.load import load
from tidal.model import TidalTransformer
from tidal.train.presets import PRESETS

UNSEEN = ("n_heads", "n_kv_heads", "rotary_places")
"""Of a shape, what the sizes of weights need not show, and what they mean depends on."""


def defaults_from(path: Path) -> Train:
    """Settings of a new run that begins with the weights in `path`, a run or a checkpoint.

    Recipe, shape, and how it was trained (rate, rows, rules of the data) are as there; data, steps and all else as in
    any new run. Raises UserError where no settings can be read.
    """
    file = checkpoint.resolve(path) / "trainer.json"
    try:
        there = Train.from_dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--init-from: {file} cannot be read: {error!r}") from error
    rules = dataclasses.replace(there.text, data=(), validation_data=(), prepared=None, cache=Train().text.cache,
                                tokenizer=None)  # fmt: skip
    return dataclasses.replace(PRESETS[there.recipe], init_from=str(path), rows=there.rows, model=there.model,
                               optim=there.optim, addition=there.addition, characters=there.characters,
                               text=rules)  # fmt: skip


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
        changed = [f"--{name.replace('_', '-')} {value} (there {shapes[1][name]})"
                   for name, value in shapes[0].items() if value != shapes[1][name]]  # fmt: skip
        why = ", ".join(changed) if ours == theirs else error
        raise UserError(f"--init-from {source} does not fit: {why}") from error
