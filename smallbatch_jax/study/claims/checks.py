"""Checks that claims are made of: each takes the studies that a claim is about and returns a Finding.

A smaller grid or data set is judged like the paper's own.
"""

import itertools
import math

import numpy as np
import pandas as pd

from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.study import analysis
from smallbatch_jax.study.claims import tables
from smallbatch_jax.study.claims.margins import OPEN, TELLS, Finding, Side, alike, at_share, compared, counted, measured, ratio
from smallbatch_jax.study.claims.tables import ALL, NotEnoughData, Sizes, by_size, listed, points, show
from smallbatch_jax.study.noise import Noise, noise_of
from smallbatch_jax.study.study import Study

# The paper says "similar", "good", "a wide range", never how much; these are our readings, in accuracy unless said otherwise.
SIMILAR = 0.02  # §3.3 "similar generalization performance", §3.4 "quite good results"
SIMILAR_CURVES = 0.05  # §3.3 "similar convergence": training accuracy, averaged over the epochs
AS_STATED = 0.03  # §3.2 "76%", which another framework, initialisation and seed reached
MOST = 0.5  # §3.3 "a wide range of batch sizes", §3.6 "appears to": fraction of the batch sizes
WIDENS = 1  # §4 "progressively reduces the range": tolerated rise in base learning rates, of which the grid has few
TREND = 3  # least number of batch sizes for a trend


def best_is_at(study: Study, sizes: Sizes, than: Sizes | None = None, tolerance: float = 0.0) -> Finding:
    """The best at some batch sizes is above that at others (all others by default), or below it by no more than a tolerance."""
    inside, outside = tables.side(study, sizes), tables.side(study, ~sizes if than is None else than)
    tried = study.cells["batch_size"].unique()
    others = "the others" if than is None else f"m {than.tried(tried)}"
    allowed = f" ({100 * tolerance:g} points allowed)" if tolerance else ""
    text = f"{study.name}: m {sizes.tried(tried)} reach {inside.text}; {others} {outside.text}{allowed}"
    return compared(text, inside, outside, tolerance)


def falls_off_more(steep: Study, flat: Study, batch_size: int) -> Finding:
    """At one batch size, `steep` is further below the best of its other batch sizes than `flat` is."""
    at = Sizes(batch_size, batch_size)
    (own, best), (flat_own, flat_best) = ((tables.side(study, at), tables.side(study, ~at)) for study in (steep, flat))
    loss, flat_loss = best.accuracy - own.accuracy, flat_best.accuracy - flat_own.accuracy
    margin = ratio(loss - flat_loss, math.hypot(own.error, best.error, flat_own.error, flat_best.error))
    text = f"{steep.name} {points(-loss)}, {flat.name} {points(-flat_loss)}, at m = {batch_size} from the best of the others"
    return measured(text, margin, best.edge or flat_own.edge, own.edge or flat_best.edge)


def has_accuracy(study: Study, accuracy: float, tolerance: float, images: int, epochs: int) -> Finding:
    """The best accuracy is within a tolerance of the paper's, after training on at least as many images and epochs."""
    if (study.examples or (images,))[0] < images or study.experiment.epochs < epochs:
        raise NotEnoughData(f"{study.name}: the paper's {100 * accuracy:g} % is of {images:,} images and {epochs} epochs")
    found = tables.side(study)
    text = f"{study.name}: best {found.text}, the paper's {100 * accuracy:g} % ({100 * tolerance:g} points allowed)"
    return alike(text, found, Side(accuracy, 0.0), tolerance)


def are_similar(study: Study, other: Study) -> Finding:
    """The best accuracies of two studies are close."""
    one, two = tables.side(study), tables.side(other)
    return alike(f"{study.name}: {one.text}; {other.name}: {two.text} ({100 * SIMILAR:g} points allowed)", one, two, SIMILAR)


def is_better(study: Study, than: Study) -> Finding:
    """One study is better than another at most batch sizes."""
    own, other = tables.shared((study, than), [tables.ordinary(some.cells) for some in (study, than)], least=2)
    better = int((own["accuracy"] > other["accuracy"]).sum())
    text = f"{study.name} is better than {than.name} at {better} of {len(own)} batch sizes"
    return measured(text + tables.edges(own, other), at_share(tables.margins_of(own, other), MOST))


def improves_on(study: Study, before: Study) -> Finding:
    """One study is better than another on average over the batch sizes at which both finished."""
    gain, *bounds = _gain(study, before, ALL)
    return measured(f"{study.name} over {before.name}: {gain.text}", ratio(gain.accuracy, gain.error), *bounds)


