"""Every planted bug and the checks that found it, as a table for docs/doctor.md: `python -m tests.doctor.table`."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.doctor.bugs_training import OF_TRAINING, OfTraining
from tests.doctor.mutants import MUTANTS
from tests.doctor.plant import Mutant
from tests.doctor.trained import SPOILT, Spoilt, spoilt_copy, train_all
from tidal import checkpoint
from tidal.cli import main, note, parse
from tidal.doctor import Report, examine_checkpoint, run
from tidal.doctor.recipes import feed_of
from tidal.doctor.specimen import make
from tidal.model import TidalTransformer
from tidal.train.loop import make_recipe, model_for

BASE, TOKENIZER = make()


def examine_mutant(mutant: Mutant, checks: Sequence[int] | None = None) -> Report:
    """The doctor's report on the small model, made and examined while the bug is there."""
    with pytest.MonkeyPatch.context() as patch:
        mutant.plant(patch)
        shape = dataclasses.replace(BASE.config.shape, **mutant.shape)
        config = dataclasses.replace(BASE.config, shape=shape)
        model, tokenizer = TidalTransformer(config, TOKENIZER.spelling), copy.deepcopy(TOKENIZER)
        torch.nn.Module.load_state_dict(model, BASE.state_dict())
        model.train(False)
        mutant.spoil(model)
        return run(model, tokenizer, quick=True, checks=checks)


def examine_spoilt(spoilt: Spoilt, runs: dict[str, Path], to: Path, checks: Sequence[int] | None = None) -> Report:
    """The doctor's report on a copy of a trained run with the bug."""
    folder = spoilt_copy(spoilt, runs, to)
    with pytest.MonkeyPatch.context() as patch:
        spoilt.plant(patch)
        return examine_checkpoint(checkpoint.resolve(folder), quick=spoilt.quick, checks=checks)


def examine_training(bug: OfTraining, folder: Path, checks: Sequence[int] | None = None) -> Report:
    """The doctor's report before training, the bug being there."""
    with pytest.MonkeyPatch.context() as patch:
        bug.plant(patch)
        settings = bug.settings(folder)
        recipe = make_recipe(settings)
        return run(model_for(settings, recipe.tokenizer), recipe.tokenizer, quick=True, checks=checks,
                   feed=feed_of(settings, recipe), precision=settings.precision)  # fmt: skip


def reports() -> Iterator[tuple[Mutant | Spoilt | OfTraining, Report]]:
    """All bugs, all quick checks."""
    for mutant in MUTANTS:
        yield mutant, examine_mutant(mutant)
    with tempfile.TemporaryDirectory() as folder:
        runs = train_all(Path(folder), pytest.MonkeyPatch())
        for n, spoilt in enumerate(SPOILT):
            yield spoilt, examine_spoilt(spoilt, runs, Path(folder) / f"copy-{n}")
        for bug in OF_TRAINING:
            yield bug, examine_training(bug, Path(folder) / "data")


def row(name: str, check: int, found: Sequence[int]) -> str:
    """A line of the table; the check that must find it is bold."""
    return f"| {name} | {', '.join(f'**{n}**' if n == check else str(n) for n in found) or 'none'} |"


@dataclass(frozen=True)
class Table:
    """Settings of `python -m tests.doctor.table`."""


def command(argv: list[str]) -> int:
    parse(Table, argv, "tests.doctor.table", "Plant every bug, run every check, print the table.")
    torch.set_num_threads(1)
    print("| planted bug | found by checks |\n|---|---|")
    caught = n = 0
    for bug, report in reports():
        found = [result.number for result in report.findings]
        print(row(bug.name, bug.check, found), flush=True)
        caught, n = caught + (bug.check in found), n + 1
    note(f"{caught} of {n} caught by the check that states the law")
    return int(caught < n)


if __name__ == "__main__":
    main(command, "tests.doctor.table")
