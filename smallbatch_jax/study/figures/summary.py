"""Figures that compare studies: the best accuracy of each batch size (Fig. 15), and the range of η̃ (Fig. 16).

Where BN batch sizes vary, they are chosen as in `grid.heat_map`.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from smallbatch_jax.study.analysis import convergence_rule, convergent, convergent_range
from smallbatch_jax.study.figures import points, style
from smallbatch_jax.study.figures.labels import dataset_name, named_metric, paper_labels
from smallbatch_jax.study.study import Study

WIDEST_OF_TWO = 36  # most characters of a legend entry in two columns
BAR = {"linewidth": 4.5, "color": "#7FB8DA"}
LIGHT_BAR = {**BAR, "color": "#D5E6F3"}
RATE: dict[str, Any] = {"color": "#08519C", "marker": "o", "markersize": 2.5, "linestyle": ""}
LIMIT: dict[str, Any] = {"color": "0.55", "linewidth": 0.8, "linestyle": (0, (3, 2)), "zorder": 1.5}
PANELS = {1: (1.9, 80, 8), 2: (1.9, 40, 8), 3: (1.5, 28, 7)}  # by columns: inches high, characters and font size of a title


@style.styled()
def best_accuracy(studies: Sequence[Study]) -> Figure:
    """The best test accuracy over η̃ of each m, one curve per study (Fig. 15).

    Returns:
      A figure in which the error bars are over the seeds of the best cell, a hollow point is provisional (some runs of
      its m, at whatever η̃, have not ended) and a line breaks where an m has no finished run.
    """
    _require_some(studies)
    experiments = [study.experiment for study in studies]
    metric, datasets = named_metric(*experiments), set(map(dataset_name, experiments))
    figure, axes = style.new_axes(f"{datasets.pop()}: best {metric.title}" if len(datasets) == 1 else f"best {metric.title}")
    entries: dict[str, Any] = {}
    drawn, colors, markers = [], style.CATEGORIES, style.MARKERS  # no two of 35 studies share colour and marker
    for i, (label, study) in enumerate(zip(paper_labels(studies), studies, strict=True)):
        cells, bn_note = points.one_bn_batch_size(study.cells, metric)
        best = points.marked(points.best_of_each(cells, metric), metric)
        look = {"color": colors[i % len(colors)], "marker": markers[i % len(markers)]}
        look["linestyle"] = "-" if i < len(colors) else "--"
        line = points.plot_curve(axes, best, "batch_size", label, **look)
        entries[label + bn_note + ("" if line else " (none yet)")] = line or style.mark(**{**look, "linestyle": ""})
        drawn.append(best[["batch_size", "y", "crossed", "provisional"]])
    axes.set_ylabel(metric.label)
    if not axes.get_lines():
        style.say_nothing_finished(axes)
    everything = pd.concat(drawn)
    style.grid_axis(axes, "x", "batch_size", everything["batch_size"])
    entries |= points.mark_entries(everything, "some seeds of the best diverged", points.PROVISIONAL)
    columns = 2 if max(map(len, entries)) <= WIDEST_OF_TWO else 1
    figure.set_figheight(3.0 + 0.16 * -(-len(entries) // columns))
    style.foot(figure, entries, points.run_note(*(study.cells for study in studies)), columns=columns)
    return figure


@style.styled()
def convergent_base_lrs(studies: Sequence[Study]) -> Figure:
    """The base learning rates that converge for each m, one panel per study on shared axes (Fig. 16).

    Returns:
      A figure in which a bar spans the lowest to the highest η̃ that converges by `analysis.CONVERGENCE_RULE`, with a
      dot on every one that does: where dots are missing the range has gaps. Bar and dots are light and hollow where
      runs of that m have not ended. Below the bars stands a × where no η̃ converges, a grey dot where none does yet.
      Dashed lines are the limits of the grid: a bar that reaches one may go on beyond it.
    """
    _require_some(studies)
    columns = min(len(studies), 2 if len(studies) <= 4 else 3)
    rows, (height, width, size) = -(-len(studies) // columns), PANELS[columns]
    figure = style.new_figure(1.2 + height * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    everything = pd.concat([study.cells[["batch_size", "base_lr"]] for study in studies])
    floor = everything["base_lr"].min() / 2
    entries: dict[str, Any] = {}
    for axes, label, study in zip(panels.flat, paper_labels(studies), studies, strict=False):
        cells, bn_note = points.one_bn_batch_size(study.cells, study.metric)
        entries |= _draw_ranges(axes, cells, study, floor)
        title = label + bn_note
        axes.set_title(title if len(title) <= width else title.replace(", ", ",\n", 1), fontsize=size)
    style.grid_axis(panels[0, 0], "x", "batch_size", everything["batch_size"], 12 // columns)
    style.grid_axis(panels[0, 0], "y", "base_lr", everything["base_lr"], 7)
    panels[0, 0].set_ylabel("")
    figure.supylabel(style.COLUMNS["base_lr"].label)
    for i, axes in enumerate(panels.flat):
        axes.set_visible(i < len(studies))
        axes.tick_params(labelbottom=i + columns >= len(studies))
        axes.set_xlabel(style.COLUMNS["batch_size"].label if i >= columns * (rows - 1) else "")
    entries["limits of the grid"] = Line2D([], [], **LIMIT)
    runs = points.run_note(*(study.cells for study in studies))
    style.foot(figure, entries, convergence_rule(studies[0].metric), end=runs, columns=3)
    return figure


def _require_some(studies: Sequence[Study]) -> None:
    if not studies:
        raise ValueError("studies: got none, accepts one or more.")


def _draw_ranges(axes: Axes, cells: pd.DataFrame, study: Study, floor: float) -> dict[str, Any]:
    """Draws one study's ranges, or marks at `floor` where nothing converges; returns the legend's entries."""
    ranges = convergent_range(cells, study.chance, study.metric).set_index("batch_size", drop=False)
    by_size = cells.groupby("batch_size")
    pending, limits = by_size["pending"].sum() > 0, by_size["base_lr"].agg(["min", "max"])
    found = ranges["convergent"] > 0
    rates = cells[convergent(cells, study.chance, study.metric)].set_index("batch_size")["base_lr"]
    entries: dict[str, Any] = {}
    for where, label, bar, dots in (
        (found & ~pending, "converging", BAR, RATE),
        (found & pending, points.PROVISIONAL, LIGHT_BAR, {**RATE, "markerfacecolor": "white"}),
    ):
        here, dotted = ranges[where], rates[rates.index.isin(ranges.index[where])]
        axes.vlines(here.index, here["lowest_base_lr"], here["highest_base_lr"], label=label, **bar)
        axes.plot(dotted.index, dotted, label=f"_{label}", **dots)
        entries |= {label: (Line2D([], [], **bar), style.mark(**dots))} if where.any() else {}
    edges = [limits.index[0] / 1.4, *limits.index, limits.index[-1] * 1.4]
    for column in ("min", "max"):
        heights = limits[column].to_numpy()
        axes.plot(edges, [heights[0], *heights, heights[-1]], drawstyle="steps-mid", label=f"_{column}", **LIMIT)
    absent = {"none converges": (~found & ~pending, style.LOST), "none yet": (~found & pending, style.NOT_YET)}
    return entries | points.plot_kinds(axes, ranges.assign(y=floor), "batch_size", "y", absent, color=style.QUIET)
