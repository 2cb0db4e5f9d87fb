"""Programs as Ray tasks: each in a process of its own, those of the most updates first, started anew where one dies."""

import dataclasses
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallbatch_jax.cluster import worker
from smallbatch_jax.cluster.worker import Outcome, Part
from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, InputError, Run
from smallbatch_jax.runner.progress import Progress, Status
from smallbatch_jax.store import results
from smallbatch_jax.store.files import append_line, write_atomically
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.timings import TIMING_COLUMNS
from smallbatch_jax.tracking.trackers import Trackers

if TYPE_CHECKING:
    from smallbatch_jax.runner.signals import Stop

RETRIES = 5  # of a program whose worker or machine died
POLL_SECONDS = 0.5  # between two looks at the board
CONNECT_SECONDS = 10.0  # to reach a cluster's head
SILENT_SECONDS = 20.0  # after which a worker that said nothing counts as gone
ANSWER_SECONDS = 10.0  # that workers and launcher wait for the board
STOP_SECONDS = 60.0  # that workers have to save
STORE_BYTES = 128 * 2**20  # of a local cluster's object store, through which only text goes


@dataclass
class Program:
    """One of a grid, and how far it has come."""

    experiment: Experiment
    workdir: Path  # absolute
    shape: tuple[int, int]  # batch size, BN batch size
    token: str  # see `worker.token`
    pending: list[Run]  # still to be trained when the launch began
    steps: int  # updates of one run
    status: Status  # as last known
    working: bool = False  # its worker was heard of lately
    failure: str = ""  # one line

    @property
    def name(self) -> str:
        return f"{self.experiment.name}, {worker.describe(*self.shape)}"

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts programs by when they should start: what takes longest, first."""
        return -self.steps, -len(self.pending)


def summed(members: Iterable[Program], started: float) -> Status:
    """How far they have come together since `started`, a time.monotonic()."""
    members = list(members)
    states = [program.status for program in members]
    working = [program.status for program in members if program.working]
    return Status(
        runs=sum(status.runs for status in states),
        images=sum(status.images for status in states),
        started=started,
        finished=sum(status.finished for status in states),
        diverged=sum(status.diverged for status in states),
        running=sum(status.running for status in working),
        trained=sum(status.trained for status in states),
        best=max((status.best for status in states if not math.isnan(status.best)), default=math.nan),
        images_per_second=sum(status.images_per_second for status in working),
    )


class Board:
    """Where workers say how far they have come and see whether to stop; an actor.

    One whose process dies begins anew, knowing nothing.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._heard: dict[int, tuple[float, Status | None]] = {}

    def report(self, program: int, status: Status | None) -> int:
        """Notes how far a program has come; the signal to stop at, or 0."""
        self._heard[program] = (time.monotonic(), status)
        return self._signum

    def heard(self, signum: int) -> dict[int, tuple[float, Status | None]]:
        """Of each program that ever began: seconds since its last report, and that report. Workers are to stop at `signum`."""
        self._signum = signum
        return {program: (time.monotonic() - when, status) for program, (when, status) in self._heard.items()}


def resources(nodes: Iterable[Mapping[str, float]], runs: int, lanes: int | None) -> dict[str, int]:
    """What a program asks of the cluster: a GPU if there are any, or else a CPU for each lane that a machine can have.

    Args:
      nodes: the resources of each machine, by Ray's names.
      runs: of the program.
      lanes: the most there may be; None is up to the driver.
    """
    from smallbatch_jax.runner.jobs import MOST_LANES

    nodes = list(nodes)
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        return {"num_gpus": 1}
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    return {"num_cpus": max(1, min(runs, lanes or MOST_LANES, largest))}


def imported_ray() -> Any:
    extras.require("cluster", "launch.py")
    import ray

    return ray


@contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """A cluster, until the block ends; Ray says nothing of its own on the terminal.

    Raises:
      InputError: if there is none at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if address is None:
        cpus = len(os.sched_getaffinity(0))
        options |= {"include_dashboard": False, "num_cpus": cpus, "object_store_memory": STORE_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address and re.fullmatch(r"[^/]+:\d+", address):  # Ray would try for minutes, and say so
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address or "local", **options)
    except Exception as error:  # of many types
        what = f"--address={address}: no Ray cluster can be reached" if address else "no Ray cluster can be started here"
        raise InputError(f"{what}: {_one_line(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray would exit without a word
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # where Ray tells at length of each worker that dies
        try:
            yield
        finally:
            ray.shutdown()


def _task(part: Part, program: int, board: Any) -> Outcome:
    def report(status: Status | None) -> int:
        # Not by ray.get: a task that waits there gives its CPUs to another one, which then runs beside it.
        return board.report.remote(program, status).future().result(timeout=ANSWER_SECONDS)

    return worker.train(part, report)


class Tasks:
    """The programs of one launch that are not done, handed to Ray."""

    def __init__(self, ray: Any, found: list[Program]):
        self._ray, self._programs = ray, found
        node = ray.get_runtime_context().get_node_id()  # the launcher's, on whose death all is over anyway
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        self._board = ray.remote(Board).options(**options).remote()
        # One function for all: Ray keeps the order of a function's tasks that ask for the same.
        self._task = ray.remote(max_calls=1, max_retries=RETRIES)(_task)
        self._began = time.monotonic()
        self._running: dict[Any, int] = {}  # the number of the program of each task that has not ended
        self._asked: dict[int, dict[str, int]] = {}  # what each program asked for, by Ray's names

    def train(self, progress: Progress) -> None:
        """Returns when each program is trained or has failed.

        Raises:
          Interrupted: on a signal of `signals`.
        """
        from smallbatch_jax.runner.signals import Interrupted, noted_signals

        with noted_signals() as stop:
            numbers = [number for number, program in enumerate(self._programs) if program.pending]
            for number in sorted(numbers, key=lambda number: self._programs[number].urgency):
                self._submit(number)
            try:
                self._follow(progress, stop)
            finally:
                progress.close(summed(self._programs, self._began))
        if stop.signum:
            raise Interrupted(stop.signum)

    def _submit(self, number: int) -> None:
        program = self._programs[number]
        experiment = program.experiment
        self._asked[number] = asked = resources(self._nodes(), program.status.runs, experiment.lanes)
        part = Part(
            _seen_from_anywhere(experiment),
            program.workdir,
            program.shape,
            program.token,
            results.path_of(program.workdir, *program.shape).read_text(),
            sys.argv,
            asked.get("num_cpus"),
        )
        task = self._task.options(name=program.name, **asked).remote(part, number, self._board)
        self._running[task] = number

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _follow(self, progress: Progress, stop: "Stop") -> None:
        deadline = math.inf
        while self._running and time.monotonic() < deadline:
            ended, _ = self._ray.wait(list(self._running), timeout=POLL_SECONDS)
            for task in ended:
                self._end(self._programs[self._running.pop(task)], task)
            self._listen(stop.signum)
            if stop.signum and deadline == math.inf:
                deadline = time.monotonic() + STOP_SECONDS
                self._cancel_waiting()
            elif not stop.signum:
                self._ask_for_less()
            working = sum(program.working for program in self._programs)
            doing = f"{working} programs at work, {len(self._running) - working} waiting"
            progress.show(summed(self._programs, self._began), doing)

    def _listen(self, signum: int) -> None:
        """Notes what the workers of programs that have not ended last said; has them stop if `signum` is not 0."""
        try:
            heard = self._ray.get(self._board.heard.remote(signum), timeout=ANSWER_SECONDS)
        except self._ray.exceptions.RayError:
            return
        for number in self._running.values():
            program, (silent, status) = self._programs[number], heard.get(number, (math.inf, None))
            program.working = silent < SILENT_SECONDS
            program.status = status or program.status

    def _ask_for_less(self) -> None:
        """Hands out anew what waits for more CPUs than any machine has that is left."""
        nodes = self._nodes()
        for task, number in list(self._running.items()):
            program, asked = self._programs[number], self._asked[number].get("num_cpus", 0)
            if program.working or asked <= 1:
                continue
            if resources(nodes, program.status.runs, program.experiment.lanes).get("num_cpus", asked) < asked:
                self._ray.cancel(task)
                del self._running[task]
                self._submit(number)

    def _cancel_waiting(self) -> None:
        """Ends programs that have not begun, of which nothing is to be saved."""
        for task, number in self._running.items():
            if not self._programs[number].working:
                self._ray.cancel(task)

    def _end(self, program: Program, task: Any) -> None:
        """Keeps what a task's worker found; a line on stderr if it failed."""
        program.working = False
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(task)
        except errors.TaskCancelledError:
            return
        except errors.RayTaskError as error:
            program.failure = f"{type(error.cause).__name__}: {_one_line(error.cause)}"
        except errors.RayError as error:
            program.failure = f"its worker died {RETRIES + 1} times, at last with {type(error).__name__}: {_one_line(error)}"
        else:
            program.status, program.failure = outcome.status or program.status, outcome.failure
            _store(program, outcome)
        if program.failure:
            print(f"{program.name}: {program.failure}", file=sys.stderr, flush=True)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _seen_from_anywhere(experiment: Experiment) -> Experiment:
    """With a path to the data that does not depend on the folder that a process runs in."""
    given = experiment.dataset.data_dir
    if not given or given.startswith("~"):
        return experiment
    return dataclasses.replace(experiment, dataset=dataclasses.replace(experiment.dataset, data_dir=os.path.abspath(given)))


def _store(program: Program, outcome: Outcome) -> None:
    """Puts into the workdir what a worker wrote elsewhere."""
    if outcome.rows is not None:
        write_atomically(results.path_of(program.workdir, *program.shape), outcome.rows)
        with ProgramResults(program.workdir, *program.shape) as stored, Trackers(program.experiment, program.workdir, [stored]):
            pass
    if outcome.timings:
        append_line(program.workdir / "timings.csv", outcome.timings.rstrip("\n"), header=",".join(TIMING_COLUMNS))
    if outcome.provenance:
        append_line(program.workdir / "provenance.jsonl", outcome.provenance.rstrip("\n"))
