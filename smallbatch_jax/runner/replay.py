"""A search replayed on a stored grid: what it would have found, and at what part of the grid's cost. Trains nothing."""

import math
import statistics
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from smallbatch_jax.config.grid import RUN_COLUMNS, Run
from smallbatch_jax.runner.policy import Cell, Curves, Round, Space, final_values, recommended, search

if TYPE_CHECKING:
    import pandas as pd

Rounds = Generator[Round, Curves, None]


class Stored(NamedTuple):
    """The runs of a whole grid."""

    curves: Curves
    epochs: dict[Run, float]  # that each run trained; the last one in part where it diverged


class Replay(NamedTuple):
    """What a search found, beside the grid's best: cells with their final metric, None and NaN where all runs diverged."""

    best: Cell | None  # of the grid
    best_value: float
    found: Cell | None  # by the search
    found_value: float  # over all seeds of the grid
    regret: float  # by how much the grid's best is better
    cost: float  # images that the search trained on, as a fraction of the grid's


def stored(rows: "pd.DataFrame", examples: int, column: str = "test_accuracy") -> Stored:
    """Returns the runs of `results.load`, all of them ended, that have one column in place of further axes.

    Args:
      rows: one row per run and epoch, a run's rows in the order of its epochs.
      examples: number of training examples.
      column: the metric.
    """
    curves: dict[Run, list[float]] = {}
    epochs: dict[Run, float] = {}
    for *values, step, value in rows[[*RUN_COLUMNS, "step", column]].itertuples(index=False):
        run = Run(*values)
        curves.setdefault(run, []).append(value)
        epochs[run] = step * run.batch_size / examples if math.isnan(value) else len(curves[run])
    return Stored(curves, epochs)


def replay(space: Space, grid: Stored, rounds: Rounds | None = None) -> Replay:
    """Sends the curves of a grid to a policy, cut to its goals.

    Args:
      space: what the grid covers, with the budget of the search; `space.fresh` is empty, since a grid has no such seeds.
      grid: has every run of the space.
      rounds: of another policy for comparison; None: `policy.search`.
    """
    seen: dict[Run, Sequence[float]] = {}
    rounds = rounds or search(space)
    with suppress(StopIteration):
        asked = next(rounds)
        while True:
            curves = {run: grid.curves[run][:goal] for run, goal in asked.goals.items()}
            seen |= curves
            asked = rounds.send(curves)
    spent = sum(grid.epochs[run] if math.isnan(curve[-1]) else len(curve) for run, curve in seen.items())
    best, best_value = _top(space, grid.curves)
    found, _ = _top(space, seen)
    found_value = _value(space, statistics.fmean(final_values(space, grid.curves)[found])) if found else math.nan
    regret = space.metric.gain(best_value, found_value)
    return Replay(best, best_value, found, found_value, regret, spent / sum(grid.epochs.values()))


def _top(space: Space, curves: Curves) -> tuple[Cell | None, float]:
    """Returns the recommended cell, and its mean over seeds."""
    cell = recommended(space, curves)
    return cell, math.nan if cell is None else _value(space, statistics.fmean(final_values(space, curves)[cell]))


def _value(space: Space, final: float) -> float:
    """Returns the metric of a `policy.final_values`, which is negated if a low one is best."""
    return space.metric.gain(final, 0.0)
