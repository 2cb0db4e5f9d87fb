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
from smallbatch_jax.store import skipped
from smallbatch_jax.store.files import WriteError
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.store.timings import TIMING_COLUMNS
from smallbatch_jax.tracking.trackers import TRACKERS

OWNER_SECONDS = 60.0  # for which a dead worker may keep its program's files: the death of its machine spreads slowly
# The files that all programs of a workdir append to, and their headers.
LOGS = {"timings.csv": ",".join(TIMING_COLUMNS), "skipped.csv": ",".join(skipped.COLUMNS), "provenance.jsonl": ""}

Report = Callable[[Status | None], object]  # takes the status of a program, None before it trains


@dataclass(frozen=True)
class ProgramTask:
    """One program of an experiment, as the launcher hands it out."""

    experiment: Experiment
    workdir: Path  # the launcher's, absolute
    shape: tuple[int, int]  # batch size, BN batch size
    owner: str  # the launcher's entry in the workdir's lock, by which a worker recognises the workdir
    rows: list[Row]  # stored when the task was made
    command: list[str]  # the launcher's, which provenance records

    @property
    def name(self) -> str:
        m, b = self.shape
        return f"{self.experiment.name}, m = {m}" + (f", BN batch {b}" if b != m else "")


@dataclass(frozen=True)
class Outcome:
    """How a task ended, and the files it wrote if it could not reach the workdir."""

    status: Status | None  # None if it did not come to train
    failure: str = ""  # one line; empty if all runs are stored or it was asked to stop
    rows: list[Row] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)  # the lines of LOGS, without headers


def train(task: ProgramTask, cpu_devices: int | None, stop: Stop, report: Report) -> Outcome:
    """Trains the runs of a program that are missing; to be called in a process that has not used JAX.

    `cpu_devices` of None stands for all devices that this process finds, of whatever kind. Once `stop` is set, the program is
    saved and left.
    """
    lock = task.workdir / "lock"
    if lock.exists() and lock.read_text() == task.owner:
        return _train(task, task.workdir, cpu_devices, stop, report)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ProgramResults(folder, *task.shape) as stored:
            stored.append(task.rows)
        untracked = dataclasses.replace(task.experiment, **dict.fromkeys(TRACKERS))  # the launcher's workdir has the trackers
        outcome = _train(dataclasses.replace(task, experiment=untracked), folder, cpu_devices, stop, report)
        with ProgramResults(folder, *task.shape) as stored:
            rows = stored.rows()
        written = {name: folder / name for name in LOGS if (folder / name).exists()}
        logs = {name: path.read_text().removeprefix(f"{LOGS[name]}\n") for name, path in written.items()}
        return dataclasses.replace(outcome, rows=rows, logs=logs)


def _train(task: ProgramTask, folder: Path, cpu_devices: int | None, stop: Stop, report: Report) -> Outcome:
    from smallbatch_jax import data
    from smallbatch_jax.program import devices
    from smallbatch_jax.runner import grid

    sys.argv = task.command
    progress = _Reporter(report)
    report(None)
    try:
        devices.use_all_cores(cpu_devices)
        source = task.experiment.dataset
        dataset = data.load(source.name, source.data_dir, source.image_size)
        ProgramResults(folder, *task.shape, OWNER_SECONDS).close()
        grid.train_program(task.experiment, folder, task.shape, dataset, progress, stop)
    except Interrupted:
        pass  # everything is saved
    except (InputError, WriteError) as error:
        return Outcome(progress.status, str(error))
    return Outcome(progress.status)


class _Reporter:
    """A `Progress` that reports each status."""

    def __init__(self, report: Report):
        self.status: Status | None = None
        self._report = report

    def show(self, status: Status, doing: str) -> None:
        self.status = dataclasses.replace(status)
        self._report(self.status)

    def close(self, status: Status) -> None:
        self.show(status, "")
