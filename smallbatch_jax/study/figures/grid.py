"""Test accuracy of every cell, over m, η̃ or the BN batch size: the form of Figs. 1–3, 5–14, 17 and 18."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.table import (
    DIVERGED,
    PENDING,
    CellTable,
    best_of_each,
    make_table,
    mark_entries,
    one_bn_batch_size,
    own_base_lrs,
    plot_absent,
    plot_rows,
    setting_labels,
    with_pending,
)

ROW = 0.13  # inches, the height of one row of marks


@style.styled()
def accuracy_against_batch_size(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy over m, one curve per η̃, and a note of how much is missing. Arguments as for `heat_map`."""
    return _curves(cells, "base_lr", "batch_size", metric)


@style.styled()
def accuracy_against_base_lr(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy over η̃, one curve per m: where each batch size stops converging. Arguments as for `heat_map`."""
    return _curves(cells, "batch_size", "base_lr", metric)


def _curves(cells: pd.DataFrame, rows: str, columns: str, metric: str) -> Figure:
    title, table = _lay_out(cells, rows, columns)
    figure, axes = style.new_axes(title)
    plot_rows(axes, table, list(map(style.COLUMNS[rows].text, table.rows)), style.COLUMNS[rows].symbol, metric)
    style.grid_axis(axes, "x", columns, table.columns)
    style.foot(figure, mark_entries(table.curves), table.note())
    return figure


def _lay_out(cells: pd.DataFrame, rows: str, columns: str) -> tuple[str, CellTable]:
    """The title of a figure, and its table."""
    cells, bn_note = one_bn_batch_size(with_pending(cells))
    return style.plain(str(cells["experiment"].iloc[0])) + bn_note, make_table(cells, rows, columns)


@style.styled()
def accuracy_against_bn_batch_size(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy over the BN batch size, one curve per SGD batch size m (Figs. 13 and 14).

    Args:
      cells: as for `heat_map`; a pair (m, BN batch size) with several base_lrs is shown at its best.
      metric: as for `heat_map`.
    Returns:
      A figure in which a planned pair without an accuracy stands in a panel below the curves, in the row of its m: as a dot
      if it has not finished, as a × if all its runs diverged.
    """
    cells = with_pending(cells)
    table = make_table(best_of_each(cells), "batch_size", "bn_batch_size")
    missing = np.flatnonzero((table.unknown | table.all_diverged).any(axis=1)).tolist()
    figure = style.new_figure(3.3 + ROW * len(missing))
    below = [ROW * (len(missing) + 0.5)] if missing else []
    panels = figure.subplots(1 + len(below), sharex=True, squeeze=False, height_ratios=[2.5, *below])[:, 0]
    choice = "" if own_base_lrs(cells).notna().all() else r", best $\tilde{\eta}$ of each"
    panels[0].set_title(style.plain(str(cells["experiment"].iloc[0])) + choice)
    plot_rows(panels[0], table, *setting_labels(cells), metric)
    marks = _mark_missing(panels[1], table, missing) if missing else {}
    style.grid_axis(panels[-1], "x", "bn_batch_size", table.columns)
    style.foot(figure, mark_entries(table.curves) | marks, table.note("pairs"))
    return figure


def _mark_missing(axes: Axes, table: CellTable, missing: list[int]) -> dict[str, Any]:
    """Marks the places of some rows that have no accuracy, a row each; the legend's entries."""
    columns, colors, entries = np.array(table.columns), style.ordered_colors(len(table.rows)), {}
    kinds = {"not finished": (table.unknown, style.NOT_YET), "diverged": (table.all_diverged, style.LOST)}
    for height, i in enumerate(missing):
        here = {label: (columns[where[i]], {**look, "color": colors[i]}) for label, (where, look) in kinds.items()}
        entries |= plot_absent(axes, height, here)
    axes.set_yticks(range(len(missing)), [f"$m$ = {table.rows[i]}" for i in missing], fontsize=6.5)
    axes.set_ylim(-0.75, len(missing) - 0.25)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    return {label: entries[label] for label in kinds if label in entries}


@style.styled()
def heat_map(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy of every cell, m upwards and η̃ to the right.

    Args:
      cells: one experiment's rows of `analysis.planned_cells`, or of `analysis.final_accuracy`, which has no cell before its
        first epoch. Where BN batch sizes vary, only those equal to m are drawn, or the largest of each m if none is, and the
        title says so.
      metric: the name of the accuracy; it ends with "accuracy".
    Returns:
      A figure in which a cell is coloured (some seed finished), crossed on grey (none finished, some diverged), dotted
      on white (planned, and no seed has ended), or blank (not planned). A small × in a corner marks a coloured cell
      some of whose seeds diverged, a small ring one with seeds pending.
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
    for which, column, values in (("x", "base_lr", table.columns), ("y", "batch_size", table.rows)):
        step, names = style.tick_step(len(values)), style.COLUMNS[column]
        getattr(axes, f"set_{which}ticks")(range(0, len(values), step), list(map(names.text, values[::step])))
        axes.set(**{f"{which}label": names.label})
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label=f"{metric} (%)", pad=0.02).outline.set_visible(False)
    return figure


def _mark_cells(axes: Axes, table: CellTable) -> dict[str, Any]:
    """Marks the cells of `heat_map` by kind; the legend's entries."""
    corner = {"color": "white", "edgecolors": "black", "linewidth": 0.6}  # seen on any colour
    kinds = {
        "diverged": (table.all_diverged, (0, 0), {"marker": "x", "color": "0.25", "s": 22}),
        "not finished": (table.unknown, (0, 0), {"marker": ".", "color": "0.6", "s": 8}),
        DIVERGED: (table.partly_diverged, (0.4, 0.36), {"marker": "X", "s": 15, **corner}),
        PENDING: (table.provisional, (-0.4, 0.36), {"marker": "o", "s": 8, **corner}),
    }
    entries = {}
    for label, (where, (right, up), look) in kinds.items():
        if where.any():
            y, x = np.nonzero(where)
            entries[label] = axes.scatter(x + right, y + up, label=label, **look)
    return entries


def _write_accuracies(axes: Axes, table: CellTable, norm: Normalize) -> None:
    for y, x in np.argwhere(table.finished):
        value = table.accuracy[y, x]
        # viridis is dark at its lower end and light at its upper one
        color = "white" if norm(value) < 0.6 else "black"
        text = axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, fontsize=6.5)
        text.set_in_layout(False)  # it lies inside its cell; measuring it would take most of the drawing time
