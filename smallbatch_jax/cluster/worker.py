"""One program of a grid, trained in a process of its own on some machine of a cluster.

Knows nothing of the cluster: what a worker says to its launcher goes through the function that it is given. A worker that
sees the launcher's workdir writes the program's own files there, and its successor goes on from them, wherever that runs.
One that does not trains in a folder of its own, from the rows that came along, and hands back what it wrote.
"""

import dataclasses
import os
import secrets
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.runner.progress import Status
from smallbatch_jax.store import results
from smallbatch_jax.store.files import WriteError, write_atomically
from smallbatch_jax.store.results import Owned, ProgramResults

if TYPE_CHECKING:
    from smallbatch_jax.runner.signals import Stop

REPORT_SECONDS = 1.0  # between two reports of a worker
OWNER_SECONDS = 60.0  # that a dead worker may keep its program's files from its successor: its node's death spreads slowly

Report = Callable[[Status | None], int]  # how far a program has come, None before it trains → the signal to stop at, or 0


class Part(NamedTuple):
    """One program of an experiment, as the launcher hands it out."""

    experiment: Experiment
    workdir: Path  # the launcher's, absolute
    shape: tuple[int, int]  # batch size, BN batch size
    token: str  # the name of a file in the workdir, by which those who see it know it
    rows: str  # the content of the program's results file
    command: list[str]  # the launcher's, of which provenance tells
    cpu_devices: int | None  # None: as many devices as the worker finds, of whatever kind


class Outcome(NamedTuple):
    """How a worker's part ended, and what it wrote if that was not in the workdir."""

    status: Status | None  # None if it did not come to train
    failure: str = ""  # one line; empty if all runs are there or it was asked to stop
    rows: str | None = None  # the content of the results file
    timings: str = ""  # lines for timings.csv
    provenance: str = ""  # lines for provenance.jsonl


def describe(batch_size: int, bn_batch_size: int) -> str:
    return f"m = {batch_size}" + (f", BN batch {bn_batch_size}" if bn_batch_size != batch_size else "")


@contextmanager
def token(workdir: Path) -> Iterator[str]:
    """A file in the workdir that no other folder has; its name.

    Named as a temporary file of this process, so that whoever opens the workdir next removes it if this process is killed.
    """
    path = workdir / f".shared.{os.getpid()}.{secrets.token_hex(8)}.tmp"
    write_atomically(path, "the workers of this process look for this file\n")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def open_results(workdir: Path, shape: tuple[int, int], seconds: float = OWNER_SECONDS) -> ProgramResults:
    """The rows of a program, once the one who writes them has ended.

    Raises:
      Owned: if that takes longer than so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ProgramResults(workdir, *shape)
        except Owned:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def train(part: Part, report: Report) -> Outcome:
    """Trains the runs of a program that are missing; to be called in a process that has not used JAX."""
    if (part.workdir / part.token).exists():
        return _train(part, part.workdir, report)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stored = results.path_of(folder, *part.shape)
        write_atomically(stored, part.rows)
        # What shows the runs elsewhere is kept with the launcher's workdir, and brought up to date there.
        unseen = part._replace(experiment=dataclasses.replace(part.experiment, tensorboard=False, wandb=None))
        outcome = _train(unseen, folder, report)
        _, _, timings = _read(folder / "timings.csv").partition("\n")  # without the header
        return outcome._replace(rows=_read(stored), timings=timings, provenance=_read(folder / "provenance.jsonl"))


def _train(part: Part, folder: Path, report: Report) -> Outcome:
    from smallbatch_jax import data
    from smallbatch_jax.program import devices
    from smallbatch_jax.runner import grid
    from smallbatch_jax.runner.signals import Stop

    sys.argv = part.command
    stop, failure = Stop(), ""
    with _Reporter(report, stop) as progress:
        try:
            if not stop.signum:
                devices.use_all_cores(part.cpu_devices)  # on an accelerator all that this process sees
                source = part.experiment.dataset
                dataset = data.load(source.name, source.data_dir, source.image_size)
                with open_results(folder, part.shape):
                    pass  # the one before this worker is dead
                grid.train_program(part.experiment, folder, part.shape, dataset, progress, stop)
        except grid.Interrupted:
            pass  # all is saved
        except (InputError, WriteError) as error:
            failure = str(error)
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Outcome(progress.status, failure)


class _Reporter:
    """Reports every second from a thread of its own, as a segment or a compilation may take long; a `Progress`."""

    def __init__(self, report: Report, stop: "Stop"):
        self.status: Status | None = None
        self._report, self._stop, self._ended = report, stop, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def show(self, status: Status, doing: str) -> None:
        self.status = dataclasses.replace(status)

    def close(self, status: Status) -> None:
        self.show(status, "")

    def _run(self) -> None:
        while not self._ended.wait(REPORT_SECONDS):
            self._tell()

    def _tell(self) -> None:
        with suppress(Exception):  # whatever becomes of the launcher, the work at hand is done and kept
            self._stop.signum = self._report(self.status) or self._stop.signum

    def __enter__(self) -> "_Reporter":
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
