"""Shared by the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from tests.train.runs import short_samples, whole


@pytest.fixture(autouse=True, scope="module")
def _quick_runs() -> Iterator[None]:
    """Short samples, and no picture of the losses, which take a third of a tiny run's time; tests/test_commands.py
    and tests/test_draw.py look at pictures."""
    with short_samples(), mock.patch("tidal.report.page.draw"):
        yield


@pytest.fixture
def one_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of the recipe addition do not share rows, so that a test sees which is which."""
    monkeypatch.setattr("tidal.train.recipes.addition.paired", lambda asked: [[a] for a in asked])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a run that nothing happens to."""
    return whole(tmp_path_factory.mktemp("alone") / "run")
