"""The training order: an endless stream of per-epoch permutations of the examples, cut into batches.

Step k takes positions k·m … k·m+m-1 of the stream, so nothing is dropped and a batch may straddle two epochs; where batches
grow, each phase starts where the previous one stopped (`BatchSchedule`). The stream is a function of (seed, epoch) alone: every
base learning rate and batch size sees the examples in the same order. The host draws it, so it is the same on every device and
for streamed images.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from smallbatch_jax.config.experiment import Experiment
from smallbatch_jax.config.fields import exact_fraction


def epoch_end(epoch: int, num_examples: int, batch_size: int) -> int:
    """Returns the number of updates before the end of an epoch (1…E): floor(epoch·N/m + 1/2) exactly; 0 for epoch 0."""
    return (2 * epoch * num_examples + batch_size) // (2 * batch_size)


def total_steps(epochs: int, num_examples: int, batch_size: int) -> int:
    """Returns the number of updates in a run of E epochs over N examples: round(E·N/m), constant work for every m (§3.1)."""
    return epoch_end(epochs, num_examples, batch_size)


@functools.lru_cache(maxsize=64)
def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of the examples in an epoch (from 0) of the stream: int32[N], read-only.

    Philox is keyed with (seed, epoch), so no epoch's order needs the ones before it. The lanes of a sweep mostly
    share seeds and epochs, hence the cache.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    permutation = generator.permutation(num_examples).astype(np.int32)
    permutation.flags.writeable = False
    return permutation


def stream(seed: int, position: int, count: int, num_examples: int) -> np.ndarray:
    """Returns the examples at positions position … position+count-1 of the stream: int32[count]."""
    epochs = range(position // num_examples, -(-(position + count) // num_examples))
    orders = [epoch_permutation(seed, epoch, num_examples) for epoch in epochs] or [np.empty(0, np.int32)]
    skipped = position % num_examples
    return np.concatenate(orders)[skipped : skipped + count]


class Phase(NamedTuple):
    """Consecutive updates of a run with one batch size."""

    step: int  # first update
    position: int  # position of its first example in the stream
    batch_size: int


@dataclass(frozen=True)
class BatchSchedule:
    """Batches of a run: m examples each, multiplied by `growth` at each boundary of the learning rate's schedule.

    A boundary is the fraction f of training at which the learning rate is reduced. Let p be the examples before a phase, m its
    batch size, and R = round((E·N - p)/m) the updates left if m stayed fixed. The boundary is the first update with at least
    f·(p + R·m) examples before it: without growth, the first update k ≥ f·T. A boundary does not enlarge the batch if less
    than half a larger batch is left to train, so that the run has E·N examples to within half of its last batch.
    """

    num_examples: int  # N
    batch_size: int  # m, before it grows
    epochs: int = 1  # E
    boundaries: tuple[float, ...] = ()
    growth: int = 1

    @classmethod
    def of(cls, experiment: Experiment, num_examples: int, batch_size: int) -> "BatchSchedule":
        """Returns the schedule of the experiment's runs that begin with this batch size."""
        schedule = experiment.schedule
        return cls(num_examples, batch_size, experiment.epochs, schedule.boundaries, schedule.batch_growth)

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Phases that have an update, in order."""
        return self._phases_and_boundaries[0]

    @property
    def total_steps(self) -> int:
        """Number of updates in the whole run."""
        return self.epoch_end(self.epochs)

    @property
    def schedule_steps(self) -> int:
        """T of the learning rate's schedule: updates in the run if batches did not grow, so that warm-up counts examples."""
        return total_steps(self.epochs, self.num_examples, self.batch_size)

    @property
    def schedule_boundaries(self) -> tuple[float | Fraction, ...]:
        """The boundaries as fractions of `schedule_steps`, exact where batches grow."""
        if self.growth == 1:
            return self.boundaries
        return tuple(Fraction(step, self.schedule_steps) for step in self._phases_and_boundaries[1])

    def examples(self, step: int) -> int:
        """Returns the number of examples in the updates before `step`."""
        phase = self.phase_of_step(step)
        return phase.position + (step - phase.step) * phase.batch_size

    def epoch_end(self, epoch: int) -> int:
        """Returns the number of updates, from 0, after which the number of examples is nearest to epoch·N; halves round up."""
        examples = epoch * self.num_examples
        phase = [phase for phase in self.phases if phase.position <= examples][-1]
        return phase.step + epoch_end(1, examples - phase.position, phase.batch_size)

    def epoch_of_step(self, step: int) -> int:
        """Returns the epoch (1…) that update `step` (from 0) belongs to: the first one that ends after that update."""
        # The rounding of epoch ends to whole steps moves it from examples/N by at most one.
        epoch = max(1, self.examples(step) // self.num_examples)
        while self.epoch_end(epoch) <= step:
            epoch += 1
        return epoch

    def phase_of_step(self, step: int) -> Phase:
        """Returns the phase that update `step` (from 0) belongs to."""
        return [phase for phase in self.phases if phase.step <= step][-1]

    @functools.cached_property
    def _phases_and_boundaries(self) -> tuple[tuple[Phase, ...], tuple[int, ...]]:
        """Returns the phases, and the update from which each boundary reduces the learning rate."""
        phases, boundaries, whole = [Phase(0, 0, self.batch_size)], [], self.epochs * self.num_examples
        for fraction in sorted(self.boundaries) if self.growth > 1 else ():
            step, position, m = phases[-1]
            rest = total_steps(1, whole - position, m)
            taken = max(0, math.ceil((exact_fraction(fraction) * (position + rest * m) - position) / m))
            boundaries.append(step + taken)
            grown = Phase(step + taken, position + taken * m, m * self.growth)
            if total_steps(1, whole - grown.position, grown.batch_size) > 0:
                phases = [phase for phase in phases if phase.step < grown.step] + [grown]
        return tuple(phases), tuple(boundaries)
