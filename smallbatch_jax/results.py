"""The results store: rows appended by runs as they come, read by everyone else.

WORKDIR/results/m00008_b00008.csv holds the rows of one program (batch size, BN batch size), one row per run and epoch.
Files are only ever appended to, a row at a time, and a row that is there already is not written again: a run that is
trained again from an older checkpoint adds only what was missing. What a killed process left half written is dropped.
"""

import csv
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from smallbatch_jax.experiment import Experiment, Run
from smallbatch_jax.workdir import read_experiment

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


class ProgramResults:
    """The rows of one program, open for appending; a context manager."""

    def __init__(self, workdir: Path, batch_size: int, bn_batch_size: int):
        self.path = workdir / "results" / f"m{batch_size:05d}_b{bn_batch_size:05d}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._epochs: dict[Run, int] = {}
        self._diverged: set[Run] = set()
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
        self._cut_torn_line()
        for row in _read_rows(self.path):
            self._note(row)

    def _cut_torn_line(self) -> None:
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.seek(whole)
        self._file.truncate()
        if whole == 0:
            self._file.write(_HEADER.encode())
            self._file.flush()

    def _note(self, row: Row) -> None:
        self._epochs[row.run] = max(row.epoch, self._epochs.get(row.run, 0))
        if row.diverged:
            self._diverged.add(row.run)

    def append(self, rows: Iterable[Row]) -> None:
        """Writes the rows that are not there yet, whole or not at all as far as readers see."""
        new = [row for row in rows if row.epoch > self._epochs.get(row.run, 0) and row.run not in self._diverged]
        if new:
            self._file.write("".join(",".join(map(repr, row)) + "\n" for row in new).encode())
            self._file.flush()
            for row in new:
                self._note(row)

    def sync(self) -> None:
        """Brings the rows to the disk, before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def complete(self, run: Run, epochs: int) -> bool:
        """Whether a run needs no more training: it diverged, or its last epoch is there."""
        return run in self._diverged or self._epochs.get(run, 0) >= epochs

    def diverged(self, run: Run) -> bool:
        return run in self._diverged

    def __enter__(self) -> "ProgramResults":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()


def _read_rows(path: Path) -> list[Row]:
    """The whole rows of a file; a damaged line is left out, and so is what follows the last line break, half written."""
    with open(path, newline="") as file:
        _, *lines, torn = file.read().split("\n") or [""]
    rows, damaged = [], bool(torn)
    for line in csv.reader(lines):
        try:
            values: Any = [kind(value) for kind, value in zip(_TYPES, line, strict=True)]
        except ValueError:
            damaged = True
        else:
            rows.append(Row(*values))
    if damaged:
        warnings.warn(f"{path}: left out lines that are not whole", stacklevel=3)
    return rows


def load(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Every row stored in a workdir, one per run and epoch, sorted by run and epoch.

    Columns: experiment (its name); batch_size m; base_lr η̃; bn_batch_size (m where none was given); seed; epoch 1…E; step,
    updates taken; train_loss and train_accuracy, means over the epoch's batches as seen; test_loss and test_accuracy over
    the whole test set (accuracies are fractions); status of the run: running, finished or diverged. A diverged run ends
    with the epoch it died in, the step of the first loss that was not finite, and accuracies NaN. bn_statistics: what batch
    norm was evaluated with, running averages or precise statistics (`model.bn_statistics`).

    Raises:
      InputError: if the folder is no workdir.
    """
    import pandas as pd

    experiment = read_experiment(Path(workdir))
    frames = [_frame(_read_rows(path)) for path in sorted((Path(workdir) / "results").glob("m*_b*.csv"))]
    frame = pd.concat(frames, ignore_index=True) if frames else _frame([])
    frame = frame.sort_values([*RUN_COLUMNS, "epoch"], kind="stable", ignore_index=True)
    frame = frame.drop_duplicates([*RUN_COLUMNS, "epoch"], ignore_index=True)
    frame.insert(0, "experiment", experiment.name)
    frame["status"] = _status(frame, experiment)
    frame["bn_statistics"] = experiment.model.bn_statistics
    return frame[list(COLUMNS)]


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


TIMING_COLUMNS = ("phase", "batch_size", "bn_batch_size", "lanes", "seconds", "steps", "images")


class Timings:
    """Appends to WORKDIR/timings.csv: seconds per phase (import, data, compile, segment, checkpoint, draw) and program."""

    def __init__(self, workdir: Path):
        self._path = workdir / "timings.csv"

    def add(
        self,
        phase: str,
        seconds: float,
        batch_size: int = 0,
        bn_batch_size: int = 0,
        lanes: int = 0,
        steps: int = 0,
        images: int = 0,
    ) -> None:
        """One line; steps and images are summed over the lanes."""
        row = (phase, batch_size, bn_batch_size, lanes, round(seconds, 6), steps, images)
        with open(self._path, "a") as file:
            if file.tell() == 0:
                file.write(",".join(TIMING_COLUMNS) + "\n")
            file.write(",".join(map(str, row)) + "\n")


def load_timings(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Where the time went: one row per measured piece, columns as in `Timings.add`; batch_size 0 outside programs."""
    import pandas as pd

    path = Path(workdir) / "timings.csv"
    if not path.exists():
        return pd.DataFrame(columns=list(TIMING_COLUMNS))
    return pd.read_csv(path, on_bad_lines="skip")
