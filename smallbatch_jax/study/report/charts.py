"""The charts of a report, made by Plotly in Python. The page shows them and swaps one for another; it draws none itself."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.study.analysis import CELL, RUN
from smallbatch_jax.study.answer import accuracy, setting
from smallbatch_jax.study.figures.labels import metric_name
from smallbatch_jax.study.figures.style import CATEGORIES, COLORS, ordered_colors
from smallbatch_jax.study.figures.table import best_of_each, make_table, own_base_lrs
from smallbatch_jax.study.study import Study

MOST_SEEDS = 8  # listed one by one in a label
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")  # as the printed figures' markers
DIVERGED, PENDING = "#d9d9d9", "#f7f7f7"
LEGEND_ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


class Grid(NamedTuple):
    """The cells of one heat map."""

    label: str  # which part of the grid this is; empty for all of it
    cells: pd.DataFrame  # at most one per place, with the index of `study.cells`
    column: str  # of the cells, that the x axis shows; the y axis shows m


def power(value: float) -> str:
    """A base learning rate for a chart, 2^-7 with a raised exponent."""
    base, caret, exponent = format_base_lr(value).partition("^")
    return f"{base}<sup>{exponent}</sup>" if caret else base


def grids(study: Study) -> list[Grid]:
    """The heat maps that together hold every cell of a study."""
    cells = study.cells
    ordinary = cells["bn_batch_size"] == cells["batch_size"]
    if ordinary.all():
        return [Grid("", cells, "base_lr")]
    if own_base_lrs(cells).notna().all():  # one base learning rate for each m, as in Figs. 13 and 14
        return [Grid("", cells, "bn_batch_size")]
    sizes = sorted(set(cells["bn_batch_size"].tolist()))
    whole = [Grid("BN batch size = m", cells[ordinary], "base_lr")] if ordinary.any() else []
    return whole + [Grid(f"BN batch size {b}", cells[cells["bn_batch_size"] == b], "base_lr") for b in sizes]


def heat_map(study: Study, grid: Grid, labels: Sequence[str]) -> go.Figure:
    """Test accuracy of every cell: coloured where a seed finished, × on grey where all diverged, a dot where none has ended.

    `labels` are by the position of the cell in `study.cells`; `customdata` of a point is that position.
    """
    positions = pd.Series(np.arange(len(study.cells)), study.cells.index)
    table = make_table(grid.cells, "batch_size", grid.column)
    place = grid.cells.assign(position=positions).pivot(index="batch_size", columns=grid.column, values="position")
    where = place.reindex(index=table.rows, columns=table.columns).to_numpy(float)
    shared = {
        "x": [power(x) if grid.column == "base_lr" else str(x) for x in table.columns],
        "y": [str(m) for m in table.rows],
        "customdata": _listed(where, int),
        "hovertext": [[labels[int(i)] if i == i else "" for i in row] for row in where],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }
    bar = {"title": {"text": f"{metric_name(study.experiment)} (%)", "side": "right"}, "thickness": 12, "outlinewidth": 0}
    colours = {"colorscale": COLORS.capitalize(), "colorbar": bar}
    numbers = {"text": [["" if a != a else f"{a:.1f}" for a in row] for row in table.accuracy], "texttemplate": "%{text}"}
    figure = empty_figure(height=96 + 34 * len(table.rows))
    figure.add_heatmap(z=_listed(table.accuracy, lambda a: round(a, 2)), **shared, **colours, **numbers)
    for mask, colour, text in ((table.all_diverged, DIVERGED, "×"), (table.unknown, PENDING, "·")):
        if mask.any():
            flat = {"colorscale": [[0, colour], [1, colour]], "showscale": False, "texttemplate": "%{text}"}
            flat["text"] = np.where(mask, text, "").tolist()
            figure.add_heatmap(z=_listed(np.where(mask, 0.0, np.nan), int), **shared, **flat)
    title = "base learning rate η̃" if grid.column == "base_lr" else "BN batch size"
    figure.update_layout(dragmode=False)  # a click chooses a cell
    figure.update_xaxes(type="category", title=title, showgrid=False)
    figure.update_yaxes(type="category", title="batch size m", showgrid=False)
    return figure


def _listed(values: np.ndarray, shown: Any) -> list[list[Any]]:
    """Rows of values as JSON has them: null where there is none."""
    return [[None if value != value else shown(value) for value in row] for row in values.tolist()]


def cell_labels(study: Study) -> list[str]:
    """What there is to know of each cell, in the order of `study.cells`: its setting, accuracy, and each seed's fate."""
    last = study.rows.drop_duplicates(RUN, keep="last")  # rows are sorted by epoch
    seeds: dict[tuple[Any, ...], list[str]] = {}
    for run in last.itertuples(index=False):
        seeds.setdefault(tuple(getattr(run, name) for name in CELL), []).append(_fate(run, study.experiment.epochs))
    labels = []
    for _, cell in study.cells.iterrows():
        eta = cell["base_lr"] * cell["batch_size"]
        lines = [f"<b>{setting(cell)}</b>", f"η = η̃·m = {eta:.6g}"]
        lines += [f"{metric_name(study.experiment)} {accuracy(cell)}"] * bool(cell["finished"])
        fates = seeds.get(tuple(cell[name] for name in CELL), [])
        lines += fates[:MOST_SEEDS] + [f"and {len(fates) - MOST_SEEDS} more seeds"] * (len(fates) > MOST_SEEDS)
        untouched = int(cell["finished"] + cell["diverged"] + cell["pending"]) - len(fates)
        lines += [f"{untouched} seed{'s' * (untouched > 1)} not begun"] * (untouched > 0)
        labels.append("<br>".join(lines))
    return labels


