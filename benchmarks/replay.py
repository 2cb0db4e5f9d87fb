"""Replays the search on every stored grid: what it would have found, and what it would have cost. Trains nothing.

    python benchmarks/replay.py [--budget=0.25]

Prints for each study and seed the grid's best cell and the search's, its regret beside the noise of the test set, which is two
standard errors of a difference, and the cost in % of the grid's images. Fig. 13's study, whose rates are fixed, is left out.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
from absl import flags

from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.runner.policy import Cell, Space
from smallbatch_jax.runner.replay import Replay, Stored, replay, stored
from smallbatch_jax.study import study

BUDGET = flags.DEFINE_float("budget", 0.25, "Budget of a search, as a fraction of the grid's images.", lower_bound=0.0)

STORED = Path(__file__).parents[1] / "notebooks" / "results"


def grids(budget: float) -> Iterator[tuple[str, Space, Stored, int]]:
    """Yields the name of every stored study, what its search chooses from, its runs and its number of test examples.

    A study of several seeds is one grid for each seed, and one of all.
    """
    for path in sorted(STORED.glob("*/*/experiment.json")):
        loaded = study.load(path.parent)
        grid, examples = loaded.experiment.grid, loaded.examples
        if grid.base_lr_by_batch_size or grid.base_lrs_from or not examples:
            continue
        for seeds in dict.fromkeys([*((seed,) for seed in grid.seeds), grid.seeds]):
            runs = stored(loaded.rows[loaded.rows["seed"].isin(seeds)], examples[0], loaded.metric.column)
            epochs = budget * sum(runs.epochs.values())
            base_lrs = tuple(sorted(grid.base_lrs))
            space = Space(tuple(grid.shapes()), base_lrs, loaded.experiment.epochs, seeds, epochs, metric=loaded.metric)
            yield f"{path.parent.parent.name}/{path.parent.name}", space, runs, examples[1]


def noise(space: Space, found: Replay, examples: int) -> float:
    """Returns two standard errors of the difference of two accuracies on a test set, as in `study.answer`."""
    return 2 * math.sqrt(sum(value * (1 - value) / examples for value in (found.best_value, found.found_value)))


def main() -> int:
    print("| study | seeds | grid's best | search's best | regret (points) | noise (points) | images (% of the grid's) |")
    print("|---|---|---|---|---|---|---|")
    for name, space, runs, examples in grids(BUDGET.value):
        found = replay(space, runs)
        best, other = _shown(found.best, found.best_value), _shown(found.found, found.found_value)
        numbers = f"{100 * found.regret:.2f} | {100 * noise(space, found, examples):.2f} | {100 * found.cost:.1f}"
        print(f"| {name} | {', '.join(map(str, space.seeds))} | {best} | {other} | {numbers} |")
    return 0


def _shown(cell: Cell | None, value: float) -> str:
    return f"m = {cell[0][0]}, {format_base_lr(cell[1])}: {100 * value:.2f} %" if cell else "none"


if __name__ == "__main__":
    command.run(main)
