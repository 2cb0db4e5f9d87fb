"""Weights & Biases as a tracker; the package is an extra and imported only where it is asked for."""

import hashlib
import secrets
import shutil
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment, InputError, Run
from smallbatch_jax.store.files import append_line
from smallbatch_jax.store.results import Row
from smallbatch_jax.tracking.metrics import hparams, name_of, scalars

UPLOAD_SECONDS = 60.0  # that W&B may take for what a run still has to upload as it ends


def require_project(project: str | None) -> None:
    """Refuses a project name that W&B does not accept, with an InputError."""
    if project and (len(project) > 128 or set(project) & set("/\\#?%:")):
        raise InputError(f"wandb: got {project!r}, accepts at most 128 characters and none of / \\ # ? % :")


class WandbRun:
    """A W&B run; the workdir keeps its id, so that a resumed run continues the same W&B run.

    W&B says how many rows its server has; only the rest is logged. Offline it keeps each session in a folder of its own,
    WORKDIR/wandb/offline-run-…: a session logs all rows, and replaces those before it unless they were uploaded.
    """

    def __init__(self, experiment: Experiment, workdir: Path, run: Run):
        import wandb

        folder, name = workdir / "wandb", name_of(run)
        identity = hashlib.sha256(f"{_key(folder)} {experiment.wandb} {name}".encode()).hexdigest()[:16]
        for session in folder.glob(f"offline-run-*-{identity}"):
            if not list(session.glob("*.synced")):
                shutil.rmtree(session)
        limits = {"finish_timeout": UPLOAD_SECONDS, "finish_timeout_raises": True}  # unknown to older versions
        known = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=experiment.wandb,
            group=experiment.name,
            name=name,
            id=identity,
            config=hparams(experiment, run),
            dir=str(workdir),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, **known
            ),
        )
        self.shown = max(0, self._run.step - 1)

    def show(self, rows: list[Row]) -> None:
        for row in rows:
            self._run.log(scalars(row), step=row.epoch, commit=True)

    def end(self, epoch: int, outcome: dict[str, float]) -> None:
        self._run.summary.update(outcome)
        self._run.finish()

    def close(self) -> None:
        self._run.finish(exit_code=1)  # to be resumed


def _key(folder: Path) -> str:
    """Returns the workdir's unique key, created on first use."""
    path = folder / "identity"
    if not path.exists():
        append_line(path, secrets.token_hex(8))
    return path.read_text().split("\n")[0]  # the first, if several processes made one at once
