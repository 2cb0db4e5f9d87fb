"""The cells as points of a figure: which are shown, and how a curve of them is drawn and marked."""

from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.config.text import axis_title
from smallbatch_jax.study.analysis import SETUP, axes, best_first, best_over_axes
from smallbatch_jax.study.figures import style

DIVERGED, PENDING = "some seeds diverged", "some seeds pending"
PROVISIONAL = "provisional (runs pending)"


def with_pending(cells: pd.DataFrame) -> pd.DataFrame:
    """Returns the cells of one experiment with `pending`, by default one seed in a cell of which none has ended."""
    names = cells["experiment"].unique()
    if len(names) != 1:
        raise ValueError(f"cells: a figure shows one experiment, got {len(names)} ({', '.join(map(str, names))}).")
    none_ended = (cells["finished"] == 0) & (cells["diverged"] == 0)
    return cells if "pending" in cells else cells.assign(pending=none_ended.astype(int))


def one_bn_batch_size(cells: pd.DataFrame, metric: Metric = ACCURACY) -> tuple[pd.DataFrame, str]:
    """Returns one cell per (m, η̃), and a note for the title if that leaves out cells or none has BN batch size m."""
    best = f" (best {', '.join(map(axis_title, axes(cells)))} of each)" if axes(cells) else ""
    cells = best_over_axes(cells, metric)
    b = cells["bn_batch_size"]
    ordinary = b == cells["batch_size"]
    if ordinary.any():
        return cells[ordinary], best + ("" if ordinary.all() else " (BN batch size = $m$)")
    cells = cells[b == cells.groupby("batch_size")["bn_batch_size"].transform("max")]
    return cells, f"{best} (BN batch size {', '.join(map(str, sorted(set(cells['bn_batch_size'].tolist()))))})"


def titled(cells: pd.DataFrame, metric: Metric = ACCURACY) -> tuple[pd.DataFrame, str]:
    """The cells of one experiment, one per (m, η̃), and the title of their figure."""
    cells, bn_note = one_bn_batch_size(with_pending(cells), metric)
    return cells, style.plain(str(cells["experiment"].iloc[0])) + bn_note


