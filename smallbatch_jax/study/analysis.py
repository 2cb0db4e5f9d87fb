"""Final accuracies, best cells, and the base learning rates that converge.

Everything starts from the tidy DataFrame of `results.load`, one row per run and epoch, or from the cells that
`final_accuracy` makes of it. Accuracies are fractions in [0, 1]; nothing here trains, plots, reads or writes.
"""

# Without pandas-stubs, pyright reads pandas' own loose annotations, where every column may be a frame or a scalar.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false

import dataclasses
import math
from collections.abc import Iterable

import pandas as pd

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.config.text import format_base_lr, percent

SETUP = ["experiment", "batch_size", "bn_batch_size"]
CELL = [*SETUP, "base_lr"]  # the columns that tell cells apart
RUN = [*CELL, "seed"]  # the columns that tell runs apart

CONVERGENCE_RULE = (
    "Converging: no seed diverged, one or more finished, and their test accuracy is above chance "
    "and at least half way from chance to the experiment's best."
)


def final_accuracy(df: pd.DataFrame) -> pd.DataFrame:
    """The test accuracy of every cell: per run the median of its last epochs (§3.1), then the mean over seeds.

    Args:
      df: results, one row per run and epoch. `status` is the same on all rows of a run.
    Returns:
      One row per cell that has any row in `df`, sorted by `CELL`, with the columns of `CELL` and

      - test_accuracy: mean over the finished seeds of the median of the run's last min(5, E) epochs; NaN if none.
      - test_accuracy_std: standard deviation over the finished seeds (n − 1); NaN for fewer than two.
      - finished, diverged: numbers of seeds. A seed still running is in neither.
    """
    return known_cells(df).drop(columns="pending")


def known_cells(df: pd.DataFrame) -> pd.DataFrame:
    """`final_accuracy`, with a column `pending`: the number of seeds that are still running."""
    finished = df[df["status"] == "finished"]
    epochs = finished.groupby(RUN, observed=True)["epoch"].transform("max")
    last = finished[finished["epoch"] > epochs - LAST_EPOCHS]
    accuracy = last.groupby(RUN, observed=True)["test_accuracy"].median().groupby(CELL, observed=True)
    runs = df.drop_duplicates(RUN)
    statuses = {"finished": "finished", "diverged": "diverged", "pending": "running"}
    counts = {column: (runs["status"] == status).astype(int) for column, status in statuses.items()}
    cells = runs[CELL].assign(**counts).groupby(CELL, observed=True).sum()
    cells.insert(0, "test_accuracy", accuracy.mean())
    cells.insert(1, "test_accuracy_std", accuracy.std())
    return cells.reset_index()


def planned_cells(df: pd.DataFrame, runs: Iterable[Run], experiment: str) -> pd.DataFrame:
    """`final_accuracy` with a row for every planned cell and the number of its seeds that have not ended.

    Args:
      df: results of one experiment, one row per run and epoch.
      runs: all runs of the experiment.
      experiment: its name.
    Returns:
      The columns of `final_accuracy`, and `pending`: the number of planned seeds that have not ended. A cell with no
      rows yet has accuracy NaN and counts 0.
    """
    plan = pd.DataFrame(list(runs), columns=[field.name for field in dataclasses.fields(Run)]).assign(experiment=experiment)
    seeds = plan.groupby(CELL, observed=True).size().rename("planned").reset_index()
    cells = seeds.merge(known_cells(df), how="outer", on=CELL)
    counts = ["planned", "finished", "diverged", "pending"]
    cells[counts] = cells[counts].fillna(0).astype(int)
    cells["pending"] = (cells["planned"] - cells["finished"] - cells["diverged"]).clip(lower=0)
    return cells[[*CELL, "test_accuracy", "test_accuracy_std", "finished", "diverged", "pending"]]


