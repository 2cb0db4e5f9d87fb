"""Test accuracy of every cell, over m, η̃ or the BN batch size: the form of Figs. 1–3, 5–14, 17 and 18."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.study.figures import points, style

ROW = 0.13  # inches, the height of one row of marks
MOST_EDGED = 60  # columns of a heat map whose white edges leave their colours visible


@style.styled()
def accuracy_against_batch_size(cells: pd.DataFrame, metric: Metric = ACCURACY) -> Figure:
    """Plots test accuracy over m, one curve per η̃, with a note of how much is missing. Arguments as for `heat_map`."""
    return _curves(cells, "base_lr", "batch_size", metric)


@style.styled()
def accuracy_against_base_lr(cells: pd.DataFrame, metric: Metric = ACCURACY) -> Figure:
    """Test accuracy over η̃, one curve per m: where each batch size stops converging. Arguments as for `heat_map`."""
    return _curves(cells, "batch_size", "base_lr", metric)


def _curves(cells: pd.DataFrame, rows: str, x: str, metric: Metric) -> Figure:
    cells, title = points.titled(cells, metric)
    cells = points.marked(cells, metric)
    figure, axes = style.new_axes(title)
    labels = [style.COLUMNS[rows].text(value) for value in sorted(set(cells[rows].tolist()))]
    points.plot_rows(axes, cells, rows, x, labels, style.COLUMNS[rows].symbol)
    axes.set_ylabel(metric.label)
    if style.spreads(cells["y"], metric):
        axes.set_yscale("log")
    style.grid_axis(axes, "x", x, cells[x])
    style.foot(figure, points.mark_entries(cells), points.count_note(cells, "cells"))
    return figure


@style.styled()
def accuracy_against_bn_batch_size(cells: pd.DataFrame, metric: Metric = ACCURACY) -> Figure:
    """Test accuracy over the BN batch size, one curve per SGD batch size m (Figs. 13 and 14).

    Args:
      cells: as for `heat_map`; a pair (m, BN batch size) with several base_lrs is shown at its best.
      metric: as for `heat_map`.
    Returns:
      A figure in which a planned pair without an accuracy stands in a panel below the curves, in the row of its m: as a dot
      if it has not finished, as a × if all its runs diverged.
    """
    cells = points.with_pending(cells)
    pairs = points.marked(points.best_of_each(cells, metric), metric)
    missing = sorted(set(pairs.loc[pairs["y"].isna(), "batch_size"].tolist()))
    figure = style.new_figure(3.3 + ROW * len(missing))
    below = [ROW * (len(missing) + 0.5)] if missing else []
    panels = figure.subplots(1 + len(below), sharex=True, squeeze=False, height_ratios=[2.5, *below])[:, 0]
    choice = "" if points.own_base_lrs(cells).notna().all() else r", best $\tilde{\eta}$ of each"
    panels[0].set(title=style.plain(str(cells["experiment"].iloc[0])) + choice, ylabel=metric.label)
    points.plot_rows(panels[0], pairs, "batch_size", "bn_batch_size", *points.setting_labels(cells))
    marks = _mark_missing(panels[1], pairs, missing) if missing else {}
    style.grid_axis(panels[-1], "x", "bn_batch_size", pairs["bn_batch_size"])
    style.foot(figure, points.mark_entries(pairs) | marks, points.count_note(pairs, "pairs"))
    return figure


def _mark_missing(axes: Axes, pairs: pd.DataFrame, missing: list[int]) -> dict[str, Any]:
    """Marks the pairs that have no accuracy, one row per m; returns the legend's entries."""
    places = pairs.assign(row=pairs["batch_size"].map({m: row for row, m in enumerate(missing)}))
    axes.set_yticks(range(len(missing)), [f"$m$ = {m}" for m in missing], fontsize=6.5)
    axes.set_ylim(-0.75, len(missing) - 0.25)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    kinds = {"not finished": (places["unknown"], style.NOT_YET), "diverged": (places["lost"], style.LOST)}
    return points.plot_kinds(axes, places, "bn_batch_size", "row", kinds, color=style.QUIET)


