"""What every tracker shows of a run: its name, its hyperparameters, curves over its epochs, and how it ended."""

import dataclasses
import math
import statistics
from typing import Any

from smallbatch_jax.config.experiment import Experiment, Run
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.store.results import Row

FINAL_ACCURACY, DIVERGED = "final/test_accuracy", "final/diverged"


def name_of(run: Run) -> str:
    """The name of a run, unique in its grid: m00008_b00004_lr2^-7_seed0, without b where that is m."""
    mantissa, exponent = math.frexp(run.base_lr)
    base_lr = f"2^{exponent - 1}" if mantissa == 0.5 else repr(run.base_lr)
    bn = f"_b{run.bn_batch_size:05d}" if run.bn_batch_size != run.batch_size else ""
    return f"m{run.batch_size:05d}{bn}_lr{base_lr}_seed{run.seed}"


def hparams(experiment: Experiment, run: Run) -> dict[str, Any]:
    """The hyperparameters of a run, for tables that compare runs."""
    return {
        **dataclasses.asdict(run),
        "log2_base_lr": math.log2(run.base_lr),
        "learning_rate": run.base_lr * run.batch_size,  # η, of the mean gradient (Eq. 6)
        "experiment": experiment.name,
        "dataset": experiment.dataset.name,
        "augment": experiment.dataset.augment,
        "model": experiment.model.name,
        "norm": experiment.model.norm,
        "bn_statistics": experiment.model.bn_statistics,
        "epochs": experiment.epochs,
        "weight_decay": experiment.weight_decay,
        "warmup_fraction": experiment.schedule.warmup_fraction,
        "precision": experiment.precision,
    }


def scalars(row: Row) -> dict[str, float]:
    """The points of a run's curves at one epoch: losses, accuracies as fractions, updates taken.

    Values that are not finite are left out: one infinite loss would spoil the axes of the runs beside it. `DIVERGED` says that
    a run diverged.
    """
    values = {
        "train/loss": row.train_loss,
        "train/accuracy": row.train_accuracy,
        "test/loss": row.test_loss,
        "test/accuracy": row.test_accuracy,
        "updates": row.step,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def outcome(rows: list[Row], epochs: int) -> dict[str, float]:
    """How a run ended: 1 if it diverged, else 0 and its final accuracy (§3.1); empty while it goes on."""
    if rows[-1].diverged:
        return {DIVERGED: 1.0}
    if rows[-1].epoch < epochs:
        return {}
    return {DIVERGED: 0.0, FINAL_ACCURACY: statistics.median(row.test_accuracy for row in rows[-LAST_EPOCHS:])}
