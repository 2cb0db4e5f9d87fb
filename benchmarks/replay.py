"""Replays the search on every stored grid: what it would have found, and what it would have cost. Trains nothing.

    python benchmarks/replay.py [--budget=0.25]

Prints for each study and seed the grid's best cell and the search's, its regret beside the noise of the test set, which is two
standard errors of a difference, and the cost in % of the grid's images. A grid of few base learning rates is searched with two
whole runs for each batch size, if that is more. Studies whose rates are fixed, such as Fig. 13's, or all diverge are left out.
"""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
from absl import flags

from smallbatch_jax.config.grid import RUN_COLUMNS, Run
from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.runner.policy import Cell, Curves, Space, final_values, recommended, search
from smallbatch_jax.study import study
from smallbatch_jax.study.study import Study

BUDGET = flags.DEFINE_float("budget", 0.25, "Budget of a search, as a fraction of the grid's images.", lower_bound=0.0)
FEW_BASE_LRS = 8  # with fewer, a quarter is less than two full runs for each batch size, the minimum budget of a search

STORED = Path(__file__).parents[1] / "notebooks" / "results"


class Stored(NamedTuple):
    """The runs of a whole grid."""

    curves: Curves
    epochs: dict[Run, float]  # epochs that each run trained; fractional if it diverged


class Replay(NamedTuple):
    """Result of a search and the grid's best: cells with their final metric, or None and NaN if all runs diverged."""

    best: Cell | None  # of the grid
    best_value: float
    found: Cell | None  # by the search
    found_value: float  # over all seeds of the grid
    regret: float  # amount by which the grid's best is better
    cost: float  # images that the search trained on, as a fraction of the grid's


def stored(loaded: Study, seeds: Sequence[int]) -> Stored:
    """Returns the runs of some seeds of a study that has no further axes and whose runs have all ended."""
    curves: dict[Run, list[float]] = {}
    epochs: dict[Run, float] = {}
    rows, examples = loaded.rows[loaded.rows["seed"].isin(seeds)], loaded.examples[0] if loaded.examples else math.nan
    for *values, step, value in rows[[*RUN_COLUMNS, "step", loaded.metric.column]].itertuples(index=False):
        run = Run(*values)
        curves.setdefault(run, []).append(value)
        epochs[run] = step * run.batch_size / examples if math.isnan(value) else len(curves[run])
    return Stored(curves, epochs)


def replay(space: Space, grid: Stored) -> Replay:
    """Runs the policy of a search on the stored curves, cut to its goals; `grid` has every run of the space."""
    seen: dict[Run, Sequence[float]] = {}
    rounds, curves = search(space), None
    with suppress(StopIteration):
        while True:
            asked = rounds.send(curves)  # pyright: ignore[reportArgumentType]
            curves = {run: grid.curves[run][:goal] for run, goal in asked.goals.items()}
            seen |= curves
    spent = sum(grid.epochs[run] if math.isnan(curve[-1]) else len(curve) for run, curve in seen.items())
    best, found = recommended(space, grid.curves), recommended(space, seen)
    finals = final_values(space, grid.curves)
    best_value, found_value = (
        space.metric.gain(statistics.fmean(finals[cell]), 0.0) if cell else math.nan for cell in (best, found)
    )
    regret = space.metric.gain(best_value, found_value)
    return Replay(best, best_value, found, found_value, regret, spent / sum(grid.epochs.values()))


def grids(budget: float) -> Iterator[tuple[str, Space, Stored, int]]:
    """Yields the name, search space, runs and number of test examples of every stored study.

    A study with several seeds yields one grid for each seed and one with all seeds.
    """
    for path in sorted(STORED.glob("*/*/experiment.json")):
        loaded = study.load(path.parent)
        grid, examples = loaded.experiment.grid, loaded.examples
        free = not (grid.base_lr_by_batch_size or grid.base_lrs_from) and len(grid.base_lrs) > 1
        if not (free and examples and loaded.cells["finished"].any()):
            continue
        for seeds in dict.fromkeys([*((seed,) for seed in grid.seeds), grid.seeds]):
            runs = stored(loaded, seeds)
            base_lrs = tuple(sorted(grid.base_lrs))
            epochs = budget * sum(runs.epochs.values())
            if len(base_lrs) < FEW_BASE_LRS:
                epochs = max(epochs, 2 * loaded.experiment.epochs * len(grid.shapes()))
            space = Space(tuple(grid.shapes()), base_lrs, loaded.experiment.epochs, seeds, epochs, metric=loaded.metric)
            yield f"{path.parent.parent.name}/{path.parent.name}", space, runs, examples[1]


def noise(found: Replay, examples: int) -> float:
    """Returns two standard errors of the difference of two accuracies on a test set, as in `study.answer`."""
    return 2 * math.sqrt(sum(value * (1 - value) / examples for value in (found.best_value, found.found_value)))


def main() -> int:
    print("| study | seeds | grid's best | search's best | regret (points) | noise (points) | images (% of the grid's) |")
    print("|---|---|---|---|---|---|---|")
    for name, space, runs, examples in grids(BUDGET.value):
        found = replay(space, runs)
        best, other = _shown(found.best, found.best_value), _shown(found.found, found.found_value)
        numbers = f"{100 * found.regret:.2f} | {100 * noise(found, examples):.2f} | {100 * found.cost:.1f}"
        print(f"| {name} | {', '.join(map(str, space.seeds))} | {best} | {other} | {numbers} |")
    return 0


def _shown(cell: Cell | None, value: float) -> str:
    return f"m = {cell[0][0]}, {format_base_lr(cell[1])}: {100 * value:.2f} %" if cell else "none"


if __name__ == "__main__":
    command.run(main)
