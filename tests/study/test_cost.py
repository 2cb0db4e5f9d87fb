"""Tests the cost of a grid from timings and rows; each expected value is worked out by hand."""

import math

import pandas as pd
import pytest
from rows import cell, cells_of, compiled, results, run, segment, timings

from smallbatch_jax.study import cost

NAN = math.nan


@pytest.fixture
def two_programs():
    """Returns the timings of m = 4, trained in two sessions at 0.1 s per image, and of m = 8 at 0.05 s."""
    m4 = compiled(4), segment(4, 10, 100), ("checkpoint", 4, 4, 16, 500.0, 0, 0, 0), compiled(4, 5.0), segment(4, 30, 300)
    return timings(("import", 0, 0, 0, 9.0, 0, 0, 0), *m4, compiled(8), segment(8, 6, 120))


def test_an_image_costs_its_share_of_all_the_seconds_that_its_program_trained(two_programs):
    """Compiling and checkpoints are excluded: (10 + 30) s / (100 + 300), and 6 s / 120."""
    assert cost.seconds_per_image(two_programs).to_dict() == {(4, 4): pytest.approx(0.1), (8, 8): pytest.approx(0.05)}


def test_a_program_that_was_only_compiled_has_no_rate():
    assert cost.seconds_per_image(timings(compiled(4), segment(4, 1.0, 0))).empty
    assert cost.seconds_per_image(timings()).empty


def test_bn_batch_sizes_are_programs_of_their_own():
    rates = cost.seconds_per_image(timings(segment(8, 1, 10), segment(8, 3, 10, bn_batch_size=2)))
    assert rates.to_dict() == {(8, 2): pytest.approx(0.3), (8, 8): pytest.approx(0.1)}


def test_a_program_costs_what_all_its_lives_did(two_programs):
    m4, m8 = cost.program_costs(two_programs).itertuples(index=False)
    assert m4[:6] == (4, 4, 16, 25.0, 40.0, 400)
    assert m4.images_per_second == pytest.approx(10)
    assert m8[:6] == (8, 8, 16, 20.0, 6.0, 120)
    assert math.isnan(m4.peak_bytes)


def test_lanes_and_memory_are_those_that_most_images_were_trained_with():
    """16 lanes ran out of memory, 8 trained most images, and 2 were enough for the last runs."""
    sizes = [compiled(4, lanes=n, peak_bytes=1000 * n) for n in (16, 8, 2)]
    found = cost.program_costs(timings(*sizes, segment(4, 1, 4, 16), segment(4, 9, 900, 8), segment(4, 1, 40, 2)))
    assert found[["lanes", "peak_bytes", "images"]].values.tolist() == [[8, 8000, 944]]


def test_memory_is_known_if_any_life_stored_it():
    """Sessions of older versions, whether first or last, stored no memory."""
    lives = compiled(4), segment(4, 1, 10), compiled(4, peak_bytes=4096), segment(4, 1, 10), compiled(4)
    assert cost.program_costs(timings(*lives)).peak_bytes.tolist() == [4096]


def test_the_time_of_a_run_is_the_images_it_has_seen_at_the_rate_of_its_program(two_programs):
    """An epoch of 10 steps takes 40 · 0.1 s at m = 4 and 80 · 0.05 s at m = 8; m = 2 has no timings."""
    rows = results(run([0.1, 0.2, 0.3], batch_size=4), run([0.1], batch_size=8), run([0.1], batch_size=2))
    timed = cost.with_time(rows.iloc[::-1], two_programs)
    assert timed.index.tolist() == [4, 3, 2, 1, 0]
    assert timed.sort_index().seconds.tolist() == pytest.approx([4, 8, 12, 4, NAN], nan_ok=True)
    assert cost.with_time(rows, timings()).seconds.isna().all()


