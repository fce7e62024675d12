"""What checks compare, and how it is reported."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from tidal.doctor import run
from tidal.doctor.registry import CHECKS
from tidal.doctor.report import Found, Meter, Report, Result, Where
from tidal.doctor.specimen import make


def test_a_meter_stops_at_the_first_difference() -> None:
    meter, sides = Meter(), ("here", "there")
    meter.same("ids", [1, 2], (1, 2), Where(), sides)
    meter.close("values", np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-10]), 1e-9, Where(), sides)
    assert (meter.compared, meter.limit) == (4, 1e-9)
    assert 0 < meter.measured <= 1e-9
    for wrong in ([1, 3], [1], [1, 2, 3]):
        with pytest.raises(Found) as found:
            meter.same("ids", [1, 2], wrong, lambda i: Where(step=i), sides)
        assert found.value.where.step == (2 if len(wrong) == 3 else 1)
    for value in (float("nan"), float("inf"), 1.5):
        with pytest.raises(Found) as found:
            meter.close("values", torch.ones(2), torch.tensor([1.0, value]), 0.1, lambda i: Where(step=i), sides)
        assert found.value.where.step == 1
        with pytest.raises(Found):
            meter.close("values", torch.ones(1), torch.tensor([value]), float("nan"), Where(), sides)
    with pytest.raises(Found):
        meter.close("values", torch.zeros(2), torch.zeros(3), 1.0, Where(), sides)
    with pytest.raises(Found):
        meter.at_most("share", float("nan"), 0.5)
    with pytest.raises(Found):
        meter.holds(False, "no")
    with pytest.raises(Found) as found:
        meter.same("ids", 1, 2, Where(tensor="a tensor"), sides)
    assert found.value.where == Where(tensor="a tensor", sides=sides, values=("1", "2"))


def test_where_tidal_itself_stops_no_disaster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error may have any cause; where it was raised is said."""
    def broken(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setitem(CHECKS, 5, dataclasses.replace(CHECKS[5], run=broken))
    table = run(*make(), quick=True, checks=[5]).table()
    assert "      Tidal itself stopped: IndexError: out of range\n      first: examine.py:" in table
    assert CHECKS[5].disaster not in table


def test_json_has_no_infinities() -> None:
    result = Result(7, "a check", "a disaster", "finding", float("inf"), 1e-9, 3, 0.1, "found", Where("a text"))
    report = Report((result,))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["results"][0]["measured"] == "inf"
    assert not report.ok
    assert "FINDING" in report.table()
    assert Report(()).ok
