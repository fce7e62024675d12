"""What a run was trained on, found again from its trainer.json: its settings, the text it held out, its files."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidal.cli import UserError
from tidal.config import Text, Train
from tidal.prepare.documents import Document, joined
from tidal.prepare.make import load
from tidal.prepare.reading import real_files
from tidal.prepare.survey import survey


def training_of(trainer: Mapping[str, Any]) -> Train:
    """Recipe, seed and data of a trainer.json; of these settings alone, since another version may have had other ones.

    Raises ValueError where they cannot be read.
    """
    try:
        settings = trainer["settings"]
        return Train.from_dict({name: settings[name] for name in ("recipe", "seed", str(settings["recipe"]))})
    except (LookupError, TypeError) as error:
        raise ValueError(str(error)) from error


def held_out_again(text: Text, seed: int, digest: object) -> tuple[list[Document], str]:
    """What training on these settings holds out, read without keeping the rest in memory, and a word on where it comes
    from; nothing where the data are gone. `digest` is that of the data then. Raises UserError for data that cannot be
    read.
    """
    if text.prepared is not None and os.path.exists(text.prepared):
        prepared = load(Path(text.prepared))
        documents = [Document(*both, text.prepared) for both in prepared.held_out.texts()]
        found = prepared.digest
    elif text.data and all(map(is_here, (*text.data, *text.validation_data))):
        data = survey(text.data, text.hold_out, seed, text.validation_data)
        documents = list(joined(part for is_held_out, part in data.parts() if is_held_out))
        found = data.digest
    else:
        return [], ""
    changed = "text where the run's was; it is not the same any more, and may hold what was learnt"
    return documents, "the run's held-out text" if found == digest else changed


def is_here(path: str) -> bool:
    """Whether a file, folder or glob of the data is on this machine."""
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def also_trained_on(paths: Sequence[str], text: Text) -> list[str]:
    """The real paths of the files of `paths` that training on these settings reads, to learn from or to hold out.

    Files of prepared data are not known. Raises UserError where `paths` cannot be read.
    """
    own: set[str] = set()
    for path in (*text.data, *text.validation_data):
        with contextlib.suppress(UserError):  # it is gone
            own |= real_files([path])
    return sorted(own & real_files(paths))
