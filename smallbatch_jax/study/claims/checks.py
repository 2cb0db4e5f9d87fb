"""Checks that claims are made of: each takes the studies that a claim is about and returns a Finding.

A smaller grid or data set is judged like the paper's own. The accuracy of a batch size is that of its best cell, or −inf if
every run diverged: it is below all others, not missing. Where batch sizes tie for the best, the claim has the benefit.
"""

# Without pandas-stubs, pyright reads pandas' own loose annotations, where every value may be a frame or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportReturnType=false

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from smallbatch_jax.config.text import format_base_lr, percent, plural
from smallbatch_jax.study import analysis
from smallbatch_jax.study.study import Study

# The paper says "similar", "good", "improves", never how much; these are our readings, in points (%) of accuracy unless
# another unit is given. From 10,000 images and one seed, an accuracy of 75 % is itself uncertain by half a point.
SIMILAR = 2.0  # §3.3 "similar generalization performance", §3.4 "quite good results"
SIMILAR_CURVES = 5.0  # §3.3 "similar convergence": training accuracy, averaged over the epochs
STILL_IMPROVES = 0.5  # §4 "continue to improve down to m = 2": below the best by no more than noise
AS_STATED = 3.0  # §3.2 "76%", which another framework, initialisation and seed reached
FALLS = -0.5  # §3.6 "a general performance improvement by reducing": rank correlation of accuracy with m
MOST = 0.5  # §3.3 "a wide range of batch sizes", §3.4 "generally": fraction of the batch sizes
WIDENS = 1  # §4 "progressively reduces the range": base learning rates, of which the grid has few
TREND = 3  # batch sizes; with fewer nothing rises or falls


class NotEnoughData(Exception):
    """The stored results cannot decide a check; the message says what they lack."""


class Finding(NamedTuple):
    """The result of a check; `holds` is None where the stored results cannot decide it."""

    holds: bool | None
    text: str


_percent = functools.partial(percent, digits=2)


def _by_size(values: pd.Series) -> str:
    """Values by batch size as "3, 1 at m = 2, 4"."""
    return f"{', '.join(map(str, values))} at m = {', '.join(map(str, values.index))}"


def _points(difference: Any) -> Any:
    """Converts a difference of accuracies to points; float error no longer decides at the edge of a tolerance."""
    return round(100 * difference, 6)


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
        if self.low == 1:
            return f"above {self.high}" if self.others else f"up to {self.high}"
        return f"below {self.low} or above {self.high}" if self.others else f"from {self.low} to {self.high}"


ALL = Sizes()


def _pick(values: Any, who: str, sizes: Sizes = ALL, least: int = 1) -> Any:
    """The values at those batch sizes; `who` ("fig01 has") begins the sentence if they are too few."""
    found = values.loc[[m for m in values.index if m in sizes]]
    if len(found) < least:
        words = f"{who} {plural(len(found), 'batch size') if len(found) else 'no batch size'} {sizes}".rstrip()
        raise NotEnoughData(f"{words}, {least} are needed" if least > 1 else words)
    return found


def _best(study: Study, sizes: Sizes = ALL, least: int = 1) -> pd.DataFrame:
    """Accuracy and base_lr (NaN if every run diverged) of the best cell, by batch size."""
    table = analysis.best_first(_comparable(_ordinary(study.cells))).drop_duplicates("batch_size")
    if table["test_accuracy"].isna().all():
        raise NotEnoughData(f"no run of {study.name} with BN over the whole batch finished")
    return _pick(table.set_index("batch_size")[["accuracy", "base_lr"]].sort_index(), f"{study.name} has", sizes, least)


def _ordinary(frame: pd.DataFrame) -> pd.DataFrame:
    """Cells or rows whose BN batch is the whole batch, at every batch size that has such."""
    own = frame["bn_batch_size"] == frame["batch_size"]
    return frame[own | ~own.groupby(frame["batch_size"]).transform("any")]


def _comparable(cells: pd.DataFrame) -> pd.DataFrame:
    """The best cells with their `accuracy`, without the rounding of a mean over seeds, which would decide between equals."""
    best = analysis.best_cells(cells)
    return best.assign(accuracy=best["test_accuracy"].round(9).fillna(-math.inf))


