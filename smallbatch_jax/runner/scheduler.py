"""Trains the pending runs of one program: refills lanes, dispatches segments, records them, retires runs, saves.

The host stays one segment ahead of the reports: it dispatches segment k+1, then reads the report of segment k. It knows in
advance when a run finishes, and refills that lane at once. It learns of a divergence one segment late, and the lane idles for
that segment.

With several hosts, each has a scheduler, and all take the same actions. Each host sends a proposal, which depends on its own
clock and signals, along with a segment; all hosts act on the proposals when they read that segment's report.
"""

import copy
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.config.grid import name_of
from smallbatch_jax.data.streaming.prefetch import WorkerDied
from smallbatch_jax.program import processes
from smallbatch_jax.program.lanes import LaneProgram, Report
from smallbatch_jax.runner.compiler import Compiler
from smallbatch_jax.runner.input import LaneSteps
from smallbatch_jax.runner.jobs import Job, Session
from smallbatch_jax.runner.progress import ProgramStatus
from smallbatch_jax.runner.segments import InFlight, Lanes
from smallbatch_jax.runner.signals import Interrupted
from smallbatch_jax.store.checkpoint import Checkpoints
from smallbatch_jax.store.results import Row

CHECKPOINT_SHARE = 0.02  # maximum fraction of training time spent on checkpoints
FIRST_SAVE_SECONDS = 0.3  # assumed time of the first checkpoint


class Proposal(NamedTuple):
    """Action this host would take next; all-gathered so that hosts agree."""

    signum: int  # signal received, else 0
    save: int  # 1 if a checkpoint is due
    steps: int  # steps per lane in the next segment


