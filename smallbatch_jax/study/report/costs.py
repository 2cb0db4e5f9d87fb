"""What a study cost, for its report: a sentence, a table of its programs, and charts of accuracy against time."""

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from smallbatch_jax.config.text import duration, plural
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import CELL
from smallbatch_jax.study.answer import setting
from smallbatch_jax.study.figures.labels import metric_name
from smallbatch_jax.study.figures.style import SECONDS, ordered_colors, unit_ticks
from smallbatch_jax.study.figures.table import best_of_each, one_bn_batch_size
from smallbatch_jax.study.report.charts import LEGEND_ABOVE, SYMBOLS, batch_size_axis, empty_figure, rgb, say_nothing
from smallbatch_jax.study.report.sections import Table, Value
from smallbatch_jax.study.study import Study


def cost_charts(study: Study) -> dict[str, go.Figure]:
    """The charts by name; none without timings."""
    if not len(cost.seconds_per_image(study.timings)):
        return {}
    return {"time": accuracy_by_time(study), "target": time_to_accuracy(study)}


def sentence(study: Study) -> str:
    """How long the study trained and compiled, in all."""
    costs = cost.program_costs(study.timings)
    trained, compiled = duration(costs["segment_seconds"].sum()), duration(costs["compile_seconds"].sum())
    images = f"{int(costs['images'].sum()):,} images"
    beside = "most of it beside training. A run's own time is its share of its program's."
    return f"{plural(len(costs), 'program')} trained {images} in {trained}; compiling took {compiled}, {beside}"


def caption(study: Study) -> str:
    """What the chart of times shows."""
    target = cost.target_accuracy(one_bn_batch_size(study.cells)[0], study.chance)
    if math.isnan(target):
        return ""
    share = f"{100 * cost.TARGET:.0f} % of the way from chance to the best"
    return f"Right: the time of a run until it reaches {100 * target:.1f} %, {share}; × marks a batch size that never does."


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def table(study: Study) -> Table | None:
    """A row for each program that was timed; None if there is none."""
    costs = cost.program_costs(study.timings)
    if costs.empty:
        return None
    shows_bn = not study.cells["bn_batch_size"].equals(study.cells["batch_size"])
    heads = ["m", *["BN batch"] * shows_bn, "lanes", "images/s", "training", "compiling", "peak MiB"]
    rows = []
    for program in costs.to_dict("records"):
        bn = [Value(program["bn_batch_size"], str(program["bn_batch_size"]))] * shows_bn
        rate, peak = program["images_per_second"], program["peak_bytes"]
        seconds = [program["segment_seconds"], program["compile_seconds"]]
        rows.append(
            [
                Value(program["batch_size"], str(program["batch_size"])),
                *bn,
                Value(program["lanes"], str(program["lanes"])),
                _number(rate, f"{rate:,.0f}"),
                *(Value(value, _time(value)) for value in seconds),
                _number(peak, f"{peak / 2**20:,.1f}"),
            ]
        )
    return Table(heads, rows)


def _number(value: float, shown: str) -> Value:
    return Value("", "–") if value != value else Value(value, shown)


def accuracy_by_time(study: Study) -> go.Figure:
    """Test accuracy over a run's own time, the mean over seeds, for each m at its best η̃."""
    cells, _ = one_bn_batch_size(study.cells)
    best = best_of_each(cells)
    best = best[best["finished"] > 0].sort_values("batch_size")
    rows = cost.with_time(study.rows, study.timings).dropna(subset=["seconds"])
    figure, drawn = empty_figure(height=380), []
    for i, (cell, colour) in enumerate(zip(best.to_dict("records"), ordered_colors(len(best)), strict=True)):
        runs = rows[(rows[CELL] == [cell[name] for name in CELL]).all(axis=1) & (rows["status"] == "finished")]
        if runs.empty:
            continue
        mean = runs.groupby("epoch")[["seconds", "test_accuracy"]].mean()
        drawn.append(mean["seconds"])
        hover = [f"<b>{setting(cell)}</b><br>epoch {epoch}, {_time(x)}" for epoch, x in mean["seconds"].items()]
        figure.add_scatter(
            x=mean["seconds"],
            y=100 * mean["test_accuracy"],
            name=f"m = {cell['batch_size']}",
            mode="lines+markers",
            line={"color": rgb(colour), "width": 1.5},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 5},
            hovertext=hover,
            hovertemplate="%{hovertext}: %{y:.1f} %<extra></extra>",
        )
    figure.update_xaxes(title="time of a run", **_time_axis(pd.concat(drawn) if drawn else pd.Series(dtype=float)))
    figure.update_yaxes(title=f"{metric_name(study.experiment)} (%)")
    figure.update_layout(showlegend=True, legend=LEGEND_ABOVE)
    if not drawn:
        say_nothing(figure)
    return figure


def time_to_accuracy(study: Study) -> go.Figure:
    """A run's own time until it reaches `cost.target_accuracy`, for each m at the η̃ that is there first."""
    cells, _ = one_bn_batch_size(study.cells)
    target = cost.target_accuracy(cells, study.chance)
    rows = study.rows.merge(cells[CELL], on=CELL)
    found = cost.time_to_accuracy(rows, study.timings, target).dropna(subset=["seconds"])
    labels = [
        f"<b>{setting(row)}</b><br>{_time(row['seconds'])}, {row['epochs']:.3g} epochs" for row in found.to_dict("records")
    ]
    figure = empty_figure(height=340)
    figure.add_scatter(x=found["batch_size"], y=found["seconds"], mode="lines+markers", hovertext=labels)
    figure.update_traces(hovertemplate="%{hovertext}<extra></extra>")
    batch_size_axis(figure, set(cells["batch_size"].tolist()))
    shown = "" if target != target else f" to {100 * target:.1f} %"
    figure.update_yaxes(title=f"time of a run{shown}", **_time_axis(found["seconds"]))
    waiting = set(cells.loc[cells["pending"] > 0, "batch_size"].tolist())
    for m in sorted(set(cells["batch_size"].tolist()) - set(found["batch_size"].tolist()) - waiting):
        never = {"text": "×", "hovertext": f"m = {m}: no η̃ gets there", "showarrow": False}
        figure.add_annotation(x=math.log10(m), y=1, yref="paper", **never)
    figure.update_layout(showlegend=False)
    if found.empty:
        say_nothing(figure)
    return figure


def _time_axis(seconds: pd.Series) -> dict[str, Any]:
    """A log axis that holds these times."""
    if seconds.empty:
        return {"showticklabels": False}
    below, above, ticks = unit_ticks(seconds, SECONDS)
    limits = [math.log10(below), math.log10(above)]
    return {"type": "log", "range": limits, "tickvals": ticks, "ticktext": [SECONDS[tick] for tick in ticks]}
