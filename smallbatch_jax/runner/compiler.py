"""Compiles programs in background threads while another one trains."""

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from smallbatch_jax.program.lanes import LaneProgram
from smallbatch_jax.runner.jobs import Job, Session
from smallbatch_jax.runner.signals import Interrupted

SLOW_SECONDS = 30  # a longer compilation is announced


class Compiler:
    """Background compiler of a grid's programs."""

    def __init__(self, session: Session, jobs: Sequence[Job]):
        """`jobs` are in the expected order of training."""
        self._session = session
        self._executor = ThreadPoolExecutor(2)
        self._programs: dict[Job, Future[LaneProgram]] = {}
        self._following = dict(itertools.pairwise(jobs))

    def submit(self, job: Job) -> Future[LaneProgram]:
        """Starts compiling the job's program in its present layout; see `Job.compile`."""
        return self._executor.submit(self._compile, job)

    def program(self, job: Job) -> LaneProgram:
        """Returns a job's program; while the caller trains it, the next job's compiles.

        Raises:
          Interrupted: if asked to stop while waiting for the compiler.
        """
        compiling = self._programs[job] = self._programs.get(job) or self.submit(job)
        # The initialiser, shared by all programs and cached, compiles beside the first one.
        self._result(job, self._executor.submit(self._session.initial, job.runs[0].seed))
        program, following = self._result(job, compiling), self._following.get(job)
        if following and following not in self._programs:
            self._programs[following] = self.submit(following)
        return program

    def forget(self, job: Job) -> None:
        """Makes `program` compile the job again, in a layout that has changed."""
        del self._programs[job]

    def close(self) -> None:
        """Shuts down without waiting for running compilations."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, job: Job) -> LaneProgram:
        began = time.monotonic()
        program = job.compile(self._session.pipeline)
        seconds = time.monotonic() - began
        self._session.timings.add("compile", seconds, *job.shape, program.lanes, peak_bytes=program.peak_bytes)
        return program

    def _result(self, job: Job, future: Future[Any]) -> Any:
        """Waits for a future's result, unless asked to stop first; announces a slow compilation."""
        began, announced = time.monotonic(), False
        while not wait([future], timeout=0.1).done:
            if signum := self._session.stop.signum:
                raise Interrupted(signum)
            if not announced and time.monotonic() - began >= SLOW_SECONDS:
                announced = True
                kept = "" if job.setup.platform == "cpu" else ", the first time only"
                self._session.show(self._session.status, f"compiling {job.title} takes more than {SLOW_SECONDS} s{kept}")
        return future.result()
