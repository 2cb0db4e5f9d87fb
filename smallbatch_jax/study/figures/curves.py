"""Curves of single settings: how they converge (Fig. 4), and what the BN batch size does to them (Fig. 13)."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from smallbatch_jax.study.analysis import format_base_lr
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.table import (
    Table,
    best_of_each,
    known_cells,
    make_table,
    mark_entries,
    one_bn_batch_size,
    plot_rows,
    with_pending,
)

BATCH_SIZE_AND_BASE_LR = r"$m$, $\tilde{\eta}$"
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a × apart from the curves under it
ROW = 0.13  # inches, the height of one row of marks


@style.styled()
def convergence(
    rows: pd.DataFrame,
    base_lr: float | None = None,
    cells: pd.DataFrame | None = None,
    metric: str = style.TEST_ACCURACY,
) -> Figure:
    """Training and test accuracy by epoch, one curve per m at one η̃ (Fig. 4).

    Args:
      rows: one experiment's results, one row per run and epoch.
      base_lr: that of the best cell by default; where each m has just one, all are drawn, each at its own.
      cells: `analysis.planned_cells` of the experiment, so that a batch size without an epoch is named; by default what
        `rows` hold. BN batch sizes are chosen as in `heat_map`.
      metric: as for `heat_map`.
    Returns:
      A figure in which a curve is the mean over the seeds that have not diverged, as far as each has come, and the band
      their deviation. Each diverged run is a curve of its own, up to a × at its last finite epoch; a batch size whose
      runs have no finite epoch is a × in the legend.
    Raises:
      ValueError: the cells are of several experiments, or none is at `base_lr`.
    """
    chosen, title = _choose_cells(rows, base_lr, known_cells(rows) if cells is None else cells)
    labels, legend_title = setting_labels(chosen)
    figure = style.new_figure(3.1)
    titles = {"train_accuracy": "training", "test_accuracy": metric.removesuffix(" accuracy")}
    panels = dict(zip(titles, figure.subplots(1, 2, sharey=True), strict=True))
    entries = plot_cells(panels, rows, chosen, labels)
    for column, axes in panels.items():
        axes.set(title=titles[column], xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if not entries:
            style.say_nothing_finished(axes, "no epoch has ended")
    panels["train_accuracy"].set_ylabel("accuracy (%)")
    figure.suptitle(title)
    if (chosen["diverged"] > 0).any():
        entries["diverged"] = style.mark(**style.CROSS)
    if entries:
        style.side_legend(panels["test_accuracy"], entries, legend_title)
    without = [str(m) for m, label in zip(chosen["batch_size"], labels, strict=True) if label not in entries]
    style.foot(figure, {}, _convergence_note(chosen, without))
    return figure


def _choose_cells(rows: pd.DataFrame, base_lr: float | None, cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """One cell per batch size, ascending, and the figure's title."""
    cells, bn_note = one_bn_batch_size(with_pending(cells))
    name = style.plain(str(cells["experiment"].iloc[0])) + bn_note
    if base_lr is None and own_base_lrs(cells).notna().all():
        chosen = cells
    else:
        wanted = _default_base_lr(rows, cells) if base_lr is None else base_lr
        chosen = cells[np.isclose(cells["base_lr"], wanted, rtol=1e-6, atol=0)]
        if chosen.empty:
            there = ", ".join(map(format_base_lr, sorted(set(cells["base_lr"].tolist()))))
            raise ValueError(f"base_lr: no run of {cells['experiment'].iloc[0]} has {format_base_lr(wanted)}; it has {there}.")
    rates = sorted(set(chosen["base_lr"].tolist()))
    eta = style.math_base_lr(rates[0]).strip("$")
    shown = rf"$\tilde{{\eta}} = {eta}$" if len(rates) == 1 else r"each $m$ at its own $\tilde{\eta}$"
    return chosen.sort_values("batch_size"), f"{name}, {shown}"


def own_base_lrs(cells: pd.DataFrame) -> pd.Series:
    """The base_lr of each batch size that has just one, NaN where there are several; by batch size."""
    rates = cells.groupby("batch_size")["base_lr"].agg(["min", "max"])
    return rates["min"].where(rates["min"] == rates["max"])


def _default_base_lr(rows: pd.DataFrame, cells: pd.DataFrame) -> float:
    """That of the best cell; before one has finished, that of which most epochs are there; of equals, the smallest."""
    if cells["finished"].any():
        best = cells.sort_values(["test_accuracy", "base_lr"], ascending=[False, True], na_position="last")
        return float(best["base_lr"].iloc[0])
    return float(rows["base_lr"].mode().min() if len(rows) else cells["base_lr"].min())


def setting_labels(cells: pd.DataFrame) -> tuple[list[str], str]:
    """A label per batch size, with its η̃ where they differ, and what the labels say."""
    rates = own_base_lrs(cells)
    if rates.nunique() > 1 and rates.notna().all():
        return [f"{m}, {style.math_base_lr(rate)}" for m, rate in rates.items()], BATCH_SIZE_AND_BASE_LR
    return [str(m) for m in rates.index], "$m$"


