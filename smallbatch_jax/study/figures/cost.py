"""What a grid cost: accuracy against time and against memory, and the time to an accuracy for each m.

Times are those of the machine that trained: `cost` says whose. So these figures are not the same for the same results.
"""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import CELL
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.curves import plot_cells, setting_labels
from smallbatch_jax.study.figures.summary import metric_name
from smallbatch_jax.study.figures.table import Table, best_of_each, make_table, one_bn_batch_size
from smallbatch_jax.study.study import Study

TITLE_WIDTH, NOTE_WIDTH = 64, 110  # characters
STEMS = ("accuracy_vs_time", "time_to_accuracy", "accuracy_vs_memory")
NONE: dict[str, Any] = {**style.CROSS, "color": "0.25"}
NONE_YET: dict[str, Any] = {**style.DOT, "color": "0.6"}
LINE: dict[str, Any] = {"color": style.CATEGORIES[0], "marker": "o"}
# Where a label may stand beside its point: offset in points, and the alignments.
PLACES = ((6, 0, "left", "center"), (-6, 0, "right", "center"), (0, -6, "center", "top"), (0, 6, "center", "bottom"))


def cost_figures(study: Study) -> Iterator[tuple[str, Figure]]:
    """File name and figure of what is known of a study's cost: nothing where it has no timings, or none of its memory."""
    costs = _program_costs(study, one_bn_batch_size(study.cells)[0])
    if costs["images_per_second"].notna().any():
        yield STEMS[0], accuracy_against_time(study)
        yield STEMS[1], time_to_accuracy(study)
    if costs["peak_bytes"].notna().any():
        yield STEMS[2], accuracy_against_memory(study)


@style.styled()
def accuracy_against_time(study: Study) -> Figure:
    """Test accuracy over a run's own time, one curve per m at its best η̃.

    Args:
      study: with timings. BN batch sizes are chosen as in `heat_map`.
    Returns:
      A figure in which a curve is drawn as in `convergence`, up to where its runs have come. Before a run of an m has
      finished, its curve is at the η̃ that has come furthest. A batch size of which no time or epoch is known is named below.
    """
    cells, bn_note = one_bn_batch_size(study.cells)
    chosen = _best_so_far(cells, study.rows)
    rows = cost.with_time(study.rows, study.timings).dropna(subset="seconds")
    labels, legend_title = setting_labels(chosen)
    metric = metric_name(study.experiment)
    figure, axes = style.new_axes(style.plain(study.name) + bn_note + r", best $\tilde{\eta}$ of each $m$")
    entries = plot_cells({"test_accuracy": axes}, rows, chosen, labels, x="seconds")
    axes.set(xlabel="time of a run", ylabel=f"{metric} (%)")
    drawn = [np.asarray(line.get_xdata(), float) for line in axes.get_lines()]
    if drawn:
        style.unit_axis(axes, "x", min(map(np.min, drawn)), max(map(np.max, drawn)), style.SECONDS)
    else:
        _say_nothing(axes, "no epoch has been timed")
    without = [m for m, label in zip(chosen["batch_size"], labels, strict=True) if label not in entries]
    if any(line.get_marker() == "x" for line in axes.get_lines()):
        entries["diverged"] = style.mark(**style.CROSS)
    if entries:
        style.side_legend(axes, entries, legend_title)
    style.foot(figure, {}, _note(_pending(cells), _named("not timed", without), _time_note(study, cells)))
    return figure


@style.styled()
def time_to_accuracy(study: Study, accuracy: float | None = None) -> Figure:
    """A run's own time until it reaches a test accuracy, for each m at the η̃ that is there first.

    Args:
      study: with timings. BN batch sizes are chosen as in `heat_map`.
      accuracy: to be reached, a fraction; by default `cost.target_accuracy`, 90 % of the way from chance to the best.
    Returns:
      A figure in which a point is hollow where other runs of its m have not ended and may be faster, and crossed where seeds
      of its η̃ diverged. At the top stands a × where no η̃ of an m gets there, a grey dot where none has yet.
    """
    cells, bn_note = one_bn_batch_size(study.cells)
    target = cost.target_accuracy(cells, study.chance) if accuracy is None else accuracy
    table = _times(study, cells, target)
    title, shown = style.plain(study.name) + bn_note, ""
    if not np.isnan(target):
        shown = f"time to {100 * target:.4g} % {metric_name(study.experiment)}"
        title += (", " if len(title + shown) < TITLE_WIDTH else ",\n") + shown
    figure, axes = style.new_axes(title)
    axes.set(xlabel=style.BATCH_SIZE_LABEL, ylabel="time of a run")
    marks = {}
    if shown:
        marks = _plot_times(axes, table)
    else:
        _say_nothing(axes)
    style.log2_axis(axes, table.index.tolist(), [str(m) for m in table.index])
    untimed = table.index[table["epochs"].notna() & table["seconds"].isna()]
    rule = f"accuracy: {100 * cost.TARGET:.0f} % of the way from chance to the best" if shown and accuracy is None else ""
    style.foot(figure, marks, _note(rule, _pending(cells), _named("not timed", untimed), _time_note(study, cells)))
    return figure


