"""Tests how numbers and durations are formatted for people."""

import math

import pytest

from smallbatch_jax.config.text import duration, two_digits

DURATIONS = {math.nan: "?", math.inf: "?", 59.4: "59 s", 60: "1 min 00 s", 3599: "59 min 59 s", 7620: "2 h 07 min", -1: "0 s"}
NUMBERS = {1_370_000: "1,400,000", 1449: "1,400", 16.0: "16", 5.04: "5", 0.999: "1", 0.25: "0.25", 0.0000123: "0.000012"}


@pytest.mark.parametrize(("seconds", "shown"), DURATIONS.items())
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(("value", "shown"), NUMBERS.items())
def test_two_digits_have_no_exponent(value, shown):
    assert two_digits(value) == shown
