"""Test accuracy over batch sizes m and base learning rates η̃: the form of Figs. 1–3, 5–12, 17 and 18."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.table import Table, make_table, mark_entries, one_bn_batch_size, plot_rows, with_pending


@style.styled()
def accuracy_against_batch_size(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy over m, one curve per η̃, and a note of how much is missing. Arguments as for `heat_map`."""
    title, table = _lay_out(cells, "base_lr", "batch_size")
    labels = [style.math_base_lr(base_lr) for base_lr in table.rows]
    figure, axes = _curves(title, table, labels, r"$\tilde{\eta}$", metric)
    style.log2_axis(axes, table.columns, [str(m) for m in table.columns])
    axes.set_xlabel(style.BATCH_SIZE_LABEL)
    return figure


@style.styled()
def accuracy_against_base_lr(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy over η̃, one curve per m: where each batch size stops converging. Arguments as for `heat_map`."""
    title, table = _lay_out(cells, "batch_size", "base_lr")
    figure, axes = _curves(title, table, [str(m) for m in table.rows], "$m$", metric)
    style.log2_axis(axes, table.columns, [style.math_base_lr(x) for x in table.columns])
    axes.set_xlabel(style.BASE_LR_LABEL)
    return figure


@style.styled()
def heat_map(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy of every cell, m upwards and η̃ to the right.

    Args:
      cells: one experiment's rows of `analysis.planned_cells`, or of `analysis.final_accuracy`, which knows of no cell
        before its first epoch. Where BN batch sizes vary, only those equal to m are drawn, or the largest of each m if
        none is, and the title says so.
      metric: what the accuracy is called, with "accuracy" at its end.
    Returns:
      A figure in which a cell is coloured (some seed finished), crossed on grey (none finished, some diverged), dotted
      on white (planned, and no seed has ended), or blank (not planned). A small × in a corner marks a coloured cell
      some of whose seeds diverged, a small ring in another one with seeds pending.
    """
    title, table = _lay_out(cells, "batch_size", "base_lr")
    rows, columns = table.accuracy.shape
    figure, axes = style.new_axes(title, height=max(2.2, 1.2 + 0.22 * rows))
    axes.grid(False)
    accuracy = np.ma.masked_invalid(table.accuracy)
    low, high = (accuracy.min(), accuracy.max()) if accuracy.count() else (0.0, 100.0)
    norm = Normalize(low, high if high > low else low + 1)
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    # A mesh, not an image: PDF viewers blur small images.
    mesh = axes.pcolormesh(*edges, accuracy, cmap=style.COLORS, norm=norm, edgecolor="white", linewidth=0.5)
    grey = np.ma.masked_equal(table.all_diverged, False)
    axes.pcolormesh(*edges, grey, cmap=ListedColormap(["0.85"]), edgecolor="white", linewidth=0.5)
    style.foot(figure, _mark_cells(axes, table))
    if columns <= style.MOST_TICKS:
        _write_accuracies(axes, table, norm)
    step_x, step_y = style.tick_step(columns), style.tick_step(rows)
    axes.set_xticks(range(0, columns, step_x), [style.math_base_lr(x) for x in table.columns[::step_x]])
    axes.set_yticks(range(0, rows, step_y), [str(m) for m in table.rows[::step_y]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=style.BASE_LR_LABEL, ylabel=style.BATCH_SIZE_LABEL)
    figure.colorbar(mesh, ax=axes, label=f"{metric} (%)", pad=0.02).outline.set_visible(False)
    return figure


def _lay_out(cells: pd.DataFrame, rows: str, columns: str) -> tuple[str, Table]:
    """The title of a figure, and its table."""
    cells, bn_note = one_bn_batch_size(with_pending(cells))
    return style.plain(str(cells["experiment"].iloc[0])) + bn_note, make_table(cells, rows, columns)


def _curves(title: str, table: Table, labels: Sequence[str], legend_title: str, metric: str) -> tuple[Figure, Axes]:
    figure, axes = style.new_axes(title)
    entries = plot_rows(axes, table, list(labels), metric)
    if entries:
        style.side_legend(axes, entries, legend_title)
    style.foot(figure, mark_entries(table), table.note)
    return figure, axes


def _mark_cells(axes: Axes, table: Table) -> dict[str, Any]:
    """The marks of `heat_map`'s kinds of cell; the legend's entries for those that are there."""
    corner = {"color": "white", "edgecolors": "black", "linewidth": 0.6}  # seen on any colour
    kinds = {
        "diverged": (table.all_diverged, (0, 0), {"marker": "x", "color": "0.25", "s": 22}),
        "not finished": (table.unknown, (0, 0), {"marker": ".", "color": "0.6", "s": 8}),
        "some seeds diverged": (table.partly_diverged, (0.4, 0.36), {"marker": "X", "s": 15, **corner}),
        "some seeds pending": (table.provisional, (-0.4, 0.36), {"marker": "o", "s": 8, **corner}),
    }
    entries = {}
    for label, (where, (right, up), look) in kinds.items():
        if where.any():
            y, x = np.nonzero(where)
            entries[label] = axes.scatter(x + right, y + up, label=label, **look)
    return entries


def _write_accuracies(axes: Axes, table: Table, norm: Normalize) -> None:
    for y, x in np.argwhere(table.finished):
        value = table.accuracy[y, x]
        # viridis is dark at its lower end and light at its upper one
        color = "white" if norm(value) < 0.6 else "black"
        text = axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, fontsize=6.5)
        text.set_in_layout(False)  # it lies inside its cell; measuring it would take most of the drawing time
