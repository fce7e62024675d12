"""Drawings: points where they belong, ticks, numbers, and plots in letters."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidal.report.draw import HEIGHT, LEFT, WIDTH, Curve, Panel, number, smooth, svg, terminal, ticks
from tidal.report.page import duration


def test_points_are_where_they_belong() -> None:
    drawing = svg(Panel("t", "u", [Curve("a", [(0, 0.0), (50, 5.0), (100, 10.0)])]))
    (points,) = re.findall(r'points="(.*?)"', drawing)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x0, x2) == (LEFT, pytest.approx(WIDTH - 10, abs=20))
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2)
    assert HEIGHT > y0 > y1 > y2 > 0
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)
    labels = {text: float(y) - 3.5 for y, text in re.findall(r'class="y" x="\d+" y="(.*?)">(.*?)<', drawing)}
    assert labels["0"] == pytest.approx(y0, abs=0.1)
    assert labels["10"] == pytest.approx(y2, abs=0.1)
    assert svg(Panel("t", "u", [Curve("a", [(1, math.nan)])])) == ""


def test_many_points_are_thinned_and_smoothed() -> None:
    noise = [(float(i), 1.0 + (i % 7) / 10) for i in range(20_000)]
    panel = Panel("t", "u", [Curve("a", noise)], noisy=True)
    assert len(svg(panel)) < 20_000
    assert panel.shown()[0].points[-1] == noise[-1]
    assert svg(panel).count("<polyline") == 2
    assert max(y for _, y in smooth(noise)[10:-10]) < 1.4


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low > 1e-9 * max(abs(low), abs(high)):
        found = ticks(low, high)
        assert found == sorted(set(found))
        assert 2 <= len(found) <= 7
        assert all(low - 0.01 * width <= tick <= high + 0.01 * width for tick in found)


@given(st.floats(1e-12, 1e9), st.floats(2.5, 1e9))
def test_logarithmic_ticks(low: float, factor: float) -> None:
    found = ticks(low, low * factor, log=True)
    assert 1 <= len(found) <= 13
    assert all(low <= tick <= low * factor for tick in found)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (1600, "1,600"), (12_345, "12.3k"), (2.5e6, "2.5M"), (0.5, "0.5"), (1.9e-5, "1.9e-5"), (1e-4, "1e-4"),
    (-1.917, "-1.92"), (math.nan, "nan")])  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_an_axis_over_little_names_different_values() -> None:
    drawn = svg(Panel("Held out", "bits", [Curve("a", [(0, 1.306), (10, 1.302)])], zoom=True))
    names = re.findall(r'class="y"[^>]*>([^<]*)<', drawn)
    assert len(set(names)) == len(names) >= 3


def test_digits() -> None:
    assert [number(value, 4) for value in (1.3024, 0.98765, 12_345, 1600, 0.5)] == ["1.302", "0.9877", "12.35k",
                                                                                  "1,600", "0.5"]  # fmt: skip


def test_durations() -> None:
    assert [duration(s) for s in (42, 119, 960, 7199, 12_600)] == ["42 s", "119 s", "16 min", "120 min", "3.5 h"]


def test_in_letters() -> None:
    plot = terminal(Panel("Loss", "nats", [Curve("a", [(0, 1.0), (10, 500.0)]), Curve("b", [(0, 2.0), (10, 3.0)])]))
    assert "Loss, nats, against step" in plot
    assert not re.search(r"\x1b", plot)
    assert re.search(r"^ *100┤", plot, re.MULTILINE), "of a logarithmic axis, the values themselves"
    assert terminal(Panel("Loss", "nats", [])) == ""


def test_in_letters_curves_are_told_apart() -> None:
    """There are no colours, so each is drawn in a letter of its own; the key is outside, where it hides nothing."""
    low, high = Curve("first", [(0, 0.2), (100, 0.1)]), Curve("second", [(0, 0.9), (1600, 1.0)])
    *rows, axis, key = terminal(Panel("Held out", "share", [low, high])).rstrip().splitlines()
    assert key == "a first   b second"
    assert axis.split() == ["0", "500", "1,000", "1,500"]
    drawn = [row.split("│")[1] if "│" in row else row.split("┤")[1] for row in rows if re.search("[│┤]", row)]
    assert {letter for row in drawn[: len(drawn) // 2] for letter in row if letter.isalpha()} == {"b"}
    assert {letter for row in drawn[len(drawn) // 2 :] for letter in row if letter.isalpha()} == {"a"}
    assert re.search("[a-z]", "".join(terminal(Panel("Held out", "share", [low])).splitlines()[1:])) is None


@pytest.mark.parametrize("values", [(1e308, -1e308), (1e299, -1e299), (-1e17, -1e17), (1e-320, 1e-320),
                                    (1e299, 1e-320)])  # fmt: skip
def test_numbers_at_the_ends_of_floats(values: tuple[float, float]) -> None:
    for zoom in (False, True):
        panel = Panel("loss", "nats", [Curve("one", [(1.0, values[0]), (2.0, values[1])])], zoom=zoom)
        assert bool(svg(panel)) == (abs(values[0]) < 1e300)
        assert bool(terminal(panel)) == (abs(values[0]) < 1e300)
