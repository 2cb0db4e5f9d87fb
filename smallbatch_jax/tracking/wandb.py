"""Weights & Biases as a tracker; the package is an extra, imported only when a run is tracked."""

import hashlib
import secrets
import shutil
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment
from smallbatch_jax.store.files import append_line

LIMITS = {"finish_timeout": 60.0, "finish_timeout_raises": True}  # seconds for the last uploads; unknown to older versions


class WandbRun:
    """A W&B run; the workdir keeps its id, so that a resumed run continues the same W&B run.

    W&B reports how many rows its server has; only later rows are logged. Offline, each session has its own folder,
    WORKDIR/wandb/offline-run-…: a session logs all rows, and replaces earlier sessions that were not uploaded.
    """

    def __init__(self, experiment: Experiment, workdir: Path, name: str, hparams: dict[str, object]):
        import wandb

        folder = workdir / "wandb"
        if not (folder / "identity").exists():
            append_line(folder / "identity", secrets.token_hex(8))
        key = (folder / "identity").read_text().split("\n")[0]  # the first line, if several processes wrote one at once
        identity = hashlib.sha256(f"{key} {experiment.wandb} {name}".encode()).hexdigest()[:16]
        for session in folder.glob(f"offline-run-*-{identity}"):
            if not list(session.glob("*.synced")):
                shutil.rmtree(session)
        known = {name: value for name, value in LIMITS.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=experiment.wandb,
            group=experiment.name,
            name=name,
            id=identity,
            config=hparams,
            dir=str(workdir),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, **known
            ),
        )
        self._uploaded = max(0, self._run.step - 1)

    def show(self, points: dict[int, dict[str, float]]) -> None:
        for epoch, scalars in points.items():
            if epoch > self._uploaded:
                self._run.log(scalars, step=epoch, commit=True)

    def close(self, outcome: dict[str, float]) -> None:
        self._run.summary.update(outcome)
        self._run.finish(exit_code=0 if outcome else 1)  # 1: to be resumed
