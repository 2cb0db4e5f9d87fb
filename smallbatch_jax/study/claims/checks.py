"""Checks that claims are made of: each takes the studies that a claim is about and returns a Finding.

A smaller grid or data set is judged like the paper's own. The accuracy of a batch size is that of its best cell; where
batch sizes tie for the best, the claim has the benefit.
"""

# Without pandas-stubs, pyright takes the keys of a Series for any Hashable.
# pyright: reportReturnType=false

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from smallbatch_jax.config.text import format_base_lr, percent, plural
from smallbatch_jax.study import analysis
from smallbatch_jax.study.study import Study

T = TypeVar("T")

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


def _by_size(values: Mapping[int, Any]) -> str:
    return f"{', '.join(map(str, values.values()))} at m = {', '.join(map(str, values))}"


def _points(difference: float) -> float:
    """A difference of accuracies in points, without the rounding that would decide at the edge of a tolerance."""
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


def _pick(values: Mapping[int, T], who: str, sizes: Sizes = ALL, least: int = 1) -> dict[int, T]:
    """The values at those batch sizes, ascending; `who` ("fig01 has") begins the sentence if they are too few."""
    found = {m: values[m] for m in sorted(values) if m in sizes}
    if len(found) < least:
        words = f"{who} {plural(len(found), 'batch size') if found else 'no batch size'} {sizes}".rstrip()
        raise NotEnoughData(f"{words}, {least} are needed" if least > 1 else words)
    return found


class Best(NamedTuple):
    """The most accurate cell of a batch size."""

    batch_size: int
    accuracy: float  # −inf where no run finished: a batch size that diverges is below all others, not missing
    base_lr: float  # NaN there

    @property
    def finished(self) -> bool:
        return self.accuracy > -math.inf

    def __str__(self) -> str:
        if not self.finished:
            return f"nothing (every run at m = {self.batch_size} diverged)"
        return f"{_percent(self.accuracy)} at m = {self.batch_size} (base_lr {format_base_lr(self.base_lr)})"


def _best(study: Study, sizes: Sizes = ALL, least: int = 1) -> dict[int, Best]:
    """The best cell by batch size."""
    table = analysis.best_first(analysis.best_cells(_ordinary(study.cells)))
    if table["test_accuracy"].isna().all():
        raise NotEnoughData(f"no run of {study.name} with BN over the whole batch finished")
    best: dict[int, Best] = {}
    for m, accuracy, base_lr in zip(table["batch_size"], table["test_accuracy"], table["base_lr"], strict=True):
        best.setdefault(m, Best(m, _comparable(accuracy), base_lr))
    return _pick(best, f"{study.name} has", sizes, least)


def _ordinary(frame: pd.DataFrame) -> pd.DataFrame:
    """Cells or rows whose BN batch is the whole batch, at every batch size that has such."""
    own = frame["bn_batch_size"] == frame["batch_size"]
    return frame[own | ~own.groupby(frame["batch_size"]).transform("any")]


def _comparable(accuracy: float) -> float:
    """Without the rounding of a mean over seeds, which would decide between equals; −inf for NaN."""
    return -math.inf if math.isnan(accuracy) else round(accuracy, 9)


def _top(best: Mapping[int, Best]) -> Best:
    """Of equals, the one of the smallest batch size."""
    return max(best.values(), key=lambda cell: cell.accuracy)


def _shared(*studies: Study, least: int = 1) -> list[dict[int, Best]]:
    """The best cells of each study at the batch sizes that all have."""
    tables = [_best(study) for study in studies]
    shared = {m for m in tables[0] if all(m in table for table in tables)}
    return [_pick({m: table[m] for m in shared}, f"{_names(studies)} share", least=least) for table in tables]


def _finished(*studies: Study) -> list[dict[int, Best]]:
    """The best cells of each study at the batch sizes at which all finished a run."""
    tables = _shared(*studies)
    done = {m for m in tables[0] if all(table[m].finished for table in tables)}
    return [_pick({m: table[m] for m in done}, f"{_names(studies)} share finished runs at") for table in tables]


def _names(studies: Iterable[Study]) -> str:
    return " and ".join(study.name for study in studies)


