"""The charts of a report, made by Plotly in Python. The page shows them and swaps one for another; it draws none itself."""

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from matplotlib.colors import to_hex

from smallbatch_jax.config.catalog import RULES
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.text import axis_title, format_base_lr, plural
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import axes, cell_columns, score, setting
from smallbatch_jax.study.figures.labels import named_metric
from smallbatch_jax.study.figures.points import best_of_each, marked, one_bn_batch_size, own_base_lrs
from smallbatch_jax.study.figures.style import CATEGORIES, COLORS, SECONDS, ordered_colors, unit_ticks
from smallbatch_jax.study.report.sections import LABELS, axis_label, short_duration
from smallbatch_jax.study.study import Study

MOST_SEEDS = 8  # listed one by one in a label
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")  # as the printed figures' markers
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "margin": {"l": 56, "r": 12, "t": 12, "b": 52},
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
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
    """Returns heat maps that together hold every cell of a study, one or more for each point on its further axes."""
    found, further = [], axes(study.cells)
    for values, cells in study.cells.groupby(further) if further else [((), study.cells)]:
        point = [f"{axis_title(name)} {value:g}" for name, value in zip(further, values, strict=True)]
        found += [shown._replace(label=", ".join(filter(None, (*point, shown.label)))) for shown in _maps_of(cells)]
    return found


def _maps_of(cells: pd.DataFrame) -> list[CellMap]:
    """The heat maps of cells without further axes."""
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

    `labels` are in the order of `study.cells`; `customdata` of a point is the position of its cell there.
    """
    metric = named_metric(study.experiment)
    cells = marked(shown.cells, metric)

    def grid(values: pd.Series, empty: Any = None) -> list[list[Any]]:
        """Returns the values of cells, by index, at the places of this map, and `empty` elsewhere."""
        table = cells.assign(value=values.astype(object)).pivot(index="batch_size", columns=shown.column, values="value")
        return table.where(table.notna(), empty).to_numpy().tolist()

    shared = {
        "x": list(map(COLUMNS[shown.column][1], sorted(set(cells[shown.column].tolist())))),
        "y": list(map(str, sorted(set(cells["batch_size"].tolist())))),
        "customdata": grid(pd.Series(range(len(labels)), study.cells.index)),
        "hovertext": grid(pd.Series(labels, study.cells.index), ""),
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "texttemplate": "%{text}",
    }
    bar = {"title": {"text": metric.label, "side": "right"}, "thickness": 12}
    written = cells["y"].map(("{:.1f}" if metric.fraction else "{:.3g}").format, na_action="ignore")
    # a click chooses a cell, so nothing is dragged
    figure = go.Figure(layout={**LAYOUT, "height": 96 + 34 * len(shared["y"]), "dragmode": False})
    colours = COLORS if metric.best == "max" else f"{COLORS}_r"  # light is good
    figure.add_heatmap(z=grid(cells["y"].round(4)), text=grid(written, ""), colorscale=colours, colorbar=bar, **shared)
    for mask, colour, sign in (("lost", "#d9d9d9", "×"), ("unknown", "#f7f7f7", "·")):
        if cells[mask].any():
            flat = {"colorscale": [[0, colour], [1, colour]], "showscale": False}
            z, text = cells[mask].map({True: 0}), cells[mask].map({True: sign})
            figure.add_heatmap(z=grid(z), text=grid(text, ""), **flat, **shared)
    figure.update_xaxes(type="category", title=axis_label(study, shown.column), showgrid=False)
    figure.update_yaxes(type="category", title=LABELS["batch_size"], showgrid=False)
    return figure


def cell_labels(study: Study) -> list[str]:
    """The label of each cell, in the order of `study.cells`: its setting, accuracy, and the state of each seed."""
    metric, optimizer, labels = named_metric(study.experiment), study.experiment.optimizer, []
    rate = RULES[optimizer.rule][0]
    for cell, runs in _with_runs(study):
        lines = [f"<b>{setting(cell)}</b>", f"η = {rate} = {optimizer.learning_rate(cell['base_lr'], cell['batch_size']):.6g}"]
        lines += [f"{metric.title} {score(cell, metric)}"] * bool(cell["finished"])
        states = [_state(run.iloc[-1], study.experiment.epochs, metric) for run in runs]
        lines += states[:MOST_SEEDS] + [f"and {len(states) - MOST_SEEDS} more seeds"] * (len(states) > MOST_SEEDS)
        untouched = cell["finished"] + cell["diverged"] + cell["pending"] - len(states)
        lines += [f"{plural(untouched, 'seed')} not begun"] * (untouched > 0)
        labels.append("<br>".join(lines))
    return labels


def _with_runs(study: Study) -> Iterator[tuple[dict[Any, Any], list[pd.DataFrame]]]:
    """Yields each cell, in the order of `study.cells`, with the rows of each of its runs."""
    key = cell_columns(study.cells)
    by_cell: dict[Any, list[pd.DataFrame]] = {}
    for (*cell, _), run in study.rows.groupby([*key, "seed"], observed=True):
        by_cell.setdefault(tuple(cell), []).append(run)
    for cell in study.cells.to_dict("records"):
        yield cell, by_cell.get(tuple(cell[name] for name in key), [])


def _state(run: pd.Series, epochs: int, metric: Metric) -> str:
    """Describes the state of a run from its last row."""
    if run["status"] == "diverged":
        return f"seed {run['seed']}: diverged in epoch {run['epoch']}"
    trained = epochs if run["status"] == "finished" else f"{run['epoch']} of {epochs}"
    return f"seed {run['seed']}: {run['status']}, {trained} epochs, {metric.show(run[metric.column])} after the last"


def learning_curves(study: Study) -> list[dict[str, Any]]:
    """Returns a title and the accuracy and loss traces of all runs for each cell, in the order of `study.cells`."""
    found = []
    for cell, runs in _with_runs(study):
        traces = {
            what: [trace for i, run in enumerate(runs) for trace in _traces(run, i, what)] for what in ("accuracy", "loss")
        }
        drawn = any(y is not None for curves in traces.values() for trace in curves for y in trace["y"])
        nothing = ": diverged before the end of an epoch" if runs else ": no epoch has ended yet"
        found.append({"title": setting(cell) + ("" if drawn else nothing), **traces})
    return found


def _traces(run: pd.DataFrame, index: int, what: str) -> Iterator[dict[str, Any]]:
    """Yields a run's test curve, solid, and its training curve, dotted."""
    lost = " (diverged)" * bool((run["status"] == "diverged").any())
    unit = ":.2f} %" if what == "accuracy" else ":.4g}"
    for part, dash in (("test", "solid"), ("train", "dot")):
        name, values = f"{part}, seed {run['seed'].iloc[0]}{lost}", run[f"{part}_{what}"].tolist()
        shown = [round(100 * v, 2) if what == "accuracy" else float(f"{v:.3g}") for v in values]
        yield {
            "type": "scatter",
            "mode": "lines+markers" if len(values) < 3 else "lines",
            "x0": int(run["epoch"].iloc[0]),
            "dx": 1,
            "y": [y if math.isfinite(y) else None for y in shown],
            "name": name,
            "line": {"color": CATEGORIES[index % len(CATEGORIES)], "dash": dash, "width": 1.5},
            "hovertemplate": "epoch %{x}: %{y" + unit + f"<extra>{name}</extra>",
        }


