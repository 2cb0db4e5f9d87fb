"""Plotly charts of scaling theory: the examples to a target and the best learning rates, as in `figures.scaling`."""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.study.critical import CriticalBatchSize
from smallbatch_jax.study.figures.scaling import RULE_COLORS
from smallbatch_jax.study.figures.style import CATEGORIES
from smallbatch_jax.study.rates import RateRule
from smallbatch_jax.study.recommendation import Recommendation
from smallbatch_jax.study.report.charts import LAYOUT, scale_batch_sizes
from smallbatch_jax.study.study import Study


def scaling_charts(study: Study, found: Recommendation) -> dict[str, go.Figure]:
    """Returns the charts by name; empty with fewer than three batch sizes."""
    if found.critical is None:
        return {}
    return {"examples": _examples(study, found.critical)} | ({"rates": _rates(study, found.rule)} if found.rule else {})


def _examples(study: Study, fit: CriticalBatchSize) -> go.Figure:
    """Plots the examples to the target against m, with the hyperbola; a triangle is a lower bound."""
    figure = go.Figure(layout={**LAYOUT, "height": 360})
    for reached, name, symbol in ((True, "reached", "circle"), (False, "needs more than that", "triangle-up-open")):
        rows = fit.table[fit.table["reached"] == reached]
        hover = [f"m = {m}: {seen:,.0f} examples" for m, seen in zip(rows["batch_size"], rows["examples"], strict=True)]
        _points(figure, rows["batch_size"], rows["examples"], hover, name, symbol)
    if not math.isnan(fit.size):
        sizes = np.geomspace(fit.table["batch_size"].min(), fit.table["batch_size"].max(), 60)
        name = "E(1 + m / m_crit)" + ", uncertain" * (not fit.known)
        _line(figure, sizes, fit.expected(sizes), name, CATEGORIES[1], fit.known)
    figure.update_yaxes(type="log", title=f"examples to {fit.target or 'a target'}")
    return scale_batch_sizes(figure, study.cells)


def _rates(study: Study, rule: RateRule) -> go.Figure:
    """The best learning rates against m with their intervals, and the rules that the data support."""
    figure, table = go.Figure(layout={**LAYOUT, "height": 360}), rule.table
    for edge, name, symbol in ((False, "best η", "circle"), (True, "at the end of the rates tried", "circle-open")):
        rows = table[table["edge"] == edge]
        shown = zip(rows["batch_size"], map(format_base_lr, rows["base_lr"]), strict=True)
        hover = [f"m = {m}: best at η̃ = {base_lr}" for m, base_lr in shown]
        above, below = (rows["high"] - rows["rate"]).tolist(), (rows["rate"] - rows["low"]).tolist()
        bars = {"array": above, "arrayminus": below, "thickness": 1, "width": 2} if rows["low"].notna().all() else None
        _points(figure, rows["batch_size"], rows["rate"], hover, name, symbol, bars)
    for name in rule.likely:
        sizes = np.geomspace(table["batch_size"].min(), table["batch_size"].max(), 60)
        _line(figure, sizes, rule.rate(name, sizes), name, RULE_COLORS[name], rule.supported is not None)
    figure.update_yaxes(type="log", title="best learning rate η")
    return scale_batch_sizes(figure, study.cells)


def _points(figure: go.Figure, x: Any, y: Any, hover: list[str], name: str, symbol: str, bars: Any = None) -> None:
    if len(x):
        look = {"mode": "markers", "marker": {"symbol": symbol, "color": CATEGORIES[0]}, "error_y": bars, "name": name}
        figure.add_scatter(x=x.tolist(), y=y.tolist(), hovertext=hover, hovertemplate="%{hovertext}<extra></extra>", **look)


def _line(figure: go.Figure, x: np.ndarray, y: np.ndarray, name: str, color: str, certain: bool) -> None:
    line = {"color": color, "dash": "solid" if certain else "dash"}
    figure.add_scatter(x=x.tolist(), y=y.tolist(), mode="lines", name=name, line=line, hoverinfo="skip")
