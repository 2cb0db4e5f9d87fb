"""The charts of a report, made by Plotly in Python. The page shows them and swaps one for another; it draws none itself."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from smallbatch_jax.config.text import format_base_lr, percent, plural
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import CELL, RUN
from smallbatch_jax.study.answer import accuracy, setting
from smallbatch_jax.study.figures.labels import metric_name
from smallbatch_jax.study.figures.points import best_of_each, marked, one_bn_batch_size, own_base_lrs
from smallbatch_jax.study.figures.style import CATEGORIES, COLORS, SECONDS, ordered_colors, unit_ticks
from smallbatch_jax.study.report.sections import LABELS, short_duration
from smallbatch_jax.study.study import Study

MOST_SEEDS = 8  # listed one by one in a label
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")  # as the printed figures' markers
DIVERGED, PENDING = "#d9d9d9", "#f7f7f7"
LEGEND_ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
AXIS = {"gridcolor": "#e6e6e6", "zeroline": False, "automargin": True, "ticks": "outside", "tickcolor": "#bbb"}
LAYOUT = {  # the style of the printed figures
    "template": "none",
    "margin": {"l": 56, "r": 12, "t": 12, "b": 52},
    "font": {"family": FONT, "size": 12},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "hoverlabel": {"align": "left", "font": {"family": FONT}},
    "xaxis": AXIS,
    "yaxis": AXIS,
}


class CellMap(NamedTuple):
    """The cells of one heat map."""

    label: str  # the part of the grid that it shows; empty for the whole grid
    cells: pd.DataFrame  # at most one per place, with the index of `study.cells`
    column: str  # the column on the x axis; m is on the y axis


def power(value: float) -> str:
    """A base learning rate for a chart, 2^-7 with a raised exponent."""
    base, caret, exponent = format_base_lr(value).partition("^")
    return f"{base}<sup>{exponent}</sup>" if caret else base


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # title of a legend, text of a value
    "base_lr": ("η̃", power),
    "bn_batch_size": ("BN batch size", str),
}


def maps_of(study: Study) -> list[CellMap]:
    """The heat maps that together hold every cell of a study."""
    cells = study.cells
    ordinary = cells["bn_batch_size"] == cells["batch_size"]
    if ordinary.all():
        return [CellMap("", cells, "base_lr")]
    if own_base_lrs(cells).notna().all():  # one base learning rate for each m, as in Figs. 13 and 14
        return [CellMap("", cells, "bn_batch_size")]
    sizes = sorted(set(cells["bn_batch_size"].tolist()))
    whole = [CellMap("BN batch size = m", cells[ordinary], "base_lr")] if ordinary.any() else []
    return whole + [CellMap(f"BN batch size {b}", cells[cells["bn_batch_size"] == b], "base_lr") for b in sizes]


def heat_map(study: Study, shown: CellMap, labels: Sequence[str]) -> go.Figure:
    """Test accuracy of every cell: coloured where a seed finished, × on grey where all diverged, a dot where none has ended.

    `labels` are by the position of the cell in `study.cells`; `customdata` of a point is that position.
    """
    position = pd.Series(np.arange(len(study.cells)), study.cells.index)
    values = ["y", "lost", "unknown", "position"]
    grids = marked(shown.cells).assign(position=position).pivot(index="batch_size", columns=shown.column, values=values)
    numbers, where = grids["y"].to_numpy(float), grids["position"].to_numpy(float)
    _, text = COLUMNS[shown.column]
    shared = {
        "x": list(map(text, grids["y"].columns)),
        "y": list(map(str, grids.index)),
        "customdata": _listed(where, int),
        "hovertext": [[labels[int(i)] if i == i else "" for i in row] for row in where],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "texttemplate": "%{text}",
    }
    bar = {"title": {"text": f"{metric_name(study.experiment)} (%)", "side": "right"}, "thickness": 12, "outlinewidth": 0}
    texts = [["" if a != a else f"{a:.1f}" for a in row] for row in numbers]
    figure = go.Figure(layout={**LAYOUT, "height": 96 + 34 * len(grids)})
    colours = {"colorscale": COLORS.capitalize(), "colorbar": bar}
    figure.add_heatmap(z=_listed(numbers, lambda a: round(a, 2)), text=texts, **colours, **shared)
    for name, colour, sign in (("lost", DIVERGED, "×"), ("unknown", PENDING, "·")):
        mask = grids[name].to_numpy(float) == 1
        if mask.any():
            flat = {"colorscale": [[0, colour], [1, colour]], "showscale": False, "text": np.where(mask, sign, "").tolist()}
            figure.add_heatmap(z=_listed(np.where(mask, 0.0, np.nan), int), **shared, **flat)
    figure.update_layout(dragmode=False)  # a click chooses a cell
    figure.update_xaxes(type="category", title=LABELS[shown.column], showgrid=False)
    figure.update_yaxes(type="category", title=LABELS["batch_size"], showgrid=False)
    return figure


def _listed(values: np.ndarray, shown: Callable[[float], Any]) -> list[list[Any]]:
    """Rows of values for JSON: null for NaN."""
    return [[None if value != value else shown(value) for value in row] for row in values.tolist()]


def cell_labels(study: Study) -> list[str]:
    """The label of each cell, in the order of `study.cells`: its setting, accuracy, and the state of each seed."""
    last = study.rows.drop_duplicates(RUN, keep="last")  # rows are sorted by epoch
    seeds: dict[tuple[Any, ...], list[str]] = {}
    for run in last.itertuples(index=False):
        seeds.setdefault(tuple(getattr(run, name) for name in CELL), []).append(_state(run, study.experiment.epochs))
    labels = []
    for cell in study.cells.to_dict("records"):
        lines = [f"<b>{setting(cell)}</b>", f"η = η̃·m = {cell['base_lr'] * cell['batch_size']:.6g}"]
        lines += [f"{metric_name(study.experiment)} {accuracy(cell)}"] * bool(cell["finished"])
        states = seeds.get(tuple(cell[name] for name in CELL), [])
        lines += states[:MOST_SEEDS] + [f"and {len(states) - MOST_SEEDS} more seeds"] * (len(states) > MOST_SEEDS)
        untouched = cell["finished"] + cell["diverged"] + cell["pending"] - len(states)
        lines += [f"{plural(untouched, 'seed')} not begun"] * (untouched > 0)
        labels.append("<br>".join(lines))
    return labels


def _state(run: Any, epochs: int) -> str:
    """The state of a run, by its last row."""
    if run.status == "diverged":
        return f"seed {run.seed}: diverged in epoch {run.epoch}"
    went = f"finished, {epochs} epochs" if run.status == "finished" else f"running, {run.epoch} of {epochs} epochs"
    return f"seed {run.seed}: {went}, {100 * run.test_accuracy:.1f} % after the last"


def learning_curves(study: Study) -> list[dict[str, Any]]:
    """By cell, in the order of `study.cells`: a title, and the traces of accuracy and loss by epoch of every run."""
    by_cell: dict[Any, list[pd.DataFrame]] = {}
    for key, run in study.rows.groupby(RUN, sort=True, observed=True):
        by_cell.setdefault(key[:-1], []).append(run)
    found = []
    for cell in study.cells.to_dict("records"):
        runs = by_cell.get(tuple(cell[name] for name in CELL), [])
        traces = {
            what: [_trace(run, i, part, what) for i, run in enumerate(runs) for part in ("test", "train")]
            for what in ("accuracy", "loss")
        }
        drawn = any(y is not None for trace in traces["accuracy"] for y in trace["y"])
        nothing = ": diverged before the end of an epoch" if runs else ": no epoch has ended yet"
        found.append({"title": setting(cell) + ("" if drawn else nothing), **traces})
    return found


def _trace(run: pd.DataFrame, index: int, part: str, what: str) -> dict[str, Any]:
    """A run's test or training curve; test is solid, training dotted."""
    lost = " (diverged)" * bool((run["status"] == "diverged").any())
    name = f"{part}, seed {int(run['seed'].iloc[0])}{lost}"
    values = run[f"{part}_{what}"].to_numpy()
    shown = [round(100 * float(v), 2) if what == "accuracy" else float(f"{v:.3g}") for v in values]
    unit = ":.2f} %" if what == "accuracy" else ":.4g}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(values) < 3 else "lines",
        "x0": int(run["epoch"].iloc[0]),
        "dx": 1,
        "y": [y if math.isfinite(y) else None for y in shown],
        "name": name,
        "line": {"color": CATEGORIES[index % len(CATEGORIES)], "dash": {"test": "solid", "train": "dot"}[part], "width": 1.5},
        "hovertemplate": "epoch %{x}: %{y" + unit + f"<extra>{name}</extra>",
    }


