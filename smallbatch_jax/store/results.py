"""The results store: rows appended by runs as they come, read by everyone else.

WORKDIR/results/m00008_b00008.csv holds the rows of one program (batch size, BN batch size), one row per run and epoch.
Files are only ever appended to, a row at a time, and a row that is there already is not written again: a run that is
trained again from an older checkpoint adds only what was missing. What a killed process left half written is dropped.
"""

import copy
import math
import os
import statistics
import warnings
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from smallbatch_jax.config.experiment import Experiment, InputError, Run, programs
from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.store.files import AppendOnly, write_atomically
from smallbatch_jax.store.timings import Timings as Timings
from smallbatch_jax.store.timings import load_timings as load_timings
from smallbatch_jax.store.workdir import read_experiment

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "experiment",
    "batch_size",
    "base_lr",
    "bn_batch_size",
    "seed",
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "status",
    "bn_statistics",
)
RUN_COLUMNS = ("batch_size", "bn_batch_size", "base_lr", "seed")


class Row(NamedTuple):
    """What a run found in one epoch. A diverged run's last row has NaN accuracies, whatever the losses."""

    batch_size: int
    bn_batch_size: int
    base_lr: float
    seed: int
    epoch: int  # 1…E
    step: int  # updates taken
    train_loss: float  # mean cross-entropy over the epoch's training batches as seen, without the penalty
    train_accuracy: float  # fraction of those examples classified rightly as they were seen
    test_loss: float  # mean cross-entropy over the whole test set
    test_accuracy: float  # fraction

    @property
    def run(self) -> Run:
        return Run(self.batch_size, self.bn_batch_size, self.base_lr, self.seed)

    @property
    def diverged(self) -> bool:
        return math.isnan(self.test_accuracy)


_TYPES = [int if kind is int else float for kind in Row.__annotations__.values()]
_HEADER = ",".join(Row._fields) + "\n"


def path_of(workdir: Path, batch_size: int, bn_batch_size: int) -> Path:
    """The file that holds the rows of a program."""
    return workdir / "results" / f"m{batch_size:05d}_b{bn_batch_size:05d}.csv"


class Owned(InputError):
    """Another process writes the rows of this program."""


class ProgramResults:
    """The rows of one program, open for appending by one process at a time; a context manager.

    Raises:
      Owned: if another process has them open.
      WriteError, InputError: if they cannot be written.
    """

    def __init__(self, workdir: Path, batch_size: int, bn_batch_size: int):
        self.path = path_of(workdir, batch_size, bn_batch_size)
        self._epochs: dict[Run, int] = {}
        self._accuracies: dict[Run, deque[float]] = {}
        self._diverged: set[Run] = set()
        whole = False
        while not whole:  # a mended file is a new one, to be owned in its turn
            self._file: AppendOnly | None = AppendOnly(self.path)
            try:
                if not self._file.owned():
                    raise Owned(f"{self.path} belongs to another process, which trains this program.")
                if not self.path.stat().st_size:
                    self._file.append(_HEADER)
                rows, whole = self._mended()
            except BaseException:
                self._file.close()
                raise
            if not whole:
                self._file.close()
        for row in rows:
            self._note(row)

    def _mended(self) -> tuple[list[Row], bool]:
        """The rows that are there, of each run up to the first that is missing, and whether the file held these alone.

        If it did not, it was replaced by one that does. A run whose later rows count on lost ones is trained again from there.
        """
        found, damaged = _read_rows(self.path)
        rows: dict[Run, list[Row]] = {}
        for row in sorted(found, key=lambda row: row.epoch):
            of_run = rows.setdefault(row.run, [])
            if row.epoch == len(of_run) + 1 and not (of_run and of_run[-1].diverged):
                of_run.append(row)
        kept = {id(row) for of_run in rows.values() for row in of_run}
        rows_kept = [row for row in found if id(row) in kept]
        whole = not damaged and len(rows_kept) == len(found)
        if not whole:
            write_atomically(self.path, _HEADER + "".join(map(_line, rows_kept)))
        return rows_kept, whole

    def followed(self) -> "ProgramResults":
        """What is known so far, for a process that follows the writer of the file: it is told of all rows, and writes none."""
        follower = copy.copy(self)
        follower._file = None
        return follower

    def _note(self, row: Row) -> None:
        self._epochs[row.run] = row.epoch
        self._accuracies.setdefault(row.run, deque(maxlen=LAST_EPOCHS)).append(row.test_accuracy)
        if row.diverged:
            self._diverged.add(row.run)

    def rows(self) -> list[Row]:
        """All that are there, those of a run in the order of its epochs; for the process that writes them."""
        return sorted(_read_rows(self.path)[0], key=lambda row: row.epoch)

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Writes the rows that are not there yet, and returns them; all of them are written or, where that fails, none.

        Raises:
          WriteError: if they cannot be written.
        """
        new = [row for row in rows if row.epoch > self.epochs(row.run) and row.run not in self._diverged]
        if new:
            if self._file:
                self._file.append("".join(map(_line, new)))
            for row in new:
                self._note(row)
        return new

    def sync(self) -> None:
        """Brings the rows to the disk, before a checkpoint that counts on them."""
        if self._file:
            self._file.sync()

    def epochs(self, run: Run) -> int:
        """Epochs of a run whose rows are there."""
        return self._epochs.get(run, 0)

    def complete(self, run: Run, epochs: int) -> bool:
        """Whether a run needs no more training: it diverged, or its last epoch is there."""
        return run in self._diverged or self.epochs(run) >= epochs

    def diverged(self, run: Run) -> bool:
        return run in self._diverged

    def final_accuracy(self, run: Run) -> float:
        """The median test accuracy of a run's last epochs (§3.1); NaN if it diverged."""
        return math.nan if self.diverged(run) else statistics.median(self._accuracies[run])

    def __enter__(self) -> "ProgramResults":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if self._file:
            self._file.close()