@style.styled()
def accuracy_against_memory(study: Study) -> Figure:
    """The best test accuracy over η̃ of each m, over the peak memory of the program that trained it.

    Args:
      study: with timings that know memory. BN batch sizes are chosen as in `heat_map`.
    Returns:
      A figure of a point per m, labelled by it: hollow and crossed as in `best_accuracy`. The memory is that of all lanes of
      the program, which the note counts, on all devices of a process, without the dataset.
    """
    cells, bn_note = one_bn_batch_size(study.cells)
    costs = _program_costs(study, cells).set_index("batch_size")
    table = make_table(best_of_each(cells), "experiment", "batch_size")
    peaks = costs["peak_bytes"].reindex(table.columns).to_numpy(float)
    figure, axes = style.new_axes(style.plain(study.name) + bn_note)
    axes.set(xlabel="peak memory of the program", ylabel=f"best {metric_name(study.experiment)} (%)")
    here = table.finished[0] & ~np.isnan(peaks)
    if here.any():
        _plot_points(axes, table, peaks, here)
    else:
        _say_nothing(axes)
    sizes = np.array(table.columns)
    unknown = _named("memory not known", sizes[table.finished[0] & np.isnan(peaks)])
    lost = _named("diverged", sizes[table.all_diverged[0]])
    marks = _marks(table.some_diverged[0] & here, table.some_pending[0] & here)
    lanes = f"memory of {_lanes_note(study, cells)} together, without the dataset"
    alike = "all need about as much" if here.sum() > 1 and peaks[here].max() < 1.1 * peaks[here].min() else ""
    style.foot(figure, marks, _note(_pending(cells), lost, unknown, alike, lanes))
    return figure


