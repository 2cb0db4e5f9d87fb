"""Tests the figures of cost: which runs make a curve, how missing times are marked, and when there is no figure."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
from drawn import foot, legend_texts, placed, tick_texts
from rows import compiled, results, run, segment, timings

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.study import figures
from smallbatch_jax.study.analysis import planned_cells
from smallbatch_jax.study.figures import COST_FIGURES as STEMS
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.study import Study

RATES = {2: 0.5, 4: 0.1, 8: 0.05}  # seconds per image: an epoch of 10 steps takes 10, 4 and 4 s


def known(*sizes, lanes=16, memory=True):
    return [row for m in sizes for row in (compiled(m, 1, lanes, m * 2**20 * memory), segment(m, 1000 * RATES[m], 1000, lanes))]


def study(rows, given=(), *missing):
    """Returns a study with chance accuracy 0.1 whose plan has the runs of `rows` and the `missing` pairs (m, base_lr)."""
    frame = results(*rows)
    fields = ["batch_size", "bn_batch_size", "base_lr", "seed"]
    runs = {Run(*values) for values in frame[fields].itertuples(index=False)} | {Run(m, m, lr, 0) for m, lr in missing}
    cells = planned_cells(frame, runs, "exp")
    return Study(Path("exp"), tiny.grid(name="exp"), frame, cells, 10, (40, 10), timings(*given))


def lines(figure):
    """Returns every line of the panel with more than one point, as lists of (x, y)."""
    return [line.get_xydata().tolist() for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 1]


def near(*points):
    return [pytest.approx(list(point), nan_ok=True) for point in points]


THREE = run([0.3, 0.5], batch_size=2), run([0.4, 0.6], batch_size=4), run([0.2, 0.9], batch_size=8)


def test_accuracy_over_time_has_a_curve_per_batch_size_at_its_best_base_lr():
    worse = run([0.1, 0.2], batch_size=4, base_lr=0.25)
    figure = figures.accuracy_against_time(study([*THREE, worse], known(2, 4, 8)))
    assert lines(figure) == [near((10, 30), (20, 50)), near((4, 40), (8, 60)), near((4, 20), (8, 90))]
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "time of a run", "test accuracy (%)")
    assert tick_texts(axes.xaxis) == ["5 s", "10 s"]
    assert legend_texts(axes) == ["2", "4", "8"]
    assert foot(figure)[0].endswith("of which 16 lanes share the devices")


def test_base_lrs_are_in_the_legend_where_they_differ():
    figure = figures.accuracy_against_time(study([THREE[0], run([0.4], base_lr=0.25)], known(2, 4)))
    assert legend_texts(figure.axes[0]) == ["2, $2^{-1}$", "4, $2^{-2}$"]


def test_before_a_run_has_finished_its_curve_is_the_one_that_has_come_furthest():
    early = [run([0.3], "running"), run([0.1, 0.2], "running", base_lr=0.25)]
    figure = figures.accuracy_against_time(study(early, known(4), (4, 1.0)))
    assert lines(figure) == [near((4, 10), (8, 20))]
    assert foot(figure)[0].startswith("3 of 3 runs not finished\n")


def test_a_diverged_run_ends_in_a_cross_at_its_last_finite_epoch():
    figure = figures.accuracy_against_time(study([THREE[0], run([0.3, 0.4], "diverged")], known(2, 4)))
    np.testing.assert_allclose(placed(figure, marker="x"), [[8, 40]])
    assert legend_texts(figure.axes[0]) == ["2", "4", "diverged"]


def test_batch_sizes_without_a_time_or_an_epoch_are_named():
    figure = figures.accuracy_against_time(study(THREE, known(4), (32, 0.5)))
    assert lines(figure) == [near((4, 40), (8, 60))]
    assert foot(figure)[0].startswith("1 of 4 runs not finished; not timed: $m$ = 2, 8, 32\n")


def times(*given, accuracy=0.5, **options):
    return figures.time_to_accuracy(study(*given, **options), accuracy)


def test_the_time_to_an_accuracy_is_a_point_per_batch_size():
    """Epochs take 10, 4 and 4 s, and all three batch sizes need both of their epochs."""
    figure = times(THREE, known(2, 4, 8))
    assert lines(figure) == [near((2, 20), (4, 8), (8, 8))]
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "exp, time to 50 % test accuracy")
    assert (tick_texts(axes.xaxis), tick_texts(axes.yaxis)) == (["2", "4", "8"], ["5 s", "10 s", "30 s"])
    assert foot(figure)[1] == []


def test_the_target_is_90_percent_of_the_way_from_chance_to_the_best_unless_it_is_given():
    """The best is 0.55 (median of 0.2 and 0.9), so the target is 0.1 + 0.9 · 0.45 = 0.505, which 0.5 does not reach."""
    figure = figures.time_to_accuracy(study(THREE, known(2, 4, 8)))
    assert figure.axes[0].get_title() == "exp, time to 50.5 % test accuracy"
    assert foot(figure)[0].startswith("accuracy: 90 % of the way from chance to the best\n")
    assert lines(figure) == [near((2, math.nan), (4, 8), (8, 8))]
    assert "from chance" not in foot(times(THREE, known(2, 4, 8)))[0]


def test_an_unreachable_target_is_a_cross_above_all_times_and_an_unfinished_one_a_dot():
    figure = times([*THREE, run([0.1], batch_size=16)], known(2, 4, 8), (32, 0.5))
    (cross,), (dot,) = placed(figure, marker="x"), placed(figure, marker=".")
    assert (cross[0], dot[0]) == (16, 32)
    assert max(20, *figure.axes[0].get_yticks()) < cross[1] < figure.axes[0].get_ylim()[1]
    assert dot[1] == cross[1]
    assert foot(figure)[1] == ["target not reached", "none yet"]


def test_a_time_is_hollow_while_faster_runs_may_follow_and_crossed_where_seeds_diverged():
    lost = run([0.1], "diverged", batch_size=8, seed=1)
    figure = times([*THREE, lost], known(2, 4, 8), (4, 0.25))
    assert placed(figure, markerfacecolor="white").tolist() == [near((4, 8))[0], near((8, 8))[0]]
    assert placed(figure, marker="x").tolist() == near((8, 8))
    assert foot(figure)[1] == ["some seeds diverged", "provisional (runs pending)"]


def test_a_batch_size_that_gets_there_in_an_unknown_time_is_named():
    figure = times(THREE, known(2, 4))
    assert lines(figure) == [near((2, 20), (4, 8), (8, math.nan))]
    assert foot(figure)[0].startswith("not timed: $m$ = 8\n")
    assert not len(placed(figure, marker="x"))


def test_accuracy_over_memory_is_a_labelled_point_per_batch_size():
    """Each point is at the final accuracy, which with two epochs is their mean."""
    figure = figures.accuracy_against_memory(study(THREE, known(2, 4, 8)))
    np.testing.assert_allclose(placed(figure), [[2 * 2**20, 40], [4 * 2**20, 50], [8 * 2**20, 55]])
    axes = figure.axes[0]
    assert legend_texts(axes) == ["2 (16)", "4 (16)", "8 (16)"]
    assert tick_texts(axes.xaxis) == ["2 MiB", "4 MiB", "8 MiB"]
    assert foot(figure) == ("memory of all lanes together, without the dataset", [])


def test_memory_tells_lanes_apart_and_names_what_has_no_point():
    rows = [*THREE, run([], "diverged", batch_size=16)]
    given = [*known(2, lanes=16), *known(4, lanes=4), *known(8, lanes=4, memory=False), *known(2)]
    figure = figures.accuracy_against_memory(study(rows, given, (2, 0.25)))
    np.testing.assert_allclose(np.unique(placed(figure), axis=0), [[2 * 2**20, 40], [4 * 2**20, 50]])
    np.testing.assert_allclose(placed(figure, markerfacecolor="white"), [[2 * 2**20, 40]])
    first, second = foot(figure)[0].split("\n")
    assert first == "1 of 5 runs not finished; diverged: $m$ = 16; memory not known: $m$ = 8"
    assert second == "memory of all lanes together, without the dataset"
    assert legend_texts(figure.axes[0]) == ["2 (16)", "4 (4)"]


def test_other_bn_batch_sizes_are_left_out():
    varied = run([0.9, 0.9], batch_size=8, bn_batch_size=2)
    given = [*known(2, 4, 8), compiled(8, peak_bytes=2**30, bn_batch_size=2), segment(8, 1000, 1000, bn_batch_size=2)]
    whole = study([*THREE, varied], given)
    assert lines(figures.accuracy_against_time(whole))[2] == near((4, 20), (8, 90))
    assert lines(figures.time_to_accuracy(whole, 0.5)) == [near((2, 20), (4, 8), (8, 8))]
    assert placed(figures.accuracy_against_memory(whole))[:, 0].max() == 8 * 2**20
    assert figures.accuracy_against_memory(whole).axes[0].get_title() == "exp (BN batch size = $m$)"


@pytest.mark.parametrize(
    ("low", "high", "units", "expected"),
    [
        (0.3, 2.2, style.SECONDS, ["500 ms", "1 s", "2 s"]),
        (40, 4000, style.SECONDS, ["1 min", "2 min", "5 min", "10 min", "30 min", "1 h"]),
        (70, 70, style.SECONDS, ["1 min", "2 min"]),
        (60, 60, style.SECONDS, ["1 min", "2 min"]),
        (1, 1e6, style.SECONDS, ["1 s", "10 s", "2 min", "30 min", "5 h", "2 d"]),
        (3e9, 4e10, style.BYTES, ["4 GiB", "8 GiB", "16 GiB", "32 GiB"]),
        (700 * 2**20, 3 * 2**30, style.BYTES, ["1 GiB", "2 GiB"]),
    ],
)
def test_times_and_memory_have_ticks_at_round_values(low, high, units, expected):
    _, axes = style.new_axes("")
    style.unit_axis(axes, "x", (low, high), units)
    assert tick_texts(axes.xaxis) == expected
    assert axes.get_xlim()[0] < low <= high < axes.get_xlim()[1]


@pytest.fixture
def drawn(monkeypatch):
    """Returns a list to which the stem of every drawn figure is appended."""
    stems = []
    monkeypatch.setattr(figures.style, "write", lambda figure, stem: stems.append(stem.name) or [stem])
    return stems


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ()),
        ([("import", 0, 0, 0, 1.0, 0, 0, 0)], ()),
        ([compiled(4)], ()),
        ([compiled(64, peak_bytes=1), segment(64, 1, 10)], ()),  # this program is not in the study
        ([compiled(4, peak_bytes=1)], STEMS[2:]),
        (known(4, memory=False), STEMS[:2]),
        (known(2, 8), STEMS),
    ],
)
def test_a_study_is_drawn_with_what_is_known_of_its_cost(drawn, given, expected):
    figures.draw_studies([study(THREE, given)], "out")
    assert drawn == ["accuracy_vs_batch_size", "convergence", "examples_to_target", *expected]


@pytest.mark.parametrize("rows", [[], [run([0.3], "running")], [run([], "diverged")]])
def test_cost_can_be_drawn_before_a_run_has_finished(rows):
    early = study(rows, known(4), (4, 0.5), (2, 0.25))
    for figure in (
        figures.accuracy_against_time(early),
        figures.time_to_accuracy(early),
        figures.accuracy_against_memory(early),
    ):
        figure.savefig(io.BytesIO(), format="png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no run has finished"]
    assert figure.axes[0].get_xticks().tolist() == []


def test_results_without_a_workdir_know_no_cost(drawn):
    figures.draw(study(THREE, known(2, 4, 8)).rows, "out")
    assert not set(drawn) & set(STEMS)
