"""Verdicts and their margins in standard errors.

A margin is a difference of accuracies over its standard error (`study.noise`), positive where a check holds. One that is
smaller than `TELLS` in size decides nothing. The errors of two cells are treated as independent; the cells share a test set, so
with one or two seeds the margin is somewhat too small. Each side of a comparison is the best of several cells and so too
optimistic; this is ignored, because both sides are similarly optimistic.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

VERDICTS = HOLDS, FAILS, OPEN, LACKS = "holds", "does not hold", "cannot tell", "lacks data"
TELLS = 2.0  # least margin that decides, in standard errors


class Finding(NamedTuple):
    """The result of a check: an entry of VERDICTS, the numbers in words, and the margin in standard errors.

    The margin is NaN where runs were counted: a run converges or it does not.
    """

    verdict: str
    text: str
    margin: float = math.nan

    @property
    def shown(self) -> str:
        """The verdict with its margin, such as "holds, +3.1 standard errors"."""
        if math.isnan(self.margin):
            return f"{self.verdict}, by count" if self.verdict in (HOLDS, FAILS) else self.verdict
        margin = math.trunc(self.margin * 10) / 10 if math.isfinite(self.margin) else self.margin  # 1.96 shows as 1.9, not 2.0
        edge = ", but an edge of the grid may reverse it" if self.verdict == OPEN and abs(self.margin) >= TELLS else ""
        return f"{self.verdict}, {margin:+.1f} standard errors{edge}"


class Side(NamedTuple):
    """One side of a comparison; an accuracy at an edge of the grid is only a lower bound of the best."""

    accuracy: float
    error: float
    edge: bool = False
    text: str = ""


def ratio(gain: float, error: float) -> float:
    """Returns gain / error, with the gain rounded so that float errors in means over seeds are not decisive if error is 0."""
    gain = round(float(gain), 9)
    return gain / float(error) if gain and error else math.copysign(math.inf, gain) if gain else 0.0


def measured(text: str, margin: float, wins: bool = False, loses: bool = False) -> Finding:
    """Returns the finding of a margin; `wins`, `loses`: whether the side for, or against, the claim is only a lower bound."""
    told = HOLDS if margin >= TELLS and not loses else FAILS if margin <= -TELLS and not wins else OPEN
    return Finding(told, text, margin)


def compared(text: str, wins: Side, loses: Side, tolerance: float = 0.0) -> Finding:
    """Returns whether one side is above another, or below it by no more than a tolerance."""
    error = math.hypot(wins.error, loses.error)
    return measured(text, ratio(wins.accuracy - loses.accuracy + tolerance, error), wins.edge, loses.edge)


def alike(text: str, one: Side, other: Side, tolerance: float) -> Finding:
    """Returns whether two sides are within a tolerance of each other: equivalence, which noise alone cannot show."""
    gap, edge = abs(one.accuracy - other.accuracy), one.edge or other.edge
    return measured(text, ratio(tolerance - gap, math.hypot(one.error, other.error)), edge, edge)


def at_share(margins: Iterable[float], share: float = 1.0) -> float:
    """Returns the margin of a statement about at least this share of the batch sizes.

    With n sizes and k = ⌈share·n⌉ it is the k-th largest margin z, shrunk towards 0 for the number of ways in which chance
    alone produces it: p = (n − k + 1)·Φ(−z), or k·Φ(z) if z < 0 (partial conjunction, Benjamini & Heller 2008, Eq. 4).
    """
    ordered = sorted(margins, reverse=True)
    k = max(1, math.ceil(share * len(ordered)))
    margin = math.nan if any(map(math.isnan, ordered)) else ordered[k - 1]
    chance = NormalDist().cdf(-abs(margin)) * (len(ordered) - k + 1 if margin > 0 else k)
    if chance < 1e-300:
        return margin
    return 0.0 if chance >= 0.5 else math.copysign(NormalDist().inv_cdf(chance), margin)


def counted(holds: bool, text: str) -> Finding:
    """Returns the finding of a number of runs, which has no standard error."""
    return Finding(HOLDS if holds else FAILS, text)