def _top(best: pd.DataFrame) -> tuple[float, str]:
    """The best accuracy, also in words; of equals, the one of the smallest batch size."""
    m = best["accuracy"].idxmax()
    accuracy, base_lr = best["accuracy"][m], best["base_lr"][m]
    if accuracy == -math.inf:
        return accuracy, f"nothing (every run at m = {m} diverged)"
    return accuracy, f"{_percent(accuracy)} at m = {m} (base_lr {format_base_lr(base_lr)})"


def _shared(*studies: Study, least: int = 1) -> pd.DataFrame:
    """Returns the best accuracies at the batch sizes that all studies share, one column per study."""
    best = pd.DataFrame({study.name: _best(study)["accuracy"] for study in studies}).dropna()
    return _pick(best, f"{_names(*studies)} share", least=least)


def _finished(*studies: Study, sizes: Sizes = ALL) -> pd.DataFrame:
    """Returns `_shared` at those batch sizes at which every study finished a run."""
    best = _shared(*studies)
    return _pick(best[(best > -math.inf).all(axis=1)], f"{_names(*studies)} share finished runs at", sizes)


def _names(*studies: Study) -> str:
    return " and ".join(study.name for study in studies)


def best_is_at(study: Study, sizes: Sizes) -> Finding:
    """The best accuracy is at one of the batch sizes."""
    (inside, reached), (outside, others) = _top(_best(study, sizes)), _top(_best(study, ~sizes))
    return Finding(bool(inside >= outside), f"{study.name}: m {sizes} reach {reached}; the others {others}")


def stays_behind(study: Study, sizes: Sizes, others: Sizes) -> Finding:
    """The best of some batch sizes is below that of others."""
    (behind, reached), (ahead, more) = _top(_best(study, sizes)), _top(_best(study, others))
    return Finding(bool(behind < ahead), f"{study.name}: m {sizes} reach {reached}; m {others} {more}")


def is_near_best(study: Study, batch_size: int, tolerance: float) -> Finding:
    """One batch size is within `tolerance` points of the best."""
    loss, words = _loss(study, batch_size)
    _, best = _top(_best(study))
    text = f"{study.name}: m = {batch_size} loses {words} ({tolerance:g} allowed) to the best, {best}"
    return Finding(loss <= tolerance, text)


def falls_off_more(steep: Study, flat: Study, batch_size: int) -> Finding:
    """From the best to `batch_size`, one study loses more than the other."""
    (loss, words), (flat_loss, flat_words) = _loss(steep, batch_size), _loss(flat, batch_size)
    losses = f"{steep.name} loses {words}, {flat.name} {flat_words}"
    return Finding(loss > flat_loss, f"from the best to m = {batch_size}, {losses}")


def _loss(study: Study, batch_size: int) -> tuple[float, str]:
    """By how many points a batch size is below the best, also in words."""
    best = _best(study, least=2)["accuracy"]
    if batch_size not in best.index:
        raise NotEnoughData(f"{study.name} has no batch size {batch_size}")
    loss = _points(float(best.max() - best[batch_size]))
    return loss, "everything" if loss == math.inf else f"{loss:.2f} points"


def has_accuracy(study: Study, accuracy: float, tolerance: float) -> Finding:
    """The best accuracy is the paper's, within `tolerance` points."""
    found, best = _top(_best(study))
    text = f"{study.name}: best {best}, the paper's {100 * accuracy:g} % ({tolerance:g} points allowed)"
    return Finding(abs(_points(float(found - accuracy))) <= tolerance, text)


def are_similar(study: Study, other: Study) -> Finding:
    """The best accuracies of two studies are close."""
    (found, best), (other_found, other_best) = _top(_best(study)), _top(_best(other))
    text = f"{study.name}: best {best}; {other.name}: best {other_best} ({SIMILAR:g} points allowed)"
    return Finding(abs(_points(float(found - other_found))) <= SIMILAR, text)


def is_better(study: Study, than: Study) -> Finding:
    """One study is better than another at most batch sizes."""
    both = _shared(study, than, least=2)
    better = int((both[study.name] > both[than.name]).sum())
    text = f"{study.name} is better than {than.name} at {better} of {len(both)} batch sizes"
    return Finding(better >= MOST * len(both), text)


