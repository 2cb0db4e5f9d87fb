"""What figures must show: every cell where it belongs, and no cell for what it is not."""

import io
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color

from smallbatch_jax import figures
from smallbatch_jax.analysis import CELL, RUN
from smallbatch_jax.experiment import InputError

COLUMNS = [*CELL, "test_accuracy", "test_accuracy_std", "finished", "diverged"]
FILES = [f"{stem}.{kind}" for stem in ("accuracy_vs_batch_size", "accuracy_vs_base_lr", "heat_map") for kind in ("png", "pdf")]
GRID = ((2, 4, 8), (0.125, 0.25, 0.5))


def cell(batch_size, base_lr, accuracy, std=math.nan, finished=1, diverged=0, bn_batch_size=None):
    return ("exp", batch_size, bn_batch_size or batch_size, base_lr, accuracy, std, finished, diverged)


@pytest.fixture
def cells():
    """Three batch sizes: all finished; one diverged; one partly diverged, one running, one never started (8, 0.125)."""
    rows = [
        cell(2, 0.125, 0.6, 0.01, finished=2),
        cell(2, 0.25, 0.7, 0.02, finished=2),
        cell(2, 0.5, 0.8, 0.03, finished=2),
        cell(4, 0.125, 0.5),
        cell(4, 0.25, 0.75),
        cell(4, 0.5, math.nan, finished=0, diverged=2),
        cell(8, 0.25, 0.3, finished=1, diverged=1),
        cell(8, 0.5, math.nan, finished=0),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def results(cells):
    """One-epoch results that hold `cells`' finished and diverged seeds; a cell with neither is running."""
    rows = []
    for c in cells.itertuples():
        statuses = ["finished"] * c.finished + ["diverged"] * c.diverged or ["running"]
        for seed, status in enumerate(statuses):
            accuracy = math.nan if status == "diverged" else c.test_accuracy
            key = (c.experiment, c.batch_size, c.bn_batch_size, c.base_lr, seed)
            rows.append((*key, 1, 10, 0.1, accuracy, 0.1, accuracy, status))
    measures = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    return pd.DataFrame(rows, columns=[*RUN, "epoch", "step", *measures, "status"])


def curves(figure):
    """The labelled lines of a figure, as label → (x, y)."""
    lines = figure.axes[0].get_lines()
    return {
        line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in lines
        if not str(line.get_label()).startswith("_")
    }


def marks(figure):
    """The marked cells of a heat map, as kind → set of (column, row)."""
    scatters = [c for c in figure.axes[0].collections if not str(c.get_label()).startswith("_")]
    return {c.get_label(): {tuple(map(round, xy)) for xy in c.get_offsets().tolist()} for c in scatters}


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_accuracy_against_batch_size_has_one_curve_per_base_lr(cells):
    drawn = curves(figures.accuracy_against_batch_size(cells, GRID))
    nan = math.nan
    expected = {"$2^{-3}$": [60, 50, nan], "$2^{-2}$": [70, 75, 30], "$2^{-1}$": [80, nan, nan]}
    assert list(drawn) == list(expected)
    for label, percent in expected.items():
        np.testing.assert_array_equal(drawn[label][0], [2, 4, 8])
        np.testing.assert_allclose(drawn[label][1], percent)


def test_accuracy_against_base_lr_has_one_curve_per_batch_size(cells):
    drawn = curves(figures.accuracy_against_base_lr(cells, GRID))
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
    """Only m = 2 has two finished seeds per cell: bars of ±1, ±2, ±3 % and no others."""
    axes = figures.accuracy_against_base_lr(cells, GRID).axes[0]
    (bars,) = (lines.get_segments() for lines in axes.collections if isinstance(lines, LineCollection))
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[59, 61], [68, 72], [77, 83]])


def test_partly_diverged_cells_are_hollow(cells):
    figure = figures.accuracy_against_batch_size(cells, GRID)
    hollow = [line for line in figure.axes[0].get_lines() if same_color(line.get_markerfacecolor(), "white")]
    points = np.concatenate([line.get_xydata() for line in hollow])
    np.testing.assert_allclose(points[~np.isnan(points[:, 1])], [[8, 30]])
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert "some seeds\ndiverged" in [text.get_text() for text in legend.get_texts()]


def test_curve_keeps_its_colour_as_results_arrive(cells):
    """Colours go by the planned grid: m = 8 looks the same before and after the others are there."""

    def color_of_eight(some):
        lines = figures.accuracy_against_base_lr(some, GRID).axes[0].get_lines()
        return next(line.get_color() for line in lines if line.get_label() == "8")

    assert same_color(color_of_eight(cells[cells["batch_size"] == 8]), color_of_eight(cells))


