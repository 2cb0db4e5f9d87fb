"""Learning curves of single cells, by epoch (Fig. 4) or over the time of a run."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import CELL, best_first, known_cells
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.cost import pending_note, time_note
from smallbatch_jax.study.figures.labels import metric_name
from smallbatch_jax.study.figures.table import one_bn_batch_size, ordered_looks, own_base_lrs, setting_labels, with_pending
from smallbatch_jax.study.study import Study

HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a × apart from the curves under it


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
      cells: `analysis.planned_cells` of the experiment, so that a batch size without an epoch is named; by default those of
        `rows`. BN batch sizes are chosen as in `heat_map`.
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
    entries = _plot_cells(panels, rows, chosen, labels)
    for column, axes in panels.items():
        axes.set(title=titles[column], xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if not entries:
            style.say_nothing_finished(axes, "no epoch has ended")
    panels["train_accuracy"].set_ylabel("accuracy (%)")
    figure.suptitle(title)
    without = [m for m, label in zip(chosen["batch_size"], labels, strict=True) if label not in entries]
    if (chosen["diverged"] > 0).any():
        entries["diverged"] = style.mark(**style.CROSS)
    style.side_legend(panels["test_accuracy"], entries, legend_title)
    pending, diverged, finished = (int(chosen[name].sum()) for name in ("pending", "diverged", "finished"))
    counts = style.count_note("runs", pending + diverged + finished, pending, diverged)
    style.foot(figure, {}, style.note(counts, style.named("no epoch yet", without)))
    return figure


def _choose_cells(rows: pd.DataFrame, base_lr: float | None, cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """One cell per batch size, ascending, and the figure's title."""
    cells, bn_note = one_bn_batch_size(with_pending(cells))
    name = str(cells["experiment"].iloc[0])
    if base_lr is None and own_base_lrs(cells).notna().all():
        chosen = cells
    else:
        wanted = _default_base_lr(rows, cells) if base_lr is None else base_lr
        chosen = cells[np.isclose(cells["base_lr"], wanted, rtol=1e-6, atol=0)]
        if chosen.empty:
            there = ", ".join(map(format_base_lr, sorted(set(cells["base_lr"].tolist()))))
            raise ValueError(f"base_lr: no run of {name} has {format_base_lr(wanted)}; it has {there}.")
    rates = sorted(set(chosen["base_lr"].tolist()))
    eta = style.math_base_lr(rates[0]).strip("$")
    shown = rf"$\tilde{{\eta}} = {eta}$" if len(rates) == 1 else r"each $m$ at its own $\tilde{\eta}$"
    return chosen.sort_values("batch_size"), f"{style.plain(name)}{bn_note}, {shown}"


def _default_base_lr(rows: pd.DataFrame, cells: pd.DataFrame) -> float:
    """That of the best cell; before one has finished, the one with most epochs; of equals, the smallest."""
    if cells["finished"].any():
        return float(best_first(cells)["base_lr"].iloc[0])
    return float(rows["base_lr"].mode().min() if len(rows) else cells["base_lr"].min())


@style.styled()
def accuracy_against_time(study: Study) -> Figure:
    """Test accuracy over a run's own time, one curve per m at its best η̃.

    Args:
      study: with timings. BN batch sizes are chosen as in `heat_map`.
    Returns:
      A figure in which a curve is drawn as in `convergence`. Before a run of an m has finished, its curve is at the η̃ that
      has come furthest. A batch size without a known time or epoch is named below.
    """
    cells, bn_note = one_bn_batch_size(study.cells)
    epochs = study.rows.groupby(CELL, observed=True).size().rename("epochs").reset_index()
    known = cells.merge(epochs, how="left", on=CELL).fillna({"epochs": 0})
    known = known.sort_values(["test_accuracy", "epochs", "base_lr"], ascending=[False, False, True], na_position="last")
    chosen = known.drop_duplicates("batch_size").sort_values("batch_size")
    rows = cost.with_time(study.rows, study.timings).dropna(subset="seconds")
    labels, legend_title = setting_labels(chosen)
    figure, axes = style.new_axes(style.plain(study.name) + bn_note + r", best $\tilde{\eta}$ of each $m$")
    entries = _plot_cells({"test_accuracy": axes}, rows, chosen, labels, x="seconds")
    axes.set(xlabel="time of a run", ylabel=f"{metric_name(study.experiment)} (%)")
    if lines := axes.get_lines():
        style.unit_axis(axes, "x", np.concatenate([np.asarray(line.get_xdata(), float) for line in lines]), style.SECONDS)
    else:
        style.say_nothing_finished(axes, "no epoch has been timed", scaled=False)
    without = [m for m, label in zip(chosen["batch_size"], labels, strict=True) if label not in entries]
    if any(line.get_marker() == "x" for line in lines):
        entries["diverged"] = style.mark(**style.CROSS)
    style.side_legend(axes, entries, legend_title)
    style.foot(figure, {}, style.note(pending_note(cells), style.named("not timed", without), end=time_note(study, cells)))
    return figure


def _plot_cells(
    panels: dict[str, Axes], rows: pd.DataFrame, chosen: pd.DataFrame, labels: list[str], x: str = "epoch"
) -> dict[str, Any]:
    """Draws the runs of every chosen cell into all panels; returns the legend's entries, none for a cell without rows.

    Panels are given by the column that they show, over column `x`, which is the same for all seeds after as many epochs.
    """
    entries, key = {}, ["batch_size", "bn_batch_size", "base_lr"]
    settings = chosen[key].itertuples(index=False)
    for i, (label, look, values) in enumerate(zip(labels, ordered_looks(len(chosen)), settings, strict=True)):
        runs = rows[(rows[key] == list(values)).all(axis=1)].sort_values("epoch")
        if runs.empty:
            continue
        step = max(1, int(runs["epoch"].max()) // 8)
        look = {**look, "markersize": 3, "markevery": (i % step, step)}
        drawn = [_plot_runs(axes, runs, x, column, look) for column, axes in panels.items()]
        entries[label] = style.mark(**(look if any(drawn) else {**style.CROSS, "color": look["color"]}))
    return entries


def _plot_runs(axes: Axes, runs: pd.DataFrame, x: str, column: str, look: dict[str, Any]) -> bool:
    """Draws the runs of one cell, sorted by epoch; returns whether they have a finite epoch to draw."""
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
        axes.plot(run[x].iloc[-1:], run["percent"].iloc[-1:], **{**style.CROSS, "color": look["color"]}, path_effects=HALO)
    return bool(len(percent))
