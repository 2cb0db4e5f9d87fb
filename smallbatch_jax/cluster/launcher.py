"""Grids on a Ray cluster: the launcher owns the workdirs, and each program is a Ray task in a process of its own.

Ray schedules the tasks, and restarts those that die.
"""

import dataclasses
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smallbatch_jax.cluster import worker
from smallbatch_jax.cluster.worker import OWNER_SECONDS, Outcome, ProgramTask
from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, InputError, programs
from smallbatch_jax.runner.progress import Progress, Status, title
from smallbatch_jax.runner.signals import Interrupted, Stop, handled, noted_signals
from smallbatch_jax.store.files import append_line
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.workdir import open_workdir, record_provenance
from smallbatch_jax.tracking.trackers import Trackers

RETRIES = 5  # retries of a program whose worker or machine died
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # timeout of a cluster's head and of the actor that holds the workers' reports
STOP_SECONDS = 60.0  # time for workers to save after a signal
STORE_BYTES = 128 * 2**20  # object store of a local cluster; only rows go through it


@dataclass
class LaunchedProgram:
    """A program of a launch and its progress."""

    name: str  # as shown to the user
    task: ProgramTask
    pending: int  # runs left to train when the launch began
    steps: int  # updates of one run
    status: Status  # as last reported
    failure: str = ""  # one line
    resources: dict[str, int] = field(default_factory=dict)  # requested by its task, by Ray's names


def train_grids(grids: Sequence[tuple[Experiment, Path]], address: str | None, progress: Progress) -> list[bool]:
    """Trains every run of the grids that their workdirs do not hold yet; returns for each grid whether it is complete.

    One line on stderr says why a program failed.

    Args:
      grids: experiments, each with a workdir of its own.
      address: address of a running cluster, in Ray's form; None starts one on this machine alone.
      progress: display that is updated twice a second.

    Raises:
      InputError: if a grid does not fit its data, a workdir holds another experiment, or no cluster can be reached.
      Interrupted: on a signal of `signals`, once the workers have saved.
    """
    extras.require("cluster", "launch.py")
    facts = [_facts(experiment) for experiment, _ in grids]
    with ExitStack() as stack:
        ray = stack.enter_context(connected(address)) if address else None  # finds a wrong address before anything is written
        launched = []
        for (experiment, path), known in zip(grids, facts, strict=True):
            workdir = stack.enter_context(open_workdir(path.absolute(), experiment, known))
            launched.append(_programs(experiment, workdir, known["examples"][0]))
        everything = [program for of_grid in launched for program in of_grid]
        if any(program.pending for program in everything):
            Launch(ray or stack.enter_context(connected(None)), everything).train(progress)
        complete = [not any(program.failure for program in of_grid) for of_grid in launched]
        for of_grid, done in zip(launched, complete, strict=True):
            if done:
                workdir, status = of_grid[0].task.workdir, summed(of_grid, time.monotonic())
                shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
                record_provenance(workdir, "finish", finished=status.finished, diverged=status.diverged)
        return complete


def _facts(experiment: Experiment) -> dict[str, Any]:
    """Returns the facts about an experiment's data, after checking that the experiment fits it."""
    import jax

    from smallbatch_jax import data
    from smallbatch_jax.runner import grid

    jax.config.update("jax_platforms", "cpu")  # accelerators are for the workers
    dataset = data.load_section(experiment.dataset)
    grid.require_trainable(experiment, dataset)
    return grid.facts(experiment, dataset)


def _programs(experiment: Experiment, workdir: Path, num_examples: int) -> list[LaunchedProgram]:
    """Returns the programs of a grid with their progress; makes the results file of each."""
    from smallbatch_jax.data.order import BatchSchedule

    sent, data_dir = experiment, experiment.dataset.data_dir
    if data_dir and not data_dir.startswith("~"):  # a worker may run in another folder
        absolute = dataclasses.replace(experiment.dataset, data_dir=os.path.abspath(data_dir))
        sent = dataclasses.replace(experiment, dataset=absolute)
    epochs, owner, found = experiment.epochs, (workdir / "lock").read_text(), []
    for (m, b), runs in programs(experiment.runs()).items():
        with ProgramResults(workdir, m, b, OWNER_SECONDS, experiment) as stored:
            status = Status()
            status.add_program(dict.fromkeys(runs, epochs), stored, num_examples)
            pending = status.runs - status.done
            if not pending:  # no worker will open the trackers
                with Trackers(experiment, workdir, [stored]):
                    pass
            task = ProgramTask(sent, workdir, (m, b), owner, stored.rows(), sys.argv)
        name, steps = f"{experiment.name}, {title(m, b)}", BatchSchedule.of(experiment, num_examples, m).total_steps
        found.append(LaunchedProgram(name, task, pending, steps, status))
    return found


