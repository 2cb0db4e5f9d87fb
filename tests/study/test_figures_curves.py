"""Tests Fig. 4 and Fig. 13: which runs make a curve, where it ends, and how pairs without an accuracy are marked."""

import io
import math

import numpy as np
import pytest
from drawn import bars, cell, curves, foot, legend_texts, missing, placed, table, tick_texts
from matplotlib.collections import PolyCollection
from rows import results, run

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.study import figures
from smallbatch_jax.study.analysis import known_cells, planned_cells
from smallbatch_jax.study.figures import style


def lines(figure, panel):
    """Returns every line of a panel with more than one point, as lists of y."""
    return [line.get_ydata().tolist() for line in figure.axes[panel].get_lines() if len(line.get_xdata()) > 1]


def heading(figure):
    return figure.get_suptitle()


def test_convergence_is_training_and_test_accuracy_by_epoch_per_batch_size():
    rows = results(run([0.2, 0.5, 0.6], batch_size=2), run([0.1, 0.3, 0.4], batch_size=8))
    rows["train_accuracy"] += 0.2
    figure = figures.convergence(rows)
    assert [axes.get_title() for axes in figure.axes] == ["training", "test"]
    assert figure.axes[0].get_ylabel() == "accuracy (%)"
    np.testing.assert_allclose(lines(figure, 0), [[40, 70, 80], [30, 50, 60]])
    np.testing.assert_allclose(lines(figure, 1), [[20, 50, 60], [10, 30, 40]])
    assert figure.axes[1].get_lines()[0].get_xdata().tolist() == [1, 2, 3]
    assert legend_texts(figure.axes[1]) == ["2", "8"]
    assert heading(figure) == r"exp, $\tilde{\eta} = 2^{-1}$"
    assert foot(figure) == ("", [])


def test_convergence_is_the_mean_over_seeds_in_a_band_of_their_deviation():
    """Accuracies of 0.2 and 0.4 give a band of 30 % ± 14.14 %."""
    figure = figures.convergence(results(run([0.2, 0.5]), run([0.4, 0.5], seed=1)))
    assert lines(figure, 1) == [pytest.approx([30, 50])]
    (band,) = (c for c in figure.axes[1].collections if isinstance(c, PolyCollection))
    corners = band.get_paths()[0].vertices
    at_one = corners[corners[:, 0] == 1, 1]
    np.testing.assert_allclose([at_one.min(), at_one.max()], [30 - 10 * math.sqrt(2), 30 + 10 * math.sqrt(2)])


def test_a_diverged_run_is_a_curve_of_its_own_up_to_a_cross():
    """Seed 1 diverges in epoch 3, so it is not part of the mean and its × is at epoch 2."""
    figure = figures.convergence(results(run([0.2, 0.4, 0.5]), run([0.3, 0.6], "diverged", seed=1)))
    assert lines(figure, 1) == [pytest.approx([20, 40, 50]), pytest.approx([30, 60])]
    for panel in (0, 1):
        np.testing.assert_allclose(placed(figure, panel, marker="x"), [[2, 60]])
    assert legend_texts(figure.axes[1]) == ["4", "diverged"]
    assert foot(figure)[0] == "1 of 2 runs diverged"


def test_a_run_that_dies_in_its_first_epoch_is_a_cross_in_the_legend():
    figure = figures.convergence(results(run([0.5, 0.6]), run([], "diverged", batch_size=8)))
    assert not len(placed(figure, 1, marker="x"))
    legend = figure.axes[1].get_legend()
    assert legend_texts(figure.axes[1]) == ["4", "8", "diverged"]
    assert [line.get_marker() for line in legend.get_lines()] == ["o", "x", "x"]


def test_a_running_run_ends_without_a_cross_and_what_has_not_begun_is_named():
    """One of three planned batch sizes has finished, one is at epoch 1, and one has no epoch."""
    rows = results(run([0.4, 0.5, 0.6], batch_size=2), run([0.3], "running", batch_size=4))
    cells = planned_cells(rows, [Run(m, m, 0.5, 0) for m in (2, 4, 64)], "exp")
    figure = figures.convergence(rows, cells=cells)
    np.testing.assert_allclose(placed(figure, 1), [[1, 40], [2, 50], [3, 60], [1, 30]])
    assert not len(placed(figure, 1, marker="x"))
    assert legend_texts(figure.axes[1]) == ["2", "4"]
    assert foot(figure)[0] == "2 of 3 runs not finished; no epoch yet: $m$ = 64"


