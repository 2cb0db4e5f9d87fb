"""The results store: rows appended by runs as they come, read by everyone else.

WORKDIR/results/m00008_b00008.csv holds the rows of one program (batch size, BN batch size), one row per run and epoch.
Files are only ever appended to, and a row that is stored already is not written again: a run that is trained again from an
older checkpoint adds only what was missing. A line that a killed process left half written is dropped.
"""

import copy
import math
import os
import statistics
import time
import warnings
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smallbatch_jax.config.experiment import InputError, Run, programs
from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.store.files import AppendOnly, read_table, table_frame, write_atomically
from smallbatch_jax.store.timings import Timings as Timings
from smallbatch_jax.store.timings import load_timings as load_timings
from smallbatch_jax.store.workdir import read_workdir

if TYPE_CHECKING:
    import pandas as pd


class Row(NamedTuple):
    """The metrics of a run in one epoch. A diverged run's last row has NaN accuracies, whatever the losses."""

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


COLUMNS = ("experiment", "batch_size", "base_lr", "bn_batch_size", *Row._fields[3:], "status", "bn_statistics")  # of `load`
RUN_COLUMNS = ("batch_size", "bn_batch_size", "base_lr", "seed")
_HEADER = ",".join(Row._fields) + "\n"


def path_of(workdir: Path, batch_size: int, bn_batch_size: int) -> Path:
    """The file that holds the rows of a program."""
    return workdir / "results" / f"m{batch_size:05d}_b{bn_batch_size:05d}.csv"


class Owned(InputError):
    """Another process writes the rows of this program."""


class ProgramResults:
    """The rows of one program, open for appending by one process at a time; a context manager.

    Raises:
      Owned: if another process has them open, and does not close them within `wait_seconds`.
      WriteError, InputError: if they cannot be written.
    """

    def __init__(self, workdir: Path, batch_size: int, bn_batch_size: int, wait_seconds: float = 0.0):
        self.path = path_of(workdir, batch_size, bn_batch_size)
        self._deadline = time.monotonic() + wait_seconds
        self._last_rows: dict[Run, deque[Row]] = {}  # the LAST_EPOCHS of each run
        self._file: AppendOnly | None = self._opened()
        try:
            if not self.path.stat().st_size:
                self._file.append(_HEADER)
            found, damaged = read_table(self.path, Row)
            kept = []
            for row in found:  # a run is trained again from its first missing epoch
                if row.epoch == self.epochs(row.run) + 1 and not self.diverged(row.run):
                    self._note(row)
                    kept.append(row)
            if damaged or len(kept) < len(found):
                write_atomically(self.path, _HEADER + "".join(map(_line, kept)))
                self._file.close()  # it has another file's name now
                self._file = self._opened()
        except BaseException:
            self._file.close()
            raise

    def _opened(self) -> AppendOnly:
        while not (file := AppendOnly(self.path)).lock(wait=False):
            file.close()
            if time.monotonic() >= self._deadline:
                raise Owned(f"{self.path} belongs to another process, which trains this program.")
            time.sleep(0.2)
        return file

    def followed(self) -> "ProgramResults":
        """A copy for a process that writes nothing; it must be given every row that the writer appends."""
        follower = copy.copy(self)
        follower._file = None
        return follower

    def _note(self, row: Row) -> None:
        self._last_rows.setdefault(row.run, deque(maxlen=LAST_EPOCHS)).append(row)

    def rows(self) -> list[Row]:
        """All stored rows, those of a run in the order of its epochs; for the process that writes them."""
        return sorted(read_table(self.path, Row)[0], key=lambda row: row.epoch)

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Writes the rows that are not stored yet, all or none, and returns them.

        Raises:
          WriteError: if they cannot be written.
        """
        new = [row for row in rows if row.epoch > self.epochs(row.run) and not self.diverged(row.run)]
        if new and self._file:
            self._file.append("".join(map(_line, new)))
        for row in new:
            self._note(row)
        return new

    def sync(self) -> None:
        """Waits until the rows are on the disk; to be called before a checkpoint that counts on them."""
        if self._file:
            self._file.sync()

    def epochs(self, run: Run) -> int:
        """Number of epochs of a run that are stored."""
        return self._last_rows[run][-1].epoch if run in self._last_rows else 0

    def complete(self, run: Run, epochs: int) -> bool:
        """Returns whether a run needs no more training: it diverged, or its last epoch is stored."""
        return self.diverged(run) or self.epochs(run) >= epochs

    def diverged(self, run: Run) -> bool:
        return run in self._last_rows and self._last_rows[run][-1].diverged

    def final_accuracy(self, run: Run, *new: Row) -> float:
        """The median test accuracy of a run's last epochs (§3.1), with rows not stored yet; NaN if it diverged."""
        last = [*self._last_rows.get(run, ()), *new][-LAST_EPOCHS:]
        return math.nan if self.diverged(run) else statistics.median(row.test_accuracy for row in last)

    def __enter__(self) -> "ProgramResults":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()


def _line(row: Row) -> str:
    return ",".join(map(repr, row)) + "\n"


def load(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Every row stored in a workdir, one per run and epoch, sorted by run and epoch.

    Columns: experiment (its name); batch_size m; base_lr η̃; bn_batch_size (m where none was given); seed; epoch 1…E; step,
    updates taken; train_loss and train_accuracy, means over the epoch's batches as seen; test_loss and test_accuracy over
    the whole test set (accuracies are fractions); status of the run: running, finished or diverged. A diverged run ends
    with the epoch it died in, the step of the first loss that was not finite, and accuracies NaN. bn_statistics: what batch
    norm was evaluated with, running averages or precise statistics (`model.bn_statistics`).

    A warning, one line, names what could not be read: a file that is missing, lines that are damaged or lost.

    Raises:
      InputError: if the folder is no workdir.
    """
    import numpy as np

    workdir = Path(expanded_path("workdir", workdir))
    experiment, _ = read_workdir(workdir)
    found = sorted((workdir / "results").glob("m*_b*.csv"))
    missing = sorted({path_of(workdir, m, b) for m, b in programs(experiment.runs())} - set(found))
    if found and missing:  # a sweep makes all files as it begins
        warnings.warn(f"{', '.join(map(str, missing))}: missing; the runs count as not trained", stacklevel=2)
    frame = table_frame((row for path in found for row in _readable_rows(path)), Row)
    frame = frame.sort_values([*RUN_COLUMNS, "epoch"], kind="stable", ignore_index=True)
    frame = frame.drop_duplicates([*RUN_COLUMNS, "epoch"], ignore_index=True)
    frame["diverged"] = frame["test_accuracy"].isna()
    runs = frame.groupby(list(RUN_COLUMNS), sort=False)
    if broken := int((runs["epoch"].max() > runs.size()).sum()):
        warnings.warn(
            f"{workdir}: rows of earlier epochs are missing (runs: {broken}); the same sweep trains them again", stacklevel=2
        )
    finished = runs["epoch"].transform("max") >= experiment.epochs
    frame["status"] = np.where(runs["diverged"].transform("any"), "diverged", np.where(finished, "finished", "running"))
    frame["experiment"], frame["bn_statistics"] = experiment.name, experiment.model.bn_statistics
    return frame[list(COLUMNS)]


def _readable_rows(path: Path) -> list[Row]:
    """The rows of a file; a warning says what was left out."""
    try:
        rows, damaged = read_table(path, Row)
    except OSError as error:
        warnings.warn(f"{path} left out: {error.strerror}", stacklevel=3)
        return []
    if damaged:
        warnings.warn(f"{path}: left out lines that are not whole", stacklevel=3)
    return rows