def curves_layout(study: Study, what: str) -> go.Figure:
    """The empty chart into which the curves of a cell are put."""
    figure = go.Figure(layout={**LAYOUT, "height": 330})
    figure.update_xaxes(title="epoch", dtick=1 if study.experiment.epochs <= 12 else None)
    if what == "accuracy":
        figure.update_yaxes(title="accuracy (%)", range=[0, 100])
    else:
        figure.update_yaxes(title="cross-entropy", type="log", exponentformat="power")
    figure.update_layout(hovermode="closest", showlegend=True, legend=LEGEND_ABOVE)
    return figure


def best_by_batch_size(studies: dict[str, Study]) -> go.Figure:
    """The best test accuracy of each m over all its η̃ (Fig. 15), a curve for each study by its label."""
    figure = go.Figure(layout={**LAYOUT, "height": 340})
    for i, (label, study) in enumerate(studies.items()):
        best = best_of_each(study.cells).sort_values("test_accuracy", ascending=False).drop_duplicates("batch_size")
        dash = "solid" if i < len(CATEGORIES) else "dash"
        _add_accuracies(
            figure, best, html.escape(label, quote=False), line={"color": CATEGORIES[i % len(CATEGORIES)], "dash": dash}
        )
    _batch_size_axis(figure, (m for study in studies.values() for m in study.cells["batch_size"].tolist()))
    figure.update_yaxes(title=f"best {metric_name(*(study.experiment for study in studies.values()))} (%)")
    figure.update_layout(showlegend=len(studies) > 1, legend=LEGEND_ABOVE)
    return figure