def improves_on(study: Study, before: Study) -> Finding:
    """One study is at least as good as another at most batch sizes, and better on average."""
    both = _shared(study, before, least=2)
    kept, gain = int((both[study.name] >= both[before.name]).sum()), _gain(study, before)
    text = f"{study.name} is at least as good as {before.name} at {kept} of {len(both)} batch sizes"
    holds = kept >= MOST * len(both) and bool(gain > 0)
    return Finding(holds, f"{text}, {gain:+.2f} points on average where both finished")


def _gain(study: Study, before: Study, sizes: Sizes = ALL) -> float:
    """By how many points one study is above another, on average over the batch sizes at which both finished a run."""
    both = _finished(study, before, sizes=sizes)
    return _points((both[study.name] - both[before.name]).mean())


def longer_is_better(short: Study, medium: Study, long: Study) -> Finding:
    """The accuracy, averaged over the batch sizes, rises with the training length."""
    means = _finished(short, medium, long).mean()
    shown = ", ".join(f"{_percent(value)} ({name})" for name, value in means.items())
    return Finding(bool((means.diff().iloc[1:] > 0).all()), f"mean over the batch sizes {shown}")


def gains_more(long: Study, short: Study, sizes: Sizes, than: Sizes) -> Finding:
    """Longer training gains more at some batch sizes than at others."""
    large, small = (_gain(long, short, some) for some in (sizes, than))
    text = f"from {short.name} to {long.name}, m {sizes} gain {large:+.2f} points on average, m {than} {small:+.2f}"
    return Finding(bool(large > small), text)


def best_base_lr_is_out_of_reach(study: Study, sizes: Sizes) -> Finding:
    """The best base_lr of each of the batch sizes is below that of the study's best cell."""
    _need_base_lrs(study)
    best, rates = _best(study), _best(study, sizes)["base_lr"]
    m = best["accuracy"].idxmax()
    shown = rates.map(lambda rate: "none" if math.isnan(rate) else format_base_lr(rate))
    text = f"{study.name}: best base_lr {format_base_lr(best['base_lr'][m])} (m = {m}); {_by_size(shown)}"
    return Finding(not (rates >= best["base_lr"][m]).any(), text)


def _need_base_lrs(study: Study) -> None:
    if study.cells.groupby("batch_size")["base_lr"].nunique().min() < 2:
        raise NotEnoughData(f"{study.name} has batch sizes of one base_lr")


def none_converges(study: Study, sizes: Sizes) -> Finding:
    """No base_lr converges at any of the batch sizes."""
    counts, text = _converging(study, sizes)
    return Finding(not counts.any(), text)


def each_converges(study: Study, sizes: Sizes) -> Finding:
    """Some base_lr converges at each of the batch sizes."""
    counts, text = _converging(study, sizes)
    return Finding(bool(counts.all()), text)


def every_base_lr_converges(study: Study, sizes: Sizes) -> Finding:
    """Each of the batch sizes converges over the full range of base learning rates."""
    _need_base_lrs(study)
    counts, text = _converging(study, sizes)
    asked = study.cells.groupby("batch_size")["base_lr"].nunique()[counts.index]
    return Finding(bool((counts == asked).all()), f"{text}, of {', '.join(map(str, asked))}")


def range_narrows(study: Study) -> Finding:
    """Fewer base learning rates converge as the batch size grows."""
    _need_base_lrs(study)
    counts, text = _converging(study, least=TREND)
    if not counts.any():
        raise NotEnoughData(f"{study.name}: no base_lr converges at any batch size")
    return Finding(bool(counts.iloc[-1] < counts.iloc[0] and not (counts.diff() > WIDENS).any()), text)


def _converging(study: Study, sizes: Sizes = ALL, least: int = 1) -> tuple[pd.Series, str]:
    """Numbers of converging base learning rates by batch size, also in words."""
    ranges = analysis.convergent_range(_ordinary(study.cells), study.chance)
    counts = _pick(ranges.groupby("batch_size")["convergent"].max(), f"{study.name} has", sizes, least)
    return counts, f"{study.name}: converging base_lrs {_by_size(counts)}"


