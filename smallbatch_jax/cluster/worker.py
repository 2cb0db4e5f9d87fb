"""One program of a grid, trained by a process of its own on some machine of a cluster.

This module does not depend on Ray. A worker that can reach the launcher's workdir writes the program's files there, and its
successor on any machine resumes from them. A worker that cannot reach it trains in a temporary folder, starting from the rows
that came with its task, and returns the files it wrote.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.runner.progress import Status
from smallbatch_jax.runner.signals import Interrupted, Stop
from smallbatch_jax.store.files import WriteError
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.tracking.trackers import TRACKERS

OWNER_SECONDS = 60.0  # time to wait for a dead worker's lock: the death of a machine is noticed late

Report = Callable[[Status | None], object]  # called with a program's status, None before it trains


@dataclass(frozen=True)
class ProgramTask:
    """One program of an experiment, which the launcher sends to a worker."""

    experiment: Experiment
    workdir: Path  # the launcher's workdir, absolute
    shape: tuple[int, int]  # batch size, BN batch size
    owner: str  # the launcher's entry in the workdir's lock, by which a worker recognises the workdir
    rows: list[Row]  # rows stored when the task was made
    command: list[str]  # the launcher's command line, recorded in provenance


@dataclass(frozen=True)
class Outcome:
    """Result of a task, with the files it wrote if it could not reach the workdir."""

    status: Status | None  # None if it did not train
    failure: str = ""  # one line; empty if all runs are stored or it was asked to stop
    rows: list[Row] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)  # lines for files shared by all programs of a workdir, by file name


def train(task: ProgramTask, cpu_devices: int | None, stop: Stop, report: Report) -> Outcome:
    """Trains the missing runs of a program; call it in a process that has not used JAX.

    If `cpu_devices` is None, the process uses all devices that it finds, of any kind. Once `stop` is set, the program is saved
    and training ends.
    """
    from smallbatch_jax import data
    from smallbatch_jax.program import devices
    from smallbatch_jax.runner import grid

    sys.argv = task.command
    progress, failure = _Reporter(report), ""
    report(None)
    lock, experiment, folder = task.workdir / "lock", task.experiment, task.workdir
    reached = lock.exists() and lock.read_text() == task.owner
    with tempfile.TemporaryDirectory() as scratch:
        if not reached:
            if experiment.keep_parameters:
                needs = "use a workdir that every machine reaches, or None"
                return Outcome(None, f"keep_parameters: {task.workdir}, which keeps them, is not reached from here; {needs}.")
            folder = Path(scratch)
            experiment = dataclasses.replace(experiment, **dict.fromkeys(TRACKERS))  # the launcher's workdir has the trackers
            with ProgramResults(folder, *task.shape, experiment=experiment) as stored:
                stored.append(task.rows)
        try:
            devices.use_all_cores(cpu_devices)
            dataset = data.load_section(experiment.dataset)
            ProgramResults(folder, *task.shape, OWNER_SECONDS, experiment).close()
            grid.train_program(experiment, folder, task.shape, dataset, progress, stop)
        except Interrupted:
            pass  # everything is saved
        except (InputError, WriteError) as error:
            failure = str(error)
        if reached:
            return Outcome(progress.status, failure)
        with ProgramResults(folder, *task.shape, experiment=experiment) as stored:
            logs = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
            return Outcome(progress.status, failure, stored.rows(), logs)


class _Reporter:
    """A `Progress` that reports each status."""

    def __init__(self, report: Report):
        self.status: Status | None = None
        self._report = report

    def show(self, status: Status, doing: str) -> None:
        self.status = status
        self._report(status)

    def close(self, status: Status) -> None:
        self.show(status, "")
