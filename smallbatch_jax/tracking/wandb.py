"""Weights & Biases as a mirror of the results store; the package is an extra and imported only where it is asked for."""

import hashlib
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, InputError, Run
from smallbatch_jax.store.files import append_line
from smallbatch_jax.store.results import Row
from smallbatch_jax.tracking.metrics import hparams, name_of, outcome, scalars

UPLOAD_SECONDS = 60.0  # that W&B may take for what a run still has to upload as it ends


def require(experiment: Experiment) -> None:
    """Refuses an experiment whose W&B project cannot be opened here.

    Raises:
      InputError: if W&B is asked for but not installed, or accepts no project of that name.
    """
    if experiment.wandb is None:
        return
    extras.require("wandb", "wandb")
    from wandb import Settings

    try:
        Settings(project=experiment.wandb)
    except Exception as error:  # of a type that depends on the version
        raise InputError(f"wandb: {error}") from None


class WeightsAndBiases:
    """One W&B run for each run, of an id that the workdir keeps, so that a resumed grid goes on in the same ones.

    W&B says up to where a run of its server came; the rest is logged. Offline it keeps each session in a folder of its own,
    WORKDIR/wandb/offline-run-…: a session logs all rows, and takes the place of those before, unless they were uploaded.

    It is a convenience that hangs on a network: the first failure, whatever it is, is told of in one line on stderr, and the
    training goes on without this mirror. The next start brings it up to date.
    """

    def __init__(self, experiment: Experiment, workdir: Path):
        self._experiment, self._workdir, self._folder = experiment, workdir, workdir / "wandb"
        self._open: dict[Run, tuple[Any, int]] = {}  # W&B's run, and the rows that it was given
        self._failed = False
        self._key, self._complete = "", frozenset[str]()
        self._try(self._begin)

    def show(self, run: Run, rows: list[Row]) -> None:
        self._try(lambda: self._show(run, rows))

    def close(self) -> None:
        self._try(lambda: [mirrored.finish(exit_code=1) for mirrored, _ in self._open.values()])  # to be resumed

    def _try(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"warning: W&B shows no more of this grid, which goes on: {reason}", file=sys.stderr, flush=True)

    def _begin(self) -> None:
        if not (self._folder / "identity").exists():
            append_line(self._folder / "identity", secrets.token_hex(8))
        self._key = (self._folder / "identity").read_text().split("\n")[0]  # the first, should several have come at once
        complete = self._folder / "complete"
        self._complete = frozenset(complete.read_text().split("\n")) if complete.exists() else self._complete

    def _show(self, run: Run, rows: list[Row]) -> None:
        name = name_of(run)
        identity = hashlib.sha256(f"{self._key} {self._experiment.wandb} {name}".encode()).hexdigest()[:16]
        if identity in self._complete:
            return
        mirrored, shown = self._open.get(run) or self._start(run, identity)
        for row in rows[shown:]:
            mirrored.log(scalars(row), step=row.epoch, commit=True)
        self._open[run] = mirrored, len(rows)
        if ended := outcome(rows, self._experiment.epochs):
            mirrored.summary.update(ended)
            mirrored.finish()
            del self._open[run]
            append_line(self._folder / "complete", identity)

    def _start(self, run: Run, identity: str) -> tuple[Any, int]:
        import wandb

        for session in self._folder.glob(f"offline-run-*-{identity}"):
            if not list(session.glob("*.synced")):
                shutil.rmtree(session)
        limits = {"finish_timeout": UPLOAD_SECONDS, "finish_timeout_raises": True}  # not known to older versions
        known = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
        mirrored = wandb.init(
            project=self._experiment.wandb,
            group=self._experiment.name,
            name=name_of(run),
            id=identity,
            config=hparams(self._experiment, run),
            dir=str(self._workdir),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, **known
            ),
        )
        return mirrored, max(0, mirrored.step - 1)
