"""Runs of single cells: learning curves by epoch (Fig. 4) or time, time to an accuracy, accuracy against memory, diagnostics.

Times depend on the machine that trained (`study.cost`), so equal results can give different cost figures; these need a study
with timings. Where BN batch sizes vary, they are chosen as in `grid.heat_map`.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import cell_columns, known_cells
from smallbatch_jax.study.figures import points, style
from smallbatch_jax.study.figures.labels import named_metric
from smallbatch_jax.study.study import Study

TITLE_WIDTH = 64  # characters
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a × apart from the curves under it


@style.styled()
def convergence(
    rows: pd.DataFrame, base_lr: float | None = None, cells: pd.DataFrame | None = None, metric: Metric = ACCURACY
) -> Figure:
    """Training and test accuracy, or another metric, by epoch, one curve per m at one η̃ (Fig. 4).

    Args:
      rows: one experiment's results, one row per run and epoch.
      base_lr: the η̃ shown; by default that of the best cell or, where each m has only one η̃, each at its own.
      cells: `analysis.planned_cells` of the experiment, so that a batch size without an epoch is named; by default those of
        `rows`.
      metric: as for `heat_map`.
    Returns:
      A figure in which a curve is the mean over the seeds that have not diverged, as far as each has come, and the band
      their deviation. Each diverged run is a curve of its own, up to a × at its last finite epoch; a batch size whose
      runs have no finite epoch is a × in the legend.
    Raises:
      ValueError: the cells are of several experiments, or none is at `base_lr`.
    """
    chosen, title = _choose_cells(rows, base_lr, known_cells(rows, metric) if cells is None else cells, metric)
    figure = style.new_figure(3.1)
    left, right = figure.subplots(1, 2, sharey=True)
    without = _plot_cells({f"train_{metric.name}": left, metric.column: right}, rows, chosen, metric.scale)
    for axes, name in ((left, "training"), (right, metric.title.removesuffix(f" {metric.noun}"))):
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if len(without) == len(chosen):
            style.say_nothing_finished(axes, "no epoch has ended")
    if style.spreads(np.concatenate([*(line.get_ydata() for axes in (left, right) for line in axes.lines), []]), metric):
        left.set_yscale("log")
    left.set_ylabel(metric.noun + " (%)" * metric.fraction)
    figure.suptitle(title)
    style.foot(figure, {}, points.run_note(chosen, diverged=True), style.named("no epoch yet", without))
    return figure


def _choose_cells(rows: pd.DataFrame, base_lr: float | None, cells: pd.DataFrame, metric: Metric) -> tuple[pd.DataFrame, str]:
    """One cell per batch size, ascending, and the figure's title."""
    cells, title = points.titled(cells, metric)
    chosen = cells
    if base_lr is not None or points.own_base_lrs(cells).isna().any():
        wanted = float(_best_first(cells, rows, metric)["base_lr"].iloc[0]) if base_lr is None else base_lr
        nearest = min(cells["base_lr"], key=lambda rate: abs(rate - wanted))
        chosen = cells[(cells["base_lr"] == nearest) & bool(np.isclose(nearest, wanted, rtol=1e-6, atol=0))]
        if chosen.empty:
            there = ", ".join(map(format_base_lr, sorted(set(cells["base_lr"].tolist()))))
            raise ValueError(f"base_lr: no run of {title} has {format_base_lr(wanted)}; it has {there}.")
    eta = style.math_base_lr(chosen["base_lr"].iloc[0]).strip("$")
    shown = rf"$\tilde{{\eta}} = {eta}$" if chosen["base_lr"].nunique() == 1 else r"each $m$ at its own $\tilde{\eta}$"
    return chosen.sort_values("batch_size"), f"{title}, {shown}"