def accuracy_by_batch_size(study: Study, shown: CellMap) -> go.Figure:
    """Test accuracy over m, one curve per η̃: the paper's form (Figs. 1–3, 5–12)."""
    figure = go.Figure(layout={**LAYOUT, "height": 380})
    legend, text = COLUMNS[shown.column]
    values = sorted(set(shown.cells.loc[shown.cells["finished"] > 0, shown.column].tolist()))
    for value, look in zip(values, _ordered_looks(len(values)), strict=True):
        _add_accuracies(figure, shown.cells[shown.cells[shown.column] == value], text(value), **look)
    _batch_size_axis(figure, shown.cells["batch_size"].tolist())
    _finish(figure, study, values)
    figure.update_layout(legend_title={"text": legend})
    return figure


def cost_charts(study: Study) -> dict[str, go.Figure]:
    """The charts of cost by name; none without timings."""
    if not len(cost.seconds_per_image(study.timings)):
        return {}
    return {"time": accuracy_by_time(study), "target": time_to_accuracy(study)}


def accuracy_by_time(study: Study) -> go.Figure:
    """Test accuracy over a run's own time, the mean over seeds, for each m at its best η̃."""
    best = best_of_each(one_bn_batch_size(study.cells)[0])
    best = best[best["finished"] > 0].sort_values("batch_size")
    rows = cost.with_time(study.rows, study.timings).dropna(subset=["seconds"])
    figure, drawn = go.Figure(layout={**LAYOUT, "height": 380}), []
    for cell, look in zip(best.to_dict("records"), _ordered_looks(len(best)), strict=True):
        runs = rows[(rows[CELL] == [cell[name] for name in CELL]).all(axis=1) & (rows["status"] == "finished")]
        if len(runs):
            mean = runs.groupby("epoch")[["seconds", "test_accuracy"]].mean()
            drawn.extend(mean["seconds"])
            epochs = zip(mean.index, mean["seconds"], mean["test_accuracy"], strict=True)
            hover = [f"<b>{setting(cell)}</b><br>epoch {n}, {short_duration(x)}: {percent(y)}" for n, x, y in epochs]
            _add_curve(figure, mean["seconds"], 100 * mean["test_accuracy"], hover, name=f"m = {cell['batch_size']}", **look)
    figure.update_xaxes(title="time of a run", **_time_axis(drawn))
    _finish(figure, study, drawn)
    return figure


