"""Every planted bug is found by the check that states the law it breaks, and the table in the docs says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.doctor.bugs_training import OF_TRAINING, OfTraining
from tests.doctor.mutants import MUTANTS
from tests.doctor.plant import Mutant
from tests.doctor.table import examine_mutant, examine_spoilt, examine_training
from tests.doctor.trained import SPOILT, Spoilt, train_all
from tidal import checkpoint
from tidal.doctor import Report, examine_checkpoint
from tidal.doctor.registry import CHECKS

BUGS = (*MUTANTS, *SPOILT, *OF_TRAINING)


def assert_found(report: Report, number: int, stops: str = "") -> None:
    """By the law that it breaks; or by an error, but then by the one that is expected."""
    assert [result.number for result in report.findings] == [number], report.table()
    found = report.findings[0]
    assert found.message
    assert found.message.startswith("Tidal itself stopped: ") == bool(stops), report.table()
    assert stops in found.message
    assert not (found.measured <= found.limit)
    assert " 0 of " not in report.table(), "a count of nothing, where something was found"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_bug_is_found(mutant: Mutant) -> None:
    assert_found(examine_mutant(mutant, [mutant.check]), mutant.check, mutant.stops)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_all(tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch())


@pytest.mark.parametrize("spoilt", SPOILT, ids=lambda spoilt: spoilt.name)
def test_the_bug_of_a_trained_model_is_found(spoilt: Spoilt, runs: dict[str, Path], tmp_path: Path) -> None:
    assert_found(examine_spoilt(spoilt, runs, tmp_path / "run", [spoilt.check]), spoilt.check)


@pytest.mark.parametrize("bug", OF_TRAINING, ids=lambda bug: bug.name)
def test_the_bug_of_what_training_feeds_is_found(bug: OfTraining, tmp_path: Path) -> None:
    assert_found(examine_training(bug, tmp_path, [bug.check]), bug.check)


def test_without_a_bug_nothing_is_found(runs: dict[str, Path]) -> None:
    """Of a trained run; tests/doctor/test_doctor.py examines the small model that mutants are made of."""
    report = examine_checkpoint(checkpoint.resolve(runs["sums"]), quick=True)
    assert report.ok, report.table()
    assert [r.number for r in report.results] == sorted(CHECKS)
    assert all(r.compared for r in report.results if r.verdict == "well")
    assert not any(r.verdict == "skipped" for r in report.results)
    report = examine_checkpoint(checkpoint.resolve(runs["text"]), checks=[21])
    assert report.ok, report.table()
    assert re.search(r"quality (-1\.\d+) \(in metrics.csv \1\)", report.results[0].message)


def test_every_check_has_its_bugs() -> None:
    assert len(BUGS) >= 40
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {bug.check for bug in BUGS} == set(CHECKS) == set(range(1, 23))


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    lines = text[text.index("| planted bug |") :].splitlines()[2:]
    rows = [line.split(" | ") for line in lines[: len(BUGS)]]
    assert [name.removeprefix("| ") for name, _ in rows] == [bug.name for bug in BUGS]
    for (_, found), bug in zip(rows, BUGS, strict=True):
        assert f"**{bug.check}**" in found
    for check in CHECKS.values():
        assert f"| {check.number} | {check.title} |" in text