def best_is_at(study: Study, sizes: Sizes) -> Finding:
    """The best accuracy is at one of the batch sizes."""
    inside, others = _top(_best(study, sizes)), _top(_best(study, ~sizes))
    text = f"{study.name}: m {sizes} reach {inside}; the others {others}"
    return Finding(inside.accuracy >= others.accuracy, text)


def is_near_best(study: Study, batch_size: int, tolerance: float) -> Finding:
    """One batch size is within `tolerance` points of the best."""
    loss, text = _loss(study, batch_size)
    best = _top(_best(study))
    return Finding(
        loss <= tolerance, f"{study.name}: m = {batch_size} loses {text} ({tolerance:g} allowed) to the best, {best}"
    )


def falls_off_more(steep: Study, flat: Study, batch_size: int) -> Finding:
    """From the best to `batch_size`, one study loses more than the other."""
    (loss, text), (flat_loss, flat_text) = _loss(steep, batch_size), _loss(flat, batch_size)
    losses = f"{steep.name} loses {text}, {flat.name} {flat_text}"
    return Finding(loss > flat_loss, f"from the best to m = {batch_size}, {losses}")


def _loss(study: Study, batch_size: int) -> tuple[float, str]:
    """By how many points a batch size is below the best, also in words."""
    best = _best(study, least=2)
    if batch_size not in best:
        raise NotEnoughData(f"{study.name} has no batch size {batch_size}")
    loss = _points(_top(best).accuracy - best[batch_size].accuracy)
    return loss, "everything" if loss == math.inf else f"{loss:.2f} points"


def has_accuracy(study: Study, accuracy: float, tolerance: float) -> Finding:
    """The best accuracy is the paper's, within `tolerance` points."""
    best = _top(_best(study))
    text = f"{study.name}: best {best}, the paper's {100 * accuracy:g} % ({tolerance:g} points allowed)"
    return Finding(abs(_points(best.accuracy - accuracy)) <= tolerance, text)


def are_similar(study: Study, other: Study) -> Finding:
    """The best accuracies of two studies are close."""
    best, second = _top(_best(study)), _top(_best(other))
    text = f"{study.name}: best {best}; {other.name}: best {second} ({SIMILAR:g} points allowed)"
    return Finding(abs(_points(best.accuracy - second.accuracy)) <= SIMILAR, text)


def is_better(study: Study, than: Study) -> Finding:
    """One study is better than another at most batch sizes."""
    ours, theirs = _shared(study, than, least=2)
    better = [m for m in ours if ours[m].accuracy > theirs[m].accuracy]
    text = f"{study.name} is better than {than.name} at {len(better)} of {len(ours)} batch sizes"
    return Finding(len(better) >= MOST * len(ours), text)


def improves_on(study: Study, before: Study) -> Finding:
    """One study is at least as good as another at most batch sizes, and better on average."""
    ours, theirs = _shared(study, before, least=2)
    kept = [m for m in ours if ours[m].accuracy >= theirs[m].accuracy]
    gain = mean(_gains(study, before).values())
    text = f"{study.name} is at least as good as {before.name} at {len(kept)} of {len(ours)} batch sizes"
    return Finding(len(kept) >= MOST * len(ours) and gain > 0, f"{text}, {gain:+.2f} points on average where both finished")


def _gains(study: Study, before: Study) -> dict[int, float]:
    """By batch size how many points one study is above another, where both finished a run."""
    ours, theirs = _finished(study, before)
    return {m: _points(ours[m].accuracy - theirs[m].accuracy) for m in ours}


def best_base_lr_is_out_of_reach(study: Study, sizes: Sizes) -> Finding:
    """The best base_lr of each of the batch sizes is below that of the study's best cell."""
    _need_base_lrs(study)
    best, found = _top(_best(study)), _best(study, sizes)
    rates = {m: format_base_lr(cell.base_lr) if cell.finished else "none" for m, cell in found.items()}
    text = f"{study.name}: best base_lr {format_base_lr(best.base_lr)} (m = {best.batch_size}); {_by_size(rates)}"
    return Finding(not any(cell.base_lr >= best.base_lr for cell in found.values()), text)


