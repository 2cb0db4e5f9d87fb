"""The best learning rate of each batch size, η*(m), and the rule that it follows: linear, square-root or saturating.

The best rate is uncertain by the spacing Δ of the rates tried and, where the top is flat, by the noise. Values are resampled
with noise z, and log2 η*(m) is the mean log2 of the best rate over the draws: a smoothed bootstrap with variance
Σ cov(log2 η*, z_i)² (Efron 2014). The spacing adds Δ²/12, or less if several rates share the draws. Rules are compared by χ² of
log2 η*(m) with these variances.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import chdtrc, ndtri

from smallbatch_jax.config.text import and_list, plural, two_digits
from smallbatch_jax.study.analysis import best_of_each_size
from smallbatch_jax.study.noise import LEVEL, Noise, noise_of, rates_of
from smallbatch_jax.study.study import Study

DRAWS = 500
APART = 4.0  # least gap in χ² + further parameters that rules out a rule, which is then e² times less likely
MISFIT = 0.01  # p-value of the best rule's χ² below which no rule fits
Z = float(ndtri((1 + LEVEL) / 2))
RULES = {
    "linear": "η ∝ m",
    "square-root": "η ∝ √m",
    "saturating": "η ∝ m up to a turn, then constant",
    "another power": "η ∝ m^p",
}


class RateRule(NamedTuple):
    """A fit of the best learning rate η*(m).

    Attributes:
      table: from `best_rates`.
      exponent, low, high: p of η* ∝ m^p with its 90 % interval; NaN if unknown noise or fewer than three sizes prevent a fit.
      likely: names in `RULES` that the data do not distinguish from the best rule, the best first; empty if none fits.
      turn: batch size at which the saturating rule turns.
      offsets: log2 η* at m = 1 by rule.
    """

    table: pd.DataFrame
    exponent: float
    low: float
    high: float
    likely: tuple[str, ...]
    turn: float
    offsets: dict[str, float]

    @property
    def supported(self) -> str | None:
        """The one rule that the data support; None if there are none or several."""
        return self.likely[0] if len(self.likely) == 1 else None

    def rate(self, rule: str, batch_size: Any) -> Any:
        """Returns η* at batch sizes by a rule."""
        return 2 ** (self.offsets[rule] + shapes(self.turn, self.exponent)[rule](np.log2(batch_size)))

    def sentence(self) -> str:
        """Returns a sentence on the rule that the best rates follow, with the exponent."""
        fitted = (~self.table["edge"]).sum()
        unclear = "Rule of the best learning rate η*(m): cannot tell"
        if math.isnan(self.exponent):
            few = f"the best rate is inside the range tried at {plural(fitted, 'batch size')}; three are needed"
            return f"{unclear}; {few if self.table['std'].notna().all() else 'the noise of a single seed is not known'}."
        exponent = f"η* ∝ m^{self.exponent:.2f} (90 %: {self.low:.2f} … {self.high:.2f})"
        if self.supported == "another power":
            return f"The best learning rate follows neither the linear nor the √ rule: {exponent} over {fitted} batch sizes."
        if rule := self.supported:
            turn = f", the turn at m ≈ {two_digits(self.turn)}" if rule == "saturating" else ""
            return f"The best learning rate follows the {rule} rule, {RULES[rule]}{turn}; {exponent} over {fitted} batch sizes."
        among = f" between {and_list(self.likely)}" if self.likely else f", as none of {and_list(list(RULES)[:3])} fits"
        return f"{unclear}{among}; {exponent} over {fitted} batch sizes."


def shapes(turn: float, exponent: float) -> dict[str, Callable[[Any], Any]]:
    """Returns log2 η* of each rule without its offset, as a function of log2 m."""
    return {
        "linear": lambda x: x,
        "square-root": lambda x: x / 2,
        "saturating": lambda x: np.minimum(x, math.log2(turn)),
        "another power": lambda x: exponent * x,
    }


def best_rates(study: Study, noise: Noise | None = None) -> pd.DataFrame:
    """Returns the best learning rate of each batch size that has a finished run and several complete rates.

    Returns:
      One row per batch size, sorted: `base_lr` of the best cell; `rate`, the estimate of η* on the mean gradient; `std`, the
      standard deviation of its log2, NaN if the noise is not known; `low`, `high`, its 90 % interval; `edge`, whether the best
      is at the end of the rates tried, so that η* may lie beyond.
    """
    noise, rows = noise or noise_of(study), []
    cells = study.cells[study.cells["pending"] == 0]
    for _, top in best_of_each_size(cells, noise.metric).iterrows():
        same = rates_of(cells, top)
        if len(same) < 2:
            continue
        rates = np.log2(same["base_lr"].to_numpy(float))
        values = (1 if noise.metric.best == "max" else -1) * same[noise.metric.column].to_numpy(float)
        centre, std, low, high = _place(rates, values, noise.error(same))
        scale = study.experiment.optimizer.learning_rate(1.0, int(top["batch_size"]))
        edge = math.log2(top["base_lr"]) in (rates[0], rates[-1])
        rows.append((top["batch_size"], top["base_lr"], *(scale * 2**x for x in (centre, low, high)), std, edge))
    table = pd.DataFrame(rows, columns=["batch_size", "base_lr", "rate", "low", "high", "std", "edge"])
    return table.astype({"edge": bool}).sort_values("batch_size", ignore_index=True)


def _place(rates: np.ndarray, values: np.ndarray, errors: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the mean, deviation and 90 % interval of the (log2) rate with the highest value; ignores NaN values."""
    finite = np.isfinite(values)
    z = np.random.default_rng(0).normal(size=(DRAWS, len(rates)))
    chosen = np.where(finite, values + np.where(finite, errors, 0) * z, -np.inf).argmax(1)
    if np.isnan(errors[finite]).any():
        return rates[np.nanargmax(values)], math.nan, math.nan, math.nan
    gaps, places = np.diff(rates), rates[chosen]
    widths = (np.r_[gaps[:1], gaps] + np.r_[gaps, gaps[-1:]]) / 2
    shares = np.bincount(chosen, minlength=len(rates)) / DRAWS
    smooth = (((places - places.mean()) @ z / DRAWS) ** 2).sum()
    std = math.sqrt(smooth + (shares**2 * widths**2).sum() / 12)
    return places.mean(), std, places.mean() - Z * std, places.mean() + Z * std


