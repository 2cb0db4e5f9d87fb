"""Tables on which claims are checked: the best cells by batch size, their standard errors, and whether the grid ends there.

The accuracy of a batch size is that of its best cell, or that of a guess if every run diverged. Where its base_lr is the
largest or smallest of those tried, and the paper tried more beyond it, the accuracy is only a lower bound.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from smallbatch_jax.config.protocol import BASE_LRS, BATCH_SIZES
from smallbatch_jax.config.text import format_base_lr, percent, plural
from smallbatch_jax.study import analysis
from smallbatch_jax.study.claims.margins import TELLS, Side, ratio
from smallbatch_jax.study.noise import noise_of
from smallbatch_jax.study.study import Study


class NotEnoughData(Exception):
    """The stored results cannot decide a check; the message says what they lack."""


show = functools.partial(percent, digits=2)


def by_size(values: pd.Series) -> str:
    """Values by batch size as "3, 1 at m = 2, 4"."""
    return f"{', '.join(map(str, values))} at m = {listed(values.index)}"


def listed(sizes: Any) -> str:
    return ", ".join(map(str, sizes))


def points(difference: float, error: float = math.nan) -> str:
    """A difference of accuracies as "+1.20 points", with its standard error "+1.20 ± 0.30 points"."""
    return f"{100 * difference:+.2f}" + ("" if math.isnan(error) else f" ± {100 * error:.2f}") + " points"


@dataclass(frozen=True)
class Sizes:
    """The batch sizes from `low` to `high`, or all others."""

    low: int = 1
    high: float = math.inf
    others: bool = False

    def __contains__(self, batch_size: int) -> bool:
        return (self.low <= batch_size <= self.high) != self.others

    def __invert__(self) -> "Sizes":
        return Sizes(self.low, self.high, not self.others)

    def __str__(self) -> str:
        if self.high == math.inf:
            return "" if self.low == 1 else f"from {self.low} on"
        if self.low == self.high:
            return f"other than {self.low}" if self.others else f"= {self.low}"
        if self.low == 1:
            return f"above {self.high}" if self.others else f"up to {self.high}"
        return f"below {self.low} or above {self.high}" if self.others else f"from {self.low} to {self.high}"

    def tried(self, batch_sizes: Any) -> str:
        """The sizes as "from 4 to 8", with those that were tried if some of them were not: "from 4 to 8 (tried: 8)"."""
        found = [m for m in batch_sizes if m in self]
        lacks = self.high < math.inf and not self.others and {m for m in BATCH_SIZES if m in self} - {*found}
        return f"{self} (tried: {listed(found)})" if lacks else str(self)


ALL = Sizes()


def pick(values: Any, who: str, sizes: Sizes = ALL, least: int = 1) -> Any:
    """Returns the values at those batch sizes; `who` ("fig01 has") begins the error message if there are too few."""
    found = values.loc[[m for m in values.index if m in sizes]]
    if len(found) < least:
        words = f"{who} {plural(len(found), 'batch size') if len(found) else 'no batch size'} {sizes}".rstrip()
        raise NotEnoughData(f"{words}, {least} are needed" if least > 1 else words)
    return found


def ordinary(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the cells or rows whose BN batch is the whole batch, or all of a batch size that has none."""
    own = frame["bn_batch_size"] == frame["batch_size"]
    return frame[own | ~own.groupby(frame["batch_size"]).transform("any")]


def best_of(study: Study, cells: pd.DataFrame, sizes: Sizes = ALL) -> pd.DataFrame:
    """The best of some cells by batch size, with its `accuracy` (of a guess if every run diverged) and standard `error`."""
    chosen = cells["batch_size"].map(sizes.__contains__).astype(bool)
    cells = analysis.best_first(cells[chosen]).drop_duplicates("batch_size")
    accuracy = cells["test_accuracy"].fillna(study.chance)
    error = noise_of(study).error(cells.assign(test_accuracy=accuracy))
    return cells.assign(accuracy=accuracy, error=error, end="", bound=False).set_index("batch_size").sort_index()


