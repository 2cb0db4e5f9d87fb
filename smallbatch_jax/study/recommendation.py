"""The recommendation of a study: the best cell with its uncertainty, equally good cells, and the fits of scaling theory.

The grid's seeds choose the cell; any other seed is fresh and only confirms the choice. All intervals are 90 % intervals.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from smallbatch_jax.config.catalog import METRICS, TASKS
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.text import plural
from smallbatch_jax.study import analysis, equal_time
from smallbatch_jax.study.analysis import best_first, best_of_each_size, score, setting
from smallbatch_jax.study.critical import CriticalBatchSize, critical_batch_size
from smallbatch_jax.study.noise import LEVEL, Noise, comparable, noise_of
from smallbatch_jax.study.rates import RateRule, Z, best_rates, fit_rule
from smallbatch_jax.study.study import Study

DRAWS = 1000


class Recommendation(NamedTuple):
    """The best cell of a study and its uncertainty.

    Attributes:
      best: the best row of `study.cells` among those `analysis.with_most_seeds`; None until a run has finished.
      low, high: interval of its metric, Student's where seeds give its error, else Wilson's for a fraction, or normal; NaN if
        the noise is not known.
      optimism: upper bound on the mean overstatement that comes from choosing the best of many noisy values.
      as_good: the best and the cells within its noise, if complete and `noise.comparable`.
      largest: the largest batch size whose best cell is among them; None if there is none.
      fresh: one row, the test metric of the best cell by fresh seeds (`finished`, `diverged`); None without such seeds.
      rule: the fit of η*(m); None with fewer than three batch sizes.
      critical: the critical batch size; None with fewer than three.
      sentences: the recommendation in words; none if no cell is distinguishable from chance.
    """

    best: pd.Series | None
    low: float = math.nan
    high: float = math.nan
    optimism: float = 0.0
    as_good: pd.DataFrame = pd.DataFrame()
    largest: int | None = None
    fresh: pd.Series | None = None
    rule: RateRule | None = None
    critical: CriticalBatchSize | None = None
    sentences: tuple[str, ...] = ()


def recommend(study: Study) -> Recommendation:
    """Returns the recommendation of a study, finished or not."""
    metric, cells = study.metric, analysis.with_most_seeds(study.cells).dropna(subset=[study.metric.column])
    best = None if cells.empty else best_first(cells, metric).iloc[0]
    noise = noise_of(study)
    if best is None or metric.gain(best[metric.column], study.chance) <= np.nan_to_num(2 * noise.error(best)):
        return Recommendation(best)
    complete = study.cells[comparable(study, best, noise) & (study.cells["pending"] == 0)]
    as_good = complete[noise.reaches(complete, best) == 1]
    largest = as_good.loc[as_good.index.isin(best_of_each_size(complete, metric).index), "batch_size"]
    sizes = study.cells.groupby("batch_size")["base_lr"].nunique()
    found = Recommendation(
        best,
        *interval(best, noise),
        optimism=_optimism(study, best, noise) if metric.column.startswith("test_") else 0.0,
        as_good=as_good,
        largest=int(largest.max()) if len(largest) else None,
        fresh=_confirmation(study, best),
        rule=fit_rule(best_rates(study, noise)) if len(sizes) >= 3 and sizes.max() > 1 else None,
        critical=critical_batch_size(study) if len(sizes) >= 3 else None,
    )
    return found._replace(sentences=tuple(_sentences(study, best, found, noise)))


def interval(cell: pd.Series, noise: Noise) -> tuple[float, float]:
    """Returns the ends of the 90 % interval of a cell's metric.

    With three seeds, a percentile bootstrap covers the mean in two cases of three, Student's interval in nine of ten.
    """
    seeds, value = cell["finished"], cell[noise.metric.column]
    by_seeds, n = noise.by_seeds(cell), noise.examples
    half = noise.error(cell) * (stdtrit(seeds - 1, (1 + LEVEL) / 2) if by_seeds else Z)
    if noise.metric.fraction and n and not by_seeds:  # Wilson (1927): not of zero width where all n examples are right
        value, half = (value + Z**2 / (2 * n)) / (1 + Z**2 / n), math.hypot(half, Z**2 / (2 * n)) / (1 + Z**2 / n)
    return value - half, value + half


def _confirmation(study: Study, best: pd.Series) -> pd.Series | None:
    """Returns the row of a cell in `analysis.final_accuracy` of the fresh seeds' test metric; None without such seeds."""
    cells = analysis.final_accuracy(analysis.of_cell(study.fresh, best), tested(study.metric))
    return cells.iloc[0] if cells[["finished", "diverged"]].to_numpy().any() else None


