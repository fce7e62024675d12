"""What `python -m tidal.doctor` examines where it is given no checkpoint."""

from __future__ import annotations

import dataclasses

import pytest

from tests.doctor.mutants import MUTANTS
from tests.doctor.plant import Mutant
from tidal.doctor import Report, Result
from tidal.doctor import __main__ as command
from tidal.doctor.specimen import OTHER, SHAPE
from tidal.train.presets import PRESETS


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.shape], ids=lambda mutant: mutant.name)
def test_bugs_of_a_shape_are_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Those that do not show in a model which adds its places, and whose steps see all of their block."""
    mutant.plant(monkeypatch)
    assert command.run(["--quick", "--checks", str(mutant.check)]) == 1
    assert f"\n{mutant.check:>2}  " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", PRESETS)
def test_what_a_recipe_turns_on_is_examined(recipe: str) -> None:
    wanted = {name for name, value in dataclasses.asdict(PRESETS[recipe].model).items() if value}
    assert wanted <= {name for shape in (SHAPE, OTHER) for name, value in dataclasses.asdict(shape).items() if value}


def test_the_graver_outcome_is_told() -> None:
    well = Result(9, "a check", "a disaster", "well", 0.25, 0.5, 3, 1.0, "well")
    near, found, skipped, exact = (
        dataclasses.replace(well, measured=0.4, message="near"),
        dataclasses.replace(well, verdict="finding", measured=1.0, limit=0.0, message="found"),
        dataclasses.replace(well, verdict="skipped", measured=0.0, limit=0.0, compared=0, message="skipped"),
        dataclasses.replace(well, measured=0.0, limit=0.0, message="exact"),
    )
    for one, other, told in ((well, near, "near"), (found, near, "found"), (well, skipped, "well"),
                             (exact, skipped, "exact"), (well, found, "found")):  # fmt: skip
        for mine, theirs in ((one, other), (other, one)):
            merged = Report((mine, dataclasses.replace(well, number=10))).merged(Report((theirs,)))
            assert [r.message for r in merged.results] == [told, "well"]
            assert merged.results[0].compared == mine.compared + theirs.compared
            assert merged.seconds == 3.0