def test_base_lr_of_the_curves_is_that_of_the_best_cell():
    rows = results(run([0.5]), run([0.9], batch_size=2, base_lr=0.25), run([0.3], base_lr=0.25), run([0.9], base_lr=1.0))
    assert heading(figures.convergence(rows)) == r"exp, $\tilde{\eta} = 2^{-2}$"  # the smaller of two equals
    np.testing.assert_allclose(placed(figures.convergence(rows), 1), [[1, 90], [1, 30]])
    np.testing.assert_allclose(placed(figures.convergence(rows, base_lr=0.5), 1), [[1, 50]])


def test_base_lr_of_the_curves_has_most_epochs_before_a_run_has_finished():
    early = [run([0.1], "running", base_lr=0.25), run([0.1] * 3, "running"), run([0.4], "diverged", base_lr=2.0)]
    assert heading(figures.convergence(results(*early))) == r"exp, $\tilde{\eta} = 2^{-1}$"


def test_base_lrs_that_nearly_agree_are_not_mixed():
    near = [run([0.5, 0.6], base_lr=0.001), run([0.4, 0.5], base_lr=0.0010000005)]
    assert len(lines(figures.convergence(results(*near)), 0)) == 1


def test_a_base_lr_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"base_lr: no run of exp has 2\^-3; it has 2\^-2, 2\^-1\."):
        figures.convergence(results(run([0.5]), run([0.9], base_lr=0.25)), base_lr=0.125)


def test_batch_sizes_with_a_base_lr_each_are_all_drawn():
    """Each m has its own base_lr, as in Fig. 13, where a figure at one base_lr would have a single curve."""
    figure = figures.convergence(results(run([0.5, 0.6]), run([0.4, 0.3], batch_size=8, base_lr=0.25)))
    assert lines(figure, 1) == [pytest.approx([50, 60]), pytest.approx([40, 30])]
    assert legend_texts(figure.axes[1]) == ["4, $2^{-1}$", "8, $2^{-2}$"]
    assert heading(figure) == r"exp, each $m$ at its own $\tilde{\eta}$"


def test_convergence_leaves_out_bn_batch_sizes_other_than_m():
    figure = figures.convergence(results(run([0.5, 0.6]), run([0.4, 0.3], bn_batch_size=2)))
    assert lines(figure, 1) == [pytest.approx([50, 60])]
    assert heading(figure).startswith("exp (BN batch size = $m$), ")


def test_convergence_can_be_drawn_before_the_first_epoch():
    figure = figures.convergence(results(), cells=table(missing(2, 0.5), missing(4, 0.5)))
    figure.savefig(io.BytesIO(), format="png")
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["no epoch has ended"] * 2
    assert foot(figure)[0] == "2 of 2 runs not finished; no epoch yet: $m$ = 2, 4"


