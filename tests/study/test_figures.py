"""Tests that figures show every cell at its place and with the right status."""

import io
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from drawn import bars, cell, curves, foot, missing, placed, table, tick_texts
from matplotlib.colors import same_color

from smallbatch_jax.config.metric import Metric
from smallbatch_jax.study import figures


@pytest.fixture
def cells():
    """Returns cells of m = 2, all finished; m = 4, one diverged; m = 8, one partly diverged and two without an ended seed."""
    rows = [
        cell(2, 0.125, 0.6, 0.01, finished=2),
        cell(2, 0.25, 0.7, 0.02, finished=2),
        cell(2, 0.5, 0.8, 0.03, finished=2),
        cell(4, 0.125, 0.5),
        cell(4, 0.25, 0.75),
        cell(4, 0.5, math.nan, finished=0, diverged=2),
        missing(8, 0.125),
        cell(8, 0.25, 0.3, finished=1, diverged=1),
        missing(8, 0.5),
    ]
    return table(*rows)


@pytest.fixture
def seeds_pending():
    """Returns cells with one pending seed each: the first two also have a finished seed, and the last two a diverged one."""
    rows = [cell(2, 0.125, 0.6, pending=1), cell(2, 0.25, 0.7, diverged=1, pending=1)]
    return table(*rows, cell(2, 0.5, math.nan, finished=0, diverged=1, pending=1))


def marks(figure):
    """Returns the marked cells of a heat map, as kind → set of (column, row)."""
    scatters = [c for c in figure.axes[0].collections if not str(c.get_label()).startswith("_")]
    return {c.get_label(): {tuple(map(round, xy)) for xy in c.get_offsets().tolist()} for c in scatters}


def test_accuracy_against_batch_size_has_one_curve_per_base_lr(cells):
    drawn = curves(figures.accuracy_against_batch_size(cells))
    nan = math.nan
    expected = {"$2^{-3}$": [60, 50, nan], "$2^{-2}$": [70, 75, 30], "$2^{-1}$": [80, nan, nan]}
    assert list(drawn) == list(expected)
    for label, percent in expected.items():
        np.testing.assert_array_equal(drawn[label][0], [2, 4, 8])
        np.testing.assert_allclose(drawn[label][1], percent)


def test_accuracy_against_base_lr_has_one_curve_per_batch_size(cells):
    drawn = curves(figures.accuracy_against_base_lr(cells))
    nan = math.nan
    expected = {"2": [60, 70, 80], "4": [50, 75, nan], "8": [nan, 30, nan]}
    assert list(drawn) == list(expected)
    for label, percent in expected.items():
        np.testing.assert_array_equal(drawn[label][0], [0.125, 0.25, 0.5])
        np.testing.assert_allclose(drawn[label][1], percent)


def test_axes_are_log2_with_ticks_at_the_grid(cells):
    by_batch_size = figures.accuracy_against_batch_size(cells).axes[0]
    by_base_lr = figures.accuracy_against_base_lr(cells).axes[0]
    assert by_batch_size.get_xscale() == by_base_lr.get_xscale() == "log"
    assert by_batch_size.get_xticks().tolist() == [2, 4, 8]
    assert tick_texts(by_batch_size.xaxis) == ["2", "4", "8"]
    assert by_base_lr.get_xticks().tolist() == [0.125, 0.25, 0.5]
    assert tick_texts(by_base_lr.xaxis) == ["$2^{-3}$", "$2^{-2}$", "$2^{-1}$"]


def test_error_bars_are_deviations_over_seeds(cells):
    """Only m = 2 has two finished seeds per cell, so there are bars of ±1, ±2 and ±3 % and no others."""
    figure = figures.accuracy_against_base_lr(cells)
    assert bars(figure) == {0.125: (59, 61), 0.25: (68, 72), 0.5: (77, 83)}


def test_partly_diverged_cells_are_hollow_and_crossed(cells):
    figure = figures.accuracy_against_batch_size(cells)
    np.testing.assert_allclose(placed(figure, markerfacecolor="white"), [[8, 30]])
    np.testing.assert_allclose(placed(figure, marker="x"), [[8, 30]])
    assert foot(figure)[1] == ["some seeds diverged"]