def summed(programs: list[LaunchedProgram], started: float) -> Status:
    """Returns the combined status of programs since `started`, a time.monotonic()."""
    names = ("runs", "images", "finished", "diverged", "trained", "running", "images_per_second")
    total: dict[str, Any] = {name: sum(getattr(program.status, name) for program in programs) for name in names}
    status = Status(started=started, **total)
    for program in programs:
        status.note(program.status.best, program.status.metric)
    return status


def resources(nodes: Sequence[Mapping[str, float]], runs: int, lanes: int | None, sharing: int = 1) -> dict[str, int]:
    """Returns the resources of a task: a GPU if any machine has one, else a CPU per lane, within the largest machine.

    `sharing` devices share each batch: a task has as many GPUs, or as many CPUs per lane.
    """
    from smallbatch_jax.runner.jobs import MOST_LANES

    kind, most = largest(nodes)
    if kind == "GPU":
        return {"num_gpus": sharing}
    return {"num_cpus": sharing * max(1, min(runs, lanes or MOST_LANES, most // sharing))}


def largest(nodes: Sequence[Mapping[str, float]]) -> tuple[str, int]:
    """Returns the kind of device that trains, GPU if any machine has one, and the most that a machine has."""
    most = {kind: max((int(node.get(kind, 0)) for node in nodes), default=0) for kind in ("GPU", "CPU")}
    return ("GPU", most["GPU"]) if most["GPU"] else ("CPU", most["CPU"])


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yields `ray` connected to the cluster at `address`, or to a new one on this machine; silences Ray within the block.

    Raises:
      InputError: if no cluster can be reached or started.
    """
    import ray

    from smallbatch_jax.program.devices import cores

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": cores(), "object_store_memory": STORE_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, handled())  # Ray's processes inherit the mask and survive a signal to the group
    try:
        if address and re.fullmatch(r"[^/]+:\d+", address):  # Ray would try for minutes, and log that
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # the child executes Ray at once
            ray.init(address or "local", **options)
    except Exception as error:  # Ray raises errors of many types
        failed = f"--address={address}: no Ray cluster can be reached" if address else "no Ray cluster can be started here"
        raise InputError(f"{failed}: {_one_line(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray's handler would exit silently
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled())
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), ExitStack() as stack:
        stack.callback(ray.shutdown)
        yield ray  # which prints a report of each worker that dies


class Reports:
    """Actor that holds the last report of each task by Ray's id; if its process dies, it restarts empty."""

    def __init__(self) -> None:
        self._last: dict[str, Status | None] = {}

    def add(self, task_id: str, status: Status | None) -> None:
        self._last[task_id] = status

    def last(self) -> dict[str, Status | None]:
        return self._last


def _train(task: ProgramTask, cpu_devices: int | None, reports: Any) -> Outcome:
    """Body of a Ray task. `ray.cancel` interrupts it as SIGINT would; it then saves and returns."""
    import ray

    stop, task_id = Stop(), ray.get_runtime_context().get_task_id()
    signal.signal(signal.SIGINT, lambda signum, frame: setattr(stop, "signum", signum))
    try:
        return worker.train(task, cpu_devices, stop, lambda status: reports.add.remote(task_id, status))
    except Exception:
        traceback.print_exc()  # goes to the worker's log; the launcher prints one line
        raise


class Launch:
    """The programs of one launch, handed to Ray."""

    def __init__(self, ray: Any, programs: list[LaunchedProgram]):
        self._ray, self._programs, self._started = ray, programs, time.monotonic()
        node = ray.get_runtime_context().get_node_id()  # if the launcher's machine dies, the launch is over anyway
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        self._reports = ray.remote(Reports).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        self._train = ray.remote(max_calls=1, max_retries=RETRIES)(_train)
        self._running: dict[Any, LaunchedProgram] = {}  # by the reference of its task
        self._working = 0  # programs that a worker has begun

    def train(self, progress: Progress) -> None:
        """Returns when each program is trained or has failed; raises `Interrupted` on a signal, once the workers have saved."""
        self._require_devices()
        with noted_signals() as stop:
            for program in sorted(self._programs, key=lambda program: (-program.steps, -program.pending)):
                if program.pending:  # the longest programs start first
                    self._submit(program)
            try:
                while self._running and not stop.signum:
                    self._follow()
                    for task, program in list(self._running.items()):
                        if self._resources(program).get("num_cpus", math.inf) < program.resources.get("num_cpus", 0):
                            self._ray.cancel(task)  # no remaining machine has that many CPUs; Ray would wait forever
                            self._submit(self._running.pop(task))
                    doing = f"{self._working} programs at work, {len(self._running) - self._working} waiting"
                    progress.show(summed(self._programs, self._started), doing)
                for task in self._running:
                    self._ray.cancel(task)
                deadline = time.monotonic() + STOP_SECONDS
                while self._running and time.monotonic() < deadline:
                    self._follow()
                for program in self._programs:
                    if not (stop.signum or program.failure) and program.status.done < program.status.runs:
                        _fail(program, "its worker was interrupted; the same command resumes")
            finally:
                progress.close(summed(self._programs, self._started))
        if stop.signum:
            raise Interrupted(stop.signum)

    def _require_devices(self) -> None:
        """Raises InputError if no machine has the devices that share a program's batches; Ray would wait for one."""
        sharing = max(program.task.experiment.data_devices or 1 for program in self._programs)
        if sharing == 1:
            return
        kind, most = largest(self._machines())
        if sharing > most:
            raise InputError(f"data_devices: got {sharing}, but no machine of the cluster has more than {most} {kind}s.")

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _resources(self, program: LaunchedProgram) -> dict[str, int]:
        experiment = program.task.experiment
        return resources(self._machines(), program.status.runs, experiment.lanes, experiment.data_devices or 1)

    def _submit(self, program: LaunchedProgram) -> None:
        program.resources = self._resources(program)
        task = self._train.options(name=program.name, **program.resources)
        self._running[task.remote(program.task, program.resources.get("num_cpus"), self._reports)] = program

    def _follow(self) -> None:
        """Waits briefly for tasks to end, and reads the reports of the others."""
        ended, _ = self._ray.wait(list(self._running), timeout=POLL_SECONDS)
        for task in ended:
            self._end(self._running.pop(task), task)
        try:
            reports = self._ray.get(self._reports.last.remote(), timeout=ANSWER_SECONDS)
        except self._ray.exceptions.RayError:
            return
        found = {task.task_id().hex(): program for task, program in self._running.items()}
        for task_id in found.keys() & reports:
            found[task_id].status = reports[task_id] or found[task_id].status
        self._working = len(found.keys() & reports)

    def _end(self, program: LaunchedProgram, task: Any) -> None:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(task)
        except errors.TaskCancelledError:
            return
        except errors.RayTaskError as error:
            outcome = Outcome(None, f"{type(error.cause).__name__}: {error.cause}")
        except errors.RayError as error:
            outcome = Outcome(None, f"its worker died {RETRIES + 1} times, at last with {type(error).__name__}: {error}")
        program.status = dataclasses.replace(outcome.status or program.status, running=0, images_per_second=0.0)
        _store(program.task, outcome)
        if outcome.failure:
            _fail(program, outcome.failure)


def _fail(program: LaunchedProgram, reason: str) -> None:
    program.failure = _one_line(reason)
    print(f"{program.name}: {program.failure}", file=sys.stderr, flush=True)


def _store(task: ProgramTask, outcome: Outcome) -> None:
    """Adds the files that a worker wrote elsewhere to the workdir."""
    if outcome.rows:
        with ProgramResults(task.workdir, *task.shape, experiment=task.experiment) as stored:
            stored.append(outcome.rows)
            with Trackers(task.experiment, task.workdir, [stored]):
                pass
    for name, text in outcome.logs.items():
        header, _, lines = text.partition("\n") if name.endswith(".csv") else ("", "", text)
        append_line(task.workdir / name, lines.rstrip("\n"), header)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