class Scheduler:
    """Trains the pending runs of one job in the lanes of its program."""

    def __init__(
        self, job: Job, program: LaneProgram, checkpoints: Checkpoints, session: Session, compiler: Compiler | None = None
    ):
        """`compiler` compiles the same program with fewer lanes, where that is faster; None keeps the program."""
        self._job, self._checkpoints, self._session, self._compiler = job, checkpoints, session, compiler
        self.lanes = Lanes(job, program, session.pipeline, session.initial)
        self._whole = program  # with as many lanes as the job's layout; `lanes.program` may have fewer
        self._pace = Pace(job.experiment.segment_seconds, job.batch_size, program)
        self._saved, self._save_seconds = time.monotonic(), FIRST_SAVE_SECONDS  # when the last checkpoint ended, and its cost
        self._queue: deque[Run] = deque()
        self._in_flight: InFlight | None = None
        self._agreed = Proposal(0, 0, self._pace.steps)
        self._compiling: Future[LaneProgram] | None = None

    def train(self) -> None:
        """Trains until all runs have reached the job's goals; runs that may continue later are parked.

        Raises:
          Interrupted: on a signal, after the segment in flight ended and all lanes were saved.
        """
        job, parked = self._job, self._job.parked
        pending = job.pending()
        ended = {run for run in parked if run not in job.goals or job.results.complete(run, job.experiment.epochs)}
        for run in ended.difference(pending):
            del parked[run]
        self._queue = deque(sorted(pending, key=lambda run: run not in parked))  # runs that have begun come first
        if len(pending) > self.lanes.program.lanes and self.lanes.program is not self._whole:
            self.lanes.move(self._whole)
        self._begin(pending)
        self._pace.restart()
        while True:
            self.lanes.refill(self._queue)
            if self._in_flight is None and not any(self.lanes.runs):
                return
            self._pack()
            before, self._in_flight = self._in_flight, self._send()
            if before is not None:
                self._record(before)
                self._agreed = self._agree(before)
            if self._agreed.signum or self._agreed.save:
                self._land()
                self.save()
                if self._agreed.signum:
                    processes.leave_together()
                    raise Interrupted(self._agreed.signum)
                self._agreed = self._agreed._replace(save=0)

    def restore(self) -> None:
        """Replaces the parked runs by those of the last checkpoint, to resume from there."""
        self._job.parked.clear()
        restored = processes.on_first(lambda: self._checkpoints.restore(self.lanes.program.template))
        if restored is not None:
            state, runs = restored
            batches, results = self._job.batches, self._job.results
            for i, run in enumerate(runs):
                step = int(state.train.step[i])
                if run is not None and results.epochs(run) >= batches.epoch_of_step(step) - 1:  # a copied workdir may lack rows
                    self._job.parked[run] = jax.tree.map(lambda leaf, i=i: leaf[i], state)
                    self._session.status.images -= batches.examples(step)

    def _begin(self, pending: list[Run]) -> None:
        """Shows the work that is left, excluding what parked runs have done already."""
        job = self._job
        program = ProgramStatus(lanes=self.lanes.program.lanes)
        program.add_program(job.goals, job.results, job.num_examples)
        program.images -= sum(job.batches.examples(job.steps_taken(run)) for run in pending)
        self._session.status.begin(program)

    def _send(self) -> InFlight | None:
        """Dispatches the next segment, with this host's proposal for what to do after it."""
        proposal = self._proposal()
        try:
            flight = self.lanes.send(self._agreed.steps)
        except (InputError, WorkerDied):  # a broken image or a dead worker: what was trained so far is kept
            self._land()
            donated = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.lanes.state))  # to a segment that did not return
            if not donated and not processes.several():  # the other hosts do not know of the failure
                self.save()
            raise
        if flight is None:
            return None
        return flight._replace(proposals=processes.exchange(proposal, self.lanes.program.mesh))

    def _record(self, flight: InFlight) -> None:
        """Waits for a segment, stores its rows, frees the lanes of runs that diverged, and shows progress."""
        job, session, status, rows, trained = self._job, self._session, self._session.status, [], 0
        report = flight.fetch()
        for i, lane in enumerate(flight.lanes):
            if lane is None or job.results.diverged(lane.run):
                continue
            trained += int(report.step[i]) - lane.first_step
            row = _row(job, lane, jax.tree.map(lambda values, i=i: values[i], report))
            if row is not None:
                rows.append(row)
                if i in flight.final and not row.diverged:  # before the last row: after a kill in between, the run is repeated
                    value = job.results.final(row.run, row)
                    session.parameters.save(name_of(row.run), row.run, value, flight.final[i])
                if row.diverged:
                    self.lanes.free(i, lane.run)
                    whole = job.batches.epoch_end(job.goals[row.run])
                    status.spare(job.batches.examples(whole) - job.batches.examples(row.step))
            if i in flight.parked and not (row and row.diverged):
                job.parked[lane.run] = job.left(jax.tree.map(np.asarray, flight.parked[i]))
        session.trackers.add(job.results, job.results.append(rows))
        for row in rows:
            if row.diverged or row.epoch == job.experiment.epochs:
                status.end_run(row.diverged, job.results.final(row.run), job.results.metric)
        seconds, images = self._pace.measure(trained), trained * job.batch_size
        session.timings.add("segment", seconds, *job.shape, self.lanes.program.lanes, trained, images)
        status.add_images(images, seconds)
        status.running = sum(run is not None for run in self.lanes.runs)
        session.show(status, job.title)

    def _land(self) -> None:
        """Waits for the segment in flight, if any, and records it."""
        if self._in_flight is not None:
            flight, self._in_flight = self._in_flight, None
            self._record(flight)

    def _proposal(self) -> Proposal:
        waited = time.monotonic() - self._saved
        due = waited > self._job.experiment.checkpoint_seconds and self._save_seconds <= CHECKPOINT_SHARE * waited
        return Proposal(self._session.stop.signum, due, self._pace.steps)

    def _agree(self, flight: InFlight) -> Proposal:
        """Returns what to do next: a single host's present proposal, or what all hosts proposed with this segment."""
        if not processes.several():
            return self._proposal()
        proposals = np.asarray(flight.proposals)
        return Proposal(int(proposals[:, 0].max()), *map(int, proposals[0, 1:]))

    def _pack(self) -> None:
        """Repacks the last runs if that keeps devices from idling or from computing for empty lanes."""
        program = self._better_program()
        if program is not None:
            self._land()
            self.lanes.move(program)
            self._pace.restart()

    def _better_program(self) -> LaneProgram | None:
        """Returns the program to move the last runs to; None to leave them where they are."""
        program, loads = self.lanes.program, self.lanes.loads()
        if self._queue or not any(loads):
            return None
        if program.any_length:  # an empty lane costs nothing, an idle device does
            return program if max(loads) - min(loads) > 1 else None
        fewer = max(loads) * len(loads)
        if self._compiling is not None:
            if not self._compiling.done() or self._compiling.result().lanes < fewer:  # asked for in a round with fewer runs
                return None
            compiled, self._compiling = self._compiling.result(), None
            return compiled
        steps = (step for step, run in zip(self.lanes.steps, self.lanes.runs, strict=True) if run)
        seconds_left = (self._job.steps.stop - min(steps)) * self._pace.seconds_per_step
        saved = seconds_left * (1 - fewer / program.lanes)
        if self._compiler and fewer <= program.lanes // 2 and saved > 2 * program.compile_seconds:
            smaller = copy.copy(self._job)  # memory may run out meanwhile, which halves the job's own layout
            smaller.layout = smaller.layout._replace(lanes=fewer)
            self._compiling = self._compiler.submit(smaller)
        return None

    def save(self) -> None:
        """Saves all lanes, after syncing the rows of their epochs to disk."""
        began = time.monotonic()
        state, runs = self.lanes.read_all()
        if processes.is_first():
            self._job.results.sync()
            self._checkpoints.save(state, runs)
        self._saved = time.monotonic()
        self._save_seconds = self._saved - began
        self._session.timings.add("checkpoint", self._save_seconds, *self._job.shape, self.lanes.program.lanes)
        self._pace.restart()


