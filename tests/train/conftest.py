"""Shared by the tests of training."""

from __future__ import annotations

import pytest


@pytest.fixture
def one_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of the recipe addition do not share rows, so that a test sees which is which."""
    monkeypatch.setattr("tidal.train.recipes.addition.paired", lambda asked: [[a] for a in asked])
