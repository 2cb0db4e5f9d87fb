r"""The critical batch size: how many examples a target needs at each batch size, and where larger batches begin to cost more.

The examples to a target follow a hyperbola (McCandlish et al. 2018; Zhang et al. 2024),

.. math:: E(m) = E_\min (1 + m / m_\mathrm{crit}),

fitted to log E with normal residuals. A batch size that has not reached the target needs more examples than its runs have seen:
it is censored, and contributes the probability of that. The interval of m_crit holds the values that a likelihood ratio test,
with Student's quantile because batch sizes are few, does not reject; it is open where the data do not bound m_crit.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import log_ndtr, stdtrit

from smallbatch_jax.config.text import two_digits
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import best_of_each_size, cell_columns
from smallbatch_jax.study.noise import LEVEL
from smallbatch_jax.study.study import Study

MORE = 0.2  # relative excess of examples over small batches, at the reported batch size (Zhang et al. 2024)
LEAST_SIGMA = 0.005  # of log E, finer than the interpolation of curves
BEYOND = 1000  # factor beyond the measured batch sizes, up to which m_crit is sought
STEPS, ITERATIONS = 100, 100  # values of m_crit, and steps of expectation maximisation


class CriticalBatchSize(NamedTuple):
    """A fitted critical batch size.

    Attributes:
      table: from `examples_to_target`.
      target: the target in words, such as "91.2 % test accuracy"; empty if it is not known, since the loss of a guess is not.
      examples: E_min; NaN if it could not be fitted.
      size, low, high: m_crit and the ends of its 90 % interval, 0 and infinity where the data do not bound it.
    """

    table: pd.DataFrame
    target: str
    examples: float
    size: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether m_crit is within the measured batch sizes and its interval is bounded on both sides."""
        sizes = self.table["batch_size"]
        return self.low > 0 and self.high < math.inf and bool(sizes.min() <= self.size <= sizes.max())

    @property
    def costly(self) -> float:
        """Batch size that needs 20 % more examples than small ones."""
        return MORE * self.size

    def expected(self, batch_size: Any) -> Any:
        """Returns E(m) of the fit."""
        return self.examples * (1 + batch_size / self.size)

    def sentence(self) -> str:
        """Returns the result of the fit in one sentence."""
        if math.isnan(self.size):
            why = "fewer than three batch sizes reached a target" if self.target else "the loss of a guess is not known"
            return f"Critical batch size: cannot tell; {why}."
        ends = f"m = {self.table['batch_size'].min()} and {self.table['batch_size'].max()}"
        low, high = two_digits(self.low), two_digits(self.high)
        if self.known:
            return (
                f"Critical batch size: m_crit = {two_digits(self.size)} (90 %: {low} … {high}) for the examples to "
                f"{self.target}; m = {two_digits(self.costly)} needs {100 * MORE:.0f} % more of them than the smallest batches."
            )
        bounds = [f"above {low}"] * (self.low > 0) + [f"below {high}"] * (self.high < math.inf)
        bound = f"; m_crit is {' and '.join(bounds)} (90 %)" if bounds else ""
        return f"Critical batch size: cannot tell; the examples to {self.target} have no certain turn between {ends}{bound}."


def critical_batch_size(study: Study, target: float | None = None) -> CriticalBatchSize:
    """Fits the hyperbola to the examples that each batch size needs for a target, at the cell that reaches it first.

    The target is a value of the study's metric, by default `cost.target_accuracy`, 90 % of the way from chance to the best.
    """
    target = cost.target_accuracy(study.cells, study.chance, metric=study.metric) if target is None else target
    table = examples_to_target(study, target)
    fit = fit_hyperbola(*(table[name].to_numpy() for name in ("batch_size", "examples", "reached")))
    return CriticalBatchSize(table, "" if math.isnan(target) else f"{study.metric.show(target)} {study.metric.title}", *fit)