def curves_are_similar(study: Study, base_lr: float, sizes: Sizes) -> Finding:
    """At one base_lr, the training accuracies of the batch sizes lie close together."""
    curves, text = _training_accuracy(study, base_lr, sizes, least=2)
    low, high = float(curves.min()), float(curves.max())
    return Finding(low > 0 and _points(high - low) <= SIMILAR_CURVES, text)


def curves_are_lower(study: Study, base_lr: float, sizes: Sizes, than: Sizes) -> Finding:
    """At one base_lr, the training accuracy of each of the batch sizes is below those of others."""
    (lower, text), (higher, _) = (_training_accuracy(study, base_lr, which) for which in (sizes, than))
    return Finding(bool(lower.max() < higher.min()), f"{text}; lowest of m {than} {_percent(higher.min())}")


def _training_accuracy(study: Study, base_lr: float, sizes: Sizes, least: int = 1) -> tuple[pd.Series, str]:
    """By batch size: the mean over the epochs of a run, 0 if it diverged, then over its seeds; also in words."""
    rows = study.rows[study.rows["base_lr"] == base_lr]
    if not (rows["status"] == "finished").any():
        raise NotEnoughData(f"{study.name} has no finished run at base_lr {format_base_lr(base_lr)}")
    rows = _ordinary(rows)
    accuracy = rows["train_accuracy"].where(rows["status"] == "finished", 0.0)
    runs = accuracy.groupby([rows["batch_size"], rows["seed"]]).mean()
    curves = _pick(runs.groupby("batch_size").mean().round(9), f"{study.name} has", sizes, least)
    shown = _by_size(curves.map(_percent))
    return curves, f"{study.name}, base_lr {format_base_lr(base_lr)}: training accuracy, mean over epochs, {shown}"


def smaller_bn_batch_is_best(study: Study, sizes: Sizes) -> Finding:
    """At each of the batch sizes, the best BN batch is smaller than the batch."""
    share, text = _best_bn(study, sizes, "is below m", "BN batches of m and smaller ones", lambda m, b: b < m)
    return Finding(share == 1, text)


def best_bn_batch_is_at(study: Study, bn_sizes: Sizes, sizes: Sizes, share: float) -> Finding:
    """At this share of the batch sizes or more, the best BN batch size is one of `bn_sizes`."""
    kinds = f"BN batches {bn_sizes} and others"
    found, text = _best_bn(study, sizes, f"is {bn_sizes}", kinds, lambda _, b: b in bn_sizes)
    return Finding(found >= share, text)


def _best_bn(study: Study, sizes: Sizes, asked: str, kinds: str, wanted: Callable[[int, int], bool]) -> tuple[float, str]:
    """The share of the batch sizes, of those with BN batches of both kinds, at which the best is wanted; also in words."""
    best = {}
    for m, cells in _comparable(study.cells).groupby("batch_size"):
        top = cells["accuracy"].max()
        if top > -math.inf and len({wanted(m, b) for b in cells["bn_batch_size"]}) == 2:
            best[m] = cells.loc[cells["accuracy"] == top, "bn_batch_size"].tolist()
    best = _pick(pd.Series(best, dtype=object), f"{study.name} has {kinds} at", sizes)
    answers = [any(wanted(m, b) for b in found) for m, found in best.items()]
    shown = _by_size(best.map(lambda found: " or ".join(map(str, found))))
    text = f"{study.name}: the best BN batch {asked} at {sum(answers)} of {len(answers)} batch sizes ({shown})"
    return sum(answers) / len(answers), text


def accuracy_falls(study: Study) -> Finding:
    """The accuracy, best over the BN batch sizes, falls as the batch size grows."""
    best = _pick(_comparable(study.cells).groupby("batch_size")["accuracy"].max(), f"{study.name} has", least=TREND)
    ranks, order = best.rank(), pd.Series(range(len(best)), best.index)
    trend = round(float(ranks.corr(order)), 9) if ranks.nunique() > 1 else 0.0
    shown = _by_size(best.map(_percent))
    return Finding(trend <= FALLS, f"{study.name}: {shown}, rank correlation {trend:+.2f} (at most {FALLS:+g})")