def _need_base_lrs(study: Study) -> None:
    if study.cells.groupby("batch_size")["base_lr"].nunique().min() < 2:
        raise NotEnoughData(f"{study.name} has batch sizes of one base_lr")


def none_converges(study: Study, sizes: Sizes) -> Finding:
    """No base_lr converges at any of the batch sizes."""
    counts = _converging(study, sizes)
    return Finding(not any(counts.values()), _format_converging(study, counts))


def each_converges(study: Study, sizes: Sizes) -> Finding:
    """Some base_lr converges at each of the batch sizes."""
    counts = _converging(study, sizes)
    return Finding(all(counts.values()), _format_converging(study, counts))


def every_base_lr_converges(study: Study, sizes: Sizes) -> Finding:
    """Each of the batch sizes converges over the full range of base learning rates."""
    _need_base_lrs(study)
    counts = _converging(study, sizes)
    asked = study.cells.groupby("batch_size")["base_lr"].nunique()
    text = f"{_format_converging(study, counts)}, of {', '.join(str(asked[m]) for m in counts)}"
    return Finding(all(counts[m] == asked[m] for m in counts), text)


def range_narrows(study: Study) -> Finding:
    """Fewer base learning rates converge as the batch size grows."""
    _need_base_lrs(study)
    counts = _converging(study, least=TREND)
    rates = list(counts.values())
    if not any(rates):
        raise NotEnoughData(f"{study.name}: no base_lr converges at any batch size")
    widens = any(after - before > WIDENS for before, after in itertools.pairwise(rates))
    return Finding(rates[-1] < rates[0] and not widens, _format_converging(study, counts))


def _converging(study: Study, sizes: Sizes = ALL, least: int = 1) -> dict[int, int]:
    """Numbers of converging base learning rates by batch size."""
    ranges = analysis.convergent_range(_ordinary(study.cells), study.chance)
    counts = ranges.groupby("batch_size")["convergent"].max().to_dict()
    return _pick(counts, f"{study.name} has", sizes, least)


def _format_converging(study: Study, counts: Mapping[int, int]) -> str:
    return f"{study.name}: converging base_lrs {_by_size(counts)}"


def curves_are_similar(study: Study, base_lr: float, sizes: Sizes) -> Finding:
    """At one base_lr, the training accuracies of the batch sizes lie close together."""
    curves = _training_accuracy(study, base_lr, sizes, least=2)
    low, high = min(curves.values()), max(curves.values())
    return Finding(low > 0 and _points(high - low) <= SIMILAR_CURVES, _format_training(study, base_lr, curves))


def curves_are_lower(study: Study, base_lr: float, sizes: Sizes, than: Sizes) -> Finding:
    """At one base_lr, the training accuracy of each of the batch sizes is below those of others."""
    lower, higher = (_training_accuracy(study, base_lr, which) for which in (sizes, than))
    lowest = min(higher.values())
    text = f"{_format_training(study, base_lr, lower)}; lowest of m {than} {_percent(lowest)}"
    return Finding(max(lower.values()) < lowest, text)


def _training_accuracy(study: Study, base_lr: float, sizes: Sizes, least: int = 1) -> dict[int, float]:
    """By batch size: the mean over the epochs of a run, 0 if it diverged, then over its seeds."""
    rows = study.rows[study.rows["base_lr"] == base_lr]
    if not (rows["status"] == "finished").any():
        raise NotEnoughData(f"{study.name} has no finished run at base_lr {format_base_lr(base_lr)}")
    rows = _ordinary(rows)
    accuracy = rows["train_accuracy"].where(rows["status"] == "finished", 0.0)
    runs = accuracy.groupby([rows["batch_size"], rows["seed"]]).mean()
    curves = {m: round(accuracy, 9) for m, accuracy in runs.groupby("batch_size").mean().items()}
    return _pick(curves, f"{study.name} has", sizes, least)


def _format_training(study: Study, base_lr: float, curves: Mapping[int, float]) -> str:
    shown = {m: _percent(accuracy) for m, accuracy in curves.items()}
    return f"{study.name}, base_lr {format_base_lr(base_lr)}: training accuracy, mean over epochs, {_by_size(shown)}"


