"""The noise of a cell's metric: its standard error, and whether another cell is within it of the best.

A cell with three or more seeds has the standard error of their mean. With fewer, a fraction has at least the error of a sample
of as many examples as its split holds, √(p(1−p)/n). A loss has no such bound, so the deviation of one run is estimated from its
departures from a line over the last epochs, and from those of neighbouring base learning rates from a parabola in log η̃.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.study.analysis import axes, best_first, cell_columns
from smallbatch_jax.study.study import Study

RULE = (
    "A batch size reaches the best if its own best is within the noise: less than two standard errors away, those of the "
    "seeds, and with fewer than three seeds at least those of a test set of that size, or of a loss those of its scatter over "
    "the last epochs and between neighbouring base learning rates."
)
LEVEL = 0.9  # of all intervals
SEEDS = 3  # from which on their deviation counts alone


@dataclass(frozen=True)
class Noise:
    """How uncertain the metric of a study's cells is."""

    metric: Metric
    examples: int | None  # of the split that the metric is of
    scatter: float  # standard deviation of one run, where it cannot be had from `examples`; NaN if not known

    def error(self, cells: pd.Series | pd.DataFrame) -> Any:
        """Returns the standard error of a cell's mean, or of each; NaN where the noise of one or two seeds is not known."""
        of_seeds, least = self._errors(cells)
        return np.where(cells["finished"] >= SEEDS, of_seeds, np.maximum(least, of_seeds))[()]

    def _errors(self, cells: pd.Series | pd.DataFrame) -> tuple[Any, Any]:
        """The error of each mean by its seeds, 0 with one, and the least error of fewer than three seeds."""
        column = self.metric.column
        value, deviation, seeds = (np.asarray(cells[name], float) for name in (column, f"{column}_std", "finished"))
        of_seeds = np.where(seeds > 1, deviation / np.sqrt(np.maximum(seeds, 1)), 0.0)
        if self.metric.fraction and self.examples:
            return of_seeds, np.sqrt(np.maximum(value * (1 - value), 0) / self.examples)
        return of_seeds, self.scatter / np.sqrt(np.maximum(seeds, 1))

    def by_seeds(self, cell: pd.Series) -> bool:
        """Returns whether the error of a cell is that of its seeds: of three or more, or of two if it is the larger one."""
        of_seeds, least = self._errors(cell)
        return bool(cell["finished"] >= SEEDS or of_seeds > least)

    def source(self, cell: pd.Series) -> str:
        """Returns what the error of a cell is taken from."""
        if self.by_seeds(cell):
            return f"{cell['finished']} seeds"
        if self.metric.fraction and self.examples:
            return f"{self.examples:,} {self.metric.column.partition('_')[0]} examples"
        return "the scatter of epochs and neighbouring rates"

    def reaches(self, cell: pd.Series, best: pd.Series) -> bool | None:
        """Returns whether a cell has finished and is within the noise of the best, by `RULE`; None if that cannot be told."""
        gain = self.metric.gain(best[self.metric.column], cell[self.metric.column])
        error = math.hypot(self.error(cell), self.error(best))
        if math.isnan(gain) or gain <= 0:
            return bool(gain <= 0)
        return None if math.isnan(error) else bool(gain <= 2 * error)


def noise_of(study: Study) -> Noise:
    """Returns the noise of a study's cells."""
    metric, examples, held_out = study.metric, None, study.experiment.dataset.validation_fraction
    if study.examples:  # the training examples are those that are left
        train, test = study.examples
        split = metric.column.partition("_")[0]
        examples = {"train": train, "test": test, "validation": round(train * held_out / (1 - held_out))}[split]
    return Noise(metric, examples, math.nan if metric.fraction and examples else _scatter(study))


def rates_of(cells: pd.DataFrame, top: pd.Series) -> pd.DataFrame:
    """Returns the cells that differ from `top` in their base learning rate alone, by rising rate."""
    same = [cells[name].to_numpy() == top[name] for name in ("batch_size", "bn_batch_size", *axes(cells))]
    return cells[np.logical_and.reduce(same)].sort_values("base_lr")


def _scatter(study: Study) -> float:
    """Returns the larger of two estimates of one run's standard deviation, at the best cells of all batch sizes; NaN: none."""
    epochs, rates = [], []
    column, key = study.metric.column, cell_columns(study.cells)
    for _, top in best_first(study.cells[study.cells["finished"] > 0], study.metric).drop_duplicates("batch_size").iterrows():
        runs = study.rows[(study.rows[key] == top[key]).all(axis=1) & (study.rows["status"] == "finished")]
        for _, run in runs.groupby("seed"):
            last = run.sort_values("epoch")[column].to_numpy(float)[-LAST_EPOCHS:]
            if len(last) > 2:
                x = np.arange(len(last))
                left = last - np.polyval(np.polyfit(x, last, 1), x)
                epochs.append(np.sqrt((left**2).sum() / (len(last) - 2)))
        same = rates_of(study.cells, top)
        values, place = same[column].to_numpy(float), same["base_lr"].tolist().index(top["base_lr"])
        third = np.abs(np.diff(values, 3)) / math.sqrt(20)  # of a parabola it is zero
        rates += third[max(0, place - 3) : place + 1].tolist()
    rates = [value for value in rates if math.isfinite(value)]
    found = [math.sqrt(np.mean(np.square(epochs)))] if epochs else []
    found += [1.48 * float(np.median(rates))] if rates else []  # of normal deviates this is their standard deviation
    return max(found, default=math.nan)