def gains_more(long: Study, short: Study, sizes: Sizes, than: Sizes) -> Finding:
    """Longer training gains more at some batch sizes than at others."""
    (large, over, under), (small, small_over, small_under) = (_gain(long, short, some) for some in (sizes, than))
    margin = ratio(large.accuracy - small.accuracy, math.hypot(large.error, small.error))
    text = f"from {short.name} to {long.name}, m {sizes} gain {large.text}; m {than} {small.text}"
    return measured(text, margin, over or small_under, under or small_over)


def _gain(study: Study, before: Study, sizes: Sizes) -> tuple[Side, bool, bool]:
    """Returns the mean gain over the batch sizes that both finished, and whether each study has lower bounds there."""
    own, other = tables.shared_finished(study, before, sizes)
    gain = float((own["accuracy"] - other["accuracy"]).mean())
    error = math.sqrt((own["error"] ** 2 + other["error"] ** 2).sum()) / len(own)
    text = f"{points(gain, error)} on average at m = {listed(own.index)}{tables.edges(own, other)}"
    return Side(gain, error, text=text), any(own["bound"]), any(other["bound"])


def best_base_lr_is_out_of_reach(study: Study, sizes: Sizes) -> Finding:
    """At each of the batch sizes, base learning rates below that of the study's best cell are better than it and those above.

    The uncertainty of that base_lr itself is ignored.
    """
    _need_base_lrs(study)
    top, best = tables.side(study), tables.best_by_size(study)
    rate, bound = (best[name].iloc[best["accuracy"].argmax()] for name in ("base_lr", "bound"))
    cells = tables.ordinary(study.cells)
    below, reached = (tables.best_of(study, cells[of], sizes) for of in (cells["base_lr"] < rate, cells["base_lr"] >= rate))
    margins = tables.margins_of(below, reached)
    who = f"{study.name} has base_lrs on both sides of {format_base_lr(rate)} that finished at"
    rates = tables.pick(best["base_lr"][margins.index], who, sizes).map(format_base_lr)
    text = f"{study.name}: best {top.text}; best base_lr {by_size(rates)}"
    return measured(text, at_share(margins), bound, bound)


def _need_base_lrs(study: Study) -> None:
    if study.cells.groupby("batch_size")["base_lr"].nunique().min() < 2:
        raise NotEnoughData(f"{study.name} has batch sizes of one base_lr")


def none_converges(study: Study, sizes: Sizes) -> Finding:
    """No base_lr converges at any of the batch sizes."""
    ranges, text = _converging(study, sizes)
    return counted(not ranges["convergent"].any(), text)


def each_converges(study: Study, sizes: Sizes) -> Finding:
    """Some base_lr converges at each of the batch sizes."""
    ranges, text = _converging(study, sizes)
    return counted(bool(ranges["convergent"].all()), text)


def every_base_lr_converges(study: Study, sizes: Sizes) -> Finding:
    """Each of the batch sizes converges over the full range of base learning rates."""
    _need_base_lrs(study)
    ranges, text = _converging(study, sizes)
    asked = study.cells.groupby("batch_size")["base_lr"].nunique()[ranges.index]
    return counted(bool((ranges["convergent"] == asked).all()), f"{text}, of {listed(asked)}")


def range_narrows(study: Study) -> Finding:
    """Fewer base learning rates converge as the batch size grows."""
    _need_base_lrs(study)
    ranges, text = _converging(study, least=TREND)
    counts = ranges["convergent"]
    if not counts.any():
        raise NotEnoughData(f"{study.name}: no base_lr converges at any batch size")
    narrows = bool(counts.iloc[-1] < counts.iloc[0] and not (counts.diff() > WIDENS).any())
    if not narrows and ranges["highest_base_lr"].iloc[0] == study.cells["base_lr"].max():
        return Finding(OPEN, f"{text}; those of m = {counts.index[0]} reach the largest tried")
    return counted(narrows, text)


def _converging(study: Study, sizes: Sizes = ALL, least: int = 1) -> tuple[pd.DataFrame, str]:
    """Returns by batch size how many base_lrs converge and the highest, and a text; within noise of chance none converges."""
    cells = tables.ordinary(study.cells)
    noise = TELLS * noise_of(study).error(cells)
    cells = cells.assign(test_accuracy=cells["test_accuracy"].where(cells["test_accuracy"] - noise > study.chance))
    ranges = analysis.convergent_range(cells, study.chance).groupby("batch_size")[["convergent", "highest_base_lr"]].max()
    ranges = tables.pick(ranges, f"{study.name} has", sizes, least)
    return ranges, f"{study.name}: converging base_lrs {by_size(ranges['convergent'])}"


