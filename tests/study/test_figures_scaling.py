"""Tests the figures of the critical batch size and of the best learning rates on stored studies."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from claimed import LRS, study
from drawn import bars, foot, placed

from smallbatch_jax.study import figures
from smallbatch_jax.study.critical import critical_batch_size
from smallbatch_jax.study.rates import best_rates, fit_rule
from smallbatch_jax.study.recommendation import recommend
from smallbatch_jax.study.report.scaling import scaling_charts
from smallbatch_jax.study.study import load

STORED = Path(__file__).parents[2] / "notebooks/results"


@cache
def stored(name):
    return load(STORED / name)


def styles(figure):
    """Returns the line styles of the curves, by label."""
    return {line.get_label(): line.get_linestyle() for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 20}


def test_examples_to_the_target_show_what_is_reached_and_what_needs_more():
    found = critical_batch_size(stored("cifar10_subset/fig01"))
    figure = figures.examples_to_target(stored("cifar10_subset/fig01"))
    reached = found.table["reached"]
    np.testing.assert_allclose(placed(figure, marker="o"), found.table.loc[reached, ["batch_size", "examples"]])
    np.testing.assert_allclose(placed(figure, marker="^"), found.table.loc[~reached, ["batch_size", "examples"]])
    assert reached.sum() == 4
    assert styles(figure) == {"_hyperbola": "-"}
    assert "20 % more, $m$ = 5.5" in foot(figure)[1]


def test_an_uncertain_hyperbola_is_dashed():
    figure = figures.examples_to_target(stored("cifar10_subset/fig02"))
    assert styles(figure) == {"_hyperbola": "--"}
    assert foot(figure)[1] == ["reached", "needs more than that", "$E_{min}(1 + m / m_{crit})$, uncertain"]


def test_the_noise_scale_has_a_panel_of_its_own_where_there_is_one():
    made = stored("digits/fig10")
    assert len(figures.examples_to_target(made).axes) == 1
    rows = made.rows.assign(train_noise_scale=made.rows["batch_size"] + 40.0, train_noise_scale_error=5.0)
    figure = figures.examples_to_target(dataclasses.replace(made, rows=rows))
    assert bars(figure, 1) == {float(m): (m + 35.0, m + 45.0) for m in (2, 8, 32, 128, 512)}
    assert figure.axes[1].get_ylabel() == "noise scale (examples)"


def test_best_learning_rates_have_intervals_and_the_rules_that_fit():
    made = stored("cifar10_subset/fig01")
    table, figure = best_rates(made), figures.best_learning_rates(made)
    assert bars(figure) == {
        m: pytest.approx((low, high), abs=1e-6) for m, low, high in table[["batch_size", "low", "high"]].itertuples(index=False)
    }
    assert len(placed(figure, markerfacecolor="white")) == table["edge"].sum() == 3
    assert set(styles(figure)) == {f"_{name}" for name in fit_rule(table).likely} >= {"_saturating", "_square-root"}
    assert set(styles(figure).values()) == {"--"}
    assert set(styles(figures.best_learning_rates(stored("cifar10/fig08"))).values()) == {"-"}


def test_a_rule_has_one_colour_in_the_figure_and_on_the_page():
    made = stored("cifar10_subset/fig01")
    drawn = {line.get_label(): line.get_color() for line in figures.best_learning_rates(made).axes[0].get_lines()}
    page = scaling_charts(made, recommend(made))["rates"].data
    shown = {f"_{trace.name}": trace.line.color for trace in page if trace.mode == "lines"}
    assert len(shown) > 1
    assert shown.items() <= drawn.items()


@pytest.mark.parametrize("table", [{2: None, 4: None, 8: None}, {2: 0.1, 4: 0.1, 8: 0.1}])
def test_they_can_be_drawn_before_anything_was_learnt(table):
    made = study("fig08", {m: [value] * 3 for m, value in table.items()}, lrs=LRS)
    for draw in (figures.examples_to_target, figures.best_learning_rates):
        draw(made)
