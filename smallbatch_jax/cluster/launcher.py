"""Grids on a Ray cluster: the launcher owns the workdirs, and each program is trained by a worker wherever there is room."""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from smallbatch_jax.cluster.ray import Launch, LaunchedProgram, connected, summed
from smallbatch_jax.cluster.worker import OWNER_SECONDS, ProgramTask
from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import Experiment, programs
from smallbatch_jax.runner.progress import Progress, Status
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.workdir import open_workdir, record_provenance
from smallbatch_jax.tracking.trackers import Trackers


def train_grids(grids: Sequence[tuple[Experiment, Path]], address: str | None, progress: Progress) -> list[bool]:
    """Trains every run of the grids that their workdirs do not hold yet; returns for each grid whether it is complete.

    One line on stderr says why a program failed.

    Args:
      grids: experiments, each with a workdir of its own.
      address: of a running cluster, as Ray takes it; None starts one of this machine alone.
      progress: shown twice a second.

    Raises:
      InputError: if a grid does not fit its data, a workdir is not its experiment's, or there is no cluster.
      Interrupted: on a signal of `signals`, once the workers have saved.
    """
    extras.require("cluster", "launch.py")
    facts = [_facts(experiment) for experiment, _ in grids]
    with ExitStack() as stack:
        ray = stack.enter_context(connected(address)) if address else None  # finds a wrong address before anything is written
        launched = []
        for (experiment, path), known in zip(grids, facts, strict=True):
            workdir = stack.enter_context(open_workdir(path.absolute(), experiment, known))
            launched.append(_programs(experiment, workdir, known["examples"][0]))
        everything = [program for of_grid in launched for program in of_grid]
        if any(program.pending for program in everything):
            Launch(ray or stack.enter_context(connected(None)), everything).train(progress)
        complete = [not any(program.failure for program in of_grid) for of_grid in launched]
        for of_grid, done in zip(launched, complete, strict=True):
            if done:
                workdir, status = of_grid[0].task.workdir, summed(of_grid, time.monotonic())
                shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
                record_provenance(workdir, "finish", finished=status.finished, diverged=status.diverged)
        return complete


def _facts(experiment: Experiment) -> dict[str, Any]:
    """The facts about an experiment's data, after checking that the experiment fits it."""
    import jax

    from smallbatch_jax import data
    from smallbatch_jax.runner import grid

    jax.config.update("jax_platforms", "cpu")  # accelerators are for the workers
    source = experiment.dataset
    dataset = data.load(source.name, source.data_dir, source.image_size)
    grid.require_trainable(experiment, dataset)
    return grid.facts(dataset)


def _programs(experiment: Experiment, workdir: Path, num_examples: int) -> list[LaunchedProgram]:
    """The programs of a grid, and how far they have come; makes the results file of each."""
    from smallbatch_jax.data import order

    epochs, owner, found = experiment.epochs, (workdir / "lock").read_text(), []
    for shape, runs in programs(experiment.runs()).items():
        with ProgramResults(workdir, *shape, OWNER_SECONDS) as stored:
            complete = [run for run in runs if stored.complete(run, epochs)]
            pending = len(runs) - len(complete)
            status = Status(len(runs), pending * epochs * num_examples)
            for run in complete:
                status.add_run(stored.diverged(run), stored.final_accuracy(run))
            if not pending:  # no worker will open the trackers
                with Trackers(experiment, workdir, [stored]):
                    pass
            task = ProgramTask(_for_workers(experiment), workdir, shape, owner, stored.rows(), sys.argv)
        found.append(LaunchedProgram(task, pending, order.total_steps(epochs, num_examples, shape[0]), status))
    return found


def _for_workers(experiment: Experiment) -> Experiment:
    """The experiment with a path to its data that does not depend on the folder in which a process runs."""
    given = experiment.dataset.data_dir
    if not given or given.startswith("~"):
        return experiment
    return dataclasses.replace(experiment, dataset=dataclasses.replace(experiment.dataset, data_dir=os.path.abspath(given)))
