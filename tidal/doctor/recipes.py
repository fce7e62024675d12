"""What the recipe of a run feeds, and what of its data was a prompt, for check 11."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tidal.cli import UserError
from tidal.config import Text, Train
from tidal.doctor.patient import Feed, Precision
from tidal.prepare.again import is_here
from tidal.prepare.make import IN_MEMORY, PLAN
from tidal.prepare.reading import read_parts, real_files
from tidal.tokenizer import MixedTokenizer
from tidal.train.loop import Recipe, make_recipe
from tidal.train.recipes.text import TextRecipe
from tidal.train.resume import with_tokenizer
from tidal.train.workers import Flat

LONGEST = 4_000
"""Characters of a document that are looked at."""
MOST_READ = 4_000_000
"""Characters of the data that are read for that."""


def feed_of(settings: Train, recipe: Recipe) -> Feed:
    """The first batch of a recipe, as a worker hands it over, and what it may do to documents."""
    batch = Flat.of(recipe.batch(0)).batch()
    if isinstance(recipe, TextRecipe):
        return Feed(batch, _prompts(settings.text).get, cuts=settings.text.cut_probability > 0, strays=False,
                    stretch=1.0, validate=recipe.validate)  # fmt: skip
    sums = settings.addition if settings.recipe == "addition" else None
    return Feed(batch, _up_to_equals, cuts=False, strays=sums is not None and sums.elsewhere > 0,
                stretch=sums.stretch if sums else 1.0, validate=recipe.validate)  # fmt: skip


def _up_to_equals(text: str) -> str:
    """The prompt of a problem or question: the answer follows the last "="."""
    return text[: text.rindex("=") + 1] if "=" in text else ""


def _prompts(text: Text) -> dict[str, str | None]:
    """Of documents at the beginning of the data, by all of their text, the prompts; None: there are two of them."""
    found: dict[str, str | None] = {}
    for prompt, completion in _short_ones(text):
        whole = prompt + completion
        found[whole] = prompt if found.get(whole, prompt) == prompt else None
    return found


def _short_ones(text: Text) -> Iterator[tuple[str, str]]:
    """Prompt and completion of documents of at most LONGEST characters, from the first MOST_READ that there are."""
    sides, total = ["", ""], 0
    with contextlib.suppress(UserError):  # prepared data do not need their files any more
        for part in read_parts(_sources(text)):
            total += len(part.text)
            sides[not part.is_prompt] += part.text[: 1 + LONGEST]
            if part.ends:
                if sum(map(len, sides)) <= LONGEST:
                    yield sides[0], sides[1]
                sides = ["", ""]
            if total > MOST_READ:
                return


def _sources(text: Text) -> list[str]:
    """The files of the data, as far as they are here."""
    paths: Sequence[str] = text.data
    if text.prepared is not None:
        paths = json.loads((Path(text.prepared) / PLAN).read_bytes()).get("paths", ())
    return [path for path in paths if is_here(path)]


def feed_of_run(trainer: Mapping[str, Any], folder: Path, tokenizer: MixedTokenizer) -> tuple[Feed | None, str]:
    """What the training of a run fed, of its trainer.json and a checkpoint's folder; or None, and why not."""
    if not trainer.get("settings"):
        return None, ""
    try:
        settings = Train.from_dict(trainer["settings"])
    except (TypeError, ValueError) as error:
        return None, f"the run's settings cannot be read: {error}"
    text = settings.text
    try:
        if settings.recipe == "text":
            if not all(map(is_here, text.data if text.prepared is None else [text.prepared])):
                return None, "the run's data are gone"
            if text.prepared is None and sum(map(os.path.getsize, real_files(text.data))) > IN_MEMORY:
                return None, f"the run's data have more than {IN_MEMORY // 10**6} MB; it was done before training"
        recipe = make_recipe(with_tokenizer(settings, folder))
    except (OSError, UserError) as error:
        return None, str(error)
    if trainer.get("data") != recipe.digest:
        return None, "the run's data are not the same any more"
    if recipe.tokenizer.fingerprint != tokenizer.fingerprint:
        return None, "this version makes another tokenizer for it"
    return feed_of(settings, recipe), ""


def precision_of_run(trainer: Mapping[str, Any]) -> Precision:
    """In what a run computes products, of its trainer.json."""
    settings = trainer.get("settings")
    return "bf16" if isinstance(settings, dict) and settings.get("precision") == "bf16" else "float32"
