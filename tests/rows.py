"""Builds rows of stored results, cells and timings for the tests of the study package."""

import math

import pandas as pd

from smallbatch_jax.store.timings import timing_frame
from smallbatch_jax.study import analysis

COLUMNS = [*analysis.RUN, "epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "status"]


def run(accuracies, status="finished", batch_size=4, base_lr=0.5, seed=0, bn_batch_size=None, experiment="exp"):
    """Returns the rows of one run with `accuracies` by epoch; a diverged run ends with one more row of NaN accuracies."""
    accuracies = [*accuracies, math.nan] if status == "diverged" else accuracies
    keys = (experiment, batch_size, bn_batch_size or batch_size, base_lr, seed)
    return [(*keys, e, 10 * e, 0.1, a, 0.1, a, status) for e, a in enumerate(accuracies, start=1)]


def results(*runs):
    return pd.DataFrame([row for rows in runs for row in rows], columns=COLUMNS)


def cell(batch_size, base_lr, accuracy, finished=1, diverged=0, experiment="exp", bn_batch_size=None):
    return (experiment, batch_size, bn_batch_size or batch_size, base_lr, accuracy, math.nan, finished, diverged)


def cells_of(*rows):
    return pd.DataFrame(rows, columns=[*analysis.CELL, "test_accuracy", "test_accuracy_std", "finished", "diverged"])


def compiled(batch_size, seconds=20.0, lanes=16, peak_bytes=0, bn_batch_size=None):
    return ("compile", batch_size, bn_batch_size or batch_size, lanes, seconds, 0, 0, peak_bytes)


def segment(batch_size, seconds, images, lanes=16, bn_batch_size=None):
    return ("segment", batch_size, bn_batch_size or batch_size, lanes, seconds, images // batch_size, images, 0)


def timings(*rows):
    return timing_frame(rows)
