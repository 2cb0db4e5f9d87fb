"""The policy of a search: decides from the curves of its own rounds alone which runs train next, and how far.

At each batch size, learning rates are bracketed by short runs, and the promising ones continue in successive halving (Jamieson
& Talwalkar 2016). Rungs are epochs, that is examples seen, the same at every batch size. Only full runs compare batch sizes.

High rates gain most when the schedule reduces them. In the grids that the policy was tuned on
(docs/choose_a_batch_size.md), the best rate after one epoch is below the final best at 38 of 57 batch sizes (mostly by one or
two powers of two) and above it at 3. So the score of a rate is the mean of its value and that of the next lower rate, and among
nearly tied rates the highest continues first. About half of the survivors train to the middle of the schedule, where the best
rate so far is within the noise of the final best at all 57.
"""

import math
import statistics
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from smallbatch_jax.config.grid import Run
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.config.protocol import LAST_EPOCHS

Shape = tuple[int, int]  # (batch size, BN batch size)
Cell = tuple[Shape, float]  # shape and base_lr; seeds are its replicates
Curves = Mapping[Run, Sequence[float]]  # the metric after epochs 1, 2, …; the last is NaN if the run diverged

FIRST_RUNG = 16  # a rate is first tried for 1/FIRST_RUNG of a run's epochs
TIED = 0.05  # rates tie with the best if they are within this fraction of the range from worst to best
FULL_RUNS = 2  # minimum budget of a shape, in full runs; with less, fewer shapes are searched


class Round(NamedTuple):
    """Runs of one program that train together up to their goals."""

    shape: Shape
    goals: dict[Run, int]  # epochs that each run trains to; runs of this shape that are not listed are given up


@dataclass(frozen=True)
class Space:
    """The batch sizes, rates and seeds that a search chooses from, and its budget."""

    shapes: tuple[Shape, ...]  # in the order of search, neighbours adjacent
    base_lrs: tuple[float, ...]  # increasing: the lattice of candidate rates
    epochs: int  # of a full run
    seeds: tuple[int, ...]  # the first finds rates, the others are replicates of the leaders
    budget: float  # epochs of training data, over all runs
    fresh: tuple[int, ...] = ()  # further seeds of the recommended cell, trained at the end
    metric: Metric = ACCURACY


