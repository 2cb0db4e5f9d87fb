"""Grids on a Ray cluster: the launcher owns the workdirs, each program is trained by a worker wherever there is room.

JAX starts in workers alone (`worker.train`); how Ray starts and watches them is in `tasks`.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from smallbatch_jax.cluster import ray as tasks
from smallbatch_jax.cluster import worker
from smallbatch_jax.cluster.ray import Program, summed
from smallbatch_jax.config.experiment import Experiment, programs
from smallbatch_jax.runner.progress import Progress, Status
from smallbatch_jax.store.workdir import open_workdir, record_provenance
from smallbatch_jax.tracking.trackers import Trackers


class Grid(NamedTuple):
    """An experiment and the folder of its results."""

    experiment: Experiment
    workdir: Path


def train_grids(grids: Sequence[Grid], address: str | None, progress: Progress) -> list[bool]:
    """Trains every run of the grids that their workdirs do not hold yet; of each grid, whether all are there then.

    A line on stderr says of each program that failed why it did.

    Args:
      grids: each with a workdir of its own.
      address: of a running cluster, as Ray takes it; None starts one of this machine alone.
      progress: told twice a second.

    Raises:
      InputError: if a grid does not fit its data, a workdir is not its experiment's, or there is no cluster.
      Interrupted: on a signal of `signals`, once the workers have saved.
    """
    ray = tasks.imported_ray()
    facts = _facts_of([grid.experiment for grid in grids])
    with ExitStack() as stack:
        if address is not None:  # a wrong one is found out before anything is written
            stack.enter_context(tasks.connected(ray, address))
        found: list[list[Program]] = []
        for grid, known in zip(grids, facts, strict=True):
            folder = stack.enter_context(open_workdir(grid.workdir.absolute(), grid.experiment, known))
            token = stack.enter_context(worker.token(folder))
            found.append(_programs(grid.experiment, folder, token, known["examples"][0]))
        of_all = [program for members in found for program in members]
        if any(program.pending for program in of_all):
            if address is None:
                stack.enter_context(tasks.connected(ray, None))
            tasks.Tasks(ray, of_all).train(progress)
        complete = [not any(program.failure for program in members) for members in found]
        for members, whole in zip(found, complete, strict=True):
            if whole:
                _finish(members[0].workdir, summed(members, time.monotonic()))
        return complete


def _finish(workdir: Path, status: Status) -> None:
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    record_provenance(workdir, "finish", finished=status.finished, diverged=status.diverged)


def _facts_of(experiments: list[Experiment]) -> list[dict[str, Any]]:
    """What is known of each experiment's data, once it is seen that the experiment fits it.

    In a process of its own: models ask JAX for its devices, which are for the workers.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_stay_off_accelerators) as process:
        return list(process.map(_facts, experiments))


def _stay_off_accelerators() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"


def _facts(experiment: Experiment) -> dict[str, Any]:
    from smallbatch_jax import data
    from smallbatch_jax.runner import grid

    source = experiment.dataset
    dataset = data.load(source.name, source.data_dir, source.image_size)
    grid.require_trainable(experiment, dataset)
    return grid.facts(dataset)


def _programs(experiment: Experiment, workdir: Path, token: str, num_examples: int) -> list[Program]:
    """The programs of a grid, and how far they have come; each has a results file from now on."""
    from smallbatch_jax.data import order

    epochs, found = experiment.epochs, []
    for shape, runs in programs(experiment.runs()).items():
        status = Status(len(runs), len(runs) * epochs * num_examples)
        pending = []
        with worker.open_results(workdir, shape) as stored:
            for run in runs:
                if stored.complete(run, epochs):
                    status.add_run(stored.diverged(run), stored.final_accuracy(run))
                    status.images -= epochs * num_examples
                else:
                    pending.append(run)
            if not pending:  # no worker will come to open them
                with Trackers(experiment, workdir, [stored]):
                    pass
        steps = order.total_steps(epochs, num_examples, shape[0])
        found.append(Program(experiment, workdir, shape, token, pending, steps, status))
    return found
