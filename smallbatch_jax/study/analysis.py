"""Final accuracies, best cells, and the base learning rates that converge.

Everything starts from the tidy DataFrame of `results.load`, one row per run and epoch, or from the cells that
`final_accuracy` makes of it. Accuracies are fractions in [0, 1]; nothing here trains, plots, reads or writes.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pandas as pd

from smallbatch_jax.config import catalog
from smallbatch_jax.config.experiment import Run
from smallbatch_jax.config.grid import RUN_COLUMNS
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.config.text import axis_title, format_base_lr

SETUP = ["experiment", "batch_size", "bn_batch_size"]
CELL = [*SETUP, "base_lr"]  # the columns that tell cells apart
RUN = [*CELL, "seed"]  # the columns that tell runs apart
BY: dict[str, Any] = {"observed": True, "dropna": False}  # options of groupby: an axis is NaN in studies without it


def convergence_rule(metric: Metric = ACCURACY) -> str:
    """Returns the sentence that says which cells `convergent` marks."""
    better, start = "above" if metric.best == "max" else "below", "chance" if metric.fraction else "that of a guess"
    return (
        f"Converging: no seed diverged, one or more finished, and their {metric.title} is {better} {start} "
        f"and at least half way from {'chance' if metric.fraction else 'there'} to the experiment's best."
    )


CONVERGENCE_RULE = convergence_rule()


def axes(frame: pd.DataFrame | Mapping[Any, Any] | pd.Series) -> list[str]:
    """Returns the columns of a grid's further axes, such as "weight_decay", in results, cells or one cell."""
    return [name for name in map(str, frame.keys()) if name in catalog.AXES or name.startswith(catalog.OWN_SCALAR)]


def cell_columns(frame: pd.DataFrame) -> list[str]:
    """Returns `CELL` with the further axes: the columns that tell the cells of results from each other."""
    return [*CELL, *axes(frame)]