def search(space: Space) -> Generator[Round, Curves, None]:
    """Yields the rounds of a search; send it the curves of each round to get the next.

    The rounds of a shape follow each other until its halving ends; its later rounds start new runs only. A run that a round of
    its shape leaves out never returns with a higher goal. The same curves give the same rounds.

    The epochs trained exceed the budget only so that at least one run finishes, and by less than `space.epochs`. A diverged run
    is charged its whole last epoch.
    """
    state = _Search(space, space.budget - min(len(space.fresh), space.budget // (4 * space.epochs)) * space.epochs)
    yield from state.find()
    yield from state.replicate()
    yield from state.use_up()
    state.budget = space.budget
    yield from state.confirm()


def final_values(space: Space, curves: Curves) -> dict[Cell, list[float]]:
    """Returns the final metric of each cell's runs: the median of the last min(5, E) epochs, negated if a low one is best.

    Runs that were given up are left out; a diverged one has −inf.
    """
    found: dict[Cell, list[float]] = {}
    for run, curve in curves.items():
        if curve and (len(curve) == space.epochs or math.isnan(curve[-1])):
            cell = (run.batch_size, run.bn_batch_size), run.base_lr
            value = space.metric.gain(statistics.median(curve[-LAST_EPOCHS:]), 0.0)
            found.setdefault(cell, []).append(-math.inf if math.isnan(curve[-1]) else value)
    return found


def best_cells(space: Space, curves: Curves) -> dict[Shape, tuple[float, float]]:
    """Returns (base_lr, mean of `final_values`) of the best cell of each shape that has a finished one, best shape first.

    A cell with a diverged seed is not a candidate. Ties go to the smallest batch size, BN batch size and base learning rate.
    """
    means = {cell: statistics.fmean(values) for cell, values in final_values(space, curves).items()}
    best: dict[Shape, tuple[float, float]] = {}
    for (shape, base_lr), mean in sorted(means.items(), key=lambda item: (-item[1], item[0])):
        if mean > -math.inf:
            best.setdefault(shape, (base_lr, mean))
    return best


def recommended(space: Space, curves: Curves) -> Cell | None:
    """Returns the best cell among those with the most seeds, as `study.recommendation` does; None until one has finished."""
    values = {cell: found for cell, found in final_values(space, curves).items() if min(found) > -math.inf}
    most = max(map(len, values.values()), default=0)
    means = {cell: statistics.fmean(found) for cell, found in values.items() if len(found) == most}
    return min(means, key=lambda cell: (-means[cell], cell), default=None)


@dataclass
class _Search:
    """State of a search: the curves so far and the budget."""

    space: Space
    budget: float
    curves: dict[Run, Sequence[float]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.budget - sum(map(len, self.curves.values()))

    @property
    def rungs(self) -> list[int]:
        """Epochs at which runs of a shape are compared."""
        epochs = self.space.epochs
        return sorted({max(1, epochs // FIRST_RUNG), (epochs + 1) // 2, epochs})

    def run(self, shape: Shape, index: int, seed: int | None = None) -> Run:
        return Run(*shape, self.space.base_lrs[index], self.space.seeds[0] if seed is None else seed)

    def live(self, run: Run) -> bool:
        return not math.isnan(self.curves.get(run, (math.nan,))[-1])

    def best(self, shape: Shape) -> int | None:
        """Returns the index of a shape's best rate by full runs; None until one has finished."""
        best = best_cells(self.space, self.curves)
        return self.space.base_lrs.index(best[shape][0]) if shape in best else None

    def train(self, shape: Shape, runs: Iterable[Run], goal: int) -> Generator[Round, Curves, None]:
        """Trains runs, the most promising first, as far as the budget allows; at least one until a run has finished."""
        left, goals, alone = self.left, {}, not best_cells(self.space, self.curves)
        for run in runs:
            reached = len(self.curves.get(run, ()))
            if goal - reached <= left or (alone and not goals and (left > 0 or reached)):
                goals[run] = goal
                left -= goal - reached
        if any(goal > len(self.curves.get(run, ())) for run in goals):
            curves = yield Round(shape, goals)
            self.curves |= {run: curves[run] for run in goals}

    def find(self) -> Generator[Round, Curves, None]:
        """Searches the shapes in order; a short budget covers every n-th shape, then those nearest to the best."""
        shapes, least = self.space.shapes, FULL_RUNS * self.space.epochs
        all_shapes = least * len(shapes)
        replicates = max(0.0, min(self.budget / 2, self.budget - all_shapes)) if len(self.space.seeds) > 1 else 0.0
        stride = math.ceil(len(shapes) / max(1, self.budget // least))
        order = list(shapes[(len(shapes) - 1) % stride // 2 :: stride])
        rest = [shape for shape in shapes if shape not in order]
        while order and (self.left >= self.space.epochs or not best_cells(self.space, self.curves)):
            shape = order.pop(0)
            yield from self.halve(shape, (self.left - replicates) / (len(order) + 1))
            if not order:
                top = shapes.index(next(iter(best_cells(self.space, self.curves)), shape))
                rest.sort(key=lambda shape: abs(shapes.index(shape) - top))
                fit = int(max(0.0, self.left - replicates) // least)
                order, rest = rest[:fit], rest[fit:]

    def halve(self, shape: Shape, allowance: float) -> Generator[Round, Curves, None]:
        """Brackets the rates of a shape and halves them rung by rung; tries lower rates while every survivor diverges."""
        floor, epochs = self.left - allowance, self.space.epochs
        live = yield from self.bracket(shape, floor)
        for k in range(1, len(self.rungs)):
            keep = self.ranked(shape, live)[: self.affordable(k, self.left - floor)]
            yield from self.train(shape, [self.run(shape, i) for i in keep], self.rungs[k])
            live = [i for i in keep if self.live(self.run(shape, i)) and len(self.curves[self.run(shape, i)]) == self.rungs[k]]
        tried = [i for i in range(len(self.space.base_lrs)) if self.run(shape, i) in self.curves]
        while self.best(shape) is None and self.left - floor >= epochs and tried and tried[0] > 0:
            tried.insert(0, tried[0] - 1)
            yield from self.train(shape, [self.run(shape, tried[0])], epochs)

    def bracket(self, shape: Shape, floor: float) -> Generator[Round, Curves, list[int]]:
        """Tries rates at the first rung, evenly spaced and then finer around the best; returns the indices of live rates."""
        low, high = self.expected(shape)
        most, stride = self.affordable(0, self.left - floor), 1
        while (high - low) // stride > most // 2:
            stride *= 2
        tried: list[int] = []
        new = list(range(low + (high - low) % stride // 2, high + 1, stride))
        live: list[int] = []
        while new:
            yield from self.train(shape, [self.run(shape, i) for i in live + new], self.rungs[0])
            trained = [i for i in new if self.run(shape, i) in self.curves]
            if not trained:
                break
            tried += trained
            live = [i for i in tried if self.live(self.run(shape, i))]
            room = self.affordable(0, self.left - floor + len(live) * self.rungs[0]) - len(live)
            new, stride = self.further(shape, tried, live, stride)
            new = new[: max(0, room)]
        return live

    def further(self, shape: Shape, tried: list[int], live: list[int], stride: int) -> tuple[list[int], int]:
        """Returns the rates to try next at the first rung, and their stride; no rates once the best has both neighbours."""
        if not live:  # all diverged
            return [max(0, min(tried) - stride)] if min(tried) else [], 2 * stride
        promise = self.promise(shape, live)
        best = max(promise, key=lambda i: (promise[i], -i))
        while True:
            beside = [best + stride, best - stride]
            new = [i for i in beside if 0 <= i < len(self.space.base_lrs) and i not in tried]
            if new or stride == 1:
                return new, stride
            stride //= 2

    def expected(self, shape: Shape) -> tuple[int, int]:
        """Returns the lowest and the highest index at which the best rate of a shape is expected.

        From the nearest known batch size, the best rate is expected to keep η̃, to keep η = η̃·m, or to lie between. The next
        higher rate is included, since the first rung favours low rates.
        """
        base_lrs, best = self.space.base_lrs, best_cells(self.space, self.curves)
        if not best:
            return 0, len(base_lrs) - 1
        near = min(best, key=lambda other: (abs(math.log(other[0] / shape[0])), other))
        ends = sorted((best[near][0], best[near][0] * near[0] / shape[0]))
        low, high = (min(range(len(base_lrs)), key=lambda i: abs(math.log(base_lrs[i] / end))) for end in ends)
        return low, min(high + 1, len(base_lrs) - 1)

    def promise(self, shape: Shape, live: Iterable[int]) -> dict[int, float]:
        """Returns for each rate the mean of its best value so far and that of the next lower live rate."""
        sign = self.space.metric.gain(1.0, 0.0)
        order = sorted(live)
        best = {i: max(sign * value for value in self.curves[self.run(shape, i)]) for i in order}
        return {i: (best[i] + best[lower]) / 2 for lower, i in zip(order[:1] + order, order, strict=False)}

    def ranked(self, shape: Shape, live: Iterable[int]) -> list[int]:
        """Returns the indices of live rates, the most promising first; rates that tie with the best, highest first."""
        promise = self.promise(shape, live)
        top, least = max(promise.values(), default=0.0), min(promise.values(), default=0.0)
        return sorted(promise, key=lambda i: (-min(promise[i], top - TIED * (top - least)), -i))

    def affordable(self, rung: int, epochs: float) -> int:
        """Returns how many runs can continue to a rung, half of them to the next, and so on; at least one."""
        steps = [end - start for start, end in zip([0, *self.rungs], self.rungs, strict=False)][rung:]
        counts = range(1, len(self.space.base_lrs) + 1)
        fit = [n for n in counts if sum(max(1, n >> k) * step for k, step in enumerate(steps)) <= epochs]
        return max(fit, default=1)

    def replicate(self) -> Generator[Round, Curves, None]:
        """Trains further seeds of the leaders.

        Leaders are the shapes' best cells within two standard errors of the best one; the r-th gets about 1/r of its seeds.
        """
        while self.left >= self.space.epochs:
            values = final_values(self.space, self.curves)
            variance, leader, waiting = _pooled_variance(values.values()), [], []
            for rank, (shape, (base_lr, mean)) in enumerate(best_cells(self.space, self.curves).items(), 1):
                own = values[shape, base_lr]
                leader = leader or own
                error = math.sqrt(variance * (1 / len(own) + 1 / len(leader)))
                new = [run for seed in self.space.seeds if (run := Run(*shape, base_lr, seed)) not in self.curves]
                if new and statistics.fmean(leader) - mean <= 2 * error:
                    waiting.append((len(own) * rank, rank, shape, new[: len(own)]))
            if not waiting:
                return
            _, _, shape, new = min(waiting)
            yield from self.train(shape, new, self.space.epochs)

    def use_up(self) -> Generator[Round, Curves, None]:
        """Trains the grid's other runs while the budget lasts, starting with rates closest to the best of their shape."""
        while self.left >= self.space.epochs:
            best = best_cells(self.space, self.curves)
            ranks = list(dict.fromkeys([*best, *self.space.shapes]))
            waiting: dict[tuple[int, int], list[Run]] = {}
            for rank, shape in enumerate(ranks):
                centre = self.best(shape) or 0
                for i in range(len(self.space.base_lrs)):
                    runs = [self.run(shape, i, seed) for seed in self.space.seeds]
                    waiting.setdefault((abs(i - centre), rank), []).extend(run for run in runs if run not in self.curves)
            key = min((key for key, runs in waiting.items() if runs), default=None)
            if key is None:
                return
            yield from self.train(ranks[key[1]], waiting[key], self.space.epochs)

    def confirm(self) -> Generator[Round, Curves, None]:
        """Trains the fresh seeds of the recommended cell."""
        cell = recommended(self.space, self.curves)
        if cell is not None:
            shape, base_lr = cell
            yield from self.train(shape, [Run(*shape, base_lr, seed) for seed in self.space.fresh], self.space.epochs)


def _pooled_variance(values: Iterable[Sequence[float]]) -> float:
    """Returns the pooled variance of values within cells; inf if no cell has two."""
    several = [cell for cell in values if len(cell) > 1 and min(cell) > -math.inf]
    freedom = sum(len(cell) - 1 for cell in several)
    return sum(statistics.variance(cell) * (len(cell) - 1) for cell in several) / freedom if several else math.inf