def examples_to_target(study: Study, target: float) -> pd.DataFrame:
    """Returns the number of examples that each batch size has seen when it reaches a target, at the cell that reaches it first.

    A run reaches it in the first epoch that is at least as good, even if it falls again; the metric is interpolated linearly
    within that epoch, from chance in epoch 1. A cell reaches it if all its runs do; its number is their geometric mean. A run
    that still trains or was given up is included with the epochs that it has.

    Returns:
      One row per batch size that has rows, sorted: `base_lr`, `examples`, and `reached`; where no cell reaches it,
      `base_lr` is NaN and `examples` the most that a run has seen.
    """
    metric, key = study.metric, cell_columns(study.rows)
    rows = study.choosing.sort_values("epoch", kind="stable")
    rows = rows.assign(seen=cost.examples_seen(rows))
    runs = rows.groupby([*key, "seed"], observed=True)
    rows = rows.assign(before=runs["seen"].shift(fill_value=0), earlier=runs[metric.column].shift())
    rows["earlier"] = rows["earlier"].where(rows["before"] > 0, study.chance)
    there = rows[(metric.gain(rows[metric.column], target) >= 0) & (rows["status"] != "diverged")]
    there = there.drop_duplicates([*key, "seed"])
    part = ((target - there["earlier"]) / (there[metric.column] - there["earlier"])).clip(0, 1).fillna(1.0)
    logs = np.log(there["before"] + part * (there["seen"] - there["before"]))
    found = there.assign(logs=logs).groupby(key, observed=True)["logs"].agg(["mean", "size"])
    begun = rows.drop_duplicates([*key, "seed"]).groupby(key, observed=True).size()
    found = found[found["size"] == begun.reindex(found.index)].reset_index()
    first = found.sort_values(["mean", "base_lr"]).drop_duplicates("batch_size").set_index("batch_size")
    table = rows.groupby("batch_size")[["seen"]].max().join(first[["base_lr", "mean"]]).reset_index()
    reached = table["mean"].notna()
    table = table.assign(examples=np.where(reached, np.exp(table["mean"]), table["seen"]), reached=reached)
    return table[["batch_size", "base_lr", "examples", "reached"]]


def fit_hyperbola(sizes: np.ndarray, examples: np.ndarray, reached: np.ndarray) -> tuple[float, float, float, float]:
    """Returns E_min and m_crit with the ends of its 90 % interval, by maximum likelihood with censored batch sizes.

    Args:
      sizes: batch sizes m, [n].
      examples: E(m), or the number seen, a lower bound, where the target is not reached, [n].
      reached: whether E(m) is known, bool [n]; with fewer than three the results are NaN.
    """
    sizes, logs, reached = sizes.astype(float), np.log(examples.astype(float)), reached.astype(bool)
    freedom = int(reached.sum()) - 2
    if freedom < 1:
        return math.nan, math.nan, math.nan, math.nan
    quantile = float(stdtrit(freedom, (1 + LEVEL) / 2))
    drop = 0.5 * (freedom + 2) * math.log1p(quantile**2 / freedom)
    ends = sizes.min() / BEYOND, sizes.max() * BEYOND
    crits = np.geomspace(*ends, STEPS)
    examples_min = size = low = high = math.nan
    for _ in range(2):  # over all values, then around the interval
        likelihood, offset = _profile(crits, sizes, logs, reached)
        best = int(likelihood.argmax())
        allowed = np.flatnonzero(likelihood >= likelihood[best] - drop)
        examples_min, size = math.exp(offset[best]), float(crits[best])
        low, high = float(crits[allowed[0]]), float(crits[allowed[-1]])
        crits = np.geomspace(crits[max(allowed[0] - 1, 0)], crits[min(allowed[-1] + 1, STEPS - 1)], STEPS)
    return examples_min, size, low if low > ends[0] * 1.001 else 0.0, high if high < ends[1] / 1.001 else math.inf


def _profile(crits: np.ndarray, sizes: np.ndarray, logs: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-likelihood of each m_crit, and its log E_min, by expectation maximisation over the censored."""
    left = logs - np.log1p(sizes / crits[:, None])  # [STEPS, n]
    offset, sigma = left[:, reached].mean(1, keepdims=True), np.ones((len(crits), 1))
    for _ in range(1 if reached.all() else ITERATIONS):
        short = np.where(reached, 0.0, (left - offset) / sigma)
        hazard = np.exp(-0.5 * short**2 - 0.5 * math.log(2 * math.pi) - log_ndtr(-short))
        mean = np.where(reached, left, offset + sigma * hazard)
        spare = np.where(reached, 0.0, sigma**2 * np.clip(1 + short * hazard - hazard**2, 0, 1))
        offset = mean.mean(1, keepdims=True)
        sigma = np.maximum(np.sqrt(((mean - offset) ** 2 + spare).mean(1, keepdims=True)), LEAST_SIGMA)
    distance = (left - offset) / sigma
    return np.where(reached, -0.5 * distance**2 - np.log(sigma), log_ndtr(-distance)).sum(1), offset[:, 0]


def noise_scale(study: Study) -> pd.DataFrame | None:
    """Returns the gradient noise scale of each batch size at its best cell (McCandlish et al. 2018), where the results have it.

    Returns:
      One row per batch size, sorted: `scale`, the median of `train_noise_scale` over the second half of training, and
      `error`, the same median of its standard error; None without the column.
    """
    rows = study.choosing
    if "train_noise_scale" not in rows or rows["train_noise_scale"].isna().all():
        return None
    best = best_of_each_size(study.cells, study.metric)
    late = rows[rows["epoch"] > study.experiment.epochs / 2].merge(best[cell_columns(best)], on=cell_columns(best))
    columns = {"scale": ("train_noise_scale", "median"), "error": ("train_noise_scale_error", "median")}
    return late.groupby("batch_size").agg(**columns).dropna(subset="scale").reset_index()
