"""The noise of a cell's metric: its standard error, and whether another cell is within it of the best.

A cell with three or more seeds has the standard error of their mean, for a fraction at least the rounding error of k/n. With
fewer, the error of a fraction is at least the sampling error of a split of n examples, √(p(1−p)/n). A loss has no such bound,
so the deviation of one run is estimated from residuals of a line over its last epochs, and of a parabola in log η̃ over
neighbouring base learning rates that converge.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.study.analysis import axes, best_of_each_size, of_cell
from smallbatch_jax.study.study import Study

RULE = (
    "A batch size reaches the best if its own best is within the noise: less than two standard errors away, those of the "
    "seeds, and with fewer than three seeds at least those of a test set of that size, or of a loss those of its scatter over "
    "the last epochs and between neighbouring base learning rates."
)
LEVEL = 0.9  # confidence level of all intervals
SEEDS = 3  # from this number on, the error is that of the seeds alone


@dataclass(frozen=True)
class Noise:
    """Uncertainty of the metric of a study's cells."""

    metric: Metric
    examples: int | None  # number in the metric's split; None if unknown
    scatter: float  # standard deviation of one run, where `examples` do not give it; NaN if not known

    def error(self, cells: pd.Series | pd.DataFrame) -> Any:
        """Returns the standard error of the mean of one or each cell; NaN where the noise of one or two seeds is not known."""
        of_seeds, least = self._errors(cells)
        return np.where(cells["finished"] >= SEEDS, of_seeds, np.maximum(least, of_seeds))[()]

    def _errors(self, cells: pd.Series | pd.DataFrame) -> tuple[Any, Any]:
        """Returns the error of each mean by its seeds (0 for one), and the least error that fewer than three seeds have."""
        column = self.metric.column
        value, deviation, seeds = (np.asarray(cells[name], float) for name in (column, f"{column}_std", "finished"))
        rounding = 1 / (self.examples * math.sqrt(12)) if self.metric.fraction and self.examples else 0.0  # of k of n examples
        of_seeds = np.where(seeds > 1, np.maximum(deviation, rounding) / np.sqrt(np.maximum(seeds, 1)), 0.0)
        if rounding:
            return of_seeds, np.sqrt(np.maximum(value * (1 - value), 0) / self.examples)
        return of_seeds, self.scatter / np.sqrt(np.maximum(seeds, 1))

    def by_seeds(self, cell: pd.Series) -> bool:
        """Returns whether a cell's error comes from its seeds: three or more, or two that exceed the least error."""
        of_seeds, least = self._errors(cell)
        return bool(cell["finished"] >= SEEDS or of_seeds > least)

    def source(self, cell: pd.Series) -> str:
        """Returns the source of a cell's error, in words."""
        if self.by_seeds(cell):
            return f"{cell['finished']} seeds"
        if self.metric.fraction and self.examples:
            return f"{self.examples:,} {self.metric.column.partition('_')[0]} examples"
        return "the scatter of epochs and neighbouring rates"

    def reaches(self, cells: pd.DataFrame, best: pd.Series, errors: float = 2.0) -> pd.Series:
        """Returns 1.0 for finished cells within the noise of the best, by `RULE`, 0.0 for others, NaN if it cannot be told."""
        gain = self.metric.gain(best[self.metric.column], cells[self.metric.column])
        error = np.hypot(self.error(cells), self.error(best))
        within = (gain <= errors * error).astype(float).where(~np.isnan(error))
        return within.mask(gain.isna(), 0.0).mask(gain <= 0, 1.0)


def noise_of(study: Study) -> Noise:
    """Returns the noise of a study's cells."""
    metric, examples, held_out = study.metric, None, study.experiment.dataset.validation_fraction
    if study.examples:  # `train` excludes the validation split
        train, test = study.examples
        split = metric.column.partition("_")[0]
        examples = {"train": train, "test": test, "validation": round(train * held_out / (1 - held_out))}[split]
    return Noise(metric, examples, math.nan if metric.fraction and examples else _scatter(study))


def comparable(study: Study, best: pd.Series, noise: Noise) -> pd.Series:
    """Marks the cells without a diverged seed that converge, or are within three errors of the best.

    The error is that of a difference between two cells as noisy as the best: a seed that collapsed makes the noise of its own
    cell huge, so that it would reach any best.
    """
    gain = noise.metric.gain(best[noise.metric.column], study.cells[noise.metric.column])
    return (study.cells["diverged"] == 0) & (study.converged | (gain <= 3 * math.sqrt(2) * noise.error(best)))


def rates_of(cells: pd.DataFrame, top: pd.Series) -> pd.DataFrame:
    """Returns the cells that differ from `top` in their base learning rate alone, by rising rate."""
    same = [cells[name].to_numpy() == top[name] for name in ("batch_size", "bn_batch_size", *axes(cells))]
    return cells[np.logical_and.reduce(same)].sort_values("base_lr")


def _scatter(study: Study) -> float:
    """Returns the larger of two estimates of one run's standard deviation, from the best cell of each batch size; else NaN."""
    epochs, rates = [], []
    column, converged = study.metric.column, study.converged
    finished = study.rows[study.rows["status"] == "finished"]
    for _, top in best_of_each_size(study.cells, study.metric).iterrows():
        for _, run in of_cell(finished, top).groupby("seed"):
            last = run.sort_values("epoch")[column].to_numpy(float)[-LAST_EPOCHS:]
            if len(last) > 2:
                x = np.arange(len(last))
                left = last - np.polyval(np.polyfit(x, last, 1), x)
                epochs.append(np.sqrt((left**2).sum() / (len(last) - 2)))
        same = rates_of(study.cells, top)
        place = same["base_lr"].tolist().index(top["base_lr"])
        usable = converged[same.index]  # losses of 1e13 are no noise
        if math.isnan(study.chance):  # every finished cell converges, even if it nearly diverged
            usable &= same["base_lr"] <= top["base_lr"]
        values = same[column].where(usable).to_numpy(float)
        third = np.abs(np.diff(values, 3)) / math.sqrt(20)  # zero for a parabola
        rates += third[max(0, place - 3) : place + 1].tolist()
    rates = [value for value in rates if math.isfinite(value)]
    found = [math.sqrt(np.mean(np.square(epochs)))] if epochs else []
    found += [1.48 * float(np.median(rates))] if rates else []  # the standard deviation, for normal deviates
    return max(found, default=math.nan)
