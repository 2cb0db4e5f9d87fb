"""What a grid cost: the time of a run, the time to an accuracy, and the programs that took it.

From `results.load_timings` and the rows of `results.load`. Times are in seconds and memory is in bytes; nothing here trains,
plots, reads or writes. The lanes of a program share its devices, so a run has no clock of its own: its time is its share, the
seconds that the program trained divided by the images that it trained, for each image that the run has seen. That is a mean
over the whole program, on the machine that trained it, with as many lanes at work as there were. Time to compile is not in it.
"""

# Without pandas-stubs, pyright reads pandas' own loose annotations, where every column may be a frame or a scalar.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false

import pandas as pd

from smallbatch_jax.study.analysis import CELL, RUN, SETUP

PROGRAM = ["batch_size", "bn_batch_size"]
TARGET = 0.9  # of the way from chance to the best


def program_costs(timings: pd.DataFrame) -> pd.DataFrame:
    """What each program cost, over all processes that ever trained a part of it.

    Args:
      timings: from `results.load_timings`.
    Returns:
      One row per (batch size, BN batch size) that was compiled or trained, sorted, with the columns
        lanes: with how many it trained most of its images; memory may have run out with more, and the last runs need fewer.
        compile_seconds, segment_seconds: of wall time, summed; a program compiles while another trains.
        images: that it trained, of all lanes; what a kill made it train twice counts twice, in seconds too.
        images_per_second: of all lanes together; NaN before the first segment.
        peak_bytes: `LaneProgram.peak_bytes` with so many lanes, memory of all its devices, dataset left out; NaN if not known.
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
    """Seconds for which a program trains, for each image that any of its lanes trains; by (batch size, BN batch size).

    A program without a segment is not in it.
    """
    rates = program_costs(timings).set_index(PROGRAM)["images_per_second"].dropna()
    return (1 / rates).rename("seconds_per_image")


def with_time(rows: pd.DataFrame, timings: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column `seconds`: the run's own time up to the end of the epoch, its share of the program's wall time.

    Args:
      rows: from `results.load`. The images that a run has seen are step · batch_size.
      timings: from `results.load_timings`; seconds are NaN where they hold no segment of the row's program.
    """
    rate = seconds_per_image(timings).reindex(pd.MultiIndex.from_frame(rows[PROGRAM]))
    return rows.assign(seconds=rows["step"] * rows["batch_size"] * rate.to_numpy(float))


def target_accuracy(cells: pd.DataFrame, chance: float, fraction: float = TARGET) -> float:
    """A test accuracy worth timing: so much of the way from chance to the best of the cells; NaN before a run has finished.

    Of the way from chance, as 90 % of a best of 12 % would be within reach of a guess.
    """
    return float(chance + fraction * (cells["test_accuracy"].max() - chance))


def time_to_accuracy(rows: pd.DataFrame, timings: pd.DataFrame, accuracy: float) -> pd.DataFrame:
    """How soon each batch size can reach a test accuracy, at the base_lr that is there first.

    A run is there after the first epoch whose test accuracy is at least that, whatever becomes of it later. A base_lr counts
    if it has finished seeds and all of them get there; its time is their mean. Seeds that diverged or still run are left out.

    Args:
      rows: from `results.load`.
      timings: from `results.load_timings`.
      accuracy: a fraction, such as `target_accuracy` gives.
    Returns:
      One row per `SETUP` that has any row, sorted, with the columns
        base_lr: whose runs are there after the fewest epochs; of equals, the smallest.
        seconds: a run's own time until then, as in `with_time`; NaN too where no time is known.
        epochs: until then, mean over seeds.
        seeds: how many they are.
      NaN, and 0 seeds, where no base_lr gets there.
    """
    finished = rows[rows["status"] == "finished"]
    there = with_time(finished[finished["test_accuracy"] >= accuracy], timings)
    cells = there.sort_values("epoch").drop_duplicates(RUN).groupby(CELL, observed=True)
    found = cells[["seconds", "epoch"]].mean().rename(columns={"epoch": "epochs"}).assign(seeds=cells.size())
    seeds = finished.drop_duplicates(RUN).groupby(CELL, observed=True).size()
    whole = found[found["seeds"] == seeds.reindex(found.index)].reset_index()
    soonest = whole.sort_values(["epochs", "base_lr"]).drop_duplicates(SETUP)
    setups = rows[SETUP].drop_duplicates().sort_values(SETUP, ignore_index=True)
    table = setups.merge(soonest, how="left", on=SETUP)
    return table.assign(seeds=table["seeds"].fillna(0).astype(int))[[*SETUP, "base_lr", "seconds", "epochs", "seeds"]]
