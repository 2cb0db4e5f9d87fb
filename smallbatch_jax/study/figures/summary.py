"""Several studies beside each other: what each batch size can reach (Fig. 15), and how freely (Fig. 16)."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from smallbatch_jax.config.catalog import MODELS, NORMS
from smallbatch_jax.config.experiment import OWN, Experiment
from smallbatch_jax.study.analysis import CONVERGENCE_RULE, convergent, convergent_range
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.table import best_of_each, make_table, mark_entries, one_bn_batch_size, plot_curve
from smallbatch_jax.study.study import Study

DATASET_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet2012": "ImageNet"}
METRIC_NAMES = {"imagenet2012": "top-1 validation accuracy"}  # ImageNet is tested on what its authors call validation
WIDEST_OF_TWO = 36  # characters of a legend entry, of which two stand side by side


def paper_labels(studies: Sequence[Study]) -> list[str]:
    """What the paper calls each study, such as "ResNet-32, BN, Aug, WU".

    The dataset comes first if there are several, and the experiment's name last where two labels would be one.
    """
    experiments = [study.experiment for study in studies]
    datasets = [_dataset_name(experiment) for experiment in experiments]
    several = len(set(datasets)) > 1
    labels = [(f"{data}, " if several else "") + _network(e) for data, e in zip(datasets, experiments, strict=True)]
    return [
        f"{label} ({style.plain(study.name)})" if labels.count(label) > 1 else label
        for label, study in zip(labels, studies, strict=True)
    ]


def _network(experiment: Experiment) -> str:
    model, norm = experiment.model.name, experiment.model.norm
    parts = [MODELS[model].title if model in MODELS else style.plain(model.removeprefix(OWN)), NORMS[norm].title]
    parts.append("Aug" if experiment.dataset.augment else "noAug")
    return ", ".join([*parts, "WU"] if experiment.schedule.warmup_fraction else parts)


def _dataset_name(experiment: Experiment) -> str:
    name = experiment.dataset.name
    if name == "folder" and experiment.dataset.data_dir:
        return style.plain(Path(experiment.dataset.data_dir).name or name)
    return DATASET_NAMES.get(name, style.plain(name.removeprefix(OWN)))


def metric_name(experiment: Experiment) -> str:
    """What the paper calls the accuracy on the images that the experiment tests on."""
    return METRIC_NAMES.get(experiment.dataset.name, style.TEST_ACCURACY)


@style.styled()
def best_accuracy(studies: Sequence[Study]) -> Figure:
    """The best test accuracy over η̃ of each m, one curve per study (Fig. 15).

    Args:
      studies: one or more. BN batch sizes are chosen as in `heat_map`.
    Returns:
      A figure in which the error bars are over the seeds of the best cell, a hollow point is provisional (some runs of
      its m, at whatever η̃, have not ended) and a line breaks where an m has no finished run.
    """
    metrics = {metric_name(study.experiment) for study in studies}
    metric = metrics.pop() if len(metrics) == 1 else style.TEST_ACCURACY
    figure, axes = style.new_axes(_of_dataset(f"best {metric}", studies))
    entries: dict[str, Any] = {}
    marks: dict[str, Any] = {}
    batch_sizes: set[int] = set()
    for i, (label, study) in enumerate(zip(paper_labels(studies), studies, strict=True)):
        cells, bn_note = one_bn_batch_size(study.cells)
        table = make_table(best_of_each(cells), "experiment", "batch_size")
        line = plot_curve(axes, table, 0, label, **_category(i))
        entries[label + bn_note + ("" if line else " (none yet)")] = line or style.mark(**{**_category(i), "linestyle": ""})
        marks |= mark_entries(table, "some seeds of the best diverged", "provisional (runs pending)")
        batch_sizes |= set(table.columns)
    axes.set(xlabel=style.BATCH_SIZE_LABEL, ylabel=f"{metric} (%)")
    if not axes.get_lines():
        style.say_nothing_finished(axes)
    style.log2_axis(axes, sorted(batch_sizes), [str(m) for m in sorted(batch_sizes)])
    entries |= marks
    columns = 2 if max(map(len, entries)) <= WIDEST_OF_TWO else 1
    figure.set_figheight(3.0 + 0.16 * -(-len(entries) // columns))
    style.foot(figure, entries, _pending(studies), columns)
    return figure


def _of_dataset(what: str, studies: Sequence[Study]) -> str:
    """A title, with the dataset if all studies share one."""
    datasets = {_dataset_name(study.experiment) for study in studies}
    return f"{datasets.pop()}: {what}" if len(datasets) == 1 else what


def _category(index: int) -> dict[str, Any]:
    """The look of a curve that has no place in an order; no two of 35 share colour and marker."""
    line = "-" if index < len(style.CATEGORIES) else "--"
    color, marker = style.CATEGORIES[index % len(style.CATEGORIES)], style.MARKERS[index % len(style.MARKERS)]
    return {"color": color, "marker": marker, "linestyle": line}


def _pending(studies: Sequence[Study]) -> str:
    ended, runs = (sum(counts) for counts in zip(*(study.runs for study in studies), strict=True))
    return style.count_note("runs", runs, runs - ended, 0)


BAR = {"linewidth": 4.5, "color": "#7FB8DA"}
LIGHT_BAR = {**BAR, "color": "#D5E6F3"}
RATE: dict[str, Any] = {"color": "#08519C", "marker": "o", "markersize": 2.5, "linestyle": ""}
LIMIT: dict[str, Any] = {"color": "0.55", "linewidth": 0.8, "linestyle": (0, (3, 2)), "zorder": 1.5}
NONE: dict[str, Any] = {**style.CROSS, "color": "0.25", "markersize": 4}
NONE_YET: dict[str, Any] = {**style.DOT, "color": "0.6"}
PANEL_HEIGHT = {1: 1.9, 2: 1.9, 3: 1.5}  # inches, by the number of columns
RANGE_MARKS = ("converging", "provisional (runs pending)", "none converges", "none yet", "limits of the grid")
TITLE_WIDTH = {1: 80, 2: 40, 3: 28}  # characters


@style.styled()
def convergent_base_lrs(studies: Sequence[Study]) -> Figure:
    """The base learning rates that converge for each m, one panel per study on shared axes (Fig. 16).

    Args:
      studies: one or more. BN batch sizes are chosen as in `heat_map`.
    Returns:
      A figure in which a bar spans the lowest to the highest η̃ that converges by `analysis.CONVERGENCE_RULE`, with a
      dot on every one that does: where dots are missing the range has gaps. Bar and dots are light and hollow where
      runs of that m have not ended. Below the bars stands a × where no η̃ converges, a grey dot where none does yet.
      Dashed lines are the limits of the grid: a bar that reaches one may go on beyond it.
    """
    columns = min(len(studies), 2 if len(studies) <= 4 else 3)
    rows = -(-len(studies) // columns)
    figure = style.new_figure(1.2 + PANEL_HEIGHT[columns] * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    base_lrs = sorted({x for study in studies for x in study.cells["base_lr"].tolist()})
    batch_sizes = sorted({m for study in studies for m in study.cells["batch_size"].tolist()})
    entries: dict[str, Any] = {}
    for axes, label, study in zip(panels.flat, paper_labels(studies), studies, strict=False):
        cells, bn_note = one_bn_batch_size(study.cells)
        entries |= _draw_ranges(axes, cells, study.chance, base_lrs[0] / 2)
        title = label + bn_note
        title = title if len(title) <= TITLE_WIDTH[columns] else title.replace(", ", ",\n", 1)
        axes.set_title(title, fontsize=8 if columns < 3 else 7)
    style.log2_axis(panels[0, 0], batch_sizes, [str(m) for m in batch_sizes], 12 // columns)
    style.log2_y_axis(panels[0, 0], base_lrs, [style.math_base_lr(x) for x in base_lrs], 7)
    _label_edges(panels, len(studies))
    text = textwrap.fill(CONVERGENCE_RULE, 110)
    entries = {label: entries[label] for label in RANGE_MARKS if label in entries}
    style.foot(figure, entries, "\n".join(filter(None, [text, _pending(studies)])), columns=3)
    return figure


def _label_edges(panels: np.ndarray, used: int) -> None:
    """Labels at the left and below the lowest panel of each column; hides the panels that are not used."""
    for i, axes in enumerate(panels.flat):
        axes.set_visible(i < used)
        axes.tick_params(labelbottom=i + panels.shape[1] >= used)
    for axes in panels[-1]:
        axes.set_xlabel(style.BATCH_SIZE_LABEL)
    for axes in panels[:, 0]:
        axes.set_ylabel(style.BASE_LR_LABEL if len(panels) == 1 else r"$\tilde{\eta}$")


def _draw_ranges(axes: Axes, cells: pd.DataFrame, chance: float, floor: float) -> dict[str, Any]:
    """Draws one study's ranges, with marks at `floor` where there is none; the legend's entries."""
    ranges = convergent_range(cells, chance).set_index("batch_size")
    by_size = cells.groupby("batch_size")
    pending, limits = by_size["pending"].sum() > 0, by_size["base_lr"].agg(["min", "max"])
    found = ranges["convergent"] > 0
    rates = cells.loc[convergent(cells, chance), ["batch_size", "base_lr"]].set_index("batch_size")["base_lr"]
    entries: dict[str, Any] = {}
    for where, label, bar, dots in (
        (found & ~pending, "converging", BAR, RATE),
        (found & pending, "provisional (runs pending)", LIGHT_BAR, {**RATE, "markerfacecolor": "white"}),
    ):
        here, dotted = ranges[where], rates[rates.index.isin(ranges.index[where])]
        axes.vlines(here.index, here["lowest_base_lr"], here["highest_base_lr"], label=label, **bar)
        axes.plot(dotted.index, dotted, label=f"_{label}", **dots)
        entries |= {label: (Line2D([], [], **bar), style.mark(**dots))} if where.any() else {}
    for where, label, look in ((~found & ~pending, "none converges", NONE), (~found & pending, "none yet", NONE_YET)):
        axes.plot(ranges.index[where], np.full(where.sum(), floor), label=label, **look)
        entries |= {label: style.mark(**look)} if where.any() else {}
    edges = [limits.index[0] / 1.4, *limits.index, limits.index[-1] * 1.4]
    for column in ("min", "max"):
        heights = limits[column].to_numpy()
        axes.plot(edges, [heights[0], *heights, heights[-1]], drawstyle="steps-mid", label=f"_{column}", **LIMIT)
    return entries | {"limits of the grid": Line2D([], [], **LIMIT)}
