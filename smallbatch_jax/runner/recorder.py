"""Stores what the segments of one program found, and reports it to the trackers and the progress display."""

import time

import numpy as np

from smallbatch_jax.data import order
from smallbatch_jax.program.lanes import Report
from smallbatch_jax.runner.jobs import Job, Session
from smallbatch_jax.runner.progress import ProgramStatus
from smallbatch_jax.runner.segments import Assignment, InFlight, Lanes
from smallbatch_jax.store.results import Row


class Recorder:
    """The rows of one program's runs, from the reports of its segments."""

    def __init__(self, job: Job, session: Session):
        self._job, self._session = job, session

    def begin(self, lanes: Lanes) -> None:
        """Shows what is left to do, less what restored lanes have done already."""
        job, status = self._job, self._session.status
        images = len(job.pending()) * job.images_per_run
        program = ProgramStatus(len(job.runs), images, name=job.title, lanes=lanes.program.lanes)
        job.count_complete(program)
        status.begin(program)
        status.spare(sum(lanes.steps) * job.batch_size)

    def record(self, flight: InFlight, lanes: Lanes) -> int:
        """Waits for a segment, stores its rows and frees the lanes of the runs that diverged; returns the steps trained."""
        report = flight.fetch()
        rows, trained = [], 0
        for lane, assignment in enumerate(flight.assignments):
            if assignment is None or self._job.results.diverged(assignment.run):
                continue
            trained += int(report.step[lane]) - assignment.first_step
            row = self._row(assignment, Report(*(values[lane] for values in report)))
            if row is not None:
                rows.append(row)
                if row.diverged:
                    lanes.free(lane, assignment.run)
        self._session.trackers.add(self._job.results.append(rows))
        for row in rows:
            self._count_if_ended(row)
        return trained

    def show(self, trained: int, seconds: float, lanes: Lanes) -> None:
        """Stores how long a segment took, and shows how far the grid has come."""
        job, session, images = self._job, self._session, trained * self._job.batch_size
        session.timings.add("segment", seconds, job.batch_size, job.bn_batch_size, lanes.program.lanes, trained, images)
        session.status.add_images(images, seconds)
        session.status.add_running(sum(run is not None for run in lanes.runs))
        session.progress.show(session.status, job.title)

    def add_checkpoint(self, began: float, lanes: Lanes) -> float:
        """Stores how long a checkpoint took, and returns it in seconds."""
        seconds = time.monotonic() - began
        self._session.timings.add("checkpoint", seconds, self._job.batch_size, self._job.bn_batch_size, lanes.program.lanes)
        return seconds

    def _count_if_ended(self, row: Row) -> None:
        job, status = self._job, self._session.status
        if row.diverged or row.epoch == job.experiment.epochs:
            status.end_run(row.diverged, job.results.final_accuracy(row.run))
        if row.diverged:
            status.spare((job.total_steps - row.step) * job.batch_size)

    def _row(self, assignment: Assignment, found: Report) -> Row | None:
        """Returns the row of an epoch that ended, well or by divergence; None while it goes on."""
        if found.alive and not assignment.evaluate:
            return None
        m, n = self._job.batch_size, self._job.num_examples
        step = int(found.step)
        # A batch whose loss was not finite was seen, though it made no update.
        batches = step - order.epoch_end(assignment.epoch - 1, n, m) + (not found.alive)
        train_loss = float(found.loss_sum) / batches
        diverged = not (found.alive and np.isfinite(found.test_loss))
        train_accuracy = float("nan") if diverged else int(found.correct) / (batches * m)
        test_accuracy = float("nan") if diverged else int(found.test_correct) / int(found.test_images)
        run = assignment.run
        key = run.batch_size, run.bn_batch_size, run.base_lr, run.seed
        return Row(*key, assignment.epoch, step, train_loss, train_accuracy, float(found.test_loss), test_accuracy)
