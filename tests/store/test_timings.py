"""Tests the timings: a damaged line costs that line alone."""

import pytest

from smallbatch_jax.store import results
from smallbatch_jax.store.timings import TIMING_COLUMNS


def test_a_timing_torn_by_a_crash_costs_that_line_alone(tmp_path):
    timings = results.Timings(tmp_path)
    timings.add("compile", 1.0, 4, 4)
    with open(tmp_path / "timings.csv", "a") as torn:
        torn.write("segment,2.")
    timings.add("segment", 3.0, 4, 4, 2, 10, 40)
    frame = results.load_timings(tmp_path)
    assert list(frame[frame.images == 40].seconds) == [3.0]
    assert list(frame[frame.phase == "compile"].seconds) == [1.0]
    assert len(frame) == 2


def test_a_timing_that_lost_its_end_is_left_out(tmp_path):
    timings = results.Timings(tmp_path)
    timings.add("segment", 1.0, 4, 4, 2, 10, 4000)
    path = tmp_path / "timings.csv"
    path.write_text(path.read_text()[: -len("00,0\n")])
    assert results.load_timings(tmp_path).empty
    timings.add("segment", 3.0, 4, 4, 2, 10, 40)
    assert list(results.load_timings(tmp_path).images) == [40]


def test_timings_that_cannot_be_read_are_none_and_named(tmp_path):
    assert list(results.load_timings(tmp_path).columns) == list(TIMING_COLUMNS)
    (tmp_path / "timings.csv").mkdir()
    with pytest.warns(UserWarning, match=r"timings.csv left out: Is a directory"):
        assert results.load_timings(tmp_path).empty
