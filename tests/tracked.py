"""Trains grids with trackers, and reads back what they wrote with TensorBoard's own reader."""

import math

import numpy as np
import tiny
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.study import analysis
from smallbatch_jax.tracking.trackers import Trackers, name_of

GRID = {"base_lrs": (2**-9, 0.1, 1e30), "seeds": (0, 1), "lanes": 4}
TAGS = {name.replace("_", "/"): name for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")} | {
    "updates": "step"
}


def train(workdir, progress=None, **fields):
    """Trains a tiny grid, whose highest base_lr diverges, into a workdir and returns its rows."""
    grid = tiny.grid(**{"tensorboard": True, **GRID, **fields})
    train_grid(grid, workdir, tiny.dataset(), progress or NoProgress(), lambda b: tiny.PlainModel())
    return results.load(workdir)


def runs_shown(workdir):
    """Returns TensorBoard's event accumulators by run name."""
    found = EventMultiplexer().AddRunsFromDirectory(str(workdir / "tensorboard")).Reload()
    return {name: found.GetAccumulator(name) for name in found.Runs()}


def points(run):
    """Returns every scalar of a run, sorted: (tag, epoch, value)."""
    tags = run.Tags()["scalars"]
    return sorted((tag, event.step, event.value) for tag in tags for event in run.Scalars(tag))


def expected(frame):
    """Returns what TensorBoard should show by run: the rows' finite values as float32, and how the run ended."""
    shown = {}
    for (m, b, base_lr, seed), rows in frame.groupby(list(results.RUN_COLUMNS)):
        values = [(tag, row["epoch"], float(row[column])) for _, row in rows.iterrows() for tag, column in TAGS.items()]
        last, status = rows["epoch"].max(), rows["status"].iloc[0]
        if status != "running":
            values.append(("final/diverged", last, float(status == "diverged")))
        if status == "finished":
            values.append(("final/test_accuracy", last, analysis.final_accuracy(rows)["test_accuracy"].item()))
        kept = [(tag, epoch, float(np.float32(value))) for tag, epoch, value in values if math.isfinite(value)]
        shown[name_of(Run(m, b, float(base_lr), seed))] = sorted(kept)  # pandas 2 groups by NumPy scalars
    return shown


def assert_all_shown(workdir):
    assert {name: points(run) for name, run in runs_shown(workdir).items()} == expected(results.load(workdir))


def row(epoch, base_lr=2**-7, test_accuracy=0.5, seed=0):
    return Row(4, 4, base_lr, seed, epoch, 13 * epoch, 1 / epoch, 0.25, 2 / epoch, test_accuracy)


def show(workdir, *rows, epochs=7, **fields):
    """Stores rows and then opens the trackers on them."""
    with ProgramResults(workdir, 4, 4) as stored:
        stored.append(rows)
        with Trackers(tiny.grid(**{"epochs": epochs, "tensorboard": True, **fields}), workdir, [stored]):
            pass
