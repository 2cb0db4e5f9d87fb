"""The cells of a figure as a table, one row per curve and one column per point on the x axis, and how its rows are drawn."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from smallbatch_jax.study.analysis import SETUP, best_first
from smallbatch_jax.study.figures import style

DIVERGED, PENDING = "some seeds diverged", "some seeds pending"


class Points(NamedTuple):
    """The points of one curve; arrays [C]."""

    x: Any
    y: np.ndarray  # NaN where the curve breaks
    std: np.ndarray  # over seeds; NaN where there is no error bar
    crossed: np.ndarray  # bool: some seeds diverged
    provisional: np.ndarray  # bool: some seeds have not ended


@dataclass(frozen=True, eq=False)
class CellTable:
    """Accuracies of R × C cells and the state of their seeds. Where nothing is planned every mask is False."""

    rows: list[Any]
    columns: list[Any]
    accuracy: np.ndarray  # float[R, C], percent; NaN where no seed finished
    std: np.ndarray  # float[R, C], percent over seeds; NaN for fewer than two
    some_diverged: np.ndarray  # bool[R, C]
    some_pending: np.ndarray  # bool[R, C]: planned seeds that have not ended
    planned: np.ndarray  # bool[R, C]

    @property
    def finished(self) -> np.ndarray:
        """bool[R, C]: some seed finished."""
        return ~np.isnan(self.accuracy)

    @property
    def all_diverged(self) -> np.ndarray:
        """bool[R, C]: some seed diverged and none finished."""
        return self.some_diverged & ~self.finished

    @property
    def partly_diverged(self) -> np.ndarray:
        """bool[R, C]: some seeds diverged and others finished; the accuracy is theirs."""
        return self.some_diverged & self.finished

    @property
    def unknown(self) -> np.ndarray:
        """bool[R, C]: planned, and no seed has ended."""
        return self.planned & ~self.finished & ~self.some_diverged

    @property
    def provisional(self) -> np.ndarray:
        """bool[R, C]: some seeds ended and others have not."""
        return self.some_pending & ~self.unknown

    @property
    def curves(self) -> list[Points]:
        """The rows, each over the columns."""
        provisional = self.provisional & self.finished
        arrays = zip(self.accuracy, self.std, self.partly_diverged, provisional, strict=True)
        return [Points(self.columns, *row) for row in arrays]

    def note(self, unit: str = "cells") -> str:
        """The numbers of cells that have not finished or have diverged."""
        return style.count_note(unit, int(self.planned.sum()), int(self.some_pending.sum()), int(self.all_diverged.sum()))


def make_table(cells: pd.DataFrame, rows: str, columns: str) -> CellTable:
    """The cells, at most one per place, by two of their columns."""
    row_values, column_values = sorted(set(cells[rows].tolist())), sorted(set(cells[columns].tolist()))

    def place(column: str) -> np.ndarray:
        table = cells.pivot(index=rows, columns=columns, values=column)
        return table.reindex(index=row_values, columns=column_values).to_numpy(float)

    accuracy, std = 100 * place("test_accuracy"), 100 * place("test_accuracy_std")
    pending = place("pending")
    return CellTable(row_values, column_values, accuracy, std, place("diverged") > 0, pending > 0, ~np.isnan(pending))


def with_pending(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of one experiment; without a plan, a cell of which no seed has ended has one pending."""
    names = cells["experiment"].unique()
    if len(names) != 1:
        raise ValueError(f"cells: a figure shows one experiment, got {len(names)} ({', '.join(map(str, names))}).")
    if "pending" in cells:
        return cells
    return cells.assign(pending=((cells["finished"] == 0) & (cells["diverged"] == 0)).astype(int))


