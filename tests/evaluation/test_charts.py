"""Charts as SVG: their words, and missing values."""

import re

import pytest

from evaluation import charts


def test_text_is_safe_and_shows_what_cannot_be_shown():
    """A file name that runs as a script, or that hides its end behind a control character."""
    assert charts.text('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    assert charts.text("a\nb\udcff\u202e") == "a\\nb\\udcff\\u202e"
    assert charts.text("長い ×") == "長い ×"


def test_charts_say_their_figures_and_survive_what_is_not_there():
    """A chart that a screen reader cannot tell, and one that breaks on a missing value, a single point or no line at all."""
    chart = charts.lines("t<", [("a", [(0, 1.0), (1, None), (2, 3.0)], "c-aligned"), ("b", [(0, None)], "c-linear")], "x", "y")
    assert "t&lt;" in chart
    assert "a: from 1 at 0 to 3 at 2" in chart
    assert "b" not in re.findall(r"</svg>(\w)</li>", chart)
    assert "nan" not in chart
    assert "nothing to draw" in charts.lines("t", [("a", [(0, 0.0)], "c-aligned")], "x", "y", log_y=True)
    assert "nan" not in charts.lines("t", [("a", [(5, 2.0)], "c-aligned")], "x", "y")
    assert "–" in charts.bars("t", [("a", None, "–", "c-aligned")])
    assert "1, –" in charts.columns("t", [("a", [1.0, None], "c-aligned")], "x", "y")
    assert "nothing to draw" in charts.columns("t", [], "x", "y")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 15, [0, 5, 10, 15]), (-2, -1, [-2, -1.8, -1.6, -1.4, -1.2, -1]), (3, 3, [3])],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    """Ticks beyond the axis, an end that rounding loses, a range of no width that divides by zero."""
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (0.05, "0.05"), (12.345, "12.3"), (1234.5, "1234"), (2e-7, "2.0e−07"), (-5, "−5")],
)
def test_numbers_on_axes_are_short(value, shown):
    """Numbers too long for the axis, or so short that two ticks read the same."""
    assert charts.number(value) == shown
