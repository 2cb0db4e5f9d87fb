"""Trackers, which show a grid while it trains: TensorBoard, Weights & Biases.

The results store is the source of truth and is written first. A tracker starts from the stored rows and adds those it lacks:
a kill neither loses nor repeats rows, and a tracker that is turned on later also shows earlier training.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, InputError, Run
from smallbatch_jax.config.grid import name_of
from smallbatch_jax.store.files import append_line
from smallbatch_jax.store.results import SPLITS, ProgramResults, Row
from smallbatch_jax.tracking.tensorboard import DIVERGED, TensorBoardRun
from smallbatch_jax.tracking.wandb import WandbRun

# Classes of a tracked run by NAME, with the methods of TensorBoardRun; each keeps its files in WORKDIR/NAME. NAME is both the
# experiment's field that turns the tracker on and the extra of setup.cfg that installs its package.
TRACKERS = {"tensorboard": TensorBoardRun, "wandb": WandbRun}


def require(experiment: Experiment) -> None:
    """Raises InputError if the package of a tracker is not installed, or W&B does not accept the project's name."""
    for name in TRACKERS:
        if getattr(experiment, name):
            extras.require(name, name)
    project = experiment.wandb or ""
    if len(project) > 128 or set(project) & set("/\\#?%:"):
        raise InputError(f"wandb: got {project!r}, accepts at most 128 characters and none of / \\ # ? % :")


class Trackers(AbstractContextManager):
    """An experiment's trackers, none by default, as a context manager.

    The process that writes a program's rows opens them. A tracker is a convenience and may depend on a network: its first
    failure of any kind prints one line on stderr, and training continues without it. The next start brings it up to date,
    except for runs listed in WORKDIR/NAME/complete. `stored`, the programs that this process trains, are shown at once.
    """

    def __init__(self, experiment: Experiment, workdir: Path, stored: Iterable[ProgramResults]):
        self._experiment, self._workdir = experiment, workdir
        self._open = {name: dict[Run, TensorBoardRun | WandbRun]() for name in TRACKERS if getattr(experiment, name)}
        for program in stored if self._open else ():
            self.add(program, program.rows())

    def add(self, stored: ProgramResults, rows: Iterable[Row]) -> None:
        """Shows newly stored rows, each once, and a run's rows in the order of its epochs."""
        points: dict[Run, dict[int, dict[str, float]]] = {}
        for row in rows if self._open else ():
            points.setdefault(row.run, {})[row.epoch] = scalars(row)
        for run, by_epoch in points.items():
            for name in list(self._open):
                with self._warning(name):
                    self._show(name, run, by_epoch, outcome(stored, run, self._experiment.epochs))

    def _show(self, name: str, run: Run, points: dict[int, dict[str, float]], ended: dict[str, float]) -> None:
        experiment, complete = self._experiment, self._workdir / name / "complete"
        entry = f"{getattr(experiment, name)} {name_of(run)}"  # another W&B project is shown all runs
        if run not in self._open[name]:
            if complete.exists() and entry in complete.read_text().split("\n"):
                return
            complete.parent.mkdir(exist_ok=True)
            self._open[name][run] = TRACKERS[name](experiment, self._workdir, name_of(run), hparams(experiment, run))
        self._open[name][run].show(points)
        if ended:
            self._open[name].pop(run).close(ended)
            append_line(complete, entry)

    @contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            del self._open[name]
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"warning: {name} gets no further results; training continues: {reason}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for name, runs in list(self._open.items()):
            with self._warning(name):
                for tracked in runs.values():
                    tracked.close({})


def hparams(experiment: Experiment, run: Run) -> dict[str, object]:
    """Returns the hyperparameters of a run, for tables that compare runs."""
    return {
        "weight_decay": experiment.weight_decay,
        "weight_decay_mask": experiment.weight_decay_mask,
        "warmup_fraction": experiment.schedule.warmup_fraction,
        "optimizer": experiment.optimizer.name,
        **experiment.optimizer.scalars(run.batch_size, dict(run.scalars)),
        **run.to_dict(),  # scalars of the grid's axes as the grid has them
        "log2_base_lr": math.log2(run.base_lr),
        "learning_rate": experiment.optimizer.learning_rate(run.base_lr, run.batch_size),  # η, of the mean gradient
        "experiment": experiment.name,
        "dataset": experiment.dataset.name,
        "augment": experiment.dataset.augment,
        "model": experiment.model.name,
        "norm": experiment.model.norm,
        "bn_statistics": experiment.model.bn_statistics,
        "epochs": experiment.epochs,
        "precision": experiment.precision,
    }


def scalars(row: Row) -> dict[str, float]:
    """Returns the points of a run's curves at one epoch: losses, accuracies as fractions, other metrics, updates taken.

    Values that are not finite are left out: one infinite loss would spoil the axes of the runs beside it.
    """
    columns = {name: value for name, value in row.to_dict().items() if name.startswith(SPLITS)}
    values = {name.replace("_", "/", 1): value for name, value in columns.items()} | {"updates": row.step}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def outcome(stored: ProgramResults, run: Run, epochs: int) -> dict[str, float]:
    """Returns how a run ended: 1 if it diverged, else 0 and its final accuracy or other metric (§3.1); {} while it trains."""
    if stored.diverged(run):
        return {DIVERGED: 1.0}
    return {DIVERGED: 0.0, f"final/{stored.metric.column}": stored.final(run)} if stored.complete(run, epochs) else {}
