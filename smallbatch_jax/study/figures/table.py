"""The cells of a figure as a table: one row per curve, one column per point on the x axis."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.study.analysis import CELL, SETUP, best_cells, planned_cells
from smallbatch_jax.study.figures import style


@dataclass(frozen=True, eq=False)
class Table:
    """Accuracies of R × C cells and what became of their seeds. Where nothing is planned every mask is False."""

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
    def note(self) -> str:
        """How many cells have not finished or have diverged."""
        return style.count_note("cells", int(self.planned.sum()), int(self.some_pending.sum()), int(self.all_diverged.sum()))


def make_table(cells: pd.DataFrame, rows: str, columns: str) -> Table:
    """The cells, at most one per place, by two of their columns."""
    row_values, column_values = sorted(set(cells[rows].tolist())), sorted(set(cells[columns].tolist()))

    def place(column: str) -> np.ndarray:
        table = cells.pivot(index=rows, columns=columns, values=column)
        return table.reindex(index=row_values, columns=column_values).to_numpy(float)

    accuracy, std = 100 * place("test_accuracy"), 100 * place("test_accuracy_std")
    pending = place("pending")
    return Table(row_values, column_values, accuracy, std, place("diverged") > 0, pending > 0, ~np.isnan(pending))


def known_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """`planned_cells` of one experiment's results for the runs that they hold: a run without a row is not known of."""
    fields = [field.name for field in dataclasses.fields(Run)]
    runs = [Run(*values) for values in rows[fields].drop_duplicates().itertuples(index=False)]
    return planned_cells(rows, runs, str(rows["experiment"].iloc[0]))


def with_pending(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of one experiment; where no plan says it, a cell of which no seed has ended counts as one pending."""
    names = cells["experiment"].unique()
    if len(names) != 1:
        raise ValueError(f"cells: a figure shows one experiment, got {len(names)} ({', '.join(map(str, names))}).")
    if "pending" in cells:
        return cells
    return cells.assign(pending=((cells["finished"] == 0) & (cells["diverged"] == 0)).astype(int))


def one_bn_batch_size(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """One cell per (m, η̃), and what the title must add if that leaves cells out or departs from ordinary BN."""
    ordinary = cells["bn_batch_size"].to_numpy() == cells["batch_size"].to_numpy()
    if ordinary.any():
        return cells.loc[ordinary], "" if ordinary.all() else " (BN batch size = $m$)"
    largest = cells.groupby("batch_size")["bn_batch_size"].transform("max").to_numpy()
    cells = cells.loc[cells["bn_batch_size"].to_numpy() == largest]
    sizes = sorted(set(cells["bn_batch_size"].tolist()))
    return cells, f" (BN batch size {', '.join(map(str, sizes))})"


def best_of_each(cells: pd.DataFrame) -> pd.DataFrame:
    """The best cell of each (experiment, batch size, BN batch size), as a table takes it.

    `pending` and, where nothing finished, `diverged` are sums over its base_lrs: a run that has not ended may yet be
    better, and all must have diverged for the best to have.
    """
    totals = cells.groupby(SETUP, observed=True)[["pending", "diverged"]].sum().reset_index()
    best = best_cells(cells).drop(columns=["finished", "diverged"]).merge(cells[[*CELL, "diverged"]], on=CELL, how="left")
    best = best.merge(totals.rename(columns={"diverged": "all_diverged"}), on=SETUP)
    nothing_pending = best["all_diverged"].where(best["pending"] == 0, 0)
    return best.assign(diverged=best["diverged"].fillna(nothing_pending))


def plot_curve(axes: Axes, table: Table, row: int, label: str, **look: Any) -> Artist | None:
    """Draws one row of a table over its columns: a line that breaks where nothing finished, error bars, marks.

    Returns:
      The line, or None where the row has no point.
    """
    accuracy, std, x = table.accuracy[row], table.std[row], table.columns
    if np.isnan(accuracy).all():
        return None
    (line,) = axes.plot(x, accuracy, label=label, **look)
    color = look["color"]
    if not np.isnan(std).all():
        axes.errorbar(x, accuracy, std, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5)
    crossed = table.partly_diverged[row]
    hollow = crossed | (table.provisional[row] & table.finished[row])
    if hollow.any():
        axes.plot(x, np.where(hollow, accuracy, np.nan), **{**look, **style.HOLLOW})
    if crossed.any():
        axes.plot(x, np.where(crossed, accuracy, np.nan), color=color, **style.CROSS)
    return line


def plot_rows(axes: Axes, table: Table, labels: list[str], metric: str) -> dict[str, Any]:
    """Draws every row that has a point, or says that there is none; returns what the legend shows, by label.

    Colours go by the place in the whole table, so that a curve keeps its colour while results arrive.
    """
    entries = {}
    for i, (label, color) in enumerate(zip(labels, style.ordered_colors(len(labels)), strict=True)):
        line = plot_curve(axes, table, i, label, color=color, marker=style.MARKERS[i % len(style.MARKERS)])
        entries |= {label: line} if line else {}
    axes.set_ylabel(f"{metric} (%)")
    if not entries:
        style.say_nothing_finished(axes)
    return entries


def mark_entries(table: Table, diverged: str = "some seeds diverged", pending: str = "some seeds pending") -> dict[str, Any]:
    """Legend entries for the marks that `plot_curve` gave to points of the table; the arguments are their labels."""
    hollow = style.mark(**style.HOLLOW)
    entries: dict[str, Any] = {}
    if table.partly_diverged.any():
        entries[diverged] = (hollow, style.mark(**style.CROSS))
    if (table.provisional & table.finished & ~table.partly_diverged).any():
        entries[pending] = hollow
    return entries
