"""Trains the grids of one or several configs on a Ray cluster, each program in a worker on any machine with free resources.

    python experiments/launch.py --config=configs/quickstart.py --workdir=runs/quickstart [--address=auto] \\
        [--also=configs/fig08_resnet32.py:runs/fig08 ...]

A program trains all runs of one batch size and BN batch size. It takes a GPU, or on a cluster without any the CPUs that its
lanes can use. The same command resumes, and so does sweep.py, on the same workdir. At the end it draws the figures of each
workdir and prints its table, as sweep.py does.
"""

import os
import sys
import time
from pathlib import Path

import command
import workdirs
from absl import flags

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.config.fields import expanded_path

CONFIG = command.define_config_flag()
WORKDIR = command.DEFINE_path("workdir", "Folder of the results; made if it is not there.")
ADDRESS = flags.DEFINE_string("address", None, "Address of a running Ray cluster, or auto; by default this machine is one.")
ALSO = flags.DEFINE_multi_string("also", [], "CONFIG.py:WORKDIR, another config and its folder; repeat it for more.")


def main() -> int:
    asked = [(experiment.from_config(command.given_config(CONFIG)), command.given(WORKDIR, "runs/quickstart"))]
    asked += [_also(value) for value in ALSO.value]
    for config, _ in asked:
        if config.search.active:
            raise InputError(f"search: {config.name} is a search, whose programs follow from one another; use search.py.")
    folders = [Path(workdir).resolve() for _, workdir in asked]
    for workdir in folders:
        if folders.count(workdir) > 1:
            raise InputError(f"--workdir, --also: {workdir} is given twice; give each config a folder of its own.")
    chosen = [(workdirs.for_workdir(config, workdir), Path(workdir)) for config, workdir in asked]
    command.import_jax()
    command.require_xla_flags()
    if not ADDRESS.value and os.environ.get("JAX_PLATFORMS"):  # which workers on this machine inherit
        command.require_devices()
    from smallbatch_jax.cluster import launcher
    from smallbatch_jax.runner import progress
    from smallbatch_jax.runner.signals import Interrupted

    imported = time.monotonic()
    try:
        complete = launcher.train_grids(chosen, ADDRESS.value or None, progress.for_stream())
    except Interrupted as interrupted:
        named = ", ".join(str(folder) for _, folder in chosen)
        command.leave(f"stopped; everything is saved in {named}, the same command resumes", 128 + interrupted.signum)
    for (_, folder), whole in zip(chosen, complete, strict=True):
        if whole:
            workdirs.show_and_time(folder, {"import": imported - command.STARTED})
    if all(complete):
        return 0
    print("some programs failed; the same command tries them again", file=sys.stderr)
    return 1


def _also(value: str) -> tuple[Experiment, str]:
    """Returns the experiment and the workdir of one --also."""
    path, _, workdir = value.partition(":")
    if not path or not workdir:
        raise InputError(f"--also: got {value!r}, accepts CONFIG.py:WORKDIR, for example configs/quickstart.py:runs/quickstart")
    path, workdir = (expanded_path("--also", given) for given in (path, workdir))
    return experiment.from_config(command.load_config(f"--also={value}", path)), workdir


if __name__ == "__main__":
    command.run(main)