def best_by_size(study: Study, sizes: Sizes = ALL, least: int = 1, cells: pd.DataFrame | None = None) -> pd.DataFrame:
    """Returns `best_of` with `end`: "smallest", "largest" or "only" if the best base_lr is that one of those tried, else "".

    `bound` says where the accuracy is a lower bound.
    """
    cells = ordinary(study.cells) if cells is None else cells
    table = best_of(study, cells)
    if not table["finished"].any():
        which = " with BN over the whole batch" if study.cells["finished"].any() else ""
        raise NotEnoughData(f"no run of {study.name}{which} finished")
    low, high = (cells.groupby("batch_size")["base_lr"].agg(end) for end in ("min", "max"))
    if not study.experiment.grid.base_lr_by_batch_size:  # those are the best of other results (§3.6)
        rates, ends = table["base_lr"], ("", "only", "smallest", "largest")
        bounds = False, True, low > BASE_LRS[0], high < BASE_LRS[-1]
        at = [table["finished"] == 0, low == high, rates == low, rates == high]
        table["end"], table["bound"] = np.select(at, ends, ""), np.select(at, bounds, False)
    return pick(table, f"{study.name} has", sizes, least)


def side(study: Study, sizes: Sizes = ALL) -> Side:
    """Returns the best accuracy at those batch sizes, also in words; ties go to the smallest batch size."""
    best = best_by_size(study)
    low, high = best.index[0], best.index[-1]
    best = pick(best, f"{study.name} has", sizes)
    m = best["accuracy"].idxmax()
    top = best.loc[m]
    if not top["finished"]:
        return Side(top["accuracy"], top["error"], text=f"nothing (every run at m = {m} diverged)")
    near = top["accuracy"] - best["accuracy"] <= TELLS * np.hypot(best["error"], top["error"])
    others = best.index[near & best["bound"] & (best.index != m)]  # as good as the best, and only lower bounds
    ends = [f"base_lr {format_base_lr(top['base_lr'])}", f"the {top['end']} tried" if top["end"] else ""]
    ends += [f"m the {end} tried" for end, edge in (("smallest", low), ("largest", high)) if m == edge and low < high]
    # Beyond 2 … 2048 the paper has nothing either.
    beyond = [new for new in BATCH_SIZES if new in sizes and (new < low if m == low else new > high if m == high else False)]
    text = f"{show(top['accuracy'])} at m = {m} ({', '.join(filter(None, ends))})"
    text += f", as good at an edge of the base_lrs at m = {listed(others)}" if len(others) else ""
    return Side(top["accuracy"], top["error"], bool(top["bound"] or len(others) or beyond), text)


def shared_finished(one: Study, other: Study, sizes: Sizes) -> list[pd.DataFrame]:
    """Returns the best cells of each study at the batch sizes at which both finished a run, of the base_lrs that both tried.

    For studies that differ in their schedule alone: the best of more base_lrs would be better by chance.
    """
    cells = [ordinary(study.cells) for study in (one, other)]
    rates = set(cells[0]["base_lr"]) & set(cells[1]["base_lr"])
    if not rates:
        raise NotEnoughData(f"{one.name} and {other.name} share no base_lr")
    cells = [of[of["base_lr"].isin(rates)] for of in cells]
    return shared((one, other), cells, " finished runs at", sizes)


def shared(
    studies: tuple[Study, Study], cells: Sequence[pd.DataFrame], what: str = "", sizes: Sizes = ALL, least: int = 1
) -> list[pd.DataFrame]:
    """Returns the best of some cells of each study at the batch sizes that both have, or have finished runs at."""
    names = " and ".join(study.name for study in studies)
    if len({(study.experiment.model.name, study.examples and study.examples[0]) for study in studies}) > 1:
        raise NotEnoughData(f"{names} differ in their model or number of training images")
    tables = [best_by_size(study, cells=of) for study, of in zip(studies, cells, strict=True)]
    tables = [table[table["finished"] > 0] if what else table for table in tables]
    both = pd.Series(tables[0].index.intersection(tables[1].index))
    both = pick(both.set_axis(both), f"{names} share{what}", sizes, least)
    return [table.loc[both] for table in tables]


def edges(*tables: pd.DataFrame) -> str:
    """Names the batch sizes whose best base_lr is at an edge of the grid, as "; best base_lr at an edge: fig01 at m = 2"."""
    found = [f"{t['experiment'].iloc[0]} at m = {listed(t.index[t['end'] != ''])}" for t in tables if any(t["end"])]
    return f"; best base_lr at an edge: {', '.join(found)}" if found else ""


def margins_of(wanted: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """Returns a table's margins above another by batch size where either finished; 0 where the lower is only a lower bound."""
    finished = wanted["finished"].add(others["finished"])  # NaN where one of them lacks the batch size
    margins = {}
    for m in finished.index[finished > 0]:
        a, b = wanted.loc[m], others.loc[m]
        margin = ratio(a["accuracy"] - b["accuracy"], math.hypot(a["error"], b["error"]))
        margins[m] = 0.0 if (b if margin > 0 else a)["bound"] else margin
    return pd.Series(margins, dtype=float)