def _fate(run: Any, epochs: int) -> str:
    """What became of a run, by its last row."""
    if run.status == "diverged":
        return f"seed {run.seed}: diverged in epoch {run.epoch}"
    went = f"finished, {epochs} epochs" if run.status == "finished" else f"running, {run.epoch} of {epochs} epochs"
    return f"seed {run.seed}: {went}, {100 * run.test_accuracy:.1f} % after the last"


class Curves(NamedTuple):
    """The learning curves of one cell, as Plotly's traces."""

    title: str
    accuracy: list[dict[str, Any]]
    loss: list[dict[str, Any]]


def learning_curves(study: Study) -> list[Curves]:
    """Accuracy and loss by epoch of every run, by cell in the order of `study.cells`; test solid, training dotted."""
    by_cell: dict[Any, list[pd.DataFrame]] = {}
    for key, run in study.rows.groupby(RUN, sort=True, observed=True):
        by_cell.setdefault(key[:-1], []).append(run)
    found = []
    for _, cell in study.cells.iterrows():
        runs = by_cell.get(tuple(cell[name] for name in CELL), [])
        traces = {
            what: [trace for i, run in enumerate(runs) for trace in _traces(run, i, what)] for what in ("accuracy", "loss")
        }
        drawn = any(y is not None for trace in traces["accuracy"] for y in trace["y"])
        nothing = ": diverged before the end of an epoch" if runs else ": no epoch has ended yet"
        found.append(Curves(setting(cell) + ("" if drawn else nothing), **traces))
    return found


def _traces(run: pd.DataFrame, index: int, what: str) -> list[dict[str, Any]]:
    """A run's test and training curves."""
    seed, lost = int(run["seed"].iloc[0]), bool((run["status"] == "diverged").any())
    colour = CATEGORIES[index % len(CATEGORIES)]
    traces = []
    for part, dash in (("test", "solid"), ("train", "dot")):
        values = run[f"{part}_{what}"].to_numpy()
        percent = what == "accuracy"
        shown = [_number(100 * v if percent else v, percent) for v in values]
        name = f"{part}, seed {seed}" + " (diverged)" * lost
        unit = ":.2f} %" if percent else ":.4g}"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(values) < 3 else "lines",
                "x0": int(run["epoch"].iloc[0]),
                "dx": 1,
                "y": shown,
                "name": name,
                "line": {"color": colour, "dash": dash, "width": 1.5},
                "hovertemplate": "epoch %{x}: %{y" + unit + f"<extra>{name}</extra>",
            }
        )
    return traces


def _number(value: float, percent: bool) -> float | None:
    if not np.isfinite(value):
        return None
    return round(float(value), 2) if percent else float(f"{value:.3g}")


def curves_layout(study: Study, what: str) -> go.Figure:
    """The empty chart into which the curves of a cell are put."""
    figure = empty_figure(height=330)
    figure.update_xaxes(title="epoch", dtick=1 if study.experiment.epochs <= 12 else None)
    if what == "accuracy":
        figure.update_yaxes(title="accuracy (%)", range=[0, 100])
    else:
        figure.update_yaxes(title="cross-entropy", type="log", exponentformat="power")
    figure.update_layout(hovermode="closest", showlegend=True, legend=LEGEND_ABOVE)
    return figure