def one_bn_batch_size(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """One cell per (m, η̃), and a note for the title if that leaves cells out or none is ordinary BN."""
    b = cells["bn_batch_size"]
    ordinary = b == cells["batch_size"]
    if ordinary.any():
        return cells[ordinary], "" if ordinary.all() else " (BN batch size = $m$)"
    cells = cells[b == cells.groupby("batch_size")["bn_batch_size"].transform("max")]
    return cells, f" (BN batch size {', '.join(map(str, sorted(set(cells['bn_batch_size'].tolist()))))})"


def best_of_each(cells: pd.DataFrame) -> pd.DataFrame:
    """The best cell of each (experiment, batch size, BN batch size), as a table takes it.

    `pending` and, where nothing finished, `diverged` are sums over its base_lrs: a run that has not ended may yet be
    better, and the best has diverged only if all have.
    """
    sums = cells.groupby(SETUP, observed=True)[["pending", "diverged"]].transform("sum")
    all_diverged = sums["diverged"].where(sums["pending"] == 0, 0)
    diverged = cells["diverged"].where(cells["finished"] > 0, all_diverged)
    return best_first(cells.assign(pending=sums["pending"], diverged=diverged)).drop_duplicates(SETUP).sort_values(SETUP)


def own_base_lrs(cells: pd.DataFrame) -> pd.Series:
    """The base_lr of each batch size that has just one, NaN where there are several; by batch size."""
    rates = cells.groupby("batch_size")["base_lr"].agg(["min", "max"])
    return rates["min"].where(rates["min"] == rates["max"])


def setting_labels(cells: pd.DataFrame) -> tuple[list[str], str]:
    """A label per batch size, with its η̃ where they differ, and the title of the legend."""
    rates = own_base_lrs(cells)
    if rates.nunique() > 1 and rates.notna().all():
        return [f"{m}, {style.math_base_lr(rate)}" for m, rate in rates.items()], r"$m$, $\tilde{\eta}$"
    return [str(m) for m in rates.index], "$m$"


def ordered_looks(count: int) -> list[dict[str, Any]]:
    """Colours and markers of curves in order, by their place in the whole grid: they stay the same as results arrive."""
    colors = style.ordered_colors(count)
    return [{"color": color, "marker": style.MARKERS[i % len(style.MARKERS)]} for i, color in enumerate(colors)]


def plot_curve(axes: Axes, points: Points, label: str, **look: Any) -> Artist | None:
    """Draws a curve with its error bars and marks; returns its line, or None where it has no point."""
    x, y = points.x, points.y
    if np.isnan(y).all():
        return None
    (line,) = axes.plot(x, y, label=label, **look)
    if not np.isnan(points.std).all():
        axes.errorbar(x, y, points.std, fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=1.5)
    hollow = points.crossed | points.provisional
    for where, mark in ((hollow, {**look, **style.HOLLOW}), (points.crossed, {**look, **style.CROSS})):
        if where.any():
            axes.plot(x, np.where(where, y, np.nan), **mark)
    return line


def plot_rows(axes: Axes, table: CellTable, labels: list[str], legend_title: str, metric: str) -> None:
    """Draws every row that has a point, with a legend beside the panel, or says that there is none."""
    looks = ordered_looks(len(labels))
    lines = {label: plot_curve(axes, row, label, **look) for row, label, look in zip(table.curves, labels, looks, strict=True)}
    entries = {label: line for label, line in lines.items() if line}
    style.side_legend(axes, entries, legend_title)
    axes.set_ylabel(f"{metric} (%)")
    if not entries:
        style.say_nothing_finished(axes)


def plot_absent(axes: Axes, height: float, kinds: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """Marks the places on the x axis that have no value, by kind: label → (places, look); returns the legend's entries."""
    for label, (places, look) in kinds.items():
        axes.plot(places, np.full(len(places), height), label=label, **look)
    return {label: style.mark(**{**look, "color": style.QUIET}) for label, (places, look) in kinds.items() if len(places)}


def mark_entries(curves: Iterable[Points], diverged: str = DIVERGED, pending: str = PENDING) -> dict[str, Any]:
    """Legend entries for the marks of `plot_curve`; the strings are their labels."""
    curves, hollow = list(curves), style.mark(**style.HOLLOW)
    entries: dict[str, Any] = {}
    if any(points.crossed.any() for points in curves):
        entries[diverged] = (hollow, style.mark(**style.CROSS))
    if any((points.provisional & ~points.crossed).any() for points in curves):
        entries[pending] = hollow
    return entries
