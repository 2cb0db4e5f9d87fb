"""Feeds the runs of one program to its lanes: refills, sends segments, records what they found, retires, saves.

The host stays one segment ahead of what it knows: it sends segment k+1, then reads what segment k found. A run that
reaches its last epoch is known to end without reading anything, so its lane is refilled at once; the lane of a run that
diverged in segment k is refilled in k+2, and computes nothing in k+1.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from smallbatch_jax import lanes as lane_programs
from smallbatch_jax.checkpoint import Checkpoints
from smallbatch_jax.data import Dataset, order
from smallbatch_jax.experiment import Experiment, Run
from smallbatch_jax.lanes import DeviceData, LaneProgram, LaneState, Report, Segment
from smallbatch_jax.progress import Progress, Status
from smallbatch_jax.results import ProgramResults, Row, Timings
from smallbatch_jax.train import Model, Program, Setting, TrainState

MOST_LANES = 16
CHECKPOINT_SHARE = 0.02  # of the training time, at most
FIXED_SEGMENT_IMAGES = 16384  # per lane, where a segment's length is compiled in

ModelOf = Callable[[int | None], Model]  # BN batch size, None for the whole batch → model


class Interrupted(Exception):
    """A signal ended the work early; everything is saved and the same command goes on."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """Asks a feeder to save and stop: the number of the signal that came, 0 while none has."""

    signum: int = 0


@dataclass
class Job:
    """One program's part of the experiment: its runs and where they are kept."""

    experiment: Experiment
    dataset: Dataset
    model_of: ModelOf
    batch_size: int
    bn_batch_size: int
    runs: list[Run]
    results: ProgramResults
    statistics_model_of: ModelOf | None = None  # the same model with a decay of 0, where statistics are precise

    @property
    def name(self) -> str:
        return f"m{self.batch_size:05d}_b{self.bn_batch_size:05d}"

    @property
    def num_examples(self) -> int:
        return len(self.dataset.train_labels)

    @property
    def total_steps(self) -> int:
        return order.total_steps(self.experiment.epochs, self.num_examples, self.batch_size)

    def pending(self) -> list[Run]:
        return [run for run in self.runs if not self.results.complete(run, self.experiment.epochs)]

    def count_complete(self, status: Status) -> None:
        """Adds the runs that an earlier process completed."""
        for run in self.runs:
            if self.results.complete(run, self.experiment.epochs):
                status.add_run(self.results.diverged(run))
                status.images -= self.experiment.epochs * self.num_examples

    def compile(self, data: DeviceData, mesh: Mesh) -> LaneProgram:
        chosen = self.experiment
        schedule = chosen.schedule
        program = Program(
            self.batch_size, self.total_steps, schedule.boundaries, schedule.factor, augment=chosen.dataset.augment
        )
        bn_batch_size = None if self.bn_batch_size == self.batch_size else self.bn_batch_size
        model = self.model_of(bn_batch_size)
        wanted = chosen.lanes or min(len(self.runs), MOST_LANES)
        lanes = -(-wanted // mesh.size) * mesh.size
        return lane_programs.compile_lanes(
            model,
            program,
            data,
            mesh,
            lanes,
            self._segment_steps(),
            chosen.precision,
            statistics_model=self.statistics_model_of and self.statistics_model_of(self.bn_batch_size),
        )

    def _segment_steps(self) -> int:
        """The most steps of a segment: an epoch's, or an even part of them where a segment's length is compiled in."""
        longest_epoch = self.num_examples // self.batch_size + 1
        if lane_programs.lane_mapping() == "map":
            return longest_epoch
        parts = -(-longest_epoch * self.batch_size // FIXED_SEGMENT_IMAGES)
        return -(-longest_epoch // parts)

    def settings(self, runs: list[Run | None]) -> Setting:
        """The scalars of the run in each lane, stacked; any valid ones where there is none."""
        return Setting(
            np.array([1.0 if run is None else run.base_lr for run in runs], np.float32),
            np.array([0 if run is None else run.seed for run in runs], np.int32),
            np.full(len(runs), self.experiment.weight_decay, np.float32),
            np.full(len(runs), self.experiment.schedule.warmup_fraction, np.float32),
        )


class Share(NamedTuple):
    """What one lane was sent to do in one segment."""

    run: Run
    epoch: int
    first_step: int
    steps: int
    evaluate: bool


class Flight(NamedTuple):
    """A segment on its way: what was sent, and what comes back."""

    shares: list[Share | None]  # by lane
    report: Report


@dataclass
class Feeder:
    """Trains the pending runs of one program."""

    job: Job
    program: LaneProgram
    initial: Callable[[int], TrainState]
    checkpoints: Checkpoints
    status: Status
    progress: Progress
    timings: Timings
    stop: Stop
    queue: deque[Run] = field(default_factory=deque)
    runs: list[Run | None] = field(default_factory=list)  # by lane
    steps: list[int] = field(default_factory=list)  # by lane: updates sent so far

    def train(self) -> None:
        state = self._begin()
        pace = Pace(self.job, self.program)
        saved, save_seconds = time.monotonic(), 0.0
        flight: Flight | None = None
        while True:
            state = self._refill(state)
            if flight is None and not any(self.runs):
                return
            state, sent = self._send(state, pace.steps)
            if flight is not None:
                self._collect(flight, pace)
            flight = sent
            due = max(self.job.experiment.checkpoint_seconds, save_seconds / CHECKPOINT_SHARE)
            if self.stop.signum or time.monotonic() - saved > due:
                if flight is not None:
                    self._collect(flight, pace)
                    flight = None
                save_seconds = self._save(state)
                saved = time.monotonic()
                pace.restart()
                if self.stop.signum:
                    self.checkpoints.close()
                    raise Interrupted(self.stop.signum)

    def _begin(self) -> LaneState:
        """Lanes as the last checkpoint left them, less the runs that have completed since; the rest is queued."""
        pending = self.job.pending()
        self.runs, self.steps = [None] * self.program.lanes, [0] * self.program.lanes
        state = self.program.empty()
        restored = self.checkpoints.restore(state)
        if restored is not None:
            host = jax.tree.map(lambda x: np.array(x), state)
            kept = [(lane, run) for lane, run in enumerate(restored[1]) if run in pending]
            for (old_lane, run), lane in zip(kept, self._lanes_by_load(), strict=False):
                for new, old in zip(jax.tree.leaves(host), jax.tree.leaves(restored[0]), strict=True):
                    new[lane] = old[old_lane]
                self.runs[lane], self.steps[lane] = run, int(host.train.step[lane])
                self.status.images -= self.steps[lane] * self.job.batch_size
            state = self.program.put(host)
        self.queue = deque(run for run in pending if run not in self.runs)
        return state

    def _lanes_by_load(self) -> Iterator[int]:
        """Free lanes, each time one on the device with the fewest runs; the caller fills it before it asks for more."""
        while free := [lane for lane, run in enumerate(self.runs) if run is None]:
            load = [0] * self.program.sharding.mesh.size
            for lane, run in enumerate(self.runs):
                load[self.program.device_of_lane(lane)] += run is not None
            yield min(free, key=lambda lane: (load[self.program.device_of_lane(lane)], lane))

    def _refill(self, state: LaneState) -> LaneState:
        """Puts queued runs into free lanes."""
        fresh: dict[int, TrainState] = {}
        for lane in self._lanes_by_load():
            if not self.queue:
                break
            run = self.queue.popleft()
            self.runs[lane], self.steps[lane] = run, 0
            fresh[lane] = self.initial(run.seed)
        return self.program.start(state, fresh) if fresh else state

    def _send(self, state: LaneState, pace: int) -> tuple[LaneState, Flight | None]:
        """Starts the next segment, and frees the lanes of the runs that end in it."""
        m, n = self.job.batch_size, self.job.num_examples
        if not any(self.runs):
            return state, None
        lanes = self.program.lanes
        segment = Segment(
            np.zeros((lanes, self.program.segment_steps, m), np.int32), np.zeros(lanes, np.int32), np.zeros(lanes, bool)
        )
        settings = self.job.settings(self.runs)
        shares: list[Share | None] = [None] * lanes
        for lane, run in enumerate(self.runs):
            if run is None:
                continue
            first = self.steps[lane]
            epoch = order.epoch_of_step(first, n, m)
            left = order.epoch_end(epoch, n, m) - first
            steps = min(pace, left)
            segment.indices[lane, :steps] = order.batch_indices(run.seed, first, steps, m, n)
            segment.steps[lane], segment.evaluate[lane] = steps, steps == left
            shares[lane] = Share(run, epoch, first, steps, steps == left)
            self.steps[lane] = first + steps
            if self.steps[lane] == self.job.total_steps:
                self.runs[lane] = None
        state, report = self.program.run(state, settings, segment)
        return state, Flight(shares, report)

    def _collect(self, flight: Flight, pace: "Pace") -> None:
        """Waits for a segment, records what it found and frees the lanes of the runs that diverged in it."""
        report = jax.tree.map(np.asarray, flight.report)
        rows, trained = [], 0
        for lane, share in enumerate(flight.shares):
            if share is None or self.job.results.diverged(share.run):
                continue
            trained += int(report.step[lane]) - share.first_step
            row = self._row(share, Report(*(values[lane] for values in report)))
            if row is None:
                continue
            rows.append(row)
            if row.diverged and self.runs[lane] == share.run:
                self.runs[lane] = None
            if row.diverged or row.epoch == self.job.experiment.epochs:
                self.status.add_run(row.diverged, row.test_accuracy)
            if row.diverged:  # the images it will not see
                self.status.images -= (self.job.total_steps - row.step) * self.job.batch_size
        self.job.results.append(rows)
        seconds = pace.measure(trained)
        m, b = self.job.batch_size, self.job.bn_batch_size
        images = trained * m
        self.timings.add("segment", seconds, m, b, self.program.lanes, trained, images)
        self.status.add_images(images, seconds)
        self.status.running = sum(run is not None for run in self.runs)
        self.progress.show(self.status, f"m = {m}" + (f", BN batch {b}" if b != m else ""))

    def _row(self, share: Share, found: Report) -> Row | None:
        """The row of an epoch that ended, well or by divergence; None while it goes on."""
        if found.alive and not share.evaluate:
            return None
        m, n = self.job.batch_size, self.job.num_examples
        step = int(found.step)
        # A batch whose loss was not finite was seen, though it made no update.
        batches = step - order.epoch_end(share.epoch - 1, n, m) + (not found.alive)
        train_loss = float(found.loss_sum) / batches
        lost = not (found.alive and np.isfinite(found.test_loss))
        train_accuracy = float("nan") if lost else int(found.correct) / (batches * m)
        test_accuracy = float("nan") if lost else int(found.test_correct) / len(self.job.dataset.test_labels)
        run = (share.run.batch_size, share.run.bn_batch_size, share.run.base_lr, share.run.seed)
        return Row(*run, share.epoch, step, train_loss, train_accuracy, float(found.test_loss), test_accuracy)

    def _save(self, state: LaneState) -> float:
        """Saves all lanes, after the rows that they have left behind; seconds it took."""
        began = time.monotonic()
        self.job.results.sync()
        self.checkpoints.save(state, self.runs)
        seconds = time.monotonic() - began
        self.timings.add("checkpoint", seconds, self.job.batch_size, self.job.bn_batch_size, self.program.lanes)
        return seconds


class Pace:
    """Steps per segment, so that a segment takes about the time that the experiment asks for."""

    FIRST_IMAGES = 256  # per lane, in the first segment

    def __init__(self, job: Job, program: LaneProgram):
        self._target, self._most, self._adapts = job.experiment.segment_seconds, program.segment_steps, program.any_length
        self.steps = max(1, min(self._most, self.FIRST_IMAGES // job.batch_size)) if self._adapts else self._most
        self.restart()

    def restart(self) -> None:
        """Begins to count from now: the time since the last measure was not a segment's."""
        self._since = time.monotonic()

    def measure(self, trained: int) -> float:
        """Seconds since the last measure; adapts the pace if anything was trained."""
        seconds = time.monotonic() - self._since
        self.restart()
        if trained and self._adapts:
            factor = min(2.0, max(0.5, self._target / max(seconds, 1e-6)))
            self.steps = max(1, min(self._most, round(self.steps * factor)))
        return seconds
