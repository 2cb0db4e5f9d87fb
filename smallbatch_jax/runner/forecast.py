"""How long the rest of a grid will take, from what its programs have done so far."""

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from smallbatch_jax.runner import planning
from smallbatch_jax.runner.jobs import Job
from smallbatch_jax.runner.progress import Progress, Status
from smallbatch_jax.store.timings import TIMING_COLUMNS


class Forecast:
    """A `Progress` that says how long the programs to come will take, and hands on to another.

    They are expected to train at the rates measured so far, here and in earlier sessions of the workdir, between whose batch
    sizes the planner interpolates; and a base learning rate that diverged at a smaller batch size to diverge at once.
    """

    def __init__(self, progress: Progress, jobs: Sequence[Job], timings: Iterable[Sequence[Any]]):
        """`jobs` are all programs of the grid; `timings` those of `timings.timing_rows`."""
        self._progress, self._jobs = progress, jobs
        images: Counter[int] = Counter()
        seconds: defaultdict[int, float] = defaultdict(float)
        for row in timings:
            values = dict(zip(TIMING_COLUMNS, row, strict=True))
            if values["phase"] == "segment":
                images[values["batch_size"]] += values["images"]
                seconds[values["batch_size"]] += values["seconds"]
        self._rates = {m: count / seconds[m] for m, count in images.items() if count and seconds[m]}

    def begin(self, job: Job, later: Sequence[Job]) -> None:
        """A program begins to train, after which these are to come; of all others' runs nothing changes meanwhile."""
        self._job = job
        self._lost = [(other.batch_size, _least_lost(other)) for other in self._jobs if other is not job]
        self._later = [(other, sorted(run.base_lr for run in other.pending())) for other in later]

    def show(self, status: Status, doing: str) -> None:
        part = status.program
        if part is not None and part.trained:
            self._rates[self._job.batch_size] = part.rate
        stored = [{"batch_size": m, "images_per_second": rate} for m, rate in self._rates.items()]
        lost = [*self._lost, (self._job.batch_size, _least_lost(self._job))]
        status.later_seconds = sum(_seconds(job, rates, lost, stored) for job, rates in self._later)
        self._progress.show(status, doing)

    def close(self, status: Status) -> None:
        self._progress.close(status)


def _seconds(job: Job, base_lrs: list[float], lost: list[tuple[int, float]], stored: list[dict[str, float]]) -> float:
    """Of a program whose runs to come have these rates, ascending; NaN while no speed is known."""
    least = min((base_lr for batch_size, base_lr in lost if batch_size <= job.batch_size), default=math.inf)
    runs = bisect.bisect_left(base_lrs, least)
    return planning.elsewhere(job.batch_size, runs, job.experiment.epochs * job.num_examples, stored)


def _least_lost(job: Job) -> float:
    """The least base learning rate of a program that diverged."""
    return min((run.base_lr for run in job.runs if job.results.diverged(run)), default=math.inf)
