"""Figures as text."""

import pytest
from results import run, runs

from _qwquanto.text import format_3g, plus_minus, rate_text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (0.00213, "0.00213"),
        (0.5, "0.500"),
        (3.14159, "3.14"),
        (44.94, "44.9"),
        (1234.5, "1234"),
    ],
)
def test_three_significant_digits(value, shown):
    assert format_3g(value) == shown


def test_spread_is_as_fine_as_its_figure():
    assert plus_minus(24.123, 0.3123) == "24.1 ±0.3" and plus_minus(0.0312, 0.00046, 0.001) == "31.2 ±0.5"
    assert (
        plus_minus(377, 3.4) == "377 ±3" and plus_minus(24.1, None) == "24.1" and plus_minus(None, 1) == "–"
    )
    assert rate_text(runs(9, 10, 11)) == "10.0 ±1.0" and rate_text([run(10)]) == "10.0"