def _line(row: Row) -> str:
    return ",".join(map(repr, row)) + "\n"


def _read_rows(path: Path) -> tuple[list[Row], bool]:
    """The whole rows of a file, and whether anything in it is not one: a damaged line, or what a kill left half written."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        *lines, torn = file.read().split("\n")
    rows, damaged = [], bool(torn) or lines[:1] not in ([], [_HEADER.rstrip()])
    for line in lines:
        try:
            values: Any = [kind(value) for kind, value in zip(_TYPES, line.split(","), strict=True)]
        except ValueError:
            damaged |= line != _HEADER.rstrip()
        else:
            rows.append(Row(*values))
    return rows, damaged


def load(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Every row stored in a workdir, one per run and epoch, sorted by run and epoch.

    Columns: experiment (its name); batch_size m; base_lr η̃; bn_batch_size (m where none was given); seed; epoch 1…E; step,
    updates taken; train_loss and train_accuracy, means over the epoch's batches as seen; test_loss and test_accuracy over
    the whole test set (accuracies are fractions); status of the run: running, finished or diverged. A diverged run ends
    with the epoch it died in, the step of the first loss that was not finite, and accuracies NaN. bn_statistics: what batch
    norm was evaluated with, running averages or precise statistics (`model.bn_statistics`).

    A warning, one line, says what could not be read: a file that is missing, lines that are damaged or lost.

    Raises:
      InputError: if the folder is no workdir.
    """
    import pandas as pd

    workdir = Path(expanded_path("workdir", workdir))
    experiment = read_experiment(workdir)
    found = sorted((workdir / "results").glob("m*_b*.csv"))
    expected = {path_of(workdir, m, b) for m, b in programs(experiment.runs())}
    if found and (missing := sorted(expected - set(found))):  # a sweep makes them all as it begins
        warnings.warn(f"{', '.join(map(str, missing))}: missing; the runs count as not trained", stacklevel=2)
    frame = pd.concat([_frame([]), *(_frame(_stored_rows(path)) for path in found)], ignore_index=True)
    frame = frame.sort_values([*RUN_COLUMNS, "epoch"], kind="stable", ignore_index=True)
    frame = frame.drop_duplicates([*RUN_COLUMNS, "epoch"], ignore_index=True)
    epochs = frame.groupby(list(RUN_COLUMNS), sort=False)["epoch"].agg(["max", "size"])
    if broken := int((epochs["max"] > epochs["size"]).sum()):
        warnings.warn(
            f"{workdir}: rows of earlier epochs are missing (runs: {broken}); the same sweep trains them again", stacklevel=2
        )
    frame.insert(0, "experiment", experiment.name)
    frame["status"] = _status(frame, experiment)
    frame["bn_statistics"] = experiment.model.bn_statistics
    return frame[list(COLUMNS)]


def _stored_rows(path: Path) -> list[Row]:
    """The rows of a file for who only reads; a warning says where there is more in it."""
    try:
        rows, damaged = _read_rows(path)
    except OSError as error:
        warnings.warn(f"{path} left out: {error.strerror}", stacklevel=3)
        return []
    if damaged:
        warnings.warn(f"{path}: left out lines that are not whole", stacklevel=3)
    return rows


def _status(frame: "pd.DataFrame", experiment: Experiment) -> Any:
    """The status of each row's run."""
    import numpy as np

    runs = frame.groupby(list(RUN_COLUMNS), sort=False)
    diverged = frame["test_accuracy"].isna().groupby([frame[c] for c in RUN_COLUMNS]).transform("any")
    finished = runs["epoch"].transform("max") >= experiment.epochs
    return np.where(diverged, "diverged", np.where(finished, "finished", "running"))


def _frame(rows: list[Row]) -> "pd.DataFrame":
    import pandas as pd

    frame = pd.DataFrame(rows, columns=list(Row._fields))
    return frame.astype({name: kind.__name__ + "64" for name, kind in zip(Row._fields, _TYPES, strict=True)})
