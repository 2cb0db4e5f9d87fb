"""Tests the analysis: which epochs and seeds are used, and which cells converge."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from rows import cell, cells_of, results, run, segment, timings

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.study import analysis, cost, figures


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.7], 0.7),
        ([0.1, 0.5], 0.3),
        ([0.9, 0.1, 0.4], 0.4),
        ([0.9, 0.8, 0.1, 0.2, 0.3], 0.3),
        ([0.99, 0.98, 0.1, 0.5, 0.2, 0.4, 0.3], 0.3),
    ],
)
def test_run_counts_by_median_of_its_last_five_epochs(accuracies, expected):
    """The accuracy of a run of E = 1, 2, 3, 5, 7 epochs is the median of the last min(5, E) (§3.1)."""
    assert analysis.final_accuracy(results(run(accuracies)))["test_accuracy"].tolist() == pytest.approx([expected])


def test_last_epochs_are_by_epoch_and_not_by_row_order():
    df = results(run([0.99, 0.98, 0.1, 0.5, 0.2, 0.4, 0.3]), run([0.6], seed=1))
    shuffled = df.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(analysis.final_accuracy(shuffled), analysis.final_accuracy(df))


def test_mean_and_deviation_are_over_seeds():
    """Medians 0.2, 0.3, 0.7 have mean 0.4 and variance (0.04 + 0.01 + 0.09) / (3 − 1)."""
    row = analysis.final_accuracy(results(run([0.2]), run([0.1, 0.3, 0.9], seed=1), run([0.7], seed=2))).iloc[0]
    assert row["test_accuracy"] == pytest.approx(0.4)
    assert row["test_accuracy_std"] == pytest.approx(math.sqrt(0.07))
    assert (row["finished"], row["diverged"]) == (3, 0)


def test_only_finished_seeds_enter_the_mean():
    """Neither a diverged nor a running seed has a final accuracy, and only the diverged one is counted."""
    row = analysis.final_accuracy(
        results(run([0.6]), run([0.1, 0.2], "diverged", seed=1), run([0.9, 0.9], "running", seed=2))
    ).iloc[0]
    assert row["test_accuracy"] == 0.6
    assert math.isnan(row["test_accuracy_std"])
    assert (row["finished"], row["diverged"]) == (1, 1)


@pytest.mark.parametrize(("status", "diverged"), [("running", 0), ("diverged", 1)])
def test_cell_without_a_finished_seed_keeps_its_row(status, diverged):
    row = analysis.final_accuracy(results(run([0.9, 0.9], status))).iloc[0]
    assert math.isnan(row["test_accuracy"])
    assert math.isnan(row["test_accuracy_std"])
    assert (row["finished"], row["diverged"]) == (0, diverged)


def test_cells_are_sorted_and_told_apart_by_all_four_columns():
    runs = [
        run([0.1], batch_size=16),
        run([0.2], batch_size=4, base_lr=0.5),
        run([0.3], batch_size=4, base_lr=0.25),
        run([0.4], batch_size=4, bn_batch_size=2),
        run([0.5], batch_size=16, experiment="a"),
    ]
    cells = analysis.final_accuracy(results(*runs))
    assert list(cells.columns) == [*analysis.CELL, "test_accuracy", "test_accuracy_std", "finished", "diverged"]
    assert cells["test_accuracy"].tolist() == [0.5, 0.4, 0.3, 0.2, 0.1]


def test_studies_with_different_axes_can_be_put_together():
    plain, decayed = (results(run([0.5, 0.6], experiment=name)) for name in ("plain", "decayed"))
    both = pd.concat([plain, decayed.assign(weight_decay=0.1), decayed.assign(weight_decay=0.0)], ignore_index=True)
    cells = analysis.final_accuracy(both)
    assert cells[["experiment", "finished"]].to_numpy().tolist() == [["decayed", 1], ["decayed", 1], ["plain", 1]]
    assert analysis.best_cells(cells)["test_accuracy"].tolist() == [0.55, 0.55]
    assert cost.time_to_accuracy(both, timings(segment(4, 1.0, 80)), 0.6)["seeds"].tolist() == [1, 1]


def test_two_rows_of_one_run_and_epoch_are_refused():
    same = results(run([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"^results: several rows of one run and epoch; give studies"):
        analysis.final_accuracy(pd.concat([same, same]))


def test_no_results_have_no_cells():
    """Every table of an empty store is empty, with the columns that a filled one has."""
    filled = analysis.summary(results(run([0.5])), chance=0.1)
    empty = analysis.summary(results(), chance=0.1)
    assert empty.empty
    assert list(empty.columns) == list(filled.columns)
    assert analysis.format_summary(empty) == analysis.CONVERGENCE_RULE


@pytest.mark.parametrize(
    ("accuracy", "finished", "diverged", "expected"),
    [
        (0.55, 1, 0, True),  # exactly halfway from 0.2 to 0.9
        (0.549, 1, 0, False),
        (0.9, 2, 1, False),  # as good as the best, but one seed diverged
        (math.nan, 0, 1, False),
        (math.nan, 0, 0, False),
    ],
)
def test_convergence_begins_half_way_from_chance_to_the_best(accuracy, finished, diverged, expected):
    cells = cells_of(cell(2, 0.5, 0.9), cell(4, 0.5, accuracy, finished, diverged))
    assert analysis.convergent(cells, chance=0.2).tolist() == [True, expected]


@pytest.mark.parametrize("accuracy", [0.1, 0.09])
def test_nothing_converges_where_the_best_is_chance(accuracy):
    assert not analysis.convergent(cells_of(cell(2, 0.5, accuracy), cell(2, 1.0, accuracy)), chance=0.1).any()


def test_each_experiment_has_its_own_best():
    cells = cells_of(cell(2, 0.5, 0.3, experiment="hard"), cell(2, 0.5, 0.9, experiment="easy"))
    assert analysis.convergent(cells, chance=0.1).all()


def test_nothing_converges_where_every_guess_is_right():
    """Among up to five classes top-5 accuracy is 1 whatever was learnt."""
    assert not analysis.convergent(cells_of(cell(2, 0.5, 1.0)), chance=1.0).any()


@pytest.mark.parametrize("chance", [10, 1.1, -0.1, math.nan])
def test_chance_must_be_a_fraction(chance):
    with pytest.raises(ValueError, match="chance"):
        analysis.convergent(cells_of(cell(2, 0.5, 0.9)), chance)


def test_convergent_range_spans_gaps_but_counts_cells():
    """The bar of Fig. 16 spans 2^-3 to 2^-1 with a gap in it; at m = 4 nothing converges."""
    accuracies = {0.0625: 0.2, 0.125: 0.8, 0.25: 0.15, 0.5: 0.9, 1.0: 0.1}
    cells = cells_of(*(cell(2, x, a) for x, a in accuracies.items()), cell(4, 0.5, math.nan, 0, 1))
    ranges = analysis.convergent_range(cells, chance=0.1)
    assert ranges["batch_size"].tolist() == [2, 4]
    np.testing.assert_equal(ranges["lowest_base_lr"].to_numpy(), [0.125, np.nan])
    np.testing.assert_equal(ranges["highest_base_lr"].to_numpy(), [0.5, np.nan])
    assert ranges["convergent"].tolist() == [2, 0]


def test_best_cell_is_the_most_accurate_then_the_smallest_base_lr():
    """`replicates` counts the best cell's seeds; `finished` and `diverged` count those of all cells of the batch size."""
    cells = cells_of(cell(2, 0.25, 0.5, finished=3), cell(2, 0.5, 0.8, finished=2, diverged=1), cell(2, 1.0, 0.8, diverged=2))
    best = analysis.best_cells(cells).iloc[0]
    assert (best["test_accuracy"], best["base_lr"], best["replicates"]) == (0.8, 0.5, 2)
    assert (best["finished"], best["diverged"]) == (6, 3)


