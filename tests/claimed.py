"""Studies built from tables of accuracies, and the verdicts of claims about them."""

import dataclasses
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


def study(name, table, lrs=LRS, bn=None, seeds=(0,), epochs=1, examples=(5000, 1000), **fields):
    """Returns a study with chance accuracy 0.1 whose runs reach the accuracies in `table`.

    `table` maps a batch size to the accuracy at the lowest base_lr (all others diverged), or to a list of accuracies
    over base learning rates, or with `bn` to a dict by BN batch size (0.3 where one is missing). An accuracy is a number,
    a list over seeds or a tuple over epochs; LOST marks a diverged run and None a run without rows.
    """
    experiment = tiny.grid(
        name=name, batch_sizes=tuple(table), base_lrs=lrs, bn_batch_sizes=bn, seeds=seeds, epochs=epochs, **fields
    )
    rows = [row for run in experiment.runs() for row in rows_of(name, run, reached(table, run, lrs), epochs)]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    cells = analysis.planned_cells(frame, experiment.runs(), name)
    return Study(Path(name), experiment, frame, cells, 10, examples)


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


def exact(name, table, lrs=LRS, **options):
    """Returns a study with so many test images that a standard error is below 0.05 points.

    A single accuracy is at the second of three base_lrs, not at an edge. The study "resnet32_nobn" claims to have 82 epochs.
    """
    if len(lrs) == len(LRS):
        table = {m: v if isinstance(v, (list, dict)) else [LOST, v, LOST] for m, v in table.items()}
    found = study(name, table, lrs, examples=(50_000, 10**6), **options)
    epochs = 82 if name == "resnet32_nobn" else found.experiment.epochs
    return dataclasses.replace(found, experiment=dataclasses.replace(found.experiment, epochs=epochs))


def studies(tables):
    """Returns studies by name: a table becomes an `exact` study, and a Study is kept as it is."""
    return {name: v if isinstance(v, Study) else exact(name, v) for name, v in tables.items()}


def verdict(claim, tables):
    return claims.judge_one(CLAIMS[claim], studies(tables))


def failing(claim, tables):
    """Returns the indices of the claim's checks that fail."""
    given = studies(tables)
    found = [claims._examine(part, given) for part in CLAIMS[claim].checks]
    return {i for i, finding in enumerate(found) if finding.verdict == claims.FAILS}


def texts(claim, tables, answer):
    return [finding.text for finding in verdict(claim, tables).findings if finding.verdict == answer]


def fig04(table, lrs=(2**-8,), **options):
    return exact("fig04", table, lrs, **options)


def chosen_rates(name, table, bn):
    """Returns a study with one base_lr for each batch size, as chosen from other results (§3.6)."""
    return exact(name, table, (2**-9,), bn=bn, base_lr_by_batch_size=tuple((m, 2**-9) for m in table))


def fig13(dataset, table):
    return chosen_rates(f"fig13_{dataset}", table, (2, 4, 8, 16, 32, 64))


def fig14(table):
    return chosen_rates("fig14", table, (2, 4, 8, 16, 32, 64, 128, 256))