def best_by_batch_size(studies: dict[str, Study]) -> go.Figure:
    """The best test accuracy of each m over all its η̃ (Fig. 15), a curve for each study by its label."""
    figure = empty_figure(height=340)
    for i, (label, study) in enumerate(studies.items()):
        cells = study.cells
        best = best_of_each(cells).sort_values("test_accuracy", ascending=False).drop_duplicates("batch_size")
        best = best.sort_values("batch_size")
        hover = [
            f"<b>{setting(cell)}</b><br>{accuracy(cell)}" if cell["finished"] else "none has finished"
            for _, cell in best.iterrows()
        ]
        std = 100 * best["test_accuracy_std"]
        figure.add_scatter(
            x=best["batch_size"],
            y=100 * best["test_accuracy"],
            error_y={"array": std, "visible": bool(std.notna().any()), "thickness": 1, "width": 3},
            name=html.escape(label, quote=False),
            mode="lines+markers",
            line={"color": CATEGORIES[i % len(CATEGORIES)], "dash": "solid" if i < len(CATEGORIES) else "dash"},
            hovertext=hover,
            hovertemplate="%{hovertext}<extra>" + html.escape(label, quote=False) + "</extra>",
        )
    batch_size_axis(figure, {m for study in studies.values() for m in study.cells["batch_size"].tolist()})
    names = {metric_name(study.experiment) for study in studies.values()}
    figure.update_yaxes(title=f"best {names.pop() if len(names) == 1 else 'test accuracy'} (%)")
    figure.update_layout(showlegend=len(studies) > 1, legend=LEGEND_ABOVE)
    return figure


def accuracy_by_batch_size(study: Study, grid: Grid) -> go.Figure:
    """Test accuracy over m, one curve per η̃: the paper's form (Figs. 1–3, 5–12)."""
    figure = empty_figure(height=380)
    rates = sorted(set(grid.cells.loc[grid.cells["finished"] > 0, grid.column].tolist()))
    looks = zip(map(rgb, ordered_colors(len(rates))), itertools.cycle(SYMBOLS), strict=False)
    for rate, (colour, symbol) in zip(rates, looks, strict=False):
        cells = grid.cells[grid.cells[grid.column] == rate].sort_values("batch_size")
        hover = [f"<b>{setting(cell)}</b><br>{accuracy(cell)}" if cell["finished"] else "" for _, cell in cells.iterrows()]
        std = 100 * cells["test_accuracy_std"]
        name = power(rate) if grid.column == "base_lr" else str(rate)
        figure.add_scatter(
            x=cells["batch_size"],
            y=100 * cells["test_accuracy"],
            error_y={"array": std, "visible": bool(std.notna().any()), "thickness": 1, "width": 2},
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"symbol": symbol, "size": 7},
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    batch_size_axis(figure, set(grid.cells["batch_size"].tolist()))
    if not rates:
        say_nothing(figure)
    figure.update_yaxes(title=f"{metric_name(study.experiment)} (%)")
    title = "η̃" if grid.column == "base_lr" else "BN batch size"
    figure.update_layout(showlegend=True, legend={**LEGEND_ABOVE, "title": {"text": title}})
    return figure


def say_nothing(figure: go.Figure) -> None:
    """What a chart without a curve says."""
    figure.add_annotation(text="no run has finished", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.update_yaxes(showticklabels=False, showgrid=False)


def rgb(colour: Any) -> str:
    """A colour of `ordered_colors`, as Plotly takes it."""
    return "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * part for part in colour[:3]))


def batch_size_axis(figure: go.Figure, sizes: set[int]) -> None:
    values = sorted(sizes)
    limits = [math.log10(values[0] / 1.4), math.log10(values[-1] * 1.4)]
    names = [str(m) for m in values]
    figure.update_xaxes(type="log", title="batch size m", tickvals=values, ticktext=names, range=limits)


def empty_figure(height: int) -> go.Figure:
    """An empty chart in the style of the printed figures."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 12, "t": 12, "b": 52},
        font={"family": FONT, "size": 12},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"align": "left", "font": {"family": FONT}},
    )
    axis = {"gridcolor": "#e6e6e6", "zeroline": False, "automargin": True, "ticks": "outside", "tickcolor": "#bbb"}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