def curves_are_similar(study: Study, base_lr: float, sizes: Sizes) -> Finding:
    """At one base_lr, the training accuracies of the batch sizes lie close together."""
    curves, text = _training_accuracy(study, base_lr, sizes, least=2)
    if not min(curves).accuracy:
        return counted(False, text)
    margins = (alike("", one, other, SIMILAR_CURVES).margin for one, other in itertools.combinations(curves, 2))
    return measured(f"{text} ({100 * SIMILAR_CURVES:g} points allowed)", at_share(margins))


def curves_are_lower(study: Study, base_lr: float, sizes: Sizes, than: Sizes) -> Finding:
    """At one base_lr, the training accuracy of each of the batch sizes is below those of others."""
    (lower, text), (higher, _) = (_training_accuracy(study, base_lr, which) for which in (sizes, than))
    margins = (compared("", high, low).margin for high, low in itertools.product(higher, lower))
    return measured(f"{text}; lowest of m {than} {show(min(higher).accuracy)}", at_share(margins))


def _training_accuracy(study: Study, base_lr: float, sizes: Sizes, least: int = 1) -> tuple[list[Side], str]:
    """Returns accuracy and error by batch size, the mean over a run's epochs (0 if it diverged), then over seeds; and a text.

    The error of the mean over epochs is taken to be that of one epoch, as examples that are hard in one are hard in all.
    """
    rows = study.rows[study.rows["base_lr"] == base_lr]
    if not (rows["status"] == "finished").any():
        raise NotEnoughData(f"{study.name} has no finished run at base_lr {format_base_lr(base_lr)}")
    rows = tables.ordinary(rows)
    accuracy = rows["train_accuracy"].where(rows["status"] == "finished", 0.0)
    runs = accuracy.groupby([rows["batch_size"], rows["seed"]]).mean().groupby("batch_size")
    table = pd.DataFrame({"train_accuracy": runs.mean(), "train_accuracy_std": runs.std(), "finished": runs.size()})
    table = tables.pick(table, f"{study.name} has", sizes, least)
    errors = Noise(Metric("train_accuracy"), study.examples[0] if study.examples else None, math.nan).error(table)
    shown = by_size(table["train_accuracy"].map(show))
    text = f"{study.name}, base_lr {format_base_lr(base_lr)}: training accuracy, mean over epochs, {shown}"
    return list(map(Side, table["train_accuracy"], errors)), text


def best_bn_batch_is(study: Study, sizes: Sizes, share: float = 1.0, bn_sizes: Sizes | None = None) -> Finding:
    """For at least this share of the batch sizes m, the best BN batch is one of `bn_sizes` or, if None, smaller than m."""
    cells, b = study.cells, study.cells["bn_batch_size"]
    wanted = b.map(bn_sizes.__contains__) if bn_sizes else b < cells["batch_size"]
    which = str(bn_sizes or "below m")
    inside, outside = (tables.best_of(study, cells[kind], sizes) for kind in (wanted, ~wanted))
    margins = tables.margins_of(inside, outside)
    best = tables.best_of(study, cells)["bn_batch_size"][margins.index]
    best = tables.pick(best, f"{study.name} has BN batches {which} and others at", sizes)
    found = f"{(margins >= 0).sum()} of {len(best)}"
    text = f"{study.name}: the best BN batch is {which} at {found} batch sizes ({by_size(best)})"
    return measured(text, at_share(margins, share))


def accuracy_falls(study: Study, sizes: Sizes = ALL) -> Finding:
    """The accuracy, best over the BN batch sizes, falls as the batch size grows.

    The test is on the slope of a line over log2 m, with its error from those of the cells: steps between neighbours are
    smaller than the noise, and the line pools them. It is unweighted, since errors hardly differ and both ends matter.
    """
    best = tables.best_by_size(study, sizes, TREND, study.cells)
    x = np.log2(best.index.to_numpy(float))
    leverage = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope, error = float(leverage @ best["accuracy"]), float(np.sqrt(leverage**2 @ best["error"] ** 2))
    small, large = (bool(best["bound"][side].any()) for side in (leverage < 0, leverage > 0))
    shown = by_size(best["accuracy"].map(show))
    text = f"{study.name}: {shown}, {points(slope, error)} a doubling{tables.edges(best)}"
    return measured(text, ratio(-slope, error), small, large)