def smaller_bn_batch_is_best(study: Study, sizes: Sizes) -> Finding:
    """At each of the batch sizes, the best BN batch is smaller than the batch."""
    curves = {m: curve for m, curve in _bn_curves(study).items() if _best_bn(curve) and m in curve and min(curve) < m}
    curves = _pick(curves, f"{study.name} has BN batches of m and smaller ones at", sizes)
    smaller = [min(_best_bn(curve)) < m for m, curve in curves.items()]
    return Finding(all(smaller), _format_bn(study, curves, "is below m", smaller))


def best_bn_batch_is_at(study: Study, bn_sizes: Sizes, sizes: Sizes, share: float) -> Finding:
    """At this share of the batch sizes or more, the best BN batch size is one of `bn_sizes`."""
    curves = {m: c for m, c in _bn_curves(study).items() if _best_bn(c) and len({b in bn_sizes for b in c}) == 2}
    curves = _pick(curves, f"{study.name} has BN batches {bn_sizes} and others at", sizes)
    inside = [any(b in bn_sizes for b in _best_bn(curve)) for curve in curves.values()]
    return Finding(sum(inside) >= share * len(inside), _format_bn(study, curves, f"is {bn_sizes}", inside))


def accuracy_falls(study: Study) -> Finding:
    """The accuracy, best over the BN batch sizes, falls as the batch size grows."""
    best = _pick({m: max(curve.values()) for m, curve in _bn_curves(study).items()}, f"{study.name} has", least=TREND)
    ranks = pd.Series(best).rank()
    trend = float(ranks.corr(pd.Series(list(best), list(best)).rank())) if ranks.nunique() > 1 else 0.0
    shown = _by_size({m: _percent(accuracy) for m, accuracy in best.items()})
    return Finding(round(trend, 9) <= FALLS, f"{study.name}: {shown}, rank correlation {trend:+.2f} (at most {FALLS:+g})")


def _bn_curves(study: Study) -> dict[int, dict[int, float]]:
    """By batch size the accuracy by BN batch size, −inf where no run finished."""
    curves: dict[int, dict[int, float]] = {}
    table = analysis.best_cells(study.cells)
    for m, b, accuracy in zip(table["batch_size"], table["bn_batch_size"], table["test_accuracy"], strict=True):
        curves.setdefault(m, {})[b] = _comparable(accuracy)
    return curves


def _best_bn(curve: Mapping[int, float]) -> list[int]:
    """The BN batch sizes of the best accuracy, none if no run finished."""
    best = max(curve.values())
    return [b for b, accuracy in curve.items() if accuracy == best > -math.inf]


def _format_bn(study: Study, curves: Mapping[int, Mapping[int, float]], asked: str, answers: list[bool]) -> str:
    best = {m: " or ".join(map(str, _best_bn(curve))) for m, curve in curves.items()}
    found = f"at {sum(answers)} of {len(answers)} batch sizes ({_by_size(best)})"
    return f"{study.name}: the best BN batch {asked} {found}"


def longer_is_better(short: Study, medium: Study, long: Study) -> Finding:
    """The accuracy, averaged over the batch sizes, rises with the training length."""
    studies = (short, medium, long)
    means = [mean(cell.accuracy for cell in table.values()) for table in _finished(*studies)]
    shown = ", ".join(f"{_percent(value)} ({study.name})" for value, study in zip(means, studies, strict=True))
    return Finding(means[0] < means[1] < means[2], f"mean over the batch sizes {shown}")


def gains_more(long: Study, short: Study, sizes: Sizes, than: Sizes) -> Finding:
    """Longer training gains more at some batch sizes than at others."""
    gains = _gains(long, short)
    who = f"{_names((long, short))} share finished runs at"
    large, small = (mean(_pick(gains, who, some).values()) for some in (sizes, than))
    text = f"from {short.name} to {long.name}, m {sizes} gain {large:+.2f} points on average, m {than} {small:+.2f}"
    return Finding(large > small, text)


def stays_behind(study: Study, sizes: Sizes, others: Sizes) -> Finding:
    """The best of some batch sizes is below that of others."""
    behind, ahead = _top(_best(study, sizes)), _top(_best(study, others))
    text = f"{study.name}: m {sizes} reach {behind}; m {others} {ahead}"
    return Finding(behind.accuracy < ahead.accuracy, text)