def test_points_with_seeds_pending_are_hollow(seeds_pending):
    """Both points are means of fewer seeds than planned; only the one that lost a seed is crossed."""
    figure = figures.accuracy_against_base_lr(seeds_pending)
    np.testing.assert_allclose(placed(figure, markerfacecolor="white"), [[0.125, 60], [0.25, 70]])
    np.testing.assert_allclose(placed(figure, marker="x"), [[0.25, 70]])
    assert foot(figure) == ("3 of 3 cells not finished, 1 diverged", ["some seeds diverged", "some seeds pending"])


@pytest.mark.parametrize("draw", [figures.accuracy_against_batch_size, figures.accuracy_against_base_lr])
def test_curves_say_how_much_is_missing(cells, draw):
    """The note counts cells that have not finished or diverged, and is empty if all have finished."""
    assert foot(draw(cells))[0] == "2 of 9 cells not finished, 1 diverged"
    assert foot(draw(cells[cells["batch_size"] == 4]))[0] == "1 of 3 cells diverged"
    assert foot(draw(cells[cells["batch_size"] == 2])) == ("", [])


@pytest.mark.parametrize("draw", [figures.accuracy_against_batch_size, figures.accuracy_against_base_lr, figures.heat_map])
def test_cells_without_a_plan_are_drawn_the_same(cells, draw):
    """Without the column `pending`, as in `final_accuracy`, a cell without an ended seed is taken to be pending."""
    plain, planned = draw(cells.drop(columns="pending")), draw(cells)
    assert foot(plain) == foot(planned)
    assert marks(plain) == marks(planned)


def test_curve_keeps_its_colour_as_results_arrive(cells):
    """Colours depend on the planned grid, so m = 8 has the same colour before and after the others have results."""
    early = cells.copy()
    early.loc[early["batch_size"] < 8, ["test_accuracy", "finished", "diverged", "pending"]] = math.nan, 0, 0, 1

    def color_of_eight(some):
        lines = figures.accuracy_against_base_lr(some).axes[0].get_lines()
        return next(line.get_color() for line in lines if line.get_label() == "8")

    assert list(curves(figures.accuracy_against_base_lr(early))) == ["8"]
    assert same_color(color_of_eight(early), color_of_eight(cells))