def curves_layout(study: Study, what: str) -> go.Figure:
    """Returns the empty chart for the learning curves of a cell."""
    figure = go.Figure(layout={**LAYOUT, "height": 330})
    figure.update_xaxes(title="epoch", dtick=1 if study.experiment.epochs <= 12 else None)
    if what == "accuracy":
        figure.update_yaxes(title="accuracy (%)", range=[0, 100])
    else:
        figure.update_yaxes(title="loss", type="log", exponentformat="power")
    return figure.update_layout(showlegend=True)


def best_by_batch_size(studies: dict[str, Study]) -> go.Figure:
    """Plots the best test accuracy of each m over all its η̃ (Fig. 15), one curve per study, by label."""
    tables = []
    for label, study in studies.items():
        cells, note = one_bn_batch_size(study.cells, study.metric)
        curve = html.escape(label + note.replace("$m$", "m"), quote=False)
        tables.append(best_of_each(cells, study.metric).assign(curve=curve))
    metric = named_metric(*(study.experiment for study in studies.values()))
    return _chart_by_batch_size(pd.concat(tables), metric, f"best {metric.label}", CATEGORIES)


def accuracy_by_batch_size(study: Study, shown: CellMap) -> go.Figure:
    """Plots test accuracy over m, one curve per η̃, in the paper's form (Figs. 1–3, 5–12)."""
    title, text = COLUMNS[shown.column]
    cells = shown.cells.sort_values([shown.column, "batch_size"])
    metric = named_metric(study.experiment)
    figure = _chart_by_batch_size(cells.assign(curve=cells[shown.column].map(text)), metric, metric.label)
    return figure.update_layout(legend_title_text=title)


def _chart_by_batch_size(cells: pd.DataFrame, metric: Metric, title: str, colors: Sequence[str] | None = None) -> go.Figure:
    """Plots a metric over m with its deviation over seeds; leaves out curves without a finished cell."""
    table = marked(cells[cells.groupby("curve")["finished"].transform("any")], metric)
    scores = [score(cell, metric) for cell in table.to_dict("records")]
    return scale_batch_sizes(_line_chart(table.assign(hover=scores), "batch_size", "y", title, colors), cells)


