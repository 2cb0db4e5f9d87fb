"""How long the rest of a grid will take, from what its programs have done so far."""

from collections.abc import Sequence

import pandas as pd

from smallbatch_jax import planning
from smallbatch_jax.jobs import Job
from smallbatch_jax.progress import Progress, Status


class Forecast:
    """A `Progress` that says how long the programs to come will take, and hands on to another.

    They are expected to train at the rates measured so far, here and in earlier sessions of the workdir, between whose batch
    sizes the planner interpolates; and a base learning rate that diverged at a smaller batch size to diverge at once.
    """

    def __init__(self, progress: Progress, jobs: Sequence[Job], timings: pd.DataFrame):
        """`jobs` are all programs of the grid; `timings` those of `results.load_timings`."""
        self._progress, self._jobs, self.later = progress, jobs, list(jobs)
        segments = timings[(timings["phase"] == "segment") & (timings["images"] > 0)]
        totals = segments.groupby("batch_size")[["images", "seconds"]].sum()
        rates = totals["images"] / totals["seconds"]
        self._rates = {int(m): float(rate) for m, rate in zip(rates.index, rates, strict=True)}

    def begin(self, job: Job, later: Sequence[Job]) -> None:
        """A program begins to train, after which these are to come."""
        self._job, self.later = job, list(later)

    def show(self, status: Status, doing: str) -> None:
        part = status.program
        if part is not None and part.trained:
            self._rates[self._job.batch_size] = part.rate
        status.later_seconds = sum(self._seconds(job) for job in self.later)
        self._progress.show(status, doing)

    def close(self, status: Status) -> None:
        self._progress.close(status)

    def _seconds(self, job: Job) -> float:
        """Of one program, NaN while no rate is known."""
        stored = [{"batch_size": m, "images_per_second": rate} for m, rate in self._rates.items()]
        lost = self._lost(job.batch_size)
        runs = sum(run.base_lr < lost for run in job.pending())
        return planning.elsewhere(job.batch_size, runs, job.experiment.epochs * job.num_examples, stored)

    def _lost(self, batch_size: int) -> float:
        """The least base learning rate that diverged at a smaller batch size, or at this one."""
        earlier = [job for job in self._jobs if job.batch_size <= batch_size]
        return min((run.base_lr for job in earlier for run in job.runs if job.results.diverged(run)), default=float("inf"))
