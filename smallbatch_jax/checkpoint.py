"""Checkpoints of a program's lanes, by Orbax: atomic, the last two kept."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from smallbatch_jax.experiment import Run

KEEP = 2
PyTree = Any


class Checkpoints:
    """The checkpoints of one program, in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._checkpointer: ocp.training.Checkpointer | None = None

    def _open(self) -> ocp.training.Checkpointer:
        if self._checkpointer is None:
            policies: Any = {
                "preservation_policy": ocp.training.preservation_policies.LatestN(KEEP),
                "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            }
            folder: Any = self._folder.resolve()
            self._checkpointer = ocp.training.Checkpointer(folder, cleanup_tmp_directories=True, **policies)
        return self._checkpointer

    def save(self, lanes: PyTree, runs: list[Run | None]) -> None:
        """Saves the stacked lanes and the run in each; returns once they are on the disk."""
        checkpointer = self._open()
        latest = checkpointer.latest
        occupants: Any = [None if run is None else dataclasses.asdict(run) for run in runs]
        checkpointer.save(
            0 if latest is None else latest.step + 1,
            jax.tree.map(np.asarray, lanes),
            custom_metadata={"runs": occupants},
        )

    def restore(self, template: PyTree) -> tuple[PyTree, list[Run | None]] | None:
        """The lanes last saved, as NumPy arrays stacked by lane, and the run in each; None if nothing was saved.

        Their number may differ from that of `template`, whose leaves give the other axes and the dtypes.
        """
        if not self._folder.is_dir():
            return None
        checkpointer = self._open()
        latest = checkpointer.latest
        if latest is None:
            return None
        metadata: Any = checkpointer.metadata(latest.step).custom_metadata
        runs = [None if run is None else Run(**run) for run in metadata["runs"]]
        here = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(runs), *x.shape[1:]), x.dtype, sharding=here), template)
        return jax.tree.map(np.asarray, checkpointer.load(latest.step, abstract)), runs

    def delete(self) -> None:
        """Removes the checkpoints of a program that is done."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
