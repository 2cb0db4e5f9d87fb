"""The results store: rows appended by running programs and read by everything else.

WORKDIR/results/m00008_b00008.csv holds the rows of one program (batch size, BN batch size), one row per run and epoch.
Files are only ever appended to, and a row that is stored already is not written again: a run that is trained again from an
older checkpoint adds only what was missing. A line that a killed process left half written is dropped.
"""

import copy
import math
import os
import re
import shutil
import statistics
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smallbatch_jax.config import catalog
from smallbatch_jax.config.experiment import Experiment, InputError, Run, programs
from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.config.grid import RUN_COLUMNS
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.store.files import AppendOnly, count, whole_lines, write_atomically, writing
from smallbatch_jax.store.timings import Timings as Timings
from smallbatch_jax.store.timings import load_timings as load_timings
from smallbatch_jax.store.workdir import is_finished, read_workdir

if TYPE_CHECKING:
    import pandas as pd


class Row(NamedTuple):
    """The metrics of a run in one epoch. A diverged run's last row has NaN accuracies, whatever the losses.

    The first ten fields are columns of the CSV files; `scalars` and `metrics` are further columns, if there are any.
    """

    batch_size: int
    bn_batch_size: int
    base_lr: float
    seed: int
    epoch: int  # 1…E
    step: int  # updates taken
    train_loss: float  # mean over the epoch's training batches as seen, without the penalty
    train_accuracy: float | None  # fraction of those examples classified correctly as seen; None: not of this task
    test_loss: float  # mean over the whole test set; NaN in a diverged run's last row if the task has no accuracy
    test_accuracy: float | None  # fraction
    scalars: tuple[tuple[str, float], ...] = ()  # the run's values on the grid's further axes
    metrics: tuple[tuple[str, float], ...] = ()  # other columns, such as "test_top5_accuracy" and "validation_loss"

    @property
    def run(self) -> Run:
        return Run(self.batch_size, self.bn_batch_size, self.base_lr, self.seed, self.scalars)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.test_loss) if self.test_accuracy is None else math.isnan(self.test_accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row's values by column."""
        return dict(zip(_FIXED, self, strict=False)) | dict(self.scalars) | dict(self.metrics)


def _fraction(text: str) -> float | None:
    value = float(text) if text else None
    if value is not None and (value < 0 or value > 1):
        raise ValueError(f"{text} is not a fraction")
    return value


SPLITS = ("train_", "test_", "validation_")  # prefixes of metric columns
_PARSERS: dict[Any, Callable[[str], Any]] = {int: count, float: float, float | None: _fraction}
_FIXED = {name: _PARSERS[kind] for name, kind in [*Row.__annotations__.items()][:10]}
COLUMNS = ("experiment", "batch_size", "base_lr", "bn_batch_size", *list(_FIXED)[3:], "status", "bn_statistics")  # of `load`
_DTYPES = {name: "int64" if parse is count else "float64" for name, parse in _FIXED.items()}


PAPER = Experiment()  # its results have the fixed columns alone


def further_columns(experiment: Experiment) -> tuple[str, ...]:
    """Returns the columns of an experiment's results after the fixed ones."""
    names = ("loss", *experiment.metric_names())
    columns = [f"{split}_{name}" for split in ("train", *experiment.splits()) for name in names]
    columns += catalog.diagnostic_columns(experiment.diagnostics)
    return (*experiment.grid.axes(), *(name for name in columns if name not in _FIXED))


def path_of(workdir: Path, batch_size: int, bn_batch_size: int) -> Path:
    """Returns the file that holds a program's rows."""
    return workdir / "results" / f"m{batch_size:05d}_b{bn_batch_size:05d}.csv"


class ProgramResults(AbstractContextManager["ProgramResults"]):
    """Rows of one program, open for appending by one process at a time; a context manager.

    Raises:
      InputError: if another process has them open, and does not close them within `wait_seconds`.
      WriteError, InputError: if they cannot be written.
    """

    def __init__(
        self, workdir: Path, batch_size: int, bn_batch_size: int, wait_seconds: float = 0.0, experiment: Experiment = PAPER
    ):
        self.metric, self.further = experiment.metric, further_columns(experiment)
        self._header = ",".join([*_FIXED, *self.further]) + "\n"
        self.path = path_of(workdir, batch_size, bn_batch_size)
        self._deadline = time.monotonic() + wait_seconds
        self._curves: dict[Run, array[float]] = {}  # the metric of each run by epoch; NaN in the last if it diverged
        self._diverged: set[Run] = set()
        self._file: AppendOnly | None = self._opened()
        try:
            if not self.path.stat().st_size:
                self._file.append(self._header)
            found, damaged = read_rows(self.path, self.further)
            kept = []
            for row in found:  # a run is trained again from its first missing epoch
                if row.epoch == self.epochs(row.run) + 1 and not self.diverged(row.run):
                    self._note(row)
                    kept.append(row)
            if damaged or len(kept) < len(found):
                if len(kept) < len(whole_lines(self.path)[0]) - 1:  # else only a line that a kill left half written
                    aside = shutil.copyfile(self.path, f"{self.path}.damaged")
                    warnings.warn(f"{self.path}: lines that cannot be used were removed; {aside} has them", stacklevel=2)
                write_atomically(self.path, self._header + "".join(map(_line, kept)))
                self._file.close()  # its path belongs to the new file now
                self._file = self._opened()
        except BaseException:
            self._file.close()
            raise

    def _opened(self) -> AppendOnly:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        while not (file := AppendOnly(self.path)).lock(wait=False):
            file.close()
            if time.monotonic() >= self._deadline:
                raise InputError(f"{self.path} belongs to another process, which trains this program.")
            time.sleep(0.2)
        return file

    def followed(self) -> "ProgramResults":
        """Returns a copy for a process that writes nothing; it must be given every row that the writer appends."""
        follower = copy.copy(self)
        follower._file = None
        return follower

    def _note(self, row: Row) -> None:
        self._curves.setdefault(row.run, array("d")).append(self._value(row))
        if row.diverged:
            self._diverged.add(row.run)

    def _value(self, row: Row) -> float:
        return math.nan if row.diverged else row.to_dict()[self.metric.column]

    def rows(self) -> list[Row]:
        """Returns all stored rows, sorted by epoch; only for the process that writes them."""
        return sorted(read_rows(self.path, self.further)[0], key=lambda row: row.epoch)

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
        """Waits until the rows are on the disk; call it before saving a checkpoint that relies on them."""
        if self._file:
            self._file.sync()

    def epochs(self, run: Run) -> int:
        """Returns the number of stored epochs of a run."""
        return len(self._curves.get(run, ()))

    def curve(self, run: Run, epochs: int) -> list[float]:
        """Returns a run's metric after each of its first epochs; NaN after the one in which it diverged."""
        return list(self._curves.get(run, ())[:epochs])

    def complete(self, run: Run, epochs: int) -> bool:
        """Returns whether a run needs no more training: it diverged, or its last epoch is stored."""
        return self.diverged(run) or self.epochs(run) >= epochs

    def diverged(self, run: Run) -> bool:
        return run in self._diverged

    def final(self, run: Run, *new: Row) -> float:
        """Returns the median of a run's metric over its last epochs (§3.1), including `new` rows; NaN if it diverged."""
        last = [*self._curves.get(run, ()), *map(self._value, new)][-LAST_EPOCHS:]
        return math.nan if self.diverged(run) else statistics.median(last)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()


def _line(row: Row) -> str:
    return ",".join("" if value is None else repr(value) for value in row.to_dict().values()) + "\n"


def read_rows(path: Path, after: Sequence[str] = ()) -> tuple[list[Row], bool]:
    """Reads the rows of a file; if its header is damaged, `after` names the columns after the fixed ones.

    Returns:
      The valid rows, and whether there were damaged lines, or one that a kill left half written.
    """
    lines, damaged = whole_lines(path)
    columns = lines[0].split(",") if lines else []
    if columns[: len(_FIXED)] != list(_FIXED):
        columns, damaged = [*_FIXED, *after], damaged or bool(lines)
    names, program = columns[len(_FIXED) :], re.fullmatch(r"m(\d+)_b(\d+)", path.stem)
    shape = tuple(map(int, program.groups())) if program else None
    scalars = sum(not name.startswith(SPLITS) for name in names)  # scalars come before metrics
    parsers = [*_FIXED.values(), *[float] * len(names)]
    rows = []
    for line in lines:
        try:
            values = [parse(value) for parse, value in zip(parsers, line.split(","), strict=True)]
            further = tuple(zip(names, values[len(_FIXED) :], strict=True))
            row = Row._make((*values[: len(_FIXED)], further[:scalars], further[scalars:]))
            if shape != (row.batch_size, row.bn_batch_size):
                raise ValueError("a row of another program")
            rows.append(row)
        except ValueError:
            damaged |= line != ",".join(columns)
    return rows, damaged


def load(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Loads every row stored in a workdir, one per run and epoch, sorted by run and epoch.

    Columns: experiment (its name); batch_size m; base_lr η̃; bn_batch_size (m where none was given); seed; epoch 1…E; step,
    updates taken; train_loss and train_accuracy, means over the epoch's batches as seen; test_loss and test_accuracy over
    the whole test set (accuracies are fractions); status of the run: running, finished, diverged, or stopped (by a
    search). A diverged run ends with the epoch it diverged in, the step of the first non-finite loss, and accuracies NaN.
    bn_statistics: what batch norm was evaluated with, running averages or precise statistics (`model.bn_statistics`).

    There are further columns where these are used: the grid's further axes (`grid.weight_decays` is weight_decay), further
    metrics ("train_top5_accuracy", "test_top5_accuracy"), "validation_loss" and others of a validation split, and those of
    `diagnostics` ("train_noise_scale"). A task without accuracy, such as regression, has NaN accuracies.

    One warning line names data that could not be read: missing files, damaged or lost lines.

    Raises:
      InputError: if the folder is not a workdir.
    """
    import numpy as np
    import pandas as pd

    workdir = Path(expanded_path("workdir", workdir))
    experiment, _ = read_workdir(workdir)
    found = sorted((workdir / "results").glob("m*_b*.csv"))
    missing = sorted({path_of(workdir, m, b) for m, b in programs(experiment.runs())} - set(found))
    if found and missing:  # a sweep makes all files as it begins
        warnings.warn(f"{', '.join(map(str, missing))}: missing; its runs are treated as not trained", stacklevel=2)
    further = further_columns(experiment)
    rows = [row for path in found for row in _readable_rows(path, further)]
    if beyond := sum(row.epoch > experiment.epochs for row in rows):
        warnings.warn(f"{workdir}: left out rows of epochs beyond {experiment.epochs}: {beyond}", stacklevel=2)
        rows = [row for row in rows if row.epoch <= experiment.epochs]
    frame = pd.DataFrame([row[: len(_FIXED)] for row in rows], columns=list(_FIXED)).astype(_DTYPES)
    others = pd.DataFrame([dict(row.scalars + row.metrics) for row in rows], index=frame.index)
    frame = frame.join(others.reindex(columns=[*dict.fromkeys([*further, *others])]).astype(float))
    run = [*RUN_COLUMNS, *experiment.grid.axes()]
    has_accuracy = "accuracy" in experiment.metric_names()
    frame["diverged"] = frame["test_accuracy"].isna() if has_accuracy else ~np.isfinite(frame["test_loss"])
    frame = frame.sort_values([*run, "epoch"], kind="stable", ignore_index=True)
    frame = frame.drop_duplicates([*run, "epoch"], ignore_index=True)
    runs = frame.groupby(run, sort=False)
    if broken := int((runs["epoch"].max() > runs.size()).sum()):
        warnings.warn(
            f"{workdir}: rows of earlier epochs are missing (runs: {broken}); the same sweep trains them again", stacklevel=2
        )
    finished = runs["epoch"].transform("max") >= experiment.epochs
    unfinished = "stopped" if experiment.search.active and is_finished(workdir) else "running"
    frame["status"] = np.where(runs["diverged"].transform("any"), "diverged", np.where(finished, "finished", unfinished))
    frame["experiment"], frame["bn_statistics"] = experiment.name, experiment.model.bn_statistics
    others = [name for name in frame if name not in COLUMNS and name != "diverged"]
    return frame[[*COLUMNS[:-2], *others, *COLUMNS[-2:]]]


def _readable_rows(path: Path, further: Sequence[str]) -> list[Row]:
    """Returns the rows of a file; warns of lines left out."""
    try:
        rows, damaged = read_rows(path, further)
    except OSError as error:
        warnings.warn(f"{path} left out: {error.strerror}", stacklevel=3)
        return []
    if damaged:
        warnings.warn(f"{path}: left out damaged or incomplete lines", stacklevel=3)
    return rows