def convergent(cells: pd.DataFrame, chance: float) -> pd.Series:
    """Marks the cells that converge by `CONVERGENCE_RULE`.

    A run that collapses to a constant guess finishes with finite losses, so "did not diverge" alone would count it.
    Half way to the best is far from both: the curves of Figs. 1–9 fall off a cliff, and where on the cliff the line is
    drawn hardly moves the range. While an experiment is still running its best is provisional, and so is the answer.

    Args:
      cells: from `final_accuracy`; each experiment is compared to its own best.
      chance: accuracy of a guess, 1 / num_classes where the test classes are balanced.
    Returns:
      bool per row of `cells`, with its index.
    Raises:
      ValueError: chance is not in [0, 1).
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance: {chance} is not an accuracy; give a fraction in [0, 1), such as 1 / num_classes.")
    accuracy = cells["test_accuracy"]
    best = cells.groupby("experiment", observed=True)["test_accuracy"].transform("max")
    # The half way line alone would lie below chance in an experiment that learnt nothing.
    learnt = (accuracy > chance) & (accuracy >= (chance + best) / 2)
    return learnt & (cells["diverged"] == 0) & (cells["finished"] > 0)


def convergent_range(cells: pd.DataFrame, chance: float) -> pd.DataFrame:
    """The base learning rates that converge for each batch size (Fig. 16).

    Args:
      cells: from `final_accuracy`.
      chance: see `convergent`.
    Returns:
      One row per `SETUP`, sorted: `lowest_base_lr` and `highest_base_lr` that converge (NaN if none does) and
      `convergent`, the number of cells that do; fewer than the range holds when it has gaps.
    """
    base_lr = cells["base_lr"].where(convergent(cells, chance))
    ranges = cells[SETUP].assign(base_lr=base_lr).groupby(SETUP, observed=True)["base_lr"].agg(["min", "max", "count"])
    ranges.columns = ["lowest_base_lr", "highest_base_lr", "convergent"]
    return ranges.reset_index()


def best_first(cells: pd.DataFrame) -> pd.DataFrame:
    """Sorts cells by falling accuracy, those without one last; ties by rising batch size, BN batch size and base_lr."""
    return cells.sort_values(["test_accuracy", *CELL[1:]], ascending=[False, True, True, True])


def best_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The most accurate cell of each batch size (Fig. 15); of equals, the one with the smallest base_lr.

    Args:
      cells: from `final_accuracy`.
    Returns:
      One row per `SETUP`, sorted: `test_accuracy`, `test_accuracy_std`, `base_lr` and `replicates` (finished seeds) of
      the best cell, NaN and 0 where nothing finished; `finished` and `diverged`, runs over all its base_lr.
    """
    best = best_first(cells).drop_duplicates(SETUP).rename(columns={"finished": "replicates"})
    best["base_lr"] = best["base_lr"].where(best["replicates"] > 0)
    totals = cells.groupby(SETUP, observed=True)[["finished", "diverged"]].sum().reset_index()
    columns = [*SETUP, "test_accuracy", "test_accuracy_std", "base_lr", "replicates"]
    return totals.merge(best[columns], on=SETUP)[[*columns, "finished", "diverged"]]


def summary(df: pd.DataFrame, chance: float, cells: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per batch size: its best accuracy, its converging base learning rates, and its numbers of runs.

    Args:
      df: results, one row per run and epoch.
      chance: see `convergent`.
      cells: from `planned_cells`, to include runs that have not begun; by default those that have rows.
    Returns:
      The columns of `best_cells`, those of `convergent_range`, and `running`, the number of runs not yet ended.
    """
    cells = known_cells(df) if cells is None else cells
    running = cells.groupby(SETUP, observed=True)["pending"].sum().rename("running").reset_index()
    return best_cells(cells).merge(convergent_range(cells, chance), on=SETUP).merge(running, on=SETUP)


def format_summary(table: pd.DataFrame) -> str:
    """`summary` as plain aligned text, one block per experiment, the convergence rule underneath."""
    blocks = [f"{name}\n{_format_block(block)}" for name, block in table.groupby("experiment", observed=True)]
    return "\n\n".join([*blocks, CONVERGENCE_RULE])


def _format_block(table: pd.DataFrame) -> str:
    """The rows of one experiment; BN batch sizes are shown if some are not m, running runs if there are any."""
    text = pd.DataFrame({"m": table["batch_size"]})  # a space before each other heading makes two between columns
    if not table["bn_batch_size"].equals(table["batch_size"]):
        text[" BN batch"] = table["bn_batch_size"]
    accuracies = zip(table["test_accuracy"], table["test_accuracy_std"], strict=True)
    text[" best test accuracy"] = [percent(mean, std, digits=2) for mean, std in accuracies]
    text[" at base_lr"] = ["-" if math.isnan(base_lr) else format_base_lr(base_lr) for base_lr in table["base_lr"]]
    ranges = zip(table["lowest_base_lr"], table["highest_base_lr"], table["convergent"], strict=True)
    text[" converging base_lr"] = [_format_range(*row) for row in ranges]
    for name in ("diverged", "finished", *(["running"] if table["running"].any() else [])):
        text[f" {name}"] = table[name]
    return text.astype(str).to_string(index=False)


def _format_range(lowest: float, highest: float, count: int) -> str:
    ends = " … ".join(dict.fromkeys(map(format_base_lr, (lowest, highest))))
    return f"{ends} ({count})" if count else "none"