def best_of_each(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """The best cell of each (experiment, batch size, BN batch size), sorted.

    `pending` and, where nothing finished, `diverged` are sums over its base_lrs: a run that has not ended may yet be
    better, and the best has diverged only if all have.
    """
    sums = cells.groupby(SETUP, observed=True)[["pending", "diverged"]].transform("sum")
    diverged = cells["diverged"].where(cells["finished"] > 0, sums["diverged"].where(sums["pending"] == 0, 0))
    cells = cells.assign(pending=sums["pending"], diverged=diverged)
    return best_first(cells, metric).drop_duplicates(SETUP).sort_values(SETUP)


def marked(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Adds `y` and `std` of the metric, a fraction in percent, and the masks by which cells are marked.

    crossed: some seeds diverged and others finished; lost: some diverged, none finished; unknown: no seed has ended;
    provisional: some seeds ended and others have not.
    """
    finished, diverged, pending = (cells[name] > 0 for name in ("finished", "diverged", "pending"))
    masks = {"crossed": finished & diverged, "lost": diverged & ~finished, "unknown": ~finished & ~diverged}
    shown = {"y": metric.scale * cells[metric.column], "std": metric.scale * cells[f"{metric.column}_std"]}
    return cells.assign(**shown, **masks, provisional=pending & (finished | diverged))


def own_base_lrs(cells: pd.DataFrame) -> pd.Series:
    """Returns the base_lr of each batch size; NaN if it has several."""
    rates = cells.groupby("batch_size")["base_lr"].agg(["min", "max"])
    return rates["min"].where(rates["min"] == rates["max"])


def setting_labels(cells: pd.DataFrame) -> tuple[list[str], str]:
    """A label per batch size, with its η̃ where they differ, and the title of the legend."""
    rates = own_base_lrs(cells)
    if rates.nunique() > 1 and rates.notna().all():
        return [f"{m}, {style.math_base_lr(rate)}" for m, rate in rates.items()], r"$m$, $\tilde{\eta}$"
    return [str(m) for m in rates.index], "$m$"


def plot_curve(axes: Axes, curve: pd.DataFrame, x: str, label: str, **look: Any) -> Artist | None:
    """Draws marked cells over column `x`: a line that breaks where y is NaN, error bars, hollow and crossed points.

    Returns:
      The line, or None where no cell has a y.
    """
    if curve["y"].isna().all():
        return None
    (line,) = axes.plot(curve[x], curve["y"], label=label, **look)
    if curve["std"].notna().any():
        axes.errorbar(curve[x], curve["y"], curve["std"], fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=1.5)
    for where, mark in ((curve["crossed"] | curve["provisional"], style.HOLLOW), (curve["crossed"], style.CROSS)):
        if where.any():
            axes.plot(curve[x][where], curve["y"][where], **{**look, **mark})
    return line


def plot_rows(axes: Axes, cells: pd.DataFrame, rows: str, x: str, labels: list[str], legend_title: str, **look: Any) -> None:
    """Draws a curve for each value of column `rows` that has a point, and their legend, or says that none has."""
    curves = zip(cells.sort_values(x).groupby(rows), labels, style.ordered_looks(len(labels)), strict=True)
    lines = {label: plot_curve(axes, curve, x, label, **ordered, **look) for (_, curve), label, ordered in curves}
    if not any(lines.values()):
        style.say_nothing_finished(axes)
    style.side_legend(axes, {label: line for label, line in lines.items() if line}, legend_title)


def plot_kinds(
    axes: Axes, table: pd.DataFrame, x: str, y: str, kinds: dict[str, tuple[pd.Series, dict[str, Any]]], **in_legend: Any
) -> dict[str, Any]:
    """Draws the rows of a table by kind: label → (mask, look); returns the legend's entries, whose look `in_legend` changes."""
    for label, (mask, look) in kinds.items():
        axes.plot(table.loc[mask, x], table.loc[mask, y], label=label, **look)
    return {label: style.mark(**{**look, **in_legend}) for label, (mask, look) in kinds.items() if mask.any()}


def mark_entries(cells: pd.DataFrame, diverged: str = DIVERGED, pending: str = PENDING) -> dict[str, Any]:
    """Legend entries for the marks of `plot_curve`; the strings are their labels."""
    hollow = style.mark(**style.HOLLOW)
    plainly_hollow = cells["provisional"] & ~cells["crossed"] & cells["y"].notna()
    entries: dict[str, Any] = {diverged: (hollow, style.mark(**style.CROSS))} if cells["crossed"].any() else {}
    return entries | ({pending: hollow} if plainly_hollow.any() else {})


def count_note(cells: pd.DataFrame, unit: str) -> str:
    """Returns a note of how many marked cells have not finished or have diverged."""
    return _counted(unit, len(cells), int((cells["pending"] > 0).sum()), int(cells["lost"].sum()))


def run_note(*cells: pd.DataFrame, diverged: bool = False) -> str:
    """Returns a note of how many runs of these cells have not ended and, if asked for, how many have diverged."""
    runs = pd.concat(cells)[["pending", "diverged", "finished"]].sum()
    return _counted("runs", int(runs.sum()), int(runs["pending"]), int(runs["diverged"]) * diverged)


def _counted(unit: str, total: int, unfinished: int, diverged: int) -> str:
    """Counts such as "12 of 143 cells not finished, 40 diverged"; empty if both are 0."""
    parts = [f"{count} {what}" for count, what in ((unfinished, "not finished"), (diverged, "diverged")) if count]
    return ", ".join(parts).replace(" ", f" of {total} {unit} ", 1)