def _program_costs(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """`cost.program_costs` of the programs of these cells."""
    return cells[cost.PROGRAM].drop_duplicates().merge(cost.program_costs(study.timings), on=cost.PROGRAM)


def _best_so_far(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """One cell per batch size: the best; before one has finished, that with most epochs; of equals, the smallest base_lr."""
    epochs = rows.groupby(CELL, observed=True).size().rename("epochs").reset_index()
    known = cells.merge(epochs, how="left", on=CELL).fillna({"epochs": 0})
    order = known.sort_values(["test_accuracy", "epochs", "base_lr"], ascending=[False, False, True], na_position="last")
    return order.drop_duplicates("batch_size").sort_values("batch_size")


def _times(study: Study, cells: pd.DataFrame, accuracy: float) -> pd.DataFrame:
    """`cost.time_to_accuracy` of every planned batch size, with the seeds pending, and those that diverged at its base_lr."""
    found = cost.time_to_accuracy(study.rows, study.timings, accuracy)
    pending = cells.groupby([*cost.PROGRAM, "experiment"], observed=True)["pending"].sum().reset_index()
    table = pending.merge(found, how="left").merge(cells[[*CELL, "diverged"]], how="left")
    return table.set_index("batch_size").sort_index()


def _plot_times(axes: Axes, table: pd.DataFrame) -> dict[str, Any]:
    """Draws the times of each batch size and the marks of those that have none; the legend's entries."""
    seconds, pending = table["seconds"], table["pending"] > 0
    timed, never = seconds.notna(), table["epochs"].isna()
    crossed = timed & (table["diverged"] > 0)
    low, high = (seconds.min(), seconds.max()) if timed.any() else (1.0, 10.0)
    style.unit_axis(axes, "y", low, high, style.SECONDS)
    bottom, end = axes.get_ylim()
    top = end * (end / bottom) ** 0.08
    axes.set_ylim(bottom, top * (end / bottom) ** 0.06 if never.any() else end)
    axes.plot(table.index, seconds, **LINE)
    for where, look in ((timed & (pending | crossed), {**LINE, **style.HOLLOW}), (crossed, {**LINE, **style.CROSS})):
        if where.any():
            axes.plot(table.index, seconds.where(where), **look)
    entries = _marks(crossed, timed & pending)
    for where, label, look in ((never & ~pending, "none gets there", NONE), (never & pending, "none yet", NONE_YET)):
        if where.any():
            axes.plot(table.index[where], np.full(where.sum(), top), label=label, **look)
            entries[label] = style.mark(**look)
    return entries


def _plot_points(axes: Axes, table: Table, peaks: np.ndarray, here: np.ndarray) -> None:
    """A point for each batch size in `here`, labelled by it, in colours by its place in the table."""
    accuracy, std = table.accuracy[0], table.std[0]
    crossed = table.partly_diverged[0]
    hollow = crossed | table.provisional[0]
    colors = style.ordered_colors(len(peaks))
    for i in np.flatnonzero(here):
        look: dict[str, Any] = {"color": colors[i], "marker": style.MARKERS[i % len(style.MARKERS)], "linestyle": ""}
        if not np.isnan(std[i]):
            axes.errorbar(peaks[i], accuracy[i], std[i], fmt="none", ecolor=colors[i], elinewidth=0.8, capsize=1.5)
        axes.plot(peaks[i : i + 1], accuracy[i : i + 1], **({**look, **style.HOLLOW} if hollow[i] else look))
        if crossed[i]:
            axes.plot(peaks[i : i + 1], accuracy[i : i + 1], **{**look, **style.CROSS})
    style.unit_axis(axes, "x", peaks[here].min(), peaks[here].max(), style.BYTES)
    axes.margins(y=0.12)
    texts = [f"{'$m$ = ' if n == 0 else ''}{table.columns[i]}" for n, i in enumerate(np.flatnonzero(here))]
    _label_points(axes, np.column_stack([peaks[here], accuracy[here]]), texts)


def _label_points(axes: Axes, points: np.ndarray, texts: Sequence[str]) -> None:
    """Writes a text beside each point, in the first place where it covers neither a point nor another text."""
    scale = 72 / axes.figure.dpi
    places = axes.transData.transform(points) * scale
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in places]
    for point, (x, y), text in zip(points, places, texts, strict=True):
        width = 4.2 * len(text.replace("$", ""))
        boxes = {}
        for reach in (1, 2, 3):
            for right, up, across, along in PLACES:
                left = x + reach * right - width * {"left": 0, "center": 0.5, "right": 1}[across]
                bottom = y + reach * up - 7 * {"bottom": 0, "center": 0.5, "top": 1}[along]
                boxes[(reach * right, reach * up, across, along)] = (left, bottom, left + width, bottom + 7)
        covered = {place: sum(map(_overlap(box), taken)) for place, box in boxes.items()}
        best = min(covered, key=lambda place: covered[place])
        taken.append(boxes[best])
        axes.annotate(text, point, best[:2], textcoords="offset points", ha=best[2], va=best[3], fontsize=7, color=style.QUIET)


def _overlap(box: tuple[float, ...]) -> Any:
    """box → the area that it shares with this one."""

    def area(other: tuple[float, ...]) -> float:
        width, height = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
        return max(width, 0) * max(height, 0)

    return area


def _say_nothing(axes: Axes, *text: str) -> None:
    """What a panel without a point says; an axis of times or memory has no scale then."""
    style.say_nothing_finished(axes, *text)
    axes.set(xticks=[], yticks=[])


def _marks(crossed: Any, pending: Any) -> dict[str, Any]:
    """Legend entries for the points that are marked."""
    hollow = style.mark(**style.HOLLOW)
    entries: dict[str, Any] = {}
    if np.any(crossed):
        entries["some seeds diverged"] = (hollow, style.mark(**style.CROSS))
    if np.any(pending & ~crossed):
        entries["provisional (runs pending)"] = hollow
    return entries


def _pending(cells: pd.DataFrame) -> str:
    pending = int(cells["pending"].sum())
    return style.count_note("runs", pending + int(cells[["finished", "diverged"]].to_numpy().sum()), pending, 0)


def _named(what: str, batch_sizes: Any) -> str:
    return f"{what}: $m$ = {', '.join(map(str, batch_sizes))}" if len(batch_sizes) else ""


def _note(*parts: str) -> str:
    """What is said under the panel; the last part begins a line."""
    *first, last = parts
    return "\n".join(textwrap.fill(line, NOTE_WIDTH) for line in ("; ".join(filter(None, first)), last) if line)


def _time_note(study: Study, cells: pd.DataFrame) -> str:
    lanes = _program_costs(study, cells)["lanes"]
    count = f"{lanes.min()} to {lanes.max()} lanes" if lanes.nunique() > 1 else _lanes_note(study, cells)
    return f"time: a run's share of the wall time of its program, of which {count} share the devices"


def _lanes_note(study: Study, cells: pd.DataFrame) -> str:
    """The lanes of the programs, such as "16 lanes", or "16 (m = 2, 4) or 8 (m = 8) lanes"."""
    lanes = _program_costs(study, cells).groupby("lanes")["batch_size"].agg(sorted)
    if len(lanes) == 1:
        return f"{lanes.index[0]} lane{'s' if lanes.index[0] != 1 else ''}"
    each = [f"{count} ($m$ = {', '.join(map(str, sizes))})" for count, sizes in sorted(lanes.items(), reverse=True)]
    return f"{' or '.join(each)} lanes"
