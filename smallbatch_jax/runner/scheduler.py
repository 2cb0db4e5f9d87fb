"""Feeds the runs of one program to its lanes: refills, sends segments, records what they found, retires, saves.

The host stays one segment ahead of what it knows: it sends segment k+1, then reads what segment k found. A run that
reaches its last epoch is known to end without reading anything, so its lane is refilled at once; the lane of a run that
diverged in segment k is refilled in k+2, and computes nothing in k+1.

With several processes each has a feeder, and all do the same: what a clock or a signal says travels with each segment, and is
acted on when that is read.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.data import order
from smallbatch_jax.data.streaming.prefetch import WorkerDied
from smallbatch_jax.program import processes
from smallbatch_jax.program.lanes import LaneProgram, LaneState, Report
from smallbatch_jax.program.train import TrainState
from smallbatch_jax.runner.input import InputPipeline, LaneSteps
from smallbatch_jax.runner.jobs import Job
from smallbatch_jax.runner.progress import ProgramPart, Progress, Status
from smallbatch_jax.runner.signals import Interrupted, Stop
from smallbatch_jax.store.checkpoint import Checkpoints
from smallbatch_jax.store.results import Row
from smallbatch_jax.store.timings import Timings
from smallbatch_jax.tracking.trackers import Trackers

CHECKPOINT_SHARE = 0.02  # of the training time, at most
FIRST_SAVE_SECONDS = 0.3  # what a checkpoint is taken to cost before one was made


class Share(NamedTuple):
    """What one lane was sent to do in one segment."""

    run: Run
    epoch: int
    first_step: int
    steps: int
    evaluate: bool


class Word(NamedTuple):
    """What a process would do next, as far as it knows."""

    signum: int  # of the signal that came, else 0
    save: int  # 1 if a checkpoint is due
    steps: int  # of the next segment


class Flight(NamedTuple):
    """A segment on its way: what was sent, and what comes back."""

    shares: list[Share | None]  # by lane
    report: Report
    words: Any  # of each process as it was sent, int32[processes, 3]


@dataclass
class Scheduler:
    """Trains the pending runs of one program."""

    job: Job
    program: LaneProgram
    supply: InputPipeline
    initial: Callable[[int], TrainState]
    checkpoints: Checkpoints
    status: Status
    progress: Progress
    timings: Timings
    stop: Stop
    mirrors: Trackers
    recompile: Callable[[int], Future[LaneProgram]] | None = None  # the same program with fewer lanes
    queue: deque[Run] = field(default_factory=deque)
    runs: list[Run | None] = field(default_factory=list)  # by lane
    steps: list[int] = field(default_factory=list)  # by lane: updates sent so far
    smaller: Future[LaneProgram] | None = None  # on its way

    def train(self) -> None:
        state = self._begin()
        pace = Pace(self.job, self.program)
        budget = Budget(self.job.experiment.checkpoint_seconds)
        flight: Flight | None = None
        agreed = Word(0, 0, pace.steps)  # nothing yet: what one process knows by now the others may not
        while True:
            state = self._refill(state)
            if flight is None and not any(self.runs):
                return
            fitting = self._fitting(pace)
            if fitting is not None:
                if flight is not None:
                    self._collect(flight, pace)
                    flight = None
                state = self._pack(fitting, self._read(state), self.runs)
                pace.restart()
            try:
                state, sent = self._send(state, agreed.steps, self._word(budget, pace))
            except (InputError, WorkerDied):  # in an image; what was trained so far is the more worth keeping
                if flight is not None:
                    self._collect(flight, pace)
                self._save_before_failing(state)
                raise
            if flight is not None:
                self._collect(flight, pace)
                agreed = self._agreed(flight, self._word(budget, pace))
            flight = sent
            if agreed.signum or agreed.save:
                if flight is not None:
                    self._collect(flight, pace)
                    flight = None
                budget.spend(self._save(state))
                pace.restart()
                if agreed.signum:
                    self.checkpoints.close()
                    processes.leave_together()
                    raise Interrupted(agreed.signum)
                agreed = agreed._replace(save=0)

    def _word(self, budget: "Budget", pace: "Pace") -> Word:
        return Word(self.stop.signum, budget.due(), pace.steps)

    def _agreed(self, flight: Flight, now: Word) -> Word:
        """What is to be done: what this process says now if it is alone, else what all said as the segment was sent."""
        if not processes.several():
            return now
        words = np.asarray(flight.words)
        return Word(int(words[:, 0].max()), *map(int, words[0, 1:]))

    def _read(self, tree: Any) -> Any:
        """Arrays of the program, as NumPy arrays."""
        return jax.tree.map(np.asarray, processes.readable(tree, self.program.mesh))

    def _begin(self) -> LaneState:
        """Lanes as the last checkpoint left them, less the runs that have completed since; the rest is queued."""
        pending = self.job.pending()
        self.runs, self.steps = [None] * self.program.lanes, [0] * self.program.lanes
        state = self.program.empty()
        restored = processes.on_first(lambda: self.checkpoints.restore(self.program.template))
        if restored is not None:
            lanes, runs = restored
            steps = np.asarray(lanes.train.step)
            kept = [run if run in pending and self._follows(run, step) else None for run, step in zip(runs, steps, strict=True)]
            state = self._pack(self.program, lanes, kept)
        self._announce(pending)
        self.queue = deque(run for run in pending if run not in self.runs)
        return state

    def _announce(self, pending: list[Run]) -> None:
        """Says what this program has to do, less what its lanes have done already."""
        images = len(pending) * self.job.experiment.epochs * self.job.num_examples
        part = ProgramPart(len(self.job.runs), images, name=self.job.title, lanes=self.program.lanes)
        self.job.count_complete(part)
        self.status.begin(part)
        self.status.spare(sum(self.steps) * self.job.batch_size)

    def _follows(self, run: Run, step: int) -> bool:
        """Whether the rows of all epochs before this step are there: files copied or restored one by one may lack some."""
        job = self.job
        epochs = order.epoch_of_step(int(step), job.num_examples, job.batch_size) - 1
        return job.results.epochs(run) >= epochs

    def _pack(self, program: LaneProgram, state: LaneState, runs: list[Run | None]) -> LaneState:
        """The runs in the lanes of `state`, on the host, moved to lanes of `program` spread evenly over its rows of devices."""
        self.program, self.runs, self.steps = program, [None] * program.lanes, [0] * program.lanes
        packed = program.zeros()
        kept = [(lane, run) for lane, run in enumerate(runs) if run is not None]
        for (old_lane, run), lane in zip(kept, self._lanes_by_load(), strict=False):
            for new, old in zip(jax.tree.leaves(packed), jax.tree.leaves(state), strict=True):
                new[lane] = old[old_lane]
            self.runs[lane], self.steps[lane] = run, int(packed.train.step[lane])
        return program.put(packed)

    def _loads(self) -> list[int]:
        """Runs in each row of devices."""
        load = [0] * self.program.rows
        for lane, run in enumerate(self.runs):
            load[self.program.row_of_lane(lane)] += run is not None
        return load

    def _fitting(self, pace: "Pace") -> LaneProgram | None:
        """The program to move the last runs to, so that no device waits for another or computes for empty lanes."""
        if self.queue or not any(self.runs):
            return None
        loads = self._loads()
        if self.program.any_length:  # an empty lane costs nothing, a device without lanes does
            return self.program if max(loads) - min(loads) > 1 else None
        if self.smaller is not None:
            ready, self.smaller = (self.smaller, None) if self.smaller.done() else (None, self.smaller)
            return ready.result() if ready else None
        lanes = max(loads) * len(loads)
        left = max(self.job.total_steps - step for step, run in zip(self.steps, self.runs, strict=True) if run)
        saved = left * pace.seconds_per_step * (1 - lanes / self.program.lanes)
        if self.recompile and lanes <= self.program.lanes // 2 and saved > 2 * self.program.compile_seconds:
            self.smaller = self.recompile(lanes)
        return None

    def _lanes_by_load(self) -> Iterator[int]:
        """Free lanes, each time one in the row with the fewest runs; the caller fills it before it asks for more."""
        while free := [lane for lane, run in enumerate(self.runs) if run is None]:
            load = self._loads()
            yield min(free, key=lambda lane: (load[self.program.row_of_lane(lane)], lane))

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

    def _send(self, state: LaneState, pace: int, word: Word) -> tuple[LaneState, Flight | None]:
        """Starts the next segment, and frees the lanes of the runs that end in it; `word` goes to the other processes."""
        if not any(self.runs):
            return state, None
        shares = self._shares(pace)
        spans = [share and LaneSteps(share.run.seed, share.first_step, share.steps, share.evaluate) for share in shares]
        load = self.supply.prepare(self.program, self.job.batch_size, spans)
        settings = self.job.settings(self.runs)
        for lane, share in enumerate(shares):
            if share is not None:
                self.steps[lane] += share.steps
                if self.steps[lane] == self.job.total_steps:
                    self.runs[lane] = None
        state, report = self.program.run(state, settings, load.segment, load.pool, load.test)
        mesh = self.program.mesh
        return state, Flight(shares, processes.readable(report, mesh), processes.exchange(word, mesh))

    def _shares(self, pace: int) -> list[Share | None]:
        """What each lane does in the next segment: steps of one epoch, the last of which is evaluated after."""
        m, n = self.job.batch_size, self.job.num_examples
        epochs = [order.epoch_of_step(step, n, m) for step in self.steps]
        left = [order.epoch_end(epoch, n, m) - step for epoch, step in zip(epochs, self.steps, strict=True)]
        wanted = [run and LaneSteps(run.seed, self.steps[lane], left[lane]) for lane, run in enumerate(self.runs)]
        steps = self.supply.steps(self.program, m, wanted, pace)
        return [
            Share(run, epochs[lane], self.steps[lane], steps[lane], steps[lane] == left[lane]) if run and steps[lane] else None
            for lane, run in enumerate(self.runs)
        ]

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
        self.mirrors.add(self.job.results.append(rows))
        self._count_ended(rows)
        seconds = pace.measure(trained)
        m, b = self.job.batch_size, self.job.bn_batch_size
        images = trained * m
        self.timings.add("segment", seconds, m, b, self.program.lanes, trained, images)
        self.status.add_images(images, seconds)
        self.status.add_running(sum(run is not None for run in self.runs))
        self.progress.show(self.status, self.job.title)

    def _count_ended(self, rows: list[Row]) -> None:
        """Tells the status of the runs that ended with these rows, which are stored."""
        for row in rows:
            if row.diverged or row.epoch == self.job.experiment.epochs:
                self.status.end_run(row.diverged, self.job.results.final_accuracy(row.run))
            if row.diverged:  # the images it will not see
                self.status.spare((self.job.total_steps - row.step) * self.job.batch_size)

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
        test_accuracy = float("nan") if lost else int(found.test_correct) / int(found.test_images)
        run = (share.run.batch_size, share.run.bn_batch_size, share.run.base_lr, share.run.seed)
        return Row(*run, share.epoch, step, train_loss, train_accuracy, float(found.test_loss), test_accuracy)

    def _save_before_failing(self, state: LaneState) -> None:
        whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # else it was given to a segment already
        if whole and not processes.several():  # the others do not know
            self._save(state)
            self.checkpoints.close()

    def _save(self, state: LaneState) -> float:
        """Saves all lanes, after the rows that they have left behind; seconds it took."""
        began = time.monotonic()
        lanes = self._read(state)
        if processes.is_first():
            self.job.results.sync()
            self.checkpoints.save(lanes, self.runs)
        seconds = time.monotonic() - began
        self.timings.add("checkpoint", seconds, self.job.batch_size, self.job.bn_batch_size, self.program.lanes)
        return seconds


class Budget:
    """When a checkpoint is due: not before so many seconds have gone by, and only within its share of the time."""

    def __init__(self, least_seconds: float):
        self._least, self._began = least_seconds, time.monotonic()
        self._saved, self._spent, self._cost = self._began, 0.0, FIRST_SAVE_SECONDS  # the cost of the next, as far as is known

    def due(self) -> bool:
        now = time.monotonic()
        return self._spent + self._cost <= CHECKPOINT_SHARE * (now - self._began) and now - self._saved > self._least

    def spend(self, seconds: float) -> None:
        """Counts a checkpoint that was made just now."""
        self._cost, self._saved = seconds, time.monotonic()
        self._spent += seconds


class Pace:
    """Steps per segment, so that a segment takes about the time that the experiment asks for."""

    FIRST_IMAGES = 256  # per lane, in the first segment

    def __init__(self, job: Job, program: LaneProgram):
        self._target, self._most, self._adapts = job.experiment.segment_seconds, program.segment_steps, program.any_length
        self.steps = max(1, min(self._most, self.FIRST_IMAGES // job.batch_size)) if self._adapts else self._most
        self.seconds_per_step = 0.0  # of a lane in the last segment
        self.restart()

    def restart(self) -> None:
        """Begins to count from now: the time since the last measure was not a segment's."""
        self._since = time.monotonic()

    def measure(self, trained: int) -> float:
        """Seconds since the last measure; adapts the pace if anything was trained."""
        seconds = time.monotonic() - self._since
        self.restart()
        self.seconds_per_step = seconds / self.steps
        if trained and self._adapts:
            factor = min(2.0, max(0.5, self._target / max(seconds, 1e-6)))
            self.steps = max(1, min(self._most, round(self.steps * factor)))
        return seconds
