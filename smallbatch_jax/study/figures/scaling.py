"""Figures of scaling theory: the examples to a target against m with the critical batch size, and the best rates η*(m)."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from smallbatch_jax.config.text import two_digits
from smallbatch_jax.study.critical import MORE, CriticalBatchSize, critical_batch_size, noise_scale
from smallbatch_jax.study.figures import points, style
from smallbatch_jax.study.rates import RULES, best_rates, fit_rule
from smallbatch_jax.study.study import Study

POINT: dict[str, Any] = {"color": style.CATEGORIES[0], "marker": "o", "linestyle": ""}
MORE_NEEDED: dict[str, Any] = {**POINT, "marker": "^", "markerfacecolor": "white", "zorder": 3}
HYPERBOLA: dict[str, Any] = {"color": style.CATEGORIES[1], "linewidth": 1.2}
BAND: dict[str, Any] = {"color": style.CATEGORIES[1], "alpha": 0.15, "linewidth": 0}
RULE_COLORS = dict(zip(RULES, style.CATEGORIES[1:], strict=False))
DASHED = (0, (3, 2))
NUMBERS = {count * 10**n: f"{count * 10**n:,}" for n in range(14) for count in (1, 2, 5)}
LEAST_SIZES = 3  # least number of batch sizes for these figures


@style.styled()
def examples_to_target(study: Study) -> Figure:
    """The number of examples until a run reaches the target of `critical.critical_batch_size`, for each m at its best η̃.

    Returns:
      A figure with the fitted hyperbola, dashed where its turn is not certain; a line at the batch size that needs 20 % more,
      with a band over its interval; and a hollow triangle for an m that never gets there, at the number of examples seen.
      Where the results have a noise scale, a second panel shows it, with its error and m_crit as a line.
    """
    fit, scale = critical_batch_size(study), noise_scale(study)
    table, title = fit.table, f"{style.plain(study.name)}: examples to {style.plain(fit.target or 'a target')}"
    figure = style.new_figure(style.HEIGHT * (1 if scale is None else 1.6))
    panels = figure.subplots(1 if scale is None else 2, sharex=True, squeeze=False)[:, 0]
    axes = panels[0]
    axes.set(title=title, ylabel="examples")
    kinds = {"reached": (table["reached"], POINT), "needs more than that": (~table["reached"], MORE_NEEDED)}
    entries = points.plot_kinds(axes, table, "batch_size", "examples", kinds)
    if not table["reached"].any():
        axes.text(0.5, 0.9, "no batch size has reached it", transform=axes.transAxes, ha="center", color=style.QUIET)
    style.unit_axis(axes, "y", table["examples"].tolist() or (1, 10), NUMBERS)
    if not math.isnan(fit.size):
        entries |= _draw_hyperbola(axes, fit)
    if scale is not None:
        errors = scale["error"].where(scale["error"] > 0, 0)
        panels[1].errorbar(scale["batch_size"], scale["scale"], errors, **{**POINT, "color": style.CATEGORIES[2]}, capsize=1.5)
        panels[1].set(ylabel="noise scale (examples)")
        style.unit_axis(panels[1], "y", [*scale["scale"], *[fit.low, fit.high] * fit.known], NUMBERS)
        if fit.known:
            panels[1].axhspan(fit.low, fit.high, **BAND)
            entries["$m_{crit}$ of the hyperbola"] = panels[1].axhline(fit.size, **HYPERBOLA, linestyle=DASHED)
    style.grid_axis(panels[-1], "x", "batch_size", study.cells["batch_size"])
    style.foot(figure, entries, fit.sentence())
    return figure


def _draw_hyperbola(axes: Axes, fit: CriticalBatchSize) -> dict[str, Any]:
    """Draws the fit and, where it is certain, the batch size that needs 20 % more; returns the legend's entries."""
    sizes = np.geomspace(fit.table["batch_size"].min(), fit.table["batch_size"].max(), 100)
    (line,) = axes.plot(sizes, fit.expected(sizes), **HYPERBOLA, linestyle="-" if fit.known else DASHED, label="_hyperbola")
    entries: dict[str, Any] = {r"$E_{min}(1 + m / m_{crit})$" + ", uncertain" * (not fit.known): line}
    if fit.known:
        axes.axvspan(MORE * fit.low, MORE * fit.high, **BAND)
        look = {**HYPERBOLA, "linestyle": ":"}
        axes.axvline(fit.costly, **look)
        entries[f"{100 * MORE:.0f} % more, $m$ = {two_digits(fit.costly)}"] = Line2D([], [], **look)
    return entries


@style.styled()
def best_learning_rates(study: Study) -> Figure:
    """The best learning rate η* on the mean gradient of each m, and the rules that the data support.

    Returns:
      A figure with 90 % intervals of η*, from the spacing of the rates tried and the noise; a hollow point has its best at the
      end of the rates tried and is not fitted. A supported rule is a solid line; rules that the data do not distinguish are
      dashed.
    """
    rule = fit_rule(best_rates(study))
    table = rule.table
    figure, axes = style.new_axes(f"{style.plain(study.name)}: best learning rate of each $m$")
    if len(table):
        axes.set_yscale("log", base=2)
    known = table[table["low"].notna()]
    axes.vlines(known["batch_size"], known["low"], known["high"], color=POINT["color"], linewidth=0.8)
    kinds = {
        r"$\eta^*$ with 90 % interval": (~table["edge"], POINT),
        "at the end of the rates tried": (table["edge"], {**POINT, **style.HOLLOW}),
    }
    entries = points.plot_kinds(axes, table, "batch_size", "rate", kinds)
    for name, color in RULE_COLORS.items():
        if name in rule.likely:
            sizes = np.geomspace(table["batch_size"].min(), table["batch_size"].max(), 100)
            look = {"color": color, "linestyle": "-" if rule.supported else DASHED}
            (entries[name],) = axes.plot(sizes, rule.rate(name, sizes), label=f"_{name}", **look)
    if table.empty:
        style.say_nothing_finished(axes)
    rule_text = style.RULE_TEXTS.get(study.experiment.optimizer.rule, r"$\tilde{\eta}\,m$")
    axes.set_ylabel(rf"learning rate $\eta$ = {rule_text}")
    style.grid_axis(axes, "x", "batch_size", study.cells["batch_size"])
    style.foot(figure, entries, rule.sentence(), columns=3)
    return figure
