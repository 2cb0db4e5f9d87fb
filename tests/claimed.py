"""Studies made of a table of accuracies, and what a claim finds in them."""

import math
from pathlib import Path

import pandas as pd
import tiny

from smallbatch_jax.study import analysis, claims
from smallbatch_jax.study.study import Study

LOST = math.nan  # a run that diverged
LRS = (2**-9, 2**-8, 2**-7)
COLUMNS = [*analysis.RUN, "epoch", "step", "train_accuracy", "test_accuracy", "train_loss", "test_loss", "status"]
CLAIMS = {claim.id: claim for claim in claims.CLAIMS}


def study(name, table, lrs=LRS, bn=None, seeds=(0,), epochs=1, **fields):
    """A study of chance 0.1 whose runs reach what `table` says.

    `table` has by batch size the accuracy at the lowest base_lr, all others having diverged, or a list of accuracies
    over base learning rates, or with `bn` a dict by BN batch size (0.3 where it says nothing). An accuracy is a number,
    a list over seeds or a tuple over epochs; LOST diverged, None has not ended.
    """
    experiment = tiny.grid(
        name=name, batch_sizes=tuple(table), base_lrs=lrs, bn_batch_sizes=bn, seeds=seeds, epochs=epochs, **fields
    )
    rows = [row for run in experiment.runs() for row in rows_of(name, run, reached(table, run, lrs), epochs)]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    cells = analysis.planned_cells(frame, experiment.runs(), name)
    return Study(Path(name), experiment, frame, cells, 10, (5000, 1000))


def reached(table, run, lrs):
    value = table[run.batch_size]
    if isinstance(value, dict):
        value = value.get(run.bn_batch_size, 0.3)
    place = lrs.index(run.base_lr)
    if isinstance(value, list):
        value = value[place]
    elif place:
        value = LOST
    return value[run.seed] if isinstance(value, list) else value


def rows_of(name, run, value, epochs):
    if value is None:
        return []
    lost = value is LOST
    values = [LOST] if lost else list(value) if isinstance(value, tuple) else [value] * epochs
    keys = (name, run.batch_size, run.bn_batch_size, run.base_lr, run.seed)
    status = "diverged" if lost else "finished"
    return [(*keys, e, round(e * 5000 / run.batch_size), a, a, 1 - a, 1 - a, status) for e, a in enumerate(values, 1)]


def studies(tables):
    """By name, of tables or of studies, which stay as they are."""
    return {name: v if isinstance(v, Study) else study(name, v) for name, v in tables.items()}


def verdict(claim, tables):
    return claims.judge_one(CLAIMS[claim], studies(tables))


def failing(claim, tables):
    """The numbers of the parts that do not hold."""
    given = studies(tables)
    found = [claims._examine(part, given) for part in CLAIMS[claim].checks]
    return {i for i, findings in enumerate(found) if any(finding.holds is False for finding in findings)}


def texts(claim, tables, holds):
    return [finding.text for finding in verdict(claim, tables).findings if finding.holds is holds]


def fig04(table, lrs=(2**-8,), **options):
    return study("fig04", table, lrs, **options)


def fig13(dataset, table):
    return study(f"fig13_{dataset}", table, lrs=(2**-9,), bn=(2, 4, 8, 16, 32, 64))


def fig14(table):
    return study("fig14", table, lrs=(2**-9,), bn=(2, 4, 8, 16, 32, 64, 128, 256))
