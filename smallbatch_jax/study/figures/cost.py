"""The cost of a grid: the time to an accuracy for each m, and accuracy against memory.

Times are those of the machine that trained (`study.cost`), so these figures are not the same for the same results.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import CELL
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.labels import metric_name
from smallbatch_jax.study.figures.table import (
    Points,
    best_of_each,
    make_table,
    mark_entries,
    one_bn_batch_size,
    ordered_looks,
    plot_absent,
    plot_curve,
)
from smallbatch_jax.study.study import Study

PROVISIONAL = "provisional (runs pending)"
TITLE_WIDTH = 64  # characters


@style.styled()
def time_to_accuracy(study: Study, accuracy: float | None = None) -> Figure:
    """A run's own time until it reaches a test accuracy, for each m at the η̃ that is there first.

    Args:
      study: with timings. BN batch sizes are chosen as in `heat_map`.
      accuracy: the target, a fraction; by default `cost.target_accuracy`, 90 % of the way from chance to the best.
    Returns:
      A figure in which a point is hollow where other runs of its m have not ended and may be faster, and crossed where seeds
      of its η̃ diverged. At the top stands a × where no η̃ of an m gets there, a grey dot where none has yet.
    """
    cells, bn_note = one_bn_batch_size(study.cells)
    target = cost.target_accuracy(cells, study.chance) if accuracy is None else accuracy
    found = cost.time_to_accuracy(study.rows, study.timings, target)
    planned = cells.groupby([*cost.PROGRAM, "experiment"], observed=True)["pending"].sum().reset_index()
    table = planned.merge(found, how="left").merge(cells[[*CELL, "diverged"]], how="left").sort_values("batch_size")
    x, pending, seconds = table["batch_size"].to_numpy(), table["pending"].to_numpy(), table["seconds"].to_numpy(float)
    timed, never = np.isfinite(seconds), table["epochs"].isna().to_numpy()
    title, rule, marks = style.plain(study.name) + bn_note, "", {}
    if not np.isnan(target):
        shown = f"time to {100 * target:.4g} % {metric_name(study.experiment)}"
        title += (", " if len(title + shown) < TITLE_WIDTH else ",\n") + shown
        rule = f"accuracy: {100 * cost.TARGET:.0f} % of the way from chance to the best" if accuracy is None else ""
    figure, axes = style.new_axes(title)
    if np.isnan(target):
        style.say_nothing_finished(axes, scaled=False)
    else:
        style.unit_axis(axes, "y", seconds[timed] if timed.any() else (1, 10), style.SECONDS)
        low, high = axes.get_ylim()
        room = high / low
        axes.set_ylim(low, high * room**0.14 if never.any() else high)
        crossed, nothing = timed & (table["diverged"] > 0).to_numpy(), np.full(len(x), np.nan)
        points = Points(x, seconds, nothing, crossed, timed & (pending > 0))
        plot_curve(axes, points, "", color=style.CATEGORIES[0], marker="o")
        lost, waiting = x[never & (pending == 0)], x[never & (pending > 0)]
        absent = {"none gets there": (lost, style.LOST), "none yet": (waiting, style.NOT_YET)}
        marks = mark_entries([points], pending=PROVISIONAL) | plot_absent(axes, high * room**0.08, absent)
    axes.set_ylabel("time of a run")
    style.grid_axis(axes, "x", "batch_size", x.tolist())
    untimed = style.named("not timed", x[~timed & ~never])
    style.foot(figure, marks, style.note(rule, pending_note(cells), untimed, end=time_note(study, cells)))
    return figure


@style.styled()
def accuracy_against_memory(study: Study) -> Figure:
    """The best test accuracy over η̃ of each m, over the peak memory of the program that trained it.

    Args:
      study: with timings that know memory. BN batch sizes are chosen as in `heat_map`.
    Returns:
      A figure with a point per m, hollow and crossed as in `best_accuracy`. The memory is that of all lanes of the program,
      whose number stands in the legend, on all devices of a process, without the dataset.
    """
    cells, bn_note = one_bn_batch_size(study.cells)
    costs = program_costs(study, cells).set_index("batch_size")
    table = make_table(best_of_each(cells), "experiment", "batch_size")
    peaks = costs["peak_bytes"].reindex(table.columns).to_numpy(float)
    (points,), sizes = table.curves, np.array(table.columns)
    figure, axes = style.new_axes(style.plain(study.name) + bn_note)
    axes.set(xlabel="peak memory of the program", ylabel=f"best {metric_name(study.experiment)} (%)")
    entries, shown = {}, []
    for i, look in enumerate(ordered_looks(len(sizes))):
        if np.isfinite(peaks[i]) and np.isfinite(points.y[i]):
            shown.append(Points(peaks[i : i + 1], *(values[i : i + 1] for values in points[1:])))
            label = f"{sizes[i]} ({costs['lanes'][sizes[i]]})"
            entries[label] = plot_curve(axes, shown[-1], label, linestyle="", **look)
    if shown:
        style.unit_axis(axes, "x", [float(point.x[0]) for point in shown], style.BYTES)
        axes.margins(y=0.12)
    else:
        style.say_nothing_finished(axes, scaled=False)
    style.side_legend(axes, entries, "$m$ (lanes)")
    unknown = style.named("memory not known", sizes[table.finished[0] & np.isnan(peaks)])
    lost = style.named("diverged", sizes[table.all_diverged[0]])
    lanes = "memory of all lanes together, without the dataset"
    style.foot(figure, mark_entries(shown, pending=PROVISIONAL), style.note(pending_note(cells), lost, unknown, end=lanes))
    return figure


def program_costs(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """`cost.program_costs` of the programs of these cells."""
    return cells[cost.PROGRAM].drop_duplicates().merge(cost.program_costs(study.timings), on=cost.PROGRAM)


def pending_note(*cells: pd.DataFrame) -> str:
    """The number of runs that have not ended; empty if all have."""
    pending = sum(int(some["pending"].sum()) for some in cells)
    return style.count_note(
        "runs", sum(int(some[["pending", "finished", "diverged"]].to_numpy().sum()) for some in cells), pending
    )


def time_note(study: Study, cells: pd.DataFrame) -> str:
    """The meaning of the time of a run."""
    lanes = program_costs(study, cells)["lanes"].tolist()
    count = " to ".join(map(str, sorted({min(lanes, default=0), max(lanes, default=0)})))
    return f"time: a run's share of the wall time of its program, of which {count} lane{'s' * (count != '1')} share the devices"
