"""Tests the figures of the noise scale and the sharpness: which points they show, and when they are drawn."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from drawn import foot, legend_texts, placed
from rows import results, run

from smallbatch_jax.study import analysis, figures
from smallbatch_jax.study.study import Study

NAMES = ("noise_scale", "sharpness")


def study(rows, diagnostics=NAMES, **columns):
    """Returns a study of `rows` with additional columns; runs have 4 epochs, and η is reduced after half of them."""
    base_lrs = tuple(sorted(set(rows["base_lr"])))
    grid = {"batch_sizes": (2, 8), "base_lrs": base_lrs}
    chosen = tiny.grid(name="exp", diagnostics=diagnostics, epochs=4, schedule={"boundaries": (0.5,)}, **grid)
    cells = analysis.planned_cells(rows, chosen.runs(), "exp")
    return Study(Path("exp"), chosen, rows.assign(**columns), cells, 10, (40, 10))


@pytest.fixture
def rows():
    """Returns the rows at η̃ = 1/4 of a run of 4 epochs at m = 2, and of one at m = 8 that diverges in epoch 3."""
    return results(run([0.2, 0.5, 0.6, 0.6], batch_size=2, base_lr=0.25), run([0.1, 0.3], "diverged", 8, 0.25))


def test_a_noise_scale_is_shown_where_it_is_larger_than_its_error(rows):
    values, errors = [10.0, 20, -5, 40, 100, 50, np.nan], [5.0, 4, 1, 50, 10, 10, np.nan]
    figure = figures.noise_scale(study(rows, train_noise_scale=values, train_noise_scale_error=errors))
    np.testing.assert_allclose(placed(figure, marker="o"), [[1, 10], [2, 20]])
    np.testing.assert_allclose(placed(figure, marker="x"), [[2, 50]])
    assert figure.axes[0].get_yscale() == "log"
    assert "without values smaller than their error" in foot(figure)[0]


def test_a_sharpness_stands_over_two_over_the_learning_rate_before_the_first_reduction(rows):
    """η = η̃·m is 0.5 and 2, and the second epoch is the last one before the reduction."""
    figure = figures.sharpness(study(rows, train_sharpness=[1.0, 2, 3, 4, 0.5, 0.75, np.nan]))
    np.testing.assert_allclose(placed(figure, marker="o"), [[4, 2]])
    np.testing.assert_allclose(placed(figure, marker="x"), [[1, 0.75]])
    (edge,) = (line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--")
    np.testing.assert_array_equal(edge.get_xdata(), edge.get_ydata())
    assert legend_texts(figure.axes[0]) == ["2", "8", r"$\lambda = 2/\eta$", "diverged later"]


@pytest.mark.long
def test_they_are_drawn_where_the_experiment_has_them_even_without_a_value(rows, tmp_path):
    columns = dict.fromkeys(("train_noise_scale", "train_noise_scale_error", "train_sharpness"), np.nan)
    drawn = {path.stem for path in figures.draw_studies([study(rows, **columns)], tmp_path / "with")}
    without = {path.stem for path in figures.draw_studies([study(rows, ())], tmp_path / "without")}
    assert drawn - without == set(NAMES)