def test_a_metric_that_is_nan_has_no_best_base_lr():
    best = analysis.best_cells(cells_of(cell(4, 0.5, math.nan), cell(4, 1.0, math.nan)))
    assert best[["base_lr"]].isna().all(axis=None)
    assert best["replicates"].tolist() == [1]


def test_batch_size_without_a_finished_run_has_no_best_base_lr():
    best = analysis.best_cells(cells_of(cell(2, 0.25, math.nan, 0, 2), cell(2, 0.5, math.nan, 0, 1))).iloc[0]
    assert math.isnan(best["test_accuracy"])
    assert math.isnan(best["base_lr"])
    assert (best["replicates"], best["finished"], best["diverged"]) == (0, 0, 3)


def test_summary_counts_every_run_once():
    df = results(
        run([0.8] * 7, base_lr=2.0**-3),
        run([0.6] * 7, base_lr=2.0**-3, seed=1),
        run([0.5] * 7, base_lr=2.0**-2),
        run([0.3], "diverged", base_lr=1.0),
        run([0.3] * 3, "running", base_lr=2.0**-4),
        run([0.3] * 3, "running", base_lr=2.0**-4, seed=1),
        run([0.2], "diverged", batch_size=8),
    )
    table = analysis.summary(df, chance=0.1)
    assert table["batch_size"].tolist() == [4, 8]
    assert table["convergent"].tolist() == [2, 0]
    counts = table[["finished", "diverged", "running"]].to_numpy()
    np.testing.assert_array_equal(counts, [[3, 1, 2], [0, 1, 0]])
    assert counts.sum() == len(df.drop_duplicates(analysis.RUN))


