"""The cost of a grid, from `results.load_timings` and `results.load`: time of a run, time to an accuracy, memory of a program.

Times are in seconds, memory is in bytes. The lanes of a program share its devices, so a run's time is not
measured: it is the number of images that the run has seen, times its program's mean seconds per image over all lanes, on the
machine that trained it. Compilation time is excluded.
"""

import pandas as pd

from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.study.analysis import BY, CELL, SETUP, cell_columns

PROGRAM = ["batch_size", "bn_batch_size"]
TARGET = 0.9  # fraction of the way from chance to the best accuracy


def program_costs(timings: pd.DataFrame) -> pd.DataFrame:
    """Returns the cost of each program, over all processes that took part in training it, from `results.load_timings`.

    Returns:
      One row per (batch size, BN batch size) that was compiled or trained, sorted, with the columns

      - lanes: the number of lanes that trained most images; more may have run out of memory, and the last runs need fewer.
      - compile_seconds, segment_seconds: wall time, summed; a program compiles while another trains.
      - images: images trained in all lanes; those trained twice after a kill are included twice, and so are their seconds.
      - images_per_second: rate of all lanes together; NaN before the first segment.
      - peak_bytes: `LaneProgram.peak_bytes` with that many lanes, on all its devices, without the dataset; NaN if not known.
    """
    parts = timings[timings["phase"].isin(["compile", "segment"]) & (timings["batch_size"] > 0)]
    of_phase = {f"{name}_seconds": parts["seconds"].where(parts["phase"] == name, 0.0) for name in ("compile", "segment")}
    parts = parts.assign(**of_phase, peak_bytes=parts["peak_bytes"].where(parts["peak_bytes"] > 0))
    by_lanes = parts.groupby([*PROGRAM, "lanes"]).agg({"images": "sum", "peak_bytes": "last"}).reset_index()
    most = by_lanes.sort_values(["images", "lanes"], ascending=False).drop_duplicates(PROGRAM).drop(columns="images")
    costs = parts.groupby(PROGRAM)[[*of_phase, "images"]].sum().reset_index().merge(most, on=PROGRAM)
    trained = (costs["images"] > 0) & (costs["segment_seconds"] > 0)
    costs["images_per_second"] = (costs["images"] / costs["segment_seconds"]).where(trained)
    return costs[[*PROGRAM, "lanes", "compile_seconds", "segment_seconds", "images", "images_per_second", "peak_bytes"]]


def seconds_per_image(timings: pd.DataFrame) -> pd.Series:
    """Returns mean seconds per image over all lanes, by (batch size, BN batch size), of programs that have a segment."""
    rates = program_costs(timings).set_index(PROGRAM)["images_per_second"].dropna()
    return (1 / rates).rename("seconds_per_image")


def examples_seen(rows: pd.DataFrame) -> pd.Series:
    """Returns the number of examples that a run was trained on up to the end of each epoch: step · batch_size.

    Where batches grow, it is the column `examples` of `Study.rows`.
    """
    return rows["examples"] if "examples" in rows else rows["step"] * rows["batch_size"]


def with_time(rows: pd.DataFrame, timings: pd.DataFrame) -> pd.DataFrame:
    """Adds `seconds`: the run's own time up to the end of the epoch; NaN without a segment of the row's program.

    Args:
      rows: from `results.load`, or `Study.rows` where batches grow.
      timings: from `results.load_timings`.
    """
    rate = seconds_per_image(timings).reindex(pd.MultiIndex.from_frame(rows[PROGRAM]))
    return rows.assign(seconds=examples_seen(rows) * rate.to_numpy(float))


def target_accuracy(cells: pd.DataFrame, chance: float, fraction: float = TARGET, metric: Metric = ACCURACY) -> float:
    """Returns the accuracy at `fraction` of the way from chance to the best of the cells; NaN before a run has finished.

    Starting from chance matters: 90 % of a best accuracy of 12 % would be within reach of a guess.
    """
    best = cells[metric.column].agg(metric.best)
    return float(chance + fraction * (best - chance))


def time_to_accuracy(rows: pd.DataFrame, timings: pd.DataFrame, accuracy: float, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Returns the time in which each batch size reaches a test accuracy, at the base_lr that reaches it first.

    A run reaches it in the first epoch whose test accuracy is at least that, even if it falls again. A base_lr reaches it if
    it has finished seeds and all of them do; its time is their mean. Seeds that diverged or still run are left out.

    Args:
      rows: as in `with_time`.
      timings: from `results.load_timings`.
      accuracy: a fraction, such as `target_accuracy`, or a value of another metric.
    Returns:
      One row per `SETUP` that has any row, sorted, with the columns

      - base_lr: the one that needs the fewest epochs; ties go to the smallest.
      - seconds: a run's own time until then, as in `with_time`; NaN also where no time is known.
      - epochs: number of epochs until then, mean over seeds.
      - seeds: number of finished seeds.

      The columns are NaN, and seeds 0, where no base_lr reaches it.
    """
    finished = rows[rows["status"] == "finished"]
    cell = cell_columns(rows)
    there = with_time(finished[metric.gain(finished[metric.column], accuracy) >= 0], timings)
    cells = there.sort_values("epoch").drop_duplicates([*cell, "seed"]).groupby(cell, **BY)
    found = cells[["seconds", "epoch"]].mean().rename(columns={"epoch": "epochs"}).assign(seeds=cells.size())
    seeds = finished.drop_duplicates([*cell, "seed"]).groupby(cell, **BY).size()
    whole = found[found["seeds"] == seeds.reindex(found.index)].reset_index()
    soonest = whole.sort_values(["epochs", "base_lr"]).drop_duplicates(SETUP)
    setups = rows[SETUP].drop_duplicates().sort_values(SETUP, ignore_index=True)
    table = setups.merge(soonest, how="left", on=SETUP)
    return table.assign(seeds=table["seeds"].fillna(0).astype(int))[[*SETUP, "base_lr", "seconds", "epochs", "seeds"]]


def planned_times(
    cells: pd.DataFrame, rows: pd.DataFrame, timings: pd.DataFrame, accuracy: float, metric: Metric = ACCURACY
) -> pd.DataFrame:
    """Returns `time_to_accuracy` of every planned setup, its `pending` seeds, and those that `diverged` at that base_lr."""
    table = cells.groupby(SETUP, observed=True)["pending"].sum().reset_index()
    table = table.merge(time_to_accuracy(rows, timings, accuracy, metric), how="left", on=SETUP)
    diverged = cells.groupby(CELL, observed=True)["diverged"].sum().reset_index()
    return table.merge(diverged, how="left", on=CELL).sort_values("batch_size")