def pairs(*rows):
    """Returns cells of (m, BN batch size, accuracy, …) with one base_lr for each m, as in Fig. 13."""
    return table(*(cell(m, 2.0 ** (-m // 8), accuracy, bn_batch_size=b, **more) for m, b, accuracy, more in rows))


@pytest.fixture
def fig13():
    """Returns cells of m = 8, done except for a diverged pair, and m = 16: one pair done, one provisional, two missing."""
    lost, none = {"finished": 0, "diverged": 2}, {"finished": 0, "pending": 2}
    return pairs(
        (8, 2, math.nan, lost),
        (8, 4, 0.7, {"std": 0.02, "finished": 2}),
        (8, 8, 0.6, {"finished": 1, "diverged": 1}),
        (16, 2, 0.5, {"std": 0.01, "finished": 2}),
        (16, 4, 0.4, {"finished": 1, "pending": 1}),
        (16, 8, math.nan, none),
        (16, 16, math.nan, none),
    )


def test_bn_figure_has_one_curve_per_sgd_batch_size(fig13):
    figure = figures.accuracy_against_bn_batch_size(fig13)
    drawn, axes = curves(figure), figure.axes[0]
    nan = math.nan
    assert list(drawn) == legend_texts(axes) == ["8, $2^{-1}$", "16, $2^{-2}$"]
    for label, percent in {"8, $2^{-1}$": [nan, 70, 60], "16, $2^{-2}$": [50, 40, nan, nan]}.items():
        np.testing.assert_array_equal(drawn[label][0], [2, 4, 8, 16][: len(percent)])  # (8, 16) is not planned
        np.testing.assert_allclose(drawn[label][1], percent)
    assert axes.get_legend().get_title().get_text() == r"$m$, $\tilde{\eta}$"
    assert figure.axes[1].get_xlabel() == "BN batch size"
    assert figure.axes[1].get_xscale() == axes.get_xscale() == "log"
    assert tick_texts(figure.axes[1].xaxis) == ["2", "4", "8", "16"]


def test_bn_figure_has_error_bars_over_seeds(fig13):
    assert bars(figures.accuracy_against_bn_batch_size(fig13)) == {4: (68, 72), 2: (49, 51)}


def test_bn_figure_tells_provisional_and_partly_diverged_pairs(fig13):
    figure = figures.accuracy_against_bn_batch_size(fig13)
    np.testing.assert_allclose(placed(figure, markerfacecolor="white"), [[8, 60], [4, 40]])
    np.testing.assert_allclose(placed(figure, marker="x"), [[8, 60]])
    labels = ["some seeds diverged", "some seeds pending", "not finished", "diverged"]
    assert foot(figure) == ("3 of 7 pairs not finished, 1 diverged", labels)


def test_pairs_without_accuracy_stand_below_in_the_row_of_their_batch_size(fig13):
    """The pair (8, 16) is not planned and has no mark."""
    figure = figures.accuracy_against_bn_batch_size(fig13)
    assert tick_texts(figure.axes[1].yaxis) == ["$m$ = 8", "$m$ = 16"]
    np.testing.assert_array_equal(placed(figure, 1, marker="x"), [[2, 0]])
    np.testing.assert_array_equal(placed(figure, 1, marker="."), [[8, 1], [16, 1]])


def test_bn_figure_that_misses_nothing_has_one_panel(fig13):
    done = fig13[fig13["finished"] == 2]
    figure = figures.accuracy_against_bn_batch_size(done)
    assert len(figure.axes) == 1
    assert foot(figure) == ("", [])


def test_bn_figure_takes_the_best_base_lr_of_each_pair():
    """A pair is provisional while any of its base_lrs is pending, and diverged when all have diverged."""
    cells = table(
        cell(8, 0.25, 0.5, std=0.03, finished=2, bn_batch_size=4),
        cell(8, 0.5, 0.6, std=0.01, finished=2, bn_batch_size=4),
        cell(8, 1.0, math.nan, finished=0, diverged=2, bn_batch_size=4),
        cell(8, 0.25, 0.4),
        missing(8, 0.5),
        cell(8, 0.25, math.nan, finished=0, diverged=1, bn_batch_size=2),
        missing(8, 0.5, bn_batch_size=2),
        cell(8, 0.25, math.nan, finished=0, diverged=1, bn_batch_size=1),
        cell(8, 0.5, math.nan, finished=0, diverged=1, bn_batch_size=1),
    )
    figure = figures.accuracy_against_bn_batch_size(cells)
    np.testing.assert_allclose(curves(figure)["8"][1], [math.nan, math.nan, 60, 40])
    assert bars(figure) == {4: (59, 61)}
    np.testing.assert_allclose(placed(figure, markerfacecolor="white"), [[8, 40]])
    assert not len(placed(figure, marker="x"))
    np.testing.assert_array_equal(placed(figure, 1, marker="x"), [[1, 0]])
    np.testing.assert_array_equal(placed(figure, 1, marker="."), [[2, 0]])
    assert figure.axes[0].get_title() == r"exp, best $\tilde{\eta}$ of each"


def test_bn_figure_can_be_drawn_before_a_run_has_finished():
    figure = figures.accuracy_against_bn_batch_size(table(missing(4, 0.5, bn_batch_size=2), missing(4, 0.5)))
    figure.savefig(io.BytesIO(), format="png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no run has finished"]
    np.testing.assert_array_equal(placed(figure, 1, marker="."), [[2, 0], [4, 0]])


def test_a_task_without_accuracies_is_drawn_by_its_loss(tmp_path):
    rows = results(run([math.nan] * 2), run([math.nan] * 2, base_lr=0.25)).assign(test_loss=[0.5, 0.4, 0.5, 0.3])
    rows["status"] = "finished"
    figures.draw(rows, tmp_path)
    loss = Metric("test_loss", "min")
    style.write(figures.accuracy_against_base_lr(known_cells(rows, loss), loss), tmp_path / "expected")
    found = next(tmp_path.rglob("accuracy_vs_base_lr.png"))
    assert found.read_bytes() == (tmp_path / "expected.png").read_bytes()