def final_accuracy(df: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns the test accuracy or other metric of every cell: the median of a run's last epochs (§3.1), averaged over seeds.

    Args:
      df: results, one row per run and epoch. `status` is the same on all rows of a run.
    Returns:
      One row per cell that has any row in `df`, sorted, with the columns `cell_columns(df)` and

      - test_accuracy, or metric.column: mean over the finished seeds of the median of the run's last min(5, E) epochs; NaN if
        none.
      - test_accuracy_std: standard deviation over the finished seeds (n − 1); NaN for fewer than two.
      - finished, diverged: numbers of seeds. A seed still running is in neither.
    Raises:
      ValueError: if `df` lacks a column or holds two rows of one run and epoch.
    """
    return known_cells(df, metric).drop(columns="pending")


def known_cells(df: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns `final_accuracy` with a column `pending`, the number of seeds that are still running."""
    require_columns(df, metric)
    cell, run = cell_columns(df), [*cell_columns(df), "seed"]
    if df.duplicated([*run, "epoch"]).any():
        raise ValueError("results: several rows of one run and epoch; give studies that are put together different names.")
    finished = df[df["status"] == "finished"]
    epochs = finished.groupby(run, **BY)["epoch"].transform("max")
    last = finished[finished["epoch"] > epochs - LAST_EPOCHS]
    final = last.groupby(run, **BY)[metric.column].median().groupby(cell, **BY)
    runs = df.drop_duplicates(run)
    statuses = {"finished": "finished", "diverged": "diverged", "pending": "running"}
    counts = {column: (runs["status"] == status).astype(int) for column, status in statuses.items()}
    cells = runs[cell].assign(**counts).groupby(cell, **BY).sum()
    cells.insert(0, metric.column, final.mean())
    cells.insert(1, f"{metric.column}_std", final.std())
    return cells.reset_index()


def require_columns(df: pd.DataFrame, metric: Metric = ACCURACY) -> None:
    """Raises ValueError if results lack a column that tells runs apart, their epoch or status, or the metric."""
    if missing := [name for name in (*RUN, "epoch", "status", metric.column) if name not in df]:
        raise ValueError(f"results: have no column {', '.join(missing)}; give a DataFrame as results.load returns it.")


def planned_cells(df: pd.DataFrame, runs: Iterable[Run], experiment: str, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns `final_accuracy` with a row for every planned cell, and `pending`, the number of its seeds that have not ended.

    A cell with no rows yet has accuracy NaN and no finished or diverged seeds.

    Args:
      df: results of one experiment, one row per run and epoch.
      runs: all runs of the experiment.
      experiment: its name.
    """
    runs = list(runs)
    columns = list(runs[0].to_dict()) if runs else RUN_COLUMNS
    plan = pd.DataFrame([run.to_dict() for run in runs], columns=columns).assign(experiment=experiment)
    cell = cell_columns(plan)
    planned = plan.groupby(cell, observed=True).size().rename("pending").reset_index()
    cells = final_accuracy(df, metric).merge(planned, how="outer", on=cell)
    counts = ["finished", "diverged", "pending"]
    cells[counts] = cells[counts].fillna(0).astype(int)
    cells["pending"] = (cells["pending"] - cells["finished"] - cells["diverged"]).clip(lower=0)
    return cells


def convergent(cells: pd.DataFrame, chance: float, metric: Metric = ACCURACY) -> pd.Series:
    """Marks the cells that converge by `CONVERGENCE_RULE`.

    A run that collapses to a constant guess finishes with finite losses, so "did not diverge" alone would count it.
    The threshold is half way from chance to the best: the curves of Figs. 1–9 fall so steeply that its exact place hardly
    changes the range. While an experiment is still running, its best is provisional, and so is the result.

    Args:
      cells: from `final_accuracy`; each experiment is compared to its own best.
      chance: the metric of the best constant guess, `Study.chance`: an accuracy is the share of the most frequent class, which
        is 1 / num_classes where the test classes are balanced. NaN if a loss is unknown: then every finished cell converges.
    Returns:
      A bool for each row of `cells`, with the same index.
    Raises:
      ValueError: the metric is a fraction, and chance is not in [0, 1].
    """
    if metric.fraction and not 0 <= chance <= 1:
        raise ValueError(f"chance: {chance} is not an accuracy; give a fraction in [0, 1], such as 1 / num_classes.")
    value = cells[metric.column]
    best = cells.groupby("experiment", observed=True)[metric.column].transform(cast(Any, metric.best))
    # The half way line alone would lie below chance in an experiment that learnt nothing.
    learnt = (metric.gain(value, chance) > 0) & (metric.gain(value, (chance + best) / 2) >= 0) | math.isnan(chance)
    return learnt & (cells["diverged"] == 0) & (cells["finished"] > 0)


def convergent_range(cells: pd.DataFrame, chance: float, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns the base learning rates that converge for each batch size (Fig. 16); arguments as for `convergent`.

    Returns:
      One row per `SETUP`, sorted: `lowest_base_lr` and `highest_base_lr` that converge (NaN if none does) and
      `convergent`, the number of cells that do, which is smaller than the number in the range if it has gaps.
    """
    rates = cells.assign(base_lr=cells["base_lr"].where(convergent(cells, chance, metric))).groupby(SETUP, observed=True)
    return rates["base_lr"].agg(lowest_base_lr="min", highest_base_lr="max", convergent="count").reset_index()


def best_first(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Sorts cells from best to worst, NaN last; ties go to the smaller batch size, BN batch size, base_lr, further axes."""
    order = {metric.column: metric.best == "min"} | dict.fromkeys(cell_columns(cells)[1:], True)
    return cells.sort_values(list(order), ascending=list(order.values()))


def with_most_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """Returns the cells with a finished seed and the largest number of ended seeds: all seeds, once one cell is complete."""
    cells = cells[cells["finished"] > 0]
    seeds = cells["finished"] + cells["diverged"]
    return cells[seeds == seeds.max()]


def best_of_each_size(cells: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Returns the best cell of each batch size that has a finished one, from best to worst."""
    return best_first(cells[cells["finished"] > 0], metric).drop_duplicates("batch_size")


def of_cell(frame: pd.DataFrame, cell: pd.Series) -> pd.DataFrame:
    """Returns the rows of a cell in results or in a table of cells."""
    key = cell_columns(frame)
    return frame[(frame[key] == cell[key]).all(axis=1)]


def best_over_axes(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns the best cell of each (batch size, BN batch size, base_lr) over the further axes, in the order of `cells`."""
    return best_first(cells, metric).drop_duplicates(CELL).sort_index() if axes(cells) else cells


def best_cells(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns the best of the cells of each batch size (Fig. 15); ties go to the smallest base_lr.

    Returns:
      One row per `SETUP`, sorted: `test_accuracy`, `test_accuracy_std` (or the metric's columns), `base_lr`, further axes and
      `replicates` (finished seeds) of the best cell, NaN and 0 where nothing finished; `finished` and `diverged`, numbers of
      runs in all its cells.
    """
    best = best_first(cells, metric).drop_duplicates(SETUP).rename(columns={"finished": "replicates"})
    chosen = ["base_lr", *axes(cells)]
    best[chosen] = best[chosen].where(best[metric.column].notna())
    totals = cells.groupby(SETUP, observed=True)[["finished", "diverged"]].sum().reset_index()
    columns = [*SETUP, metric.column, f"{metric.column}_std", *chosen, "replicates"]
    return totals.merge(best[columns], on=SETUP)[[*columns, "finished", "diverged"]]


def summary(df: pd.DataFrame, chance: float, cells: pd.DataFrame | None = None, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns, per batch size, the best accuracy (or other metric), the base learning rates that converge, and numbers of runs.

    Args:
      df: results, one row per run and epoch.
      chance: see `convergent`.
      cells: from `planned_cells`, to include runs that have not begun; by default only cells with rows.
    Returns:
      The columns of `best_cells` and `convergent_range`, and `running`, the number of runs that have not ended.
    """
    cells = known_cells(df, metric) if cells is None else cells
    running = cells.groupby(SETUP, observed=True)["pending"].sum().rename("running").reset_index()
    return best_cells(cells, metric).merge(convergent_range(cells, chance, metric), on=SETUP).merge(running, on=SETUP)


def format_summary(table: pd.DataFrame, metric: Metric = ACCURACY) -> str:
    """Formats `summary` as plain aligned text, one block per experiment, with the convergence rule underneath."""
    blocks = [f"{name}\n{format_block(block, metric)}" for name, block in table.groupby("experiment", observed=True)]
    return "\n\n".join([*blocks, convergence_rule(metric)])


def format_block(table: pd.DataFrame, metric: Metric) -> str:
    """Formats the rows of one experiment; shows BN batch sizes if some are not m, and running runs if there are any."""
    text = pd.DataFrame({"m": table["batch_size"]})  # the leading space of later headings separates columns by two
    if not table["bn_batch_size"].equals(table["batch_size"]):
        text[" BN batch"] = table["bn_batch_size"]
    values = zip(table[metric.column], table[f"{metric.column}_std"], strict=True)
    text[f" best {metric.title}"] = [metric.show(mean, std, digits=2) for mean, std in values]
    for name in ("base_lr", *axes(table)):
        heading = f" at {name.removeprefix(catalog.OWN_SCALAR)}"
        text[heading] = ["-" if math.isnan(value) else format_base_lr(value) for value in table[name]]
    ranges = zip(table["lowest_base_lr"], table["highest_base_lr"], table["convergent"], strict=True)
    text[" converging base_lr"] = [_format_range(*row) for row in ranges]
    for name in ("diverged", "finished", *(["running"] if table["running"].any() else [])):
        text[f" {name}"] = table[name]
    return text.astype(str).to_string(index=False)


def _format_range(lowest: float, highest: float, count: int) -> str:
    ends = " … ".join(dict.fromkeys(map(format_base_lr, (lowest, highest))))
    return f"{ends} ({count})" if count else "none"


def setting(cell: Mapping[Any, Any] | pd.Series) -> str:
    """Formats a cell as "m = 4, η̃ = 2^-7", with its BN batch size where that is not m, and its further axes."""
    m, b = int(cell["batch_size"]), int(cell["bn_batch_size"])
    others = "".join(f", {axis_title(name)} {cell[name]:g}" for name in axes(cell) if not math.isnan(cell[name]))
    return f"m = {m}, " + (f"BN batch size {b}, " if b != m else "") + f"η̃ = {format_base_lr(cell['base_lr'])}{others}"


def score(cell: Mapping[Any, Any] | pd.Series, metric: Metric = ACCURACY) -> str:
    """Formats the metric of a cell as "91.2 ± 0.2 %" or "0.31 ± 0.02"; without a deviation where one seed finished."""
    return metric.show(cell[metric.column], cell[f"{metric.column}_std"])