def test_heat_map_tells_four_kinds_of_cell_apart(cells):
    """Columns are base_lr and rows are m; the cells (0, 2) and (2, 2) have no ended seed."""
    figure = figures.heat_map(cells)
    assert marks(figure) == {"diverged": {(2, 1)}, "not finished": {(0, 2), (2, 2)}, "some seeds diverged": {(1, 2)}}
    assert foot(figure)[1] == list(marks(figure))
    colored, grey = (~np.ma.getmaskarray(np.ma.asarray(mesh.get_array())) for mesh in figure.axes[0].collections[:2])
    np.testing.assert_array_equal(colored, [[1, 1, 1], [1, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(grey, [[0, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_heat_map_marks_cells_with_seeds_pending(seeds_pending):
    """A cell with diverged seeds is marked as pending too, because its pending seed may yet finish."""
    shown = marks(figures.heat_map(seeds_pending))
    assert shown == {"diverged": {(2, 0)}, "some seeds diverged": {(1, 0)}, "some seeds pending": {(0, 0), (1, 0), (2, 0)}}


def test_heat_map_writes_each_accuracy_in_its_cell(cells):
    figure = figures.heat_map(cells)
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "60.0", (1, 0): "70.0", (2, 0): "80.0", (0, 1): "50.0", (1, 1): "75.0", (1, 2): "30.0"}
    np.testing.assert_allclose(np.ma.asarray(axes.collections[0].get_array())[0], [60, 70, 80])
    assert tick_texts(axes.xaxis) == ["$2^{-3}$", "$2^{-2}$", "$2^{-1}$"]
    assert tick_texts(axes.yaxis) == ["2", "4", "8"]


def test_a_cell_that_is_not_planned_is_blank(cells):
    """An unplanned cell, such as (8, 0.125), has neither colour nor mark; every planned batch size has a row."""
    figure = figures.heat_map(cells.drop(index=6))
    assert marks(figure)["not finished"] == {(2, 2)}
    colored, grey = (np.ma.asarray(mesh.get_array()) for mesh in figure.axes[0].collections[:2])
    assert colored.mask[2, 0]
    assert grey.mask[2, 0]
    wider = pd.concat([cells, table(*(missing(16, x) for x in (0.125, 0.25, 0.5)))])
    assert marks(figures.heat_map(wider))["not finished"] == {(0, 2), (2, 2), (0, 3), (1, 3), (2, 3)}


def test_wide_grid_shows_fewer_labels_and_no_numbers():
    many = table(*(cell(2, 2.0**k, 0.5) for k in range(-29, 1)))
    axes = figures.heat_map(many).axes[0]
    assert len(axes.get_xticks()) == 10
    assert not axes.texts


@pytest.mark.parametrize("draw", [figures.accuracy_against_batch_size, figures.accuracy_against_base_lr, figures.heat_map])
def test_labels_legend_and_colours_of_many_uneven_rates_can_be_seen(draw):
    cells = table(*(cell(m, rate, 0.5) for m in (4, 8) for rate in np.geomspace(1e-5, 1, 80)))
    figure = draw(cells)
    figure.draw_without_rendering()
    places = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(places))
    for legend in filter(None, [figure.axes[0].get_legend()]):
        assert legend.get_window_extent().height < figure.bbox.height
    for mesh in figure.axes[0].collections:
        assert not same_color(mesh.get_edgecolor()[:1], "white")  # it would cover the colours of so narrow cells


def test_bn_batch_sizes_other_than_m_are_left_out_and_said_so(cells):
    other = table(cell(8, 0.25, 0.9, bn_batch_size=2))
    figure = figures.accuracy_against_base_lr(pd.concat([cells, other]))
    np.testing.assert_allclose(curves(figure)["8"][1][1], 30)
    assert figure.axes[0].get_title() == "exp (BN batch size = $m$)"
    assert figures.accuracy_against_base_lr(cells).axes[0].get_title() == "exp"


def test_largest_bn_batch_size_stands_for_m_where_none_equals_it():
    rows = [
        cell(8, 0.25, 0.9, bn_batch_size=2),
        cell(8, 0.25, 0.7, bn_batch_size=4),
        cell(8, 0.5, 0.6, bn_batch_size=2),
    ]
    figure = figures.accuracy_against_base_lr(table(*rows))
    np.testing.assert_allclose(curves(figure)["8"][1], [70])
    assert figure.axes[0].get_title() == "exp (BN batch size 4)"


def test_one_figure_shows_one_experiment(cells):
    both = pd.concat([cells, cells.assign(experiment="other")])
    with pytest.raises(ValueError, match="one experiment, got 2"):
        figures.heat_map(both)


def test_results_without_a_finished_run_can_be_drawn(cells):
    """Without a finished run there is no curve and no warning, and the heat map still tells diverged from running."""
    early = cells[cells["finished"] == 0]
    figure = figures.accuracy_against_batch_size(early)
    figure.savefig(io.BytesIO(), format="png")
    assert not curves(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no run has finished"]
    early_map = figures.heat_map(early)
    assert marks(early_map) == {"diverged": {(1, 0)}, "not finished": {(0, 1), (1, 1)}}
    assert early_map.axes[1].get_ylim() == (0, 100)


def test_a_loss_is_shown_as_it_is_on_a_log_axis_where_it_spreads_and_small_is_light(cells):
    loss = Metric("test_loss", "min")
    losses = cells.assign(test_loss=1 / cells["test_accuracy"] ** 4, test_loss_std=math.nan)
    near, far = (figures.accuracy_against_base_lr(frame, loss) for frame in (losses[losses["test_loss"] < 10], losses))
    assert [figure.axes[0].get_ylabel() for figure in (near, far)] == ["test loss", "test loss"]
    assert [figure.axes[0].get_yscale() for figure in (near, far)] == ["linear", "log"]
    np.testing.assert_allclose(curves(far)["2"][1], 1 / np.array([0.6, 0.7, 0.8]) ** 4)
    mesh = figures.heat_map(losses, loss).axes[0].collections[0]
    assert mesh.get_cmap().name == "viridis_r"
