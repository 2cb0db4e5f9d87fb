"""The paper's figures from stored results: test accuracy over batch sizes m and base learning rates η̃.

Each figure is a function of the cells of one experiment (`analysis.final_accuracy`) and returns a matplotlib Figure
that no pyplot state knows of, so drawing works without a display and leaves a notebook's settings alone.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from smallbatch_jax.analysis import final_accuracy, format_base_lr
from smallbatch_jax.experiment import InputError

STYLE = {
    "figure.figsize": (5.4, 3.3),  # inches; still legible when shrunk to one column of a two-column page
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType: text stays text in an editor, and journals accept it
}
COLORS = "viridis"  # perceptually uniform, ordered, and safe for colour-blind readers
MARKERS = "osD^v"  # a second cue, since the colours of neighbouring curves are close
BATCH_SIZE_LABEL = "batch size $m$"
BASE_LR_LABEL = r"base learning rate $\tilde{\eta}$"
ACCURACY_LABEL = "test accuracy (%)"
MOST_TICKS = 14  # more labels than this would touch

Grid = tuple[Sequence[int], Sequence[float]]  # planned batch sizes, planned base_lrs


def draw(df: pd.DataFrame, out_dir: str | os.PathLike[str], grid: Grid | None = None) -> list[Path]:
    """Writes every figure as PNG and PDF; the same results give the same bytes.

    Args:
      df: results, one row per run and epoch. Several experiments go into one folder each, under their names.
      out_dir: created if need be. A file that is there is replaced whole or not at all.
      grid: the planned batch sizes and base_lrs, so that what has not run yet is seen to be missing.
    Returns:
      The paths written.
    Raises:
      InputError: there is nothing to draw, or an experiment's name cannot name a folder.
    """
    if df.empty:
        raise InputError("figures: the results hold no rows yet; train at least one epoch of one run first.")
    makers = {
        "accuracy_vs_batch_size": accuracy_against_batch_size,
        "accuracy_vs_base_lr": accuracy_against_base_lr,
        "heat_map": heat_map,
    }
    by_name = {str(name): cells for name, cells in final_accuracy(df).groupby("experiment", observed=True)}
    folders = {name: Path(out_dir) / (_folder_name(name) if len(by_name) > 1 else "") for name in by_name}
    paths = []
    for name, cells in by_name.items():
        folder = folders[name]
        folder.mkdir(parents=True, exist_ok=True)
        for stem, make in makers.items():
            paths += _write(make(cells, grid), folder / stem)
    return paths


def _styled():
    """A context or decorator: matplotlib's defaults and STYLE inside, the caller's settings again afterwards."""
    return matplotlib.style.context(["default", STYLE])


@_styled()
def accuracy_against_batch_size(cells: pd.DataFrame, grid: Grid | None = None) -> Figure:
    """Test accuracy over m, one curve per η̃: the form of Figs. 1–3 and 5–12. Arguments as for `heat_map`."""
    layout = _lay_out(cells, grid)
    figure, axes = _new_figure(layout.title)
    labels = [_math(base_lr) for base_lr in layout.base_lrs]
    _plot_curves(axes, layout.batch_sizes, labels, layout.accuracy.T, layout.std.T, layout.partly_diverged.T)
    _log2_axis(axes, layout.batch_sizes, [str(m) for m in layout.batch_sizes], BATCH_SIZE_LABEL)
    _legend(axes, r"$\tilde{\eta}$", bool(layout.partly_diverged.any()))
    return figure


@_styled()
def accuracy_against_base_lr(cells: pd.DataFrame, grid: Grid | None = None) -> Figure:
    """Test accuracy over η̃, one curve per m: where each batch size stops converging. Arguments as for `heat_map`."""
    layout = _lay_out(cells, grid)
    figure, axes = _new_figure(layout.title)
    labels = [str(m) for m in layout.batch_sizes]
    _plot_curves(axes, layout.base_lrs, labels, layout.accuracy, layout.std, layout.partly_diverged)
    _log2_axis(axes, layout.base_lrs, [_math(base_lr) for base_lr in layout.base_lrs], BASE_LR_LABEL)
    _legend(axes, "$m$", bool(layout.partly_diverged.any()))
    return figure


@_styled()
def heat_map(cells: pd.DataFrame, grid: Grid | None = None) -> Figure:
    """Test accuracy of every cell, m upwards and η̃ to the right.

    Args:
      cells: one experiment's rows of `analysis.final_accuracy`. Where BN batch sizes vary, only those equal to m are
        drawn, or the largest of each m if none is, and the title says so.
      grid: planned batch sizes and base_lrs; they widen the axes beyond what `cells` holds.
    Returns:
      A figure in which a cell is coloured (some seed finished), crossed on grey (none finished, some diverged), or
      dotted on white (not run, or still running); a small ring marks a coloured cell some of whose seeds diverged.
    """
    layout = _lay_out(cells, grid)
    rows, columns = layout.accuracy.shape
    figure, axes = _new_figure(layout.title, height=max(2.2, 1.2 + 0.22 * rows))
    axes.grid(False)
    accuracy = np.ma.masked_invalid(layout.accuracy)
    low, high = (accuracy.min(), accuracy.max()) if accuracy.count() else (0.0, 100.0)
    norm = Normalize(low, high if high > low else low + 1)
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    # A mesh, not an image: PDF viewers blur small images.
    mesh = axes.pcolormesh(*edges, accuracy, cmap=COLORS, norm=norm, edgecolor="white", linewidth=0.5)
    grey = np.ma.masked_equal(layout.all_diverged, False)
    axes.pcolormesh(*edges, grey, cmap=ListedColormap(["0.85"]), edgecolor="white", linewidth=0.5)
    _mark_cells(axes, layout, norm)
    step_x, step_y = _tick_step(columns), _tick_step(rows)
    axes.set_xticks(range(0, columns, step_x), [_math(x) for x in layout.base_lrs[::step_x]])
    axes.set_yticks(range(0, rows, step_y), [str(m) for m in layout.batch_sizes[::step_y]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=BASE_LR_LABEL, ylabel=BATCH_SIZE_LABEL)
    figure.colorbar(mesh, ax=axes, label=ACCURACY_LABEL, pad=0.02).outline.set_visible(False)
    return figure


class _Layout(NamedTuple):
    """The cells of one experiment on their grid."""

    title: str
    batch_sizes: list[int]  # M, ascending
    base_lrs: list[float]  # L, ascending
    accuracy: np.ndarray  # float[M, L], percent; NaN where no seed finished
    std: np.ndarray  # float[M, L], percent over seeds; NaN for fewer than two
    any_diverged: np.ndarray  # bool[M, L]

    @property
    def all_diverged(self) -> np.ndarray:
        """bool[M, L]: some seed diverged and none finished."""
        return self.any_diverged & np.isnan(self.accuracy)

    @property
    def partly_diverged(self) -> np.ndarray:
        """bool[M, L]: some seeds diverged and others finished; the accuracy is theirs."""
        return self.any_diverged & ~np.isnan(self.accuracy)


def _lay_out(cells: pd.DataFrame, grid: Grid | None) -> _Layout:
    names = cells["experiment"].unique()
    if len(names) != 1:
        raise ValueError(f"cells: a figure shows one experiment, got {len(names)} ({', '.join(map(str, names))}).")
    cells, note = _one_bn_batch_size(cells)
    batch_sizes, base_lrs = grid or ((), ())
    batch_sizes = sorted({*batch_sizes, *cells["batch_size"].tolist()})
    base_lrs = sorted({*base_lrs, *cells["base_lr"].tolist()})

    def place(column: str) -> np.ndarray:
        table = cells.pivot(index="batch_size", columns="base_lr", values=column)
        return table.reindex(index=batch_sizes, columns=base_lrs).to_numpy(float)

    percent, std = 100 * place("test_accuracy"), 100 * place("test_accuracy_std")
    title = str(names[0]).replace("$", r"\$") + note
    return _Layout(title, batch_sizes, base_lrs, percent, std, place("diverged") > 0)


def _one_bn_batch_size(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """One cell per (m, η̃), and what the title must add if that leaves cells out or departs from ordinary BN."""
    ordinary = cells["bn_batch_size"].to_numpy() == cells["batch_size"].to_numpy()
    if ordinary.any():
        return cells.loc[ordinary], "" if ordinary.all() else " (BN batch size = $m$)"
    largest = cells.groupby("batch_size")["bn_batch_size"].transform("max").to_numpy()
    cells = cells.loc[cells["bn_batch_size"].to_numpy() == largest]
    sizes = sorted(set(cells["bn_batch_size"].tolist()))
    return cells, f" (BN batch size {', '.join(map(str, sizes))})"


def _new_figure(title: str, height: float | None = None) -> tuple[Figure, Axes]:
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if height is not None:
        figure.set_figheight(height)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _plot_curves(
    axes: Axes, x: Sequence[float], labels: list[str], accuracy: np.ndarray, std: np.ndarray, hollow: np.ndarray
) -> None:
    """Draws one curve per label from arrays [curves, points], with std as error bars and hollow markers where asked.

    A line breaks where nothing finished, so that no gap is drawn over. Colours go by the place in the whole grid, so
    that a curve keeps its colour while results arrive; they stop short of the light end, which is lost on white.
    """
    colors = matplotlib.colormaps[COLORS](np.linspace(0, 0.87, len(labels)))
    for i, (label, color) in enumerate(zip(labels, colors, strict=True)):
        if np.isnan(accuracy[i]).all():
            continue
        line = {"color": color, "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(x, accuracy[i], label=label, **line)
        if not np.isnan(std[i]).all():
            axes.errorbar(x, accuracy[i], std[i], fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5)
        if hollow[i].any():
            axes.plot(x, np.where(hollow[i], accuracy[i], np.nan), linestyle="", markerfacecolor="white", **line)
    axes.set_ylabel(ACCURACY_LABEL)


def _legend(axes: Axes, title: str, any_hollow: bool) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if not handles:
        axes.set_ylim(0, 100)
        axes.text(0.5, 0.5, "no run has finished", transform=axes.transAxes, ha="center", va="center", color="0.4")
        return
    if any_hollow:
        label = "some seeds\ndiverged"
        handles.append(Line2D([], [], marker="o", linestyle="", color="0.4", markerfacecolor="white", label=label))
    axes.legend(handles=handles, title=title, loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=0.3)


def _log2_axis(axes: Axes, values: Sequence[float], labels: list[str], name: str) -> None:
    """A log2 x axis that is as wide as the grid and has its ticks at the grid's values."""
    step = _tick_step(len(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(values[::step], labels[::step])
    axes.minorticks_off()
    axes.set(xlabel=name, xlim=(values[0] / 1.4, values[-1] * 1.4))


def _mark_cells(axes: Axes, layout: _Layout, norm: Normalize) -> None:
    """The marks of `heat_map`'s three kinds of cell, their legend, and the accuracies where they fit."""
    finished = ~np.isnan(layout.accuracy)
    ring = {"marker": "o", "color": "white", "edgecolors": "black", "s": 10, "linewidth": 0.6}  # seen on any colour
    kinds = {
        "diverged": (layout.all_diverged, 0, {"marker": "x", "color": "0.25", "s": 22}),
        "not finished": (~finished & ~layout.any_diverged, 0, {"marker": ".", "color": "0.6", "s": 8}),
        "some seeds diverged": (layout.partly_diverged, 0.36, ring),
    }
    for label, (where, offset, mark) in kinds.items():
        if where.any():
            y, x = np.nonzero(where)
            axes.scatter(x + offset, y + offset, label=label, **mark)
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower center", ncols=len(kinds))
    if finished.shape[1] > MOST_TICKS:
        return
    for y, x in np.argwhere(finished):
        value = layout.accuracy[y, x]
        # viridis is dark at its lower end and light at its upper one
        color = "white" if norm(value) < 0.6 else "black"
        text = axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, fontsize=6.5)
        text.set_in_layout(False)  # it lies inside its cell; measuring it would take most of the drawing time


def _tick_step(count: int) -> int:
    """Label every so manieth of `count` values, for at most MOST_TICKS labels."""
    return -(-count // MOST_TICKS)


def _math(base_lr: float) -> str:
    """`format_base_lr` with a raised exponent, for matplotlib's mathtext."""
    base, caret, exponent = format_base_lr(base_lr).partition("^")
    return f"${base}^{{{exponent}}}$" if caret else base


def _folder_name(experiment: str) -> str:
    if experiment in ("", ".", "..") or Path(experiment).name != experiment:
        raise InputError(f"experiment: {experiment!r} cannot name a folder; use a name without slashes.")
    return experiment


def _write(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.pdf, each complete under a temporary name first; no date or version goes in."""
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    paths = []
    for suffix, values in metadata.items():
        path = stem.with_suffix(suffix)
        buffer = io.BytesIO()
        with _styled():
            figure.savefig(buffer, format=suffix[1:], metadata=values)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
        paths.append(path)
    return paths