def tested(metric: Metric) -> Metric:
    """Returns the test-set counterpart of a validation metric."""
    return metric._replace(column=metric.column.replace("validation_", "test_"))


def _optimism(study: Study, best: pd.Series, noise: Noise) -> float:
    """Returns the mean over draws of the largest error among the cells within three errors of the best, as if all were equal.

    With two errors, the mean of 24 equal cells is 5 % too small.
    """
    cells = study.cells[comparable(study, best, noise) | (study.cells.index == best.name)]  # it may have a diverged seed
    errors = noise.error(cells[noise.reaches(cells, best, 3) == 1])
    gained = (errors * np.random.default_rng(0).normal(size=(DRAWS, len(errors)))).max(1).mean()
    return 0.0 if math.isnan(gained) else max(0.0, float(gained))


def _sentences(study: Study, best: pd.Series, found: Recommendation, noise: Noise) -> list[str]:
    """Returns the recommendation in words."""
    metric = study.metric
    said = [f"How good it is cannot be told: the noise of a single seed's {metric.noun} is not known."]
    if not math.isnan(found.low):
        positive = study.experiment.task in TASKS and metric.name in ("loss", *METRICS)
        low, high = max(0.0 if positive else -math.inf, found.low), min(1.0, found.high) if metric.fraction else found.high
        between = f"{metric.show(low).removesuffix(' %')} … {metric.show(high)}"
        said = [f"Its {metric.title} is {between} (90 %, by {noise.source(best)})."]
    if found.fresh is not None:
        said.append(_confirmed(found.fresh, tested(metric)))
    elif round(metric.scale * found.optimism, 1 if metric.fraction else 3):
        many = int((study.cells["finished"] > 0).sum())
        gap = f"{100 * found.optimism:.1f} points" if metric.fraction else f"{found.optimism:.2g}"
        said.append(f"The test set chose it among {many} cells, so it looks better than it is, by up to {gap} on average.")
    several = study.cells["batch_size"].nunique() > 1
    if several and found.largest is not None and not study.unfinished:
        top = best_first(found.as_good[found.as_good["batch_size"] == found.largest], metric).iloc[0]
        which = f"at {setting(top)}: {score(top, metric)}" if found.largest != best["batch_size"] else "which it is"
        said.append(f"m = {found.largest} is the largest batch size within the noise of the best, {which}.")
    said += [part.sentence() for part in (found.rule, found.critical) if part is not None]
    return [*said, equal_time.sentence([study])] if several else said


def _confirmed(fresh: pd.Series, metric: Metric) -> str:
    """Returns the result of the fresh seeds in words."""
    seeds, lost = int(fresh["finished"]), int(fresh["diverged"])
    if not seeds:
        return f"Fresh seeds do not confirm it: all {lost} diverged."
    shown = metric.show(fresh[metric.column], fresh[f"{metric.column}_std"] / math.sqrt(seeds))
    spread = ", mean ± standard error" if seeds > 1 else ""
    diverged = f"; {lost} more diverged" if lost else ""
    return f"{plural(seeds, 'fresh seed')}, not used for the choice: {metric.title} {shown}{spread}{diverged}."