def test_summary_of_a_plan_counts_what_has_not_begun():
    df = results(run([0.8]), run([0.3], "running", seed=1))
    plan = [Run(m, m, 0.5, seed) for m in (4, 8) for seed in (0, 1, 2)]
    table = analysis.summary(df, 0.1, analysis.planned_cells(df, plan, "exp"))
    assert table[["batch_size", "finished", "running"]].to_numpy().tolist() == [[4, 1, 2], [8, 0, 3]]
    assert table["test_accuracy"].isna().tolist() == [False, True]


def test_formatted_summary_shows_each_batch_size_and_the_rule():
    df = results(
        run([0.8], base_lr=2.0**-3),
        run([0.6], base_lr=2.0**-3, seed=1),
        run([0.5], base_lr=0.3),
        run([0.2], "diverged", batch_size=1024),
    )
    name, head, four, many, blank, rule = analysis.format_summary(analysis.summary(df, chance=0.1)).splitlines()
    assert (name, blank, rule) == ("exp", "", analysis.CONVERGENCE_RULE)
    words = [" ".join(text.split()) for text in (head, four, many)]
    assert words[0] == "m best test accuracy at base_lr converging base_lr diverged finished"
    assert words[1] == "4 70.00 ± 14.14 % 2^-3 2^-3 … 0.3 (2) 0 3"
    assert words[2] == "1024 - - none 1 0"
    assert len({len(head), len(four), len(many)}) == 1


def test_formatted_summary_adds_columns_only_when_they_say_something():
    df = results(run([0.8], bn_batch_size=2), run([0.5], "running", seed=1, bn_batch_size=2))
    shown = analysis.format_summary(analysis.summary(df, chance=0.1))
    plain = analysis.format_summary(analysis.summary(results(run([0.8])), chance=0.1))
    assert "BN batch" in shown
    assert "running" in shown
    assert "BN batch" not in plain
    assert "running" not in plain


@pytest.mark.parametrize(
    ("base_lr", "text"),
    [(2.0**-7, "2^-7"), (1.0, "2^0"), (4.0, "2^2"), (0.1, "0.1"), (3 * 2.0**-7, "0.0234375"), (1e-7, "1e-07")],
)
def test_powers_of_two_are_written_as_powers(base_lr, text):
    assert analysis.format_base_lr(base_lr) == text


@pytest.mark.parametrize("use", [analysis.final_accuracy, partial(figures.draw, out_dir="never written")])
def test_results_without_a_column_that_is_needed_are_refused_by_its_name(use):
    with pytest.raises(ValueError, match=r"^results: have no column experiment, status; give a DataFrame as results.load"):
        use(results(run([0.8])).drop(columns=["experiment", "status"]))


def test_an_axis_that_a_study_does_not_have_is_not_named():
    """Cells of studies with different axes have NaN for those of the others."""
    one = {"batch_size": 4, "bn_batch_size": 4, "base_lr": 0.5}
    assert analysis.setting(one | {"weight_decay": 0.1}) == "m = 4, η̃ = 2^-1, weight decay 0.1"
    assert analysis.setting(one | {"weight_decay": math.nan}) == analysis.setting(one) == "m = 4, η̃ = 2^-1"