def fit_rule(table: pd.DataFrame) -> RateRule:
    """Fits η*(m) to `best_rates`, without batch sizes whose best is at an edge."""
    inside = table[~table["edge"]]
    x, y = (np.log2(inside[name].to_numpy(float)) for name in ("batch_size", "rate"))
    weights = 1 / inside["std"].to_numpy(float) ** 2
    if len(inside) < 3 or not np.isfinite(weights).all():
        return RateRule(table, math.nan, math.nan, math.nan, (), math.nan, {})
    (exponent, offset), covariance = np.polyfit(x, y, 1, w=np.sqrt(weights), cov="unscaled")
    exponent, left = float(exponent), y - offset - exponent * x
    error = Z * math.sqrt(max(1.0, (weights * left**2).sum() / (len(x) - 2)) * covariance[0, 0])

    def fit(shape: Callable[[Any], Any]) -> tuple[float, float]:
        """Returns χ² and the offset of a rule."""
        offset = np.average(y - shape(x), weights=weights)
        return float((weights * (y - shape(x) - offset) ** 2).sum()), float(offset)

    turns: list[float] = (2 ** np.linspace(x[0], x[-1] - 1, 100)).tolist()  # a turn at the last size would be the linear rule
    turn = min(turns, key=lambda turn: fit(shapes(turn, exponent)["saturating"])[0])
    fits = {name: fit(shape) for name, shape in shapes(turn, exponent).items()}
    further = {name: int(name in ("saturating", "another power")) for name in RULES}  # parameters beside the offset
    scores = {name: fits[name][0] + further[name] for name in RULES}
    power = scores.pop("another power")
    if min(scores, key=lambda name: scores[name]) == "saturating":  # a turn must also fit better than an exponent in between
        scores["another power"] = power
    order = sorted(scores, key=lambda name: scores[name])
    fitting = chdtrc(len(x) - 1 - further[order[0]], fits[order[0]][0]) > MISFIT
    likely = tuple(name for name in order if scores[name] < scores[order[0]] + APART) if fitting else ()
    offsets = {name: offset for name, (_, offset) in fits.items()}
    return RateRule(table, exponent, exponent - error, exponent + error, likely, turn, offsets)
