"""Trackers show a grid while it trains: TensorBoard, Weights & Biases.

The results store is the truth and is written first. A tracker is opened with what is stored, and adds what it lacks: nothing
is lost or shown twice whenever a process was killed, and a tracker that is turned on later shows what was trained before.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, Run
from smallbatch_jax.store.files import append_line
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.tracking.metrics import name_of, outcome
from smallbatch_jax.tracking.tensorboard import TensorBoardRun
from smallbatch_jax.tracking.wandb import WandbRun, require_project


class TrackedRun(Protocol):
    """One run in one tracker, which keeps its files in WORKDIR/NAME."""

    shown: int  # rows that the tracker has

    def __init__(self, experiment: Experiment, workdir: Path, run: Run) -> None: ...

    def show(self, rows: list[Row]) -> None:
        """Shows rows that follow those shown already."""

    def end(self, epoch: int, outcome: dict[str, float]) -> None:
        """Shows how the run ended after an epoch, as `metrics.outcome` says; closes it."""

    def close(self) -> None:
        """Leaves a run that another process goes on with."""


# By the experiment's field that turns it on, which is also the extra of setup.cfg with its package.
TRACKERS: dict[str, type[TrackedRun]] = {"tensorboard": TensorBoardRun, "wandb": WandbRun}


def require(experiment: Experiment) -> None:
    """Refuses an experiment whose trackers cannot be opened here.

    Raises:
      InputError: if the package of a tracker is not installed, or W&B accepts no project of that name.
    """
    for name in TRACKERS:
        if getattr(experiment, name):
            extras.require(name, name)
    require_project(experiment.wandb)


class Trackers:
    """The trackers that an experiment asks for, none as a rule; a context manager.

    The process that writes a program's rows opens them. A tracker is a convenience and may depend on a network: its first
    failure of any kind is one line on stderr, and training goes on without it. The next start brings it up to date.

    Args:
      experiment: says which.
      workdir: of the experiment; WORKDIR/NAME/complete lists the runs that need not be shown again.
      stored: the rows of the programs that this process trains, which are shown at once.
    """

    def __init__(self, experiment: Experiment, workdir: Path, stored: Iterable[ProgramResults]):
        self._experiment, self._workdir = experiment, workdir
        self._names = [name for name in TRACKERS if getattr(experiment, name)]
        self._rows: dict[Run, list[Row]] = {}  # of runs that have not ended
        self._open: dict[tuple[str, Run], TrackedRun] = {}
        for program in stored if self._names else ():
            self.add(program.rows())

    def add(self, rows: Iterable[Row]) -> None:
        """Shows rows that are stored by now; each is given once, those of a run in the order of its epochs."""
        added = list(rows) if self._names else []
        for row in added:
            self._rows.setdefault(row.run, []).append(row)
        for run in dict.fromkeys(row.run for row in added):
            for name in list(self._names):
                with self._warning(name):
                    self._show(name, run)
            if outcome(self._rows[run], self._experiment.epochs):
                del self._rows[run]

    def _show(self, name: str, run: Run) -> None:
        rows, complete = self._rows[run], self._workdir / name / "complete"
        entry = f"{getattr(self._experiment, name)} {name_of(run)}"  # another W&B project is shown all runs
        if (name, run) not in self._open:
            if complete.exists() and entry in complete.read_text().split("\n"):
                return
            self._open[name, run] = TRACKERS[name](self._experiment, self._workdir, run)
        tracked = self._open[name, run]
        tracked.show(rows[tracked.shown :])
        tracked.shown = len(rows)
        if ended := outcome(rows, self._experiment.epochs):
            tracked.end(rows[-1].epoch, ended)
            del self._open[name, run]
            append_line(complete, entry)

    @contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._names.remove(name)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"warning: {name} shows no more of this grid, which goes on: {reason}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for key, tracked in self._open.items():
            if key[0] in self._names:
                with self._warning(key[0]):
                    tracked.close()


class NoTrackers(Trackers):
    """Trackers of a process that writes nothing."""

    def __init__(self) -> None:
        self._names, self._open = [], {}
