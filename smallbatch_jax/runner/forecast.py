"""How long the rest of a grid will take, from what its programs have done so far."""

import bisect
import math
from collections.abc import Sequence

from smallbatch_jax.runner import planning
from smallbatch_jax.runner.jobs import Job
from smallbatch_jax.runner.progress import Progress, Status


class Forecast:
    """A `Progress` that adds the expected time of the programs to come, and passes on to another.

    They are expected to train at the rates of the programs so far, interpolated between batch sizes; a base learning rate that
    diverged at a smaller batch size is expected to diverge at once.
    """

    def __init__(self, progress: Progress, jobs: Sequence[Job]):
        """`jobs` are all programs of the grid."""
        self._progress, self._jobs = progress, jobs
        self._rates: dict[int, float] = {}  # images/s by batch size

    def begin(self, job: Job, later: Sequence[Job]) -> None:
        """A program begins to train, and `later` are to come; the runs of all others change no more meanwhile."""
        self._job = job
        self._diverged = [(other.batch_size, _lowest_diverged(other)) for other in self._jobs if other is not job]
        self._later = [(other, sorted(run.base_lr for run in other.pending())) for other in later]

    def show(self, status: Status, doing: str) -> None:
        program = status.program
        if program is not None and program.trained:
            self._rates[self._job.batch_size] = program.rate
        stored = [{"batch_size": m, "images_per_second": rate} for m, rate in self._rates.items()]
        diverged = [*self._diverged, (self._job.batch_size, _lowest_diverged(self._job))]
        status.later_seconds = 0.0
        for job, base_lrs in self._later:
            lowest = min((base_lr for m, base_lr in diverged if m <= job.batch_size), default=math.inf)
            runs = bisect.bisect_left(base_lrs, lowest)
            status.later_seconds += planning.elsewhere(job.batch_size, runs, job.experiment.epochs * job.num_examples, stored)
        self._progress.show(status, doing)

    def close(self, status: Status) -> None:
        self._progress.close(status)


def _lowest_diverged(job: Job) -> float:
    """Returns the lowest base learning rate of a program that diverged."""
    return min((run.base_lr for run in job.runs if job.results.diverged(run)), default=math.inf)