def test_heat_map_tells_four_kinds_of_cell_apart(cells):
    """Columns are base_lr, rows are m; (0, 2) was never started, (2, 2) is running."""
    figure = figures.heat_map(cells, GRID)
    assert marks(figure) == {"diverged": {(2, 1)}, "not finished": {(0, 2), (2, 2)}, "some seeds diverged": {(1, 2)}}
    colored, grey = (~np.ma.getmaskarray(np.ma.asarray(mesh.get_array())) for mesh in figure.axes[0].collections[:2])
    np.testing.assert_array_equal(colored, [[1, 1, 1], [1, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(grey, [[0, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_heat_map_writes_each_accuracy_in_its_cell(cells):
    figure = figures.heat_map(cells, GRID)
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "60.0", (1, 0): "70.0", (2, 0): "80.0", (0, 1): "50.0", (1, 1): "75.0", (1, 2): "30.0"}
    np.testing.assert_allclose(np.ma.asarray(axes.collections[0].get_array())[0], [60, 70, 80])
    assert tick_texts(axes.xaxis) == ["$2^{-3}$", "$2^{-2}$", "$2^{-1}$"]
    assert tick_texts(axes.yaxis) == ["2", "4", "8"]


def test_planned_grid_widens_the_axes(cells):
    """Without a grid an unknown batch size is not there; with it, its cells are missing."""
    assert marks(figures.heat_map(cells))["not finished"] == {(0, 2), (2, 2)}
    wider = (*GRID[0], 16), GRID[1]
    assert marks(figures.heat_map(cells, wider))["not finished"] == {(0, 2), (2, 2), (0, 3), (1, 3), (2, 3)}


def test_wide_grid_shows_fewer_labels_and_no_numbers():
    many = pd.DataFrame([cell(2, 2.0**k, 0.5) for k in range(-29, 1)], columns=COLUMNS)
    axes = figures.heat_map(many).axes[0]
    assert len(axes.get_xticks()) == 10
    assert not axes.texts


def test_bn_batch_sizes_other_than_m_are_left_out_and_said_so(cells):
    other = pd.DataFrame([cell(8, 0.25, 0.9, bn_batch_size=2)], columns=COLUMNS)
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
    figure = figures.accuracy_against_base_lr(pd.DataFrame(rows, columns=COLUMNS))
    np.testing.assert_allclose(curves(figure)["8"][1], [70])
    assert figure.axes[0].get_title() == "exp (BN batch size 4)"


def test_one_figure_shows_one_experiment(cells):
    both = pd.concat([cells, cells.assign(experiment="other")])
    with pytest.raises(ValueError, match="one experiment, got 2"):
        figures.heat_map(both)


def test_draw_writes_six_files_and_the_same_bytes_again(cells, tmp_path):
    df = results(cells)
    paths = figures.draw(df, tmp_path / "a", GRID)
    assert [path.name for path in paths] == FILES
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES)
    again = figures.draw(df.sample(frac=1, random_state=0), tmp_path / "b", GRID)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_figures_carry_no_date_and_depend_on_no_settings(cells, tmp_path, monkeypatch):
    """A reader's matplotlibrc changes nothing, and neither does the date."""
    df = results(cells[:2])
    plain = figures.draw(df, tmp_path / "plain")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 50, "axes.linewidth": 5}):
        before = dict(matplotlib.rcParams)
        styled = figures.draw(df, tmp_path / "styled")
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in styled] == [path.read_bytes() for path in plain]
    assert b"CreationDate" not in plain[1].read_bytes()


def test_results_without_a_finished_run_can_be_drawn(cells):
    """Nothing finished yet: no curve to show, no warning, and the heat map still tells diverged from running."""
    early = cells[cells["finished"] == 0]
    figure = figures.accuracy_against_batch_size(early)
    figure.savefig(io.BytesIO(), format="png")
    assert not curves(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no run has finished"]
    early_map = figures.heat_map(early)
    assert marks(early_map) == {"diverged": {(0, 0)}, "not finished": {(0, 1)}}
    assert early_map.axes[1].get_ylim() == (0, 100)


def test_experiments_go_into_folders_of_their_own(cells, tmp_path):
    one = results(cells[:1])
    two = pd.concat([one, one.assign(experiment="other")])
    paths = figures.draw(two, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [f"{e}/{f}" for e in ("exp", "other") for f in FILES]


def test_no_rows_are_refused_before_anything_is_written(cells, tmp_path):
    with pytest.raises(InputError, match="no rows") as error:
        figures.draw(results(cells).iloc[:0], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_experiment_name_cannot_leave_the_folder(cells, tmp_path):
    two = pd.concat([results(cells).assign(experiment="up/../.."), results(cells)])
    with pytest.raises(InputError, match="cannot name a folder"):
        figures.draw(two, tmp_path / "out")
    assert not list(tmp_path.iterdir())