def cost_charts(study: Study) -> dict[str, go.Figure]:
    """Returns the cost charts by name; empty without timings."""
    if not len(cost.seconds_per_image(study.timings)):
        return {}
    return {"time": accuracy_by_time(study), "target": time_to_accuracy(study)}


def accuracy_by_time(study: Study) -> go.Figure:
    """Test accuracy over a run's own time, the mean over seeds, for each m at its best η̃."""
    metric = named_metric(study.experiment)
    best = best_of_each(one_bn_batch_size(study.cells, metric)[0], metric)
    key = cell_columns(best)
    rows = cost.with_time(study.rows, study.timings).dropna(subset=["seconds"])
    rows = rows[rows["status"] == "finished"].merge(best[key], on=key)
    mean = rows.groupby([*key, "epoch"], observed=True)[["seconds", metric.column]].mean().reset_index()
    shown = zip(mean["epoch"], mean["seconds"], mean[metric.column], strict=True)
    hover = [f"epoch {epoch}, {short_duration(seconds)}: {metric.show(value)}" for epoch, seconds, value in shown]
    table = mean.assign(y=metric.scale * mean[metric.column], hover=hover, curve="m = " + mean["batch_size"].astype(str))
    figure = _line_chart(table, "seconds", "y", metric.label)
    return figure.update_xaxes(title="time of a run", **_time_axis(table["seconds"]))


def time_to_accuracy(study: Study) -> go.Figure:
    """Plots a run's own time until it reaches `cost.target_accuracy`, for each m at the η̃ that gets there first."""
    cells, _ = one_bn_batch_size(study.cells, study.metric)
    target = cost.target_accuracy(cells, study.chance, metric=study.metric)
    times = cost.planned_times(cells, study.rows, study.timings, target, study.metric)
    found, never = times.dropna(subset=["seconds"]), times["epochs"].isna() & (times["pending"] == 0)
    hover = [f"{short_duration(row['seconds'])}, {row['epochs']:.3g} epochs" for row in found.to_dict("records")]
    shown = "" if math.isnan(target) else f" to {study.metric.show(target)}"
    figure = _line_chart(found.assign(curve="", hover=hover), "batch_size", "seconds", f"time of a run{shown}", CATEGORIES)
    for m in times.loc[never, "batch_size"]:
        text = {"text": "×", "hovertext": f"m = {m}: no η̃ gets there", "showarrow": False}
        figure.add_annotation(x=math.log10(m), y=1, yref="paper", **text)
    figure.update_yaxes(**_time_axis(found["seconds"]))
    return scale_batch_sizes(figure, cells).update_layout(showlegend=False)


def _line_chart(table: pd.DataFrame, x: str, y: str, title: str, colors: Sequence[str] | None = None) -> go.Figure:
    """Plots a line per `curve` of a table of cells, with error bars `std`; says if the table is empty.

    The label of a point is the setting of its cell and `hover`.
    """
    figure = px.line(
        table,
        x=x,
        y=y,
        error_y="std" if "std" in table else None,
        color="curve",
        symbol="curve",
        hover_name=[f"<b>{setting(row)}</b><br>{row['hover']}" for row in table.to_dict("records")],
        markers=True,
        render_mode="svg",  # px would use WebGL for many points
        color_discrete_sequence=colors or list(map(to_hex, ordered_colors(table["curve"].nunique()))),
        symbol_sequence=SYMBOLS,
    )
    look = {"line_width": 1.5, "error_y": {"thickness": 1, "width": 2}}
    figure.update_traces(hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>", **look)
    figure.update_layout(LAYOUT, height=360, showlegend=True, legend_title_text="")
    figure.update_yaxes(title=title)
    if table.empty:
        figure.add_annotation(text="no run has finished", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
        figure.update_yaxes(showticklabels=False, showgrid=False)
    return figure


def scale_batch_sizes(figure: go.Figure, cells: pd.DataFrame) -> go.Figure:
    """Gives a figure the log axis of the batch sizes of cells."""
    values = sorted(set(cells["batch_size"].tolist()))
    limits = [math.log10(values[0] / 1.4), math.log10(values[-1] * 1.4)]
    ticks = {"tickvals": values, "ticktext": list(map(str, values))}
    return figure.update_xaxes(type="log", title=LABELS["batch_size"], range=limits, **ticks)


def _time_axis(seconds: pd.Series) -> dict[str, Any]:
    """A log axis that holds these times."""
    if not len(seconds):
        return {"showticklabels": False}
    below, above, ticks = unit_ticks(seconds, SECONDS)
    limits = [math.log10(below), math.log10(above)]
    return {"type": "log", "range": limits, "tickvals": ticks, "ticktext": [SECONDS[tick] for tick in ticks]}
