"""The best cell at equal epochs, and at equal wall-clock time: one study, or several of different lengths (Figs. 17 and 18)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from smallbatch_jax.config.text import plural, short_duration
from smallbatch_jax.study import cost
from smallbatch_jax.study.analysis import best_first, cell_columns, known_cells, setting, with_most_seeds
from smallbatch_jax.study.study import Study


class Best(NamedTuple):
    """The best cell under a limit of time or epochs."""

    epochs: int  # training length of its study
    cell: pd.Series  # with the metric that it has within the limit
    seconds: float  # the limit of time; NaN for a limit of epochs


def by_length(studies: Sequence[Study]) -> list[Best]:
    """Returns the best cell of each study that has one, by rising number of epochs."""
    finished = [study for study in studies if study.cells["finished"].any()]
    cells = [best_first(with_most_seeds(study.cells), study.metric).iloc[0] for study in finished]
    bests = [Best(study.experiment.epochs, cell, math.nan) for study, cell in zip(finished, cells, strict=True)]
    return sorted(bests, key=lambda best: best.epochs)


def by_time(studies: Sequence[Study]) -> list[Best]:
    """Returns the best cell within the training time of the fastest batch size, and within that of the slowest.

    A run that needs longer is judged by its epochs within that time, before its schedule has ended, and as always by the median
    of the last five. The list is empty if a study that has finished runs has no timings.
    """
    metric, found = studies[0].metric, []
    timed = [cost.with_time(study.choosing, study.timings).dropna(subset="seconds") for study in studies]
    keys = [with_most_seeds(study.cells)[cell_columns(study.cells)] for study in studies]
    timed = [rows[rows["status"] == "finished"].merge(key) for rows, key in zip(timed, keys, strict=True)]
    ends = pd.concat([rows.groupby(cell_columns(rows), observed=True)["seconds"].max() for rows in timed])
    known = all(len(rows) or not study.cells["finished"].any() for study, rows in zip(studies, timed, strict=True))
    for limit in (ends.min(), ends.max()) if known and len(ends) else ():
        bests = []
        for study, rows in zip(studies, timed, strict=True):
            cells = best_first(known_cells(rows[rows["seconds"] <= limit], metric), metric)
            bests += [Best(study.experiment.epochs, cell, float(limit)) for _, cell in cells[:1].iterrows()]
        found.append(max(bests, key=lambda best: metric.gain(best.cell[metric.column], 0.0)))
    return found


def sentence(studies: Sequence[Study]) -> str:
    """Returns a sentence on the best at equal epochs, for each length if there are several, and at equal time.

    Studies of different models, datasets or metrics are not compared: the sentence is empty.
    """
    if len({(study.experiment.model, study.experiment.dataset.name, study.metric.column) for study in studies}) > 1:
        return ""
    metric, several = studies[0].metric, len({study.experiment.epochs for study in studies}) > 1

    def told(best: Best, length: bool = several) -> str:
        after = f" of {plural(best.epochs, 'epoch')}" * length
        return f"{setting(best.cell)}{after} ({metric.show(best.cell[metric.column])})"

    lengths = [f"{plural(best.epochs, 'epoch')}: " * several + told(best, False) for best in by_length(studies)]
    if not lengths:
        return ""
    epochs = f"At equal epochs the best is {', '.join(lengths)}"
    if not (times := by_time(studies)):
        return f"{epochs}; the best at equal time is not known, since some runs have no timings."
    fast, slow = (f"{told(best)} in {short_duration(best.seconds)}" for best in times)
    return f"{epochs}; at equal time {fast}, the time of the fastest batch size, and {slow}, that of the slowest."
