"""Trains an experiment into a workdir, alone or as one of several processes; shared by sweep.py, train.py and search.py."""

import time
from collections.abc import Callable
from pathlib import Path

import command
import distributed
import workdirs
from absl import flags
from ml_collections import ConfigDict

from smallbatch_jax.config.experiment import Experiment

flags.disclaim_key_flags()  # the flags defined in `run` belong to the command


def run(make: Callable[[ConfigDict], Experiment], example: str) -> None:
    """Runs a command that trains the experiment which `make` returns for --config; `example` is a workdir for an error."""
    config = command.define_config_flag()
    workdir = command.DEFINE_path("workdir", "Folder of the results; made if it is not there.")
    command.run(lambda: train(make(command.given_config(config)), command.given(workdir, example)))


def train(chosen: Experiment, workdir: str) -> int:
    """Trains an experiment into a workdir, draws its figures and prints its table; returns the exit status.

    With several processes, all train and only the first uses the workdir.
    """
    distributed.supervise()
    command.start_jax(join=distributed.join)
    import jax

    from smallbatch_jax.data.streaming.prefetch import WorkerDied
    from smallbatch_jax.program import processes
    from smallbatch_jax.runner import grid, progress

    imported, folder = time.monotonic(), Path(workdir)
    try:
        processes.require_same(chosen.to_dict(), "config")
        chosen = processes.on_first(lambda: workdirs.for_workdir(chosen, workdir))
        dataset = processes.on_every(lambda: command.load_data(chosen.dataset))
        loaded = time.monotonic()
        grid.train_grid(chosen, folder, dataset, progress.for_stream())
    except grid.Interrupted as interrupted:
        command.leave(f"stopped; everything is saved in {folder}, the same command resumes", 128 + interrupted.signum)
    except WorkerDied as died:
        command.leave(f"{died}; the same command resumes", 1)
    except jax.errors.JaxRuntimeError as error:
        if not processes.several():
            raise
        command.leave(distributed.failure(error), 1)
    if processes.is_first():
        workdirs.show_and_time(folder, {"import": imported - command.STARTED, "data": loaded - imported})
    return 0