def _best_first(cells: pd.DataFrame, rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Sorts cells, the best first and those that have not finished last, by falling number of epochs."""
    epochs = rows.groupby(cell_columns(cells), observed=True).size().rename("epochs").reset_index()
    order = {metric.column: metric.best == "min", "epochs": False, "base_lr": True}
    return cells.merge(epochs, how="left").sort_values(list(order), ascending=list(order.values()))


def _plot_best(study: Study, rows: pd.DataFrame, column: str, scale: float, x: str) -> tuple[Figure, Axes, list[int]]:
    """Draws the best cell of each m, or the one that has trained longest while none has finished, by `_plot_cells`."""
    cells, title = points.titled(study.cells, study.metric)
    chosen = _best_first(cells, study.rows, study.metric).drop_duplicates("batch_size").sort_values("batch_size")
    figure, axes = style.new_axes(title + r", best $\tilde{\eta}$ of each $m$")
    return figure, axes, _plot_cells({column: axes}, rows, chosen, scale, x)


@style.styled()
def accuracy_against_time(study: Study) -> Figure:
    """Test accuracy over a run's own time, one curve per m at its best η̃.

    Returns:
      A figure in which a curve is drawn as in `convergence`. While no run of an m has finished, its curve shows the η̃
      that has trained longest. Batch sizes without a known time or epoch are named below the panel.
    """
    metric = named_metric(study.experiment)
    cells, _ = points.one_bn_batch_size(study.cells, metric)
    rows = cost.with_time(study.rows, study.timings).dropna(subset="seconds")
    figure, axes, without = _plot_best(study, rows, metric.column, metric.scale, "seconds")
    axes.set(xlabel="time of a run", ylabel=metric.label)
    if axes.has_data():
        style.unit_axis(axes, "x", axes.dataLim.intervalx, style.SECONDS)
    else:
        style.say_nothing_finished(axes, "no epoch has been timed")
        axes.set_xticks([])
    style.foot(figure, {}, points.run_note(cells), style.named("not timed", without), end=_time_note(study, cells))
    return figure


def _plot_cells(panels: dict[str, Axes], rows: pd.DataFrame, chosen: pd.DataFrame, scale: float, x: str = "epoch") -> list[int]:
    """Draws each panel's column, times `scale`, over `x` for the chosen cells; returns the batch sizes without rows."""
    rows = rows.merge(chosen[cell_columns(chosen)[1:]]).sort_values("epoch")
    labels, legend_title = points.setting_labels(chosen)
    looks, entries = style.ordered_looks(len(chosen)), {}
    for i, (label, look, m) in enumerate(zip(labels, looks, chosen["batch_size"], strict=True)):
        runs = rows[rows["batch_size"] == m]
        if runs.empty:
            continue
        step = max(1, int(runs["epoch"].max()) // 8)
        look["markersize"] = 3
        for column, axes in panels.items():
            shown = runs.dropna(subset=[column]).assign(shown=scale * runs[column])
            _plot_runs(axes, shown, x, {**look, "markevery": (i % step, step)})
        finite = runs[list(panels)].notna().any(axis=None)
        entries[label] = style.mark(**(look if finite else {**style.CROSS, "color": look["color"]}))
    if (rows["status"] == "diverged").any():
        entries["diverged"] = style.mark(**style.CROSS)
    style.side_legend(list(panels.values())[-1], entries, legend_title)
    return chosen.loc[~chosen["batch_size"].isin(rows["batch_size"]), "batch_size"].tolist()


def _plot_runs(axes: Axes, runs: pd.DataFrame, x: str, look: dict[str, Any]) -> None:
    """Draws `shown` in the finite epochs of a cell: the mean over seeds in a band of their deviation, and each diverged run."""
    lost = runs["status"] == "diverged"
    together = runs[~lost].groupby(x)["shown"].agg(["mean", "std"])
    if len(together):
        axes.plot(together.index, together["mean"], **look)
    if together["std"].notna().any():
        low, high = together["mean"] - together["std"], together["mean"] + together["std"]
        axes.fill_between(together.index, low, high, color=look["color"], alpha=0.2, linewidth=0)
    for _, run in runs[lost].groupby("seed"):
        axes.plot(run[x], run["shown"], **look)
        axes.plot(run[x].iloc[-1:], run["shown"].iloc[-1:], **{**style.CROSS, "color": look["color"]}, path_effects=HALO)


@style.styled()
def time_to_accuracy(study: Study, accuracy: float | None = None) -> Figure:
    """Plots a run's own time until it reaches a test accuracy, for each m at the η̃ that gets there first.

    Args:
      study: one with `timings`; where its BN batch sizes vary, they are chosen as in `heat_map`.
      accuracy: the target, a fraction, or a value of the study's metric; by default `cost.target_accuracy`, 90 % of the way
        from chance to the best.
    Returns:
      A figure in which a point is hollow where other runs of its m have not ended and may be faster, and crossed where seeds
      of its η̃ diverged. At the top stands a × where no η̃ of an m gets there, a grey dot where none has yet.
    """
    metric = named_metric(study.experiment)
    cells, title = points.titled(study.cells, metric)
    target = cost.target_accuracy(cells, study.chance, metric=metric) if accuracy is None else accuracy
    table = cost.planned_times(cells, study.rows, study.timings, target, metric)
    seconds, pending, never = table["seconds"].astype(float), table["pending"] > 0, table["epochs"].isna()
    crossed = seconds.notna() & (table["diverged"] > 0)
    times = table.assign(y=seconds, std=np.nan, crossed=crossed, provisional=seconds.notna() & pending)
    goal = f"time to {metric.scale * target:.4g}{' %' * metric.fraction} {metric.title}"
    goal = "no run has finished" if np.isnan(target) else goal
    figure, axes = style.new_axes(title + (", " if len(title + goal) < TITLE_WIDTH else ",\n") + goal)
    style.unit_axis(axes, "y", seconds.dropna().tolist() or (1, 10), style.SECONDS)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.14 if never.any() else high)
    points.plot_curve(axes, times, "batch_size", "", color=style.CATEGORIES[0], marker="o")
    absent = {"target not reached": (never & ~pending, style.LOST), "none yet": (never & pending, style.NOT_YET)}
    at_top = table.assign(y=high * (high / low) ** 0.08)
    marks = points.mark_entries(times, pending=points.PROVISIONAL)
    marks |= points.plot_kinds(axes, at_top, "batch_size", "y", absent, color=style.QUIET)
    axes.set_ylabel("time of a run")
    style.grid_axis(axes, "x", "batch_size", table["batch_size"])
    rule = f"{metric.name}: {100 * cost.TARGET:.0f} % of the way from chance to the best" if accuracy is None else ""
    untimed = style.named("not timed", table.loc[seconds.isna() & ~never, "batch_size"])
    style.foot(figure, marks, rule, points.run_note(cells), untimed, end=_time_note(study, cells))
    return figure


@style.styled()
def accuracy_against_memory(study: Study) -> Figure:
    """Plots the best test accuracy over η̃ of each m against the peak memory of the program that trained it.

    Returns:
      A figure with a point per m, hollow and crossed as in `best_accuracy`. The memory is that of all lanes of the program,
      whose number stands in the legend, on all devices of a process, without the dataset.
    """
    metric = named_metric(study.experiment)
    cells, title = points.titled(study.cells, metric)
    best = points.marked(points.best_of_each(cells, metric), metric)
    best = best.merge(program_costs(study, cells), how="left", on=cost.PROGRAM)
    here = best["y"].notna() & best["peak_bytes"].notna()
    figure, axes = style.new_axes(title)
    axes.set(xlabel="peak memory of the program", ylabel=f"best {metric.label}")
    labels = [f"{m} ({lanes:g})" for m, lanes in zip(best["batch_size"], best["lanes"], strict=True)]
    known = best.assign(y=best["y"].where(here))
    points.plot_rows(axes, known, "batch_size", "peak_bytes", labels, "$m$ (lanes)", linestyle="")
    if here.any():
        style.unit_axis(axes, "x", best.loc[here, "peak_bytes"], style.BYTES)
        axes.margins(y=0.12)
    else:
        axes.set_xticks([])
    unknown = style.named("memory not known", best.loc[best["y"].notna() & ~here, "batch_size"])
    lost = style.named("diverged", best.loc[best["lost"], "batch_size"])
    marks = points.mark_entries(best[here], pending=points.PROVISIONAL)
    style.foot(figure, marks, points.run_note(cells), lost, unknown, end="memory of all lanes together, without the dataset")
    return figure


@style.styled()
def noise_scale(study: Study) -> Figure:
    """Plots the gradient noise scale by epoch, one curve per m at its best η̃; the experiment must have that diagnostic.

    Returns:
      A figure with curves as in `convergence`, of the evaluations whose noise scale is larger than its error.
    """
    value, error = study.rows["train_noise_scale"], study.rows["train_noise_scale_error"]
    known = study.rows.assign(train_noise_scale=value.where(error < value))
    figure, axes, without = _plot_best(study, known, "train_noise_scale", 1.0, "epoch")
    axes.set(xlabel="epoch", ylabel="gradient noise scale (examples)")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if axes.has_data():
        axes.set_yscale("log")
    else:
        style.say_nothing_finished(axes, "no noise scale is larger than its error")
    runs = points.run_note(points.one_bn_batch_size(study.cells, study.metric)[0])
    style.foot(figure, {}, runs, style.named("no epoch yet", without), end="without values smaller than their error")
    return figure


@style.styled()
def sharpness(study: Study) -> Figure:
    """Plots every run's sharpness against 2/η by m, before the learning rate is reduced; the experiment needs that diagnostic.

    Gradient descent on a quadratic diverges where λ > 2/η, and full-batch training settles near λ = 2/η, the edge of stability
    (Cohen et al. 2021, arXiv 2103.00065).

    Returns:
      A figure with a point for each run at its last evaluation before the first reduction, a × for a run that diverged later,
      and for SGD without momentum the line λ = 2/η.
    """
    experiment = study.experiment
    _, title = points.titled(study.cells, study.metric)
    last = min(experiment.schedule.boundaries, default=1.0) * experiment.epochs
    rows = study.rows[study.rows["epoch"] <= last].dropna(subset="train_sharpness")
    runs = rows.sort_values("epoch").drop_duplicates([*cell_columns(rows), "seed"], keep="last")
    figure, axes = style.new_axes(title)
    sizes, entries = sorted(set(study.cells["batch_size"].tolist())), {}
    for m, look in zip(sizes, style.ordered_looks(len(sizes)), strict=True):
        of_size, entries[str(m)] = runs[runs["batch_size"] == m], style.mark(**look)
        edges = 2 / of_size["base_lr"].map(lambda base_lr, m=m: experiment.optimizer.learning_rate(base_lr, m))
        lost = of_size["status"] == "diverged"
        for where, mark in ((~lost, {"linestyle": ""}), (lost, style.CROSS)):
            axes.plot(edges[where], of_size["train_sharpness"][where], **{**look, **mark})
    axes.set(xlabel=r"$2/\eta$", ylabel=r"sharpness $\lambda_{\mathrm{max}}$")
    if runs.empty:
        style.say_nothing_finished(axes, "no evaluation before the first reduction")
    else:
        axes.set(xscale="log", yscale="log")
    if experiment.optimizer.name == "sgd" and len(runs):
        (line,) = axes.plot(axes.get_xlim(), axes.get_xlim(), color=style.QUIET, linestyle="--", zorder=1, scaley=False)
        entries[r"$\lambda = 2/\eta$"] = line
    if (runs["status"] == "diverged").any():
        entries["diverged later"] = style.mark(**style.CROSS)
    style.side_legend(axes, entries, "$m$")
    style.foot(figure, {}, "last evaluation of each run before the learning rate is first reduced")
    return figure


def program_costs(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """`cost.program_costs` of the programs of these cells."""
    return cells[cost.PROGRAM].drop_duplicates().merge(cost.program_costs(study.timings), on=cost.PROGRAM)


def _time_note(study: Study, cells: pd.DataFrame) -> str:
    """Returns the note that explains the time of a run."""
    lanes = program_costs(study, cells)["lanes"].tolist()
    count = " to ".join(dict.fromkeys(map(str, (min(lanes, default=0), max(lanes, default=0)))))
    return f"time: a run's share of the wall time of its program, of which {count} lane{'s' * (count != '1')} share the devices"