@style.styled()
def heat_map(cells: pd.DataFrame, metric: Metric = ACCURACY) -> Figure:
    """Test accuracy of every cell, m upwards and η̃ to the right.

    Args:
      cells: one experiment's rows of `analysis.planned_cells`, or of `analysis.final_accuracy`, which lacks cells without
        an epoch. Where BN batch sizes vary, only those equal to m are drawn, or the largest of each m if none is, and the
        title says so.
      metric: the column that is shown.
    Returns:
      A figure in which a cell is coloured (some seed finished), crossed on grey (none finished, some diverged), dotted
      on white (planned, and no seed has ended), or blank (not planned). A small × in a corner marks a coloured cell
      some of whose seeds diverged, a small ring one with seeds pending.
    """
    cells, title = points.titled(cells, metric)
    cells = points.marked(cells, metric)
    grids = cells.pivot(index="batch_size", columns="base_lr", values=["y", "lost"])
    values = np.ma.masked_invalid(grids["y"].to_numpy(float))
    grey = np.ma.masked_not_equal(grids["lost"].to_numpy(float), 1)
    rows, columns = values.shape
    figure, axes = style.new_axes(title, height=max(2.2, 1.2 + 0.22 * rows))
    axes.grid(False)
    norm = Normalize(0, 100)
    if values.count():
        norm = (LogNorm if style.spreads(values.compressed(), metric) else Normalize)(values.min(), values.max())
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    colors = style.COLORS if metric.best == "max" else f"{style.COLORS}_r"  # light is good
    # A mesh, not an image: PDF viewers blur small images.
    look: dict[str, Any] = {"edgecolor": "white" if columns <= MOST_EDGED else "face", "linewidth": 0.5}
    mesh = axes.pcolormesh(*edges, values, cmap=colors, norm=norm, **look)
    axes.pcolormesh(*edges, grey, cmap=ListedColormap(["0.85"]), **look)
    # places of a pivot are sorted by value, as dense ranks are
    ranked = cells.assign(x=cells["base_lr"].rank(method="dense") - 1, row=cells["batch_size"].rank(method="dense") - 1)
    style.foot(figure, _mark_cells(axes, ranked))
    for x, row, value in zip(ranked["x"], ranked["row"], ranked["y"], strict=True):
        if columns <= style.MOST_TICKS and not np.isnan(value):
            light = norm(value) if metric.best == "max" else 1 - norm(value)  # viridis is dark at its lower end
            color = "white" if light < 0.6 else "black"
            shown = f"{value:.1f}" if metric.fraction else f"{value:.2g}"
            text = axes.text(x, row, shown, ha="center", va="center", color=color, fontsize=6.5)
            text.set_in_layout(False)  # it lies inside its cell; measuring it would take most of the drawing time
    for which, column, places in (("x", "base_lr", grids["y"].columns), ("y", "batch_size", grids.index)):
        labels = list(map(style.COLUMNS[column].text, places))
        step = style.tick_step(labels)
        getattr(axes, f"set_{which}ticks")(range(0, len(places), step), labels[::step])
        axes.set(**{f"{which}label": style.COLUMNS[column].label})
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label=metric.label, pad=0.02).outline.set_visible(False)
    return figure


def _mark_cells(axes: Axes, cells: pd.DataFrame) -> dict[str, Any]:
    """Marks the cells of `heat_map` at (x, row) by kind; returns the legend's entries."""
    corner = {"color": "white", "edgecolors": "black", "linewidth": 0.6}  # seen on any colour
    kinds = {
        "diverged": ("lost", (0, 0), {"marker": "x", "color": "0.25", "s": 22}),
        "not finished": ("unknown", (0, 0), {"marker": ".", "color": "0.6", "s": 8}),
        points.DIVERGED: ("crossed", (0.4, 0.36), {"marker": "X", "s": 15, **corner}),
        points.PENDING: ("provisional", (-0.4, 0.36), {"marker": "o", "s": 8, **corner}),
    }
    entries = {}
    for label, (mask, (right, up), look) in kinds.items():
        here = cells[cells[mask]]
        if len(here):
            entries[label] = axes.scatter(here["x"] + right, here["row"] + up, label=label, **look)
    return entries