def _row(job: Job, lane: LaneSteps, found: Report) -> Row | None:
    """Returns the row of an epoch that ended, normally or by divergence; None while it continues."""
    if found.alive and not lane.evaluate:
        return None
    run, m, batches, step = lane.run, job.batch_size, job.batches, int(found.step)
    # A batch with a non-finite loss is included, although it made no update.
    examples = batches.examples(step) - batches.examples(batches.epoch_end(lane.epoch - 1)) + m * (not found.alive)
    values = {"train_loss": float(found.loss_sum) / (examples / m)}
    values |= {f"train_{name}": float(total) / examples for name, total in found.sums.items()}
    for split, tested in found.tested.items():
        examples = np.float32(tested.examples) if tested.examples else np.float32("nan")
        values |= {f"{split}_{name}": float(total) / float(examples) for name, total in tested.sums.items()}
        values[f"{split}_loss"] = float(np.float32(tested.sums["loss"]) / examples)
    values |= {name: float(value) for name, value in found.diagnosed.items()}
    has_accuracy = "test_accuracy" in values
    if not found.alive or any(not np.isfinite(values[f"{split}_loss"]) for split in found.tested):
        losses = {name for name in values if name.endswith("_loss")} if has_accuracy else {"train_loss"}
        values = {name: value if name in losses else float("nan") for name, value in values.items()}
    fixed: list[Any] = [values.pop(name, None) for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")]
    further = tuple((name, values[name]) for name in job.results.further if name in values)
    key = run.batch_size, run.bn_batch_size, run.base_lr, run.seed
    return Row(*key, lane.epoch, step, *fixed, scalars=run.scalars, metrics=further)


class Pace:
    """Steps per segment, adapted so that a segment takes about the time that the experiment asks for."""

    FIRST_IMAGES = 256  # per lane, in the first segment

    def __init__(self, segment_seconds: float, batch_size: int, program: LaneProgram):
        self._target, self._most, self._adapts = segment_seconds, program.segment_steps, program.any_length
        self.steps = max(1, min(self._most, self.FIRST_IMAGES // batch_size)) if self._adapts else self._most
        self.seconds_per_step = 0.0  # per lane, in the last segment
        self.restart()

    def restart(self) -> None:
        """Restarts the clock, to exclude time spent outside segments."""
        self._since = time.monotonic()

    def measure(self, trained: int) -> float:
        """Returns the seconds since the last measurement, and adapts the pace if anything was trained."""
        seconds = time.monotonic() - self._since
        self.restart()
        self.seconds_per_step = seconds / self.steps
        if trained and self._adapts:
            factor = min(2.0, max(0.5, self._target / max(seconds, 1e-6)))
            self.steps = max(1, min(self._most, round(self.steps * factor)))
        return seconds
