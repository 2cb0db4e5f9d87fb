"""Predicts the cost of a grid before it runs, and the time left while it runs.

Each program is compiled as in training and timed for a few seconds on its own runs. The probe also finds the base learning
rates that diverge at once and excludes the time of their runs; a run that diverges later makes the plan an overestimate.
"""

import bisect
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from smallbatch_jax.program.lanes import LaneProgram
from smallbatch_jax.program.train import TrainState
from smallbatch_jax.runner.input import InputPipeline, input_pipeline
from smallbatch_jax.runner.jobs import Job, Setup
from smallbatch_jax.runner.progress import Progress, Status
from smallbatch_jax.runner.segments import Lanes

WARM_UP_IMAGES = 512  # per lane in the first segment, which is not timed
PROBE_SECONDS = 1.0  # training time per probe when fitting a time budget
EVALUATED_BATCHES = 4  # number of batches of a streamed test set to time
COMPILING_BESIDE = {"cpu": 1.75}  # slow-down of compilation by concurrent training, measured on 2 cores; elsewhere none


class Trial:
    """The first runs of a job, trained in memory only to measure their speed."""

    def __init__(self, job: Job, program: LaneProgram, pipeline: InputPipeline, initial: Callable[[int], TrainState]):
        """Fills the lanes of the job's compiled program; `initial` maps a seed to the state before the first update."""
        self.job, self.program, self._pipeline = job, program, pipeline
        self._lanes = Lanes(job, program, pipeline, initial)
        first = {run.base_lr: run for run in reversed(job.runs)}
        # One run of each base learning rate comes first.
        self._lanes.refill(deque(sorted(job.runs, key=lambda run: first[run.base_lr] is not run)))
        self.runs = list(self._lanes.runs)
        self.alive = np.array([run is not None for run in self.runs])
        self._seconds_per_step = 0.0

    def train(self, seconds: float) -> tuple[int, float]:
        """Trains for about `seconds`, or until all runs have ended; returns the images trained and the seconds taken."""
        trained, spent = 0, 0.0
        while spent < seconds:
            steps = round((seconds - spent) / max(self._seconds_per_step, 1e-9))
            images, elapsed = self._segment(max(1, steps))
            if not elapsed:
                break
            trained, spent = trained + images, spent + elapsed
        return trained, spent

    def warm_up(self) -> tuple[int, float]:
        """Trains the first segment; returns the images trained and the seconds taken."""
        return self._segment(max(1, WARM_UP_IMAGES // self.job.batch_size))

    def evaluate(self) -> float:
        """Returns the seconds to evaluate all lanes a second time; a streamed test set is extrapolated from a few batches."""
        self._time_evaluation(True)
        masked = 0.0 if self.program.any_length else self._time_evaluation(False)[0]  # seconds of a segment without steps
        seconds, scale = self._time_evaluation(True)
        return max(0.0, seconds - masked) * scale

    def _time_evaluation(self, evaluate: bool) -> tuple[float, float]:
        """Runs a segment without steps; returns its seconds and the factor that scales them to the whole test set."""
        settings = self.job.settings(self.runs)
        load = self._pipeline.prepare(self.program, self.job.batch_size, [None] * self.program.lanes)
        segment = load.segment._replace(evaluate=np.full(self.program.lanes, evaluate))
        few = itertools.islice(load.test, EVALUATED_BATCHES)
        began = time.monotonic()
        self._lanes.state, report = self.program.run(self._lanes.state, settings, segment, load.pool, few)
        jax.block_until_ready(report)
        return time.monotonic() - began, max(1.0, load.test_batches / EVALUATED_BATCHES)

    def diverged(self) -> set[float]:
        """Returns the base learning rates whose run has diverged."""
        return {run.base_lr for run, lives in zip(self.runs, self.alive, strict=True) if run and not lives}

    def _segment(self, pace: int) -> tuple[int, float]:
        """Trains about `pace` steps per lane; returns the images trained and the seconds, 0 if all runs have ended."""
        most = self.program.segment_steps
        pace = min(pace, most) if self.program.any_length else most
        began = time.monotonic()  # loading a streamed segment's images is part of its time
        flight = self._lanes.send(pace, evaluate=False)
        if flight is None:
            return 0, 0.0
        report = flight.fetch()
        seconds = time.monotonic() - began
        self._seconds_per_step = seconds / pace
        sent = [(i, lane) for i, lane in enumerate(flight.lanes) if lane]
        for i, lane in sent:
            if not report.alive[i]:
                self.alive[i] = False
                self._lanes.free(i, lane.run)
        return sum(int(report.step[i]) - lane.first_step for i, lane in sent) * self.job.batch_size, seconds


def measure(setup: Setup) -> Iterator[Trial]:
    """Compiles each program of a setup and yields its trial; any dataset of the same shape will do. Stores nothing."""
    initial = setup.initialiser()
    with closing(input_pipeline(setup.dataset, setup.experiment)) as pipeline:
        for shape in setup.programs:
            job = Job(setup, *shape)
            yield Trial(job, job.compile(pipeline), pipeline, initial)


@dataclass(frozen=True)
class ProgramPlan:
    """Cost of one program, extrapolated from a few seconds of it."""

    flops: float  # over all runs, if none diverges
    diverging: int  # runs expected to end at once
    compile_seconds: float
    images_per_second: float  # training rate of all lanes; NaN if no image was trained
    evaluation_seconds: float  # per run, for the whole test set
    seconds: float  # training and evaluation
    peak_bytes: int  # over all devices, from the compiled program, without the dataset


def plan_program(trial: Trial, flops_per_image: float, seconds: float) -> ProgramPlan:
    """Returns a plan extrapolated from a warm-up segment, about `seconds` of timed training and one evaluation."""
    first, later = trial.warm_up(), trial.train(seconds)
    trained, spent = later if later[0] else first  # all runs may end in the first segment
    rate = trained / spent if trained else math.nan
    evaluation = trial.evaluate() / max(1, trial.alive.sum())
    job, program, diverged = trial.job, trial.program, trial.diverged()
    diverging = sum(run.base_lr in diverged for run in job.runs)
    surviving, images = len(job.runs) - diverging, job.batches.examples(job.total_steps)
    return ProgramPlan(
        flops=flops_per_image * images * len(job.runs),
        diverging=diverging,
        compile_seconds=program.compile_seconds,
        images_per_second=rate,
        evaluation_seconds=evaluation,
        seconds=surviving * (images / rate + job.experiment.epochs * evaluation) if surviving else 0.0,
        peak_bytes=program.peak_bytes,
    )


def total_seconds(plans: Sequence[ProgramPlan]) -> float:
    """Returns the seconds of all programs in the order of training, each compiled while the previous one trains."""
    slowdown = COMPILING_BESIDE.get(jax.default_backend(), 1.0)
    compiling = [slowdown * plan.compile_seconds for plan in plans]
    hidden = zip(plans, [*compiling[1:], 0.0], strict=False)
    return sum(compiling[:1]) + sum(max(plan.seconds, following) for plan, following in hidden)


def examples_in(seconds: float, setup: Setup) -> float:
    """Returns how many examples a search can train on in `seconds`, spread evenly over the grid's batch sizes.

    The rate is measured at the smallest and the largest batch size and interpolated; compile time is not included.
    """
    experiment, sizes = setup.experiment, setup.experiment.grid.batch_sizes
    ends = replace(experiment, grid=replace(experiment.grid, batch_sizes=tuple(sorted({min(sizes), max(sizes)}))))
    rates = []
    for trial in measure(Setup(ends, setup.dataset, setup.model_of, setup.own)):
        plan = plan_program(trial, 0.0, PROBE_SECONDS)
        each = 1 / plan.images_per_second + plan.evaluation_seconds / setup.dataset.num_train
        rates.append({"batch_size": trial.job.batch_size, "images_per_second": 1 / each})
    return seconds / statistics.mean(elsewhere(m, 1, 1, rates) for m in sizes)


def elsewhere(batch_size: int, runs: int, images: int, stored: Sequence[Mapping[str, Any]], devices: int = 1) -> float:
    """Returns the seconds that a program's runs would train on `images` each, spread over devices of another kind.

    `stored` has the results of `benchmark.py --json` on one such device, for the same model. The rate is interpolated between
    the two nearest batch sizes on logarithmic axes; NaN if there are no results.
    """
    rates = {int(row["batch_size"]): float(row["images_per_second"]) for row in stored}
    if not rates:
        return math.nan
    sizes, known = zip(*sorted(rates.items()), strict=True)
    rate = 2.0 ** np.interp(math.log2(batch_size), np.log2(sizes), np.log2(known))
    return -(-runs // devices) * images / float(rate)


class Forecast:
    """Display that passes a status on to a `Progress` with the expected time of later programs.

    Later programs are expected to train at the rates of those so far, interpolated between batch sizes; a base learning rate
    that diverged at a smaller batch size is expected to diverge at once.
    """

    def __init__(self, progress: Progress, jobs: Sequence[Job]):
        """`jobs` are all programs of the grid."""
        self._progress, self._jobs = progress, jobs
        self._rates: dict[int, float] = {}  # images/s by batch size
        self._later: list[tuple[Job, list[float]]] = []

    def begin(self, job: Job, later: Sequence[Job]) -> None:
        """Records that `job` begins to train, and the jobs that follow it."""
        self._job = job
        self._later = [(other, sorted(run.base_lr for run in other.pending())) for other in later]

    def show(self, status: Status, doing: str) -> None:
        if status.program is not None and status.program.trained:
            self._rates[self._job.batch_size] = status.program.rate
        stored = [{"batch_size": m, "images_per_second": rate} for m, rate in self._rates.items()]
        diverged = [(job.batch_size, run.base_lr) for job in self._jobs for run in job.runs if job.results.diverged(run)]
        status.later_seconds = 0.0
        for job, base_lrs in self._later:
            lowest = min((base_lr for m, base_lr in diverged if m <= job.batch_size), default=math.inf)
            runs = bisect.bisect_left(base_lrs, lowest)
            status.later_seconds += elsewhere(job.batch_size, runs, job.experiment.epochs * job.num_examples, stored)
        if not self._later and status.program is not None and status.images_per_second:  # the rest of a search's budget
            now = status.program.images - status.program.trained
            status.later_seconds = max(0, status.images - status.trained - now) / status.images_per_second
        self._progress.show(status, doing)