def time_to_accuracy(study: Study) -> go.Figure:
    """A run's own time until it reaches `cost.target_accuracy`, for each m at the η̃ that is there first."""
    cells, _ = one_bn_batch_size(study.cells)
    target = cost.target_accuracy(cells, study.chance)
    times = cost.planned_times(cells, study.rows, study.timings, target)
    found, never = times.dropna(subset=["seconds"]), times["epochs"].isna() & (times["pending"] == 0)
    hover = [
        f"<b>{setting(row)}</b><br>{short_duration(row['seconds'])}, {row['epochs']:.3g} epochs"
        for row in found.to_dict("records")
    ]
    figure = go.Figure(layout={**LAYOUT, "height": 340})
    _add_curve(figure, found["batch_size"], found["seconds"], hover)
    _batch_size_axis(figure, cells["batch_size"].tolist())
    shown = "" if math.isnan(target) else f" to {100 * target:.1f} %"
    for m in times.loc[never, "batch_size"]:
        text = {"text": "×", "hovertext": f"m = {m}: no η̃ gets there", "showarrow": False}
        figure.add_annotation(x=math.log10(m), y=1, yref="paper", **text)
    _finish(figure, study, hover)
    figure.update_yaxes(title=f"time of a run{shown}", **_time_axis(found["seconds"]))
    figure.update_layout(showlegend=False)
    return figure


def _add_accuracies(figure: go.Figure, cells: pd.DataFrame, name: str, **look: Any) -> None:
    """Adds a curve of accuracies over m, with the deviations over seeds."""
    cells = cells.sort_values("batch_size")
    hover = [
        f"<b>{setting(cell)}</b><br>{accuracy(cell)}" if cell["finished"] else "none has finished"
        for cell in cells.to_dict("records")
    ]
    std = 100 * cells["test_accuracy_std"]
    error = {"array": std, "visible": bool(std.notna().any()), "thickness": 1, "width": 2}
    _add_curve(figure, cells["batch_size"], 100 * cells["test_accuracy"], hover, name=name, error_y=error, **look)


def _add_curve(figure: go.Figure, x: pd.Series, y: pd.Series, hover: list[str], name: str = "", **look: Any) -> None:
    template = f"%{{hovertext}}<extra>{name}</extra>"
    figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", hovertext=hover, hovertemplate=template, **look)


def _ordered_looks(count: int) -> list[dict[str, Any]]:
    """Plotly's looks of curves in order."""
    colours = ["rgb({:.0f},{:.0f},{:.0f})".format(*(255 * part for part in colour[:3])) for colour in ordered_colors(count)]
    return [
        {"line": {"color": colour, "width": 1.5}, "marker": {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 6}}
        for i, colour in enumerate(colours)
    ]


def _finish(figure: go.Figure, study: Study, drawn: Sequence[Any]) -> None:
    """Adds the legend and the label of accuracies; a chart without a curve says so."""
    figure.update_yaxes(title=f"{metric_name(study.experiment)} (%)")
    figure.update_layout(showlegend=True, legend=LEGEND_ABOVE)
    if not len(drawn):
        figure.add_annotation(text="no run has finished", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
        figure.update_yaxes(showticklabels=False, showgrid=False)


def _batch_size_axis(figure: go.Figure, sizes: Iterable[int]) -> None:
    values = sorted(set(sizes))
    limits = [math.log10(values[0] / 1.4), math.log10(values[-1] * 1.4)]
    figure.update_xaxes(type="log", title=LABELS["batch_size"], tickvals=values, ticktext=list(map(str, values)), range=limits)


def _time_axis(seconds: Sequence[float] | pd.Series) -> dict[str, Any]:
    """A log axis that holds these times."""
    if not len(seconds):
        return {"showticklabels": False}
    below, above, ticks = unit_ticks(seconds, SECONDS)
    limits = [math.log10(below), math.log10(above)]
    return {"type": "log", "range": limits, "tickvals": ticks, "ticktext": [SECONDS[tick] for tick in ticks]}
