"""Assigns runs to the lanes of one program, chooses the next steps of each, and dispatches segments.

`Lanes` does not wait for the segments that it dispatches. The scheduler fetches and stores their reports and refills lanes; the
planner only times them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.program import processes
from smallbatch_jax.program.lanes import LaneProgram, LaneState, Report
from smallbatch_jax.program.train import PyTree, TrainState
from smallbatch_jax.runner.input import InputPipeline, LaneSteps
from smallbatch_jax.runner.jobs import Job


class InFlight(NamedTuple):
    """A dispatched segment and its outputs, not fetched yet."""

    lanes: list[LaneSteps | None]
    report: Report
    final: dict[int, PyTree]  # params and batch_stats of the runs that end, by lane; empty unless parameters are kept
    parked: dict[int, LaneState]  # states of runs that reach a goal, or a larger batch, before their end
    proposals: Any = None  # int32[hosts, 3], the `Proposal` of each host

    def fetch(self) -> Report:
        """Waits for the segment and returns its report as NumPy arrays."""
        return jax.tree.map(np.asarray, self.report)


class Lanes:
    """The lanes of one program; each holds a run or is free."""

    def __init__(self, job: Job, program: LaneProgram, pipeline: InputPipeline, initial: Callable[[int], TrainState]):
        """Starts with free lanes; `initial` maps a seed to the state before the first update."""
        self.job, self._pipeline, self._initial = job, pipeline, initial
        self._use(program)
        self.state: LaneState = program.empty()

    def _use(self, program: LaneProgram) -> None:
        self.program = program
        self.runs: list[Run | None] = [None] * program.lanes
        self.steps = [0] * program.lanes  # updates dispatched so far

    def loads(self) -> list[int]:
        """Returns the number of runs in each row of devices."""
        load = [0] * self.program.rows
        for lane, run in enumerate(self.runs):
            load[self.program.row_of_lane(lane)] += run is not None
        return load

    def refill(self, queue: deque[Run]) -> None:
        """Starts queued runs in the free lanes, or resumes them if they were parked."""
        entering: dict[int, TrainState | LaneState] = {}
        for lane in self._free_lanes():
            if not queue:
                break
            run = queue.popleft()
            self.runs[lane], self.steps[lane] = run, self.job.steps_taken(run)
            entering[lane] = self.job.parked.pop(run, None) or self._initial(run.seed)
        if entering:
            self.state = self.program.start(self.state, entering)

    def free(self, lane: int, run: Run) -> None:
        """Frees a lane if the run is still in it."""
        if self.runs[lane] == run:
            self.runs[lane] = None

    def read(self) -> LaneState:
        """Returns the state of all lanes as NumPy arrays."""
        return jax.tree.map(np.asarray, processes.readable(self.state, self.program.mesh))

    def read_all(self) -> tuple[LaneState, list[Run | None]]:
        """Returns the state of all lanes and parked runs, stacked as NumPy arrays, and the run of each."""
        state, parked = self.read(), self.job.parked.values()
        stacked = jax.tree.map(lambda lanes, *others: np.concatenate([lanes, *(x[None] for x in others)]), state, *parked)
        return stacked, [*self.runs, *self.job.parked]

    def move(self, program: LaneProgram) -> None:
        """Moves the runs into lanes of `program`, evenly over its rows of devices."""
        state, packed = self.read(), program.zeros()
        kept = [(lane, run) for lane, run in enumerate(self.runs) if run is not None]
        self._use(program)
        free = self._free_lanes()
        for old_lane, run in kept:
            lane = next(free)
            for new, old in zip(jax.tree.leaves(packed), jax.tree.leaves(state), strict=True):
                new[lane] = old[old_lane]
            self.runs[lane], self.steps[lane] = run, int(packed.train.step[lane])
        self.state = program.put(packed)

    def send(self, pace: int, evaluate: bool = True) -> InFlight | None:
        """Dispatches a segment of about `pace` steps per lane and frees the lanes of runs that end in it; None if all are free.

        A lane stops at the end of its epoch and is evaluated there, unless `evaluate` is False.
        """
        lanes = self._next_steps(pace, evaluate)
        if not any(lanes):
            return None
        load = self._pipeline.prepare(self.program, self.job.batch_size, lanes)
        settings, final, parked = self.job.settings(self.runs), {}, {}
        for i, lane in enumerate(lanes):
            if lane is not None:
                self.steps[i] += lane.steps
                if self.steps[i] == self.job.goal(lane.run):
                    self.runs[i] = None
        self.state, report = self.program.run(self.state, settings, load.segment, load.pool, load.test)
        train = self.state.train
        for i, lane in enumerate(lanes):
            if lane is not None and self.steps[i] == self.job.goal(lane.run):
                if self.steps[i] < self.job.total_steps:
                    parked[i] = self._copy(self.state, i)
                elif self.job.experiment.keep_parameters and evaluate:
                    final[i] = self._copy({"params": train.params, "batch_stats": train.batch_stats}, i)
        return InFlight(lanes, processes.readable(report, self.program.mesh), final, parked)

    def _copy(self, stacked: PyTree, lane: int) -> PyTree:
        """Returns a copy of one lane's arrays, which outlives the donated state."""
        return processes.readable(_take_lane(stacked, np.int32(lane)), self.program.mesh)

    def _free_lanes(self) -> Iterator[int]:
        """Yields free lanes, each in the row with the fewest runs; the caller fills it before it asks for another."""
        while free := [lane for lane, run in enumerate(self.runs) if run is None]:
            load = self.loads()
            yield min(free, key=lambda lane: (load[self.program.row_of_lane(lane)], lane))

    def _next_steps(self, pace: int, evaluate: bool) -> list[LaneSteps | None]:
        """Returns what each lane does in the next segment: steps of one epoch, or of the whole run without evaluation."""
        batches, wanted = self.job.batches, []
        for run, step in zip(self.runs, self.steps, strict=True):
            if run is None:
                wanted.append(None)
                continue
            epoch, goal = batches.epoch_of_step(step), self.job.goal(run)
            end = batches.epoch_end(epoch)
            stop = min(end, goal) if evaluate else goal
            wanted.append(LaneSteps(run, epoch, step, batches.examples(step), stop - step, evaluate and stop == end))
        taken = self._pipeline.steps(self.program, self.job.batch_size, wanted, pace)
        return [
            lane._replace(steps=steps, evaluate=lane.evaluate and steps == lane.steps) if lane and steps else None
            for lane, steps in zip(wanted, taken, strict=True)
        ]


@jax.jit
def _take_lane(stacked: PyTree, lane: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[lane], stacked)
