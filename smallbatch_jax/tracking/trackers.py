"""Trackers of the results store, to watch a grid while it trains: TensorBoard's event files, Weights & Biases.

The store is the truth and is written first. A mirror is opened with what is stored, and adds what it lacks: so nothing is
lost or shown twice whenever a process was killed, and a mirror that is turned on later shows what was trained before.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, Run
from smallbatch_jax.store.files import write_from
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.tracking import wandb as weights_and_biases
from smallbatch_jax.tracking.metrics import DIVERGED, FINAL_ACCURACY, hparams, name_of, outcome, scalars

EVENT_FILE = "events.out.tfevents.0"  # of each run; TensorBoard reads what has "tfevents" in its name


def require(experiment: Experiment) -> None:
    """Refuses an experiment whose trackers cannot be opened here.

    Raises:
      InputError: if the package of a tracker is not installed, or W&B accepts no project of that name.
    """
    if experiment.tensorboard:
        extras.require("tensorboard", "tensorboard")
    weights_and_biases.require(experiment)


class Mirror(Protocol):
    """Shows runs elsewhere."""

    def show(self, run: Run, rows: list[Row]) -> None:
        """Has it show the rows of a run so far, epochs 1 to len(rows); what it shows of them already stays as it is."""

    def close(self) -> None:
        """Called once, when no more rows will come from this process."""


class Trackers:
    """The mirrors that an experiment asks for, none as a rule; a context manager.

    For each program one process has them open: that which writes the program's rows.
    """

    def __init__(self, experiment: Experiment, workdir: Path, stored: Iterable[ProgramResults]):
        """Opens them, and has them show what is stored.

        Args:
          experiment: whose `tensorboard` and `wandb` say which.
          workdir: gets TensorBoard's files in WORKDIR/tensorboard, W&B's own in WORKDIR/wandb.
          stored: the rows of the programs that this process trains.

        Raises:
          WriteError, InputError: if TensorBoard's files cannot be written.
        """
        self._epochs = experiment.epochs
        self._rows: dict[Run, list[Row]] = {}  # of runs that have not ended
        self._mirrors: list[Mirror] = []
        if experiment.tensorboard:
            self._mirrors.append(TensorBoard(experiment, workdir))
        if experiment.wandb is not None:
            self._mirrors.append(weights_and_biases.WeightsAndBiases(experiment, workdir))
        for program in stored if self._mirrors else ():
            self.add(program.rows())

    def add(self, rows: Iterable[Row]) -> None:
        """Shows rows that are stored by now, each given once, those of a run in the order of its epochs.

        Raises:
          WriteError, InputError: as when opened; what is shown then is shown by who opens the mirrors next.
        """
        last: dict[Run, Row] = {}
        for row in rows if self._mirrors else ():
            self._rows.setdefault(row.run, []).append(row)
            last[row.run] = row
        for run, row in last.items():
            for mirror in self._mirrors:
                mirror.show(run, self._rows[run])
            if row.diverged or row.epoch == self._epochs:
                del self._rows[run]

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for mirror in self._mirrors:
            mirror.close()


class NoTrackers(Trackers):
    """Of a process that writes nothing."""

    def __init__(self) -> None:
        self._mirrors = []


class TensorBoard:
    """WORKDIR/tensorboard/RUN/events.out.tfevents.0: a file for each run, which grows with the run's rows.

    What it holds follows from the rows, but for the times. So a file that is there is compared with what it should hold, as
    far as it is whole: if it agrees, what is missing is added, and a TensorBoard that looks on sees a file that grew; if not,
    it is written anew. No file stays open, no thread writes, and a full disk is told of as for any other file.
    """

    def __init__(self, experiment: Experiment, workdir: Path):
        self._experiment, self._folder = experiment, workdir / "tensorboard"
        self._written: dict[Run, tuple[int, int]] = {}  # of runs that have not ended: rows in the file, its bytes

    def show(self, run: Run, rows: list[Row]) -> None:
        from smallbatch_jax.tracking import events

        path = self._folder / name_of(run) / EVENT_FILE
        ended = outcome(rows, self._experiment.epochs)
        shown, size = self._written.pop(run, (0, 0))
        if shown and path.exists() and path.stat().st_size == size:
            missing = self._tail(rows[shown:], ended)
        else:
            start = events.session_start(hparams(self._experiment, run), (FINAL_ACCURACY, DIVERGED))
            due = [events.FILE_VERSION, start, *self._tail(rows, ended)]
            found, size = events.read(path)
            found, size = (found, size) if found == due[: len(found)] else ([], 0)
            missing = due[len(found) :]
        content = events.encode(missing)
        write_from(path, size, content)
        if not ended:
            self._written[run] = len(rows), size + len(content)

    def close(self) -> None: ...

    def _tail(self, rows: list[Row], ended: Mapping[str, float]) -> list[Any]:
        """The rows, and if a run ended with them how it did."""
        from smallbatch_jax.tracking import events

        last = rows[-1].epoch
        end = [events.scalars(last, ended), events.session_end(success=not ended[DIVERGED])] if ended else []
        return [*(events.scalars(row.epoch, scalars(row)) for row in rows), *end]