def plot_cells(
    panels: dict[str, Axes], rows: pd.DataFrame, chosen: pd.DataFrame, labels: list[str], x: str = "epoch"
) -> dict[str, Any]:
    """Draws the runs of every chosen cell into all panels; returns the legend's entries, none for a cell without rows.

    Panels are given by the column that they show, over column `x`, which is the same for all seeds after as many epochs.
    """
    entries = {}
    key = ["batch_size", "bn_batch_size", "base_lr"]
    colors = style.ordered_colors(len(chosen))
    for i, (label, values) in enumerate(zip(labels, chosen[key].itertuples(index=False), strict=True)):
        runs = rows[(rows[key] == list(values)).all(axis=1)].sort_values("epoch")
        if runs.empty:
            continue
        look = {"color": colors[i], "marker": style.MARKERS[i % len(style.MARKERS)], "markersize": 3}
        step = max(1, int(runs["epoch"].max()) // 8)
        drawn = [_plot_runs(axes, runs, x, column, {**look, "markevery": (i % step, step)}) for column, axes in panels.items()]
        entries[label] = style.mark(**look) if any(drawn) else style.mark(**{**style.CROSS, "color": colors[i]})
    return entries


def _plot_runs(axes: Axes, runs: pd.DataFrame, x: str, column: str, look: dict[str, Any]) -> bool:
    """Draws the runs of one cell, sorted by epoch; whether they have a finite epoch to draw."""
    percent = runs.assign(percent=100 * runs[column]).dropna(subset=[column])
    lost = percent["status"] == "diverged"
    together = percent[~lost].groupby(x)["percent"].agg(["mean", "std"])
    if len(together):
        axes.plot(together.index, together["mean"], **look)
        if together["std"].notna().any():
            low, high = together["mean"] - together["std"], together["mean"] + together["std"]
            axes.fill_between(together.index, low, high, color=look["color"], alpha=0.2, linewidth=0)
    for _, run in percent[lost].groupby("seed"):
        axes.plot(run[x], run["percent"], **look)
        axes.plot(run[x].iloc[-1:], run["percent"].iloc[-1:], color=look["color"], **style.CROSS, path_effects=HALO)
    return bool(len(percent))


def _convergence_note(chosen: pd.DataFrame, without_epoch: list[str]) -> str:
    pending, diverged = int(chosen["pending"].sum()), int(chosen["diverged"].sum())
    counts = style.count_note("runs", pending + diverged + int(chosen["finished"].sum()), pending, diverged)
    return f"{counts}; no epoch yet: $m$ = {', '.join(without_epoch)}" if without_epoch else counts


@style.styled()
def accuracy_against_bn_batch_size(cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Figure:
    """Test accuracy over the BN batch size, one curve per SGD batch size m (Figs. 13 and 14).

    Args:
      cells: as for `heat_map`; where a pair (m, BN batch size) has several base_lrs, its best counts.
      metric: as for `heat_map`.
    Returns:
      A figure in which a pair that has no accuracy stands in a panel below the curves, in the row of its m: as a dot if
      it has not finished, as a × if all its runs diverged. A pair that is not planned is nowhere.
    """
    cells = with_pending(cells)
    table = make_table(best_of_each(cells), "batch_size", "bn_batch_size")
    labels, legend_title = setting_labels(cells)
    missing = [i for i in range(len(table.rows)) if (table.unknown | table.all_diverged)[i].any()]
    figure = style.new_figure(3.3 + ROW * len(missing))
    below = [ROW * (len(missing) + 0.5)] if missing else []
    panels = figure.subplots(1 + len(below), sharex=True, squeeze=False, height_ratios=[2.5, *below])[:, 0]
    choice = "" if own_base_lrs(cells).notna().all() else r", best $\tilde{\eta}$ of each"
    panels[0].set_title(style.plain(str(cells["experiment"].iloc[0])) + choice)
    entries = plot_rows(panels[0], table, labels, metric)
    if entries:
        style.side_legend(panels[0], entries, legend_title)
    marks = _mark_missing(panels[1], table, missing) if missing else {}
    panels[-1].set_xlabel("BN batch size")
    style.log2_axis(panels[-1], table.columns, [str(b) for b in table.columns])
    style.foot(figure, mark_entries(table) | marks, table.note.replace("cells", "pairs"))
    return figure


def _mark_missing(axes: Axes, table: Table, missing: list[int]) -> dict[str, Any]:
    """Marks the places of some rows that have no accuracy, a row each; the legend's entries."""
    kinds = {"not finished": (table.unknown, style.DOT), "diverged": (table.all_diverged, {**style.CROSS, "markersize": 4.5})}
    colors = style.ordered_colors(len(table.rows))
    for height, i in enumerate(missing):
        for where, look in kinds.values():
            x = np.array(table.columns)[where[i]]
            axes.plot(x, np.full(len(x), height), color=colors[i], label=f"_{table.rows[i]}", **look)
    axes.set_yticks(range(len(missing)), [f"$m$ = {table.rows[i]}" for i in missing], fontsize=6.5)
    axes.set_ylim(-0.75, len(missing) - 0.25)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    return {label: style.mark(**look) for label, (where, look) in kinds.items() if where.any()}