def test_the_target_is_so_much_of_the_way_from_chance_to_the_best():
    cells = cells_of(cell(4, 0.5, 0.9), cell(8, 0.5, 0.3), cell(8, 1.0, NAN))
    assert cost.target_accuracy(cells, 0.1) == pytest.approx(0.82)
    assert cost.target_accuracy(cells, 0.1, fraction=0.5) == pytest.approx(0.5)
    assert math.isnan(cost.target_accuracy(cells_of(cell(8, 1.0, NAN)), 0.1))


def soonest(given, *runs, accuracy=0.5):
    """Returns [base_lr, seconds, epochs, seeds] by batch size."""
    found = cost.time_to_accuracy(results(*runs), given, accuracy)
    return found.set_index("batch_size")[["base_lr", "seconds", "epochs", "seeds"]].T.to_dict("list")


def approximately(*values):
    return [pytest.approx(value, nan_ok=True) for value in values]


def test_a_batch_size_takes_the_base_lr_that_gets_there_first(two_programs):
    """0.25 reaches exactly the target after two epochs of 4 s, although it falls again and 0.5 ends higher."""
    slow, fast = run([0.1, 0.2, 0.9]), run([0.1, 0.5, 0.2], base_lr=0.25)
    found = soonest(two_programs, slow, fast, run([0.6], batch_size=8))
    assert found == {4: approximately(0.25, 8, 2, 1), 8: approximately(0.5, 4, 1, 1)}


def test_of_base_lrs_that_are_equally_fast_the_smallest_is_taken(two_programs):
    assert soonest(two_programs, run([0.6], base_lr=0.5), run([0.9], base_lr=0.25)) == {4: approximately(0.25, 4, 1, 1)}


def test_the_time_is_the_mean_over_seeds_and_all_must_get_there(two_programs):
    """At 0.5 the seeds take 1 and 3 epochs; at 0.25 one takes 1 epoch and the other never reaches the target."""
    seeds = run([0.6, 0.6, 0.6]), run([0.1, 0.2, 0.6], seed=1)
    one_of_two = run([0.9, 0.9, 0.9], base_lr=0.25), run([0.1, 0.1, 0.1], base_lr=0.25, seed=1)
    assert soonest(two_programs, *seeds, *one_of_two) == {4: approximately(0.5, 8, 2, 2)}


def test_seeds_that_diverged_or_still_run_are_left_out(two_programs):
    """0.25 has no finished seed and is left out; 0.5 is judged by its one finished seed."""
    others = run([0.9], "diverged", seed=1), run([0.9], "running", seed=2), run([0.9], "running", base_lr=0.25)
    assert soonest(two_programs, run([0.1, 0.6]), *others) == {4: approximately(0.5, 8, 2, 1)}


def test_where_no_base_lr_gets_there_is_nothing(two_programs):
    assert soonest(two_programs, run([0.4]), run([], "diverged", base_lr=1.0)) == {4: approximately(NAN, NAN, NAN, 0)}
    assert soonest(two_programs, run([0.4]), accuracy=NAN) == {4: approximately(NAN, NAN, NAN, 0)}


def test_epochs_are_known_where_the_time_is_not():
    assert soonest(timings(), run([0.4, 0.6])) == {4: approximately(0.5, NAN, 2, 1)}


def test_every_pair_of_batch_sizes_has_a_row_of_its_own(two_programs):
    rows = results(run([0.6], batch_size=8), run([0.4, 0.6], batch_size=8, bn_batch_size=2), run([0.6], batch_size=2))
    found = cost.time_to_accuracy(rows, two_programs, 0.5)
    assert list(found.columns) == ["experiment", "batch_size", "bn_batch_size", "base_lr", "seconds", "epochs", "seeds"]
    assert found[["batch_size", "bn_batch_size", "epochs"]].values.tolist() == [[2, 2, 1], [8, 2, 2], [8, 8, 1]]
    assert cost.time_to_accuracy(rows.iloc[:0], two_programs, 0.5).empty
    pd.testing.assert_frame_equal(found, cost.time_to_accuracy(rows.iloc[::-1], two_programs, 0.5))
