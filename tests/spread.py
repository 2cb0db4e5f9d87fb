"""A command for tests: trains a network for a few steps, its batches sharded over devices, and writes the result.

    python tests/spread.py OUT.npz CASES.json [COORDINATOR PROCESSES PROCESS]

A case is a name and the arguments of `trained`. With a coordinator this is one of several processes. With JAX_ENABLE_X64 set
everything that the package computes in float32 is computed in float64, so that rounding is too small to flip any ReLU.
"""

import json
import sys
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

if jax.config.jax_enable_x64:
    jnp.float32 = jnp.float64

from smallbatch_jax import data
from smallbatch_jax.config import experiment
from smallbatch_jax.program import devices, lanes, processes
from smallbatch_jax.runner import jobs
from smallbatch_jax.runner.input import LaneSteps, input_pipeline
from smallbatch_jax.store.checkpoint import Checkpoints

STEPS = 20


def main(out: str, cases: str, *distributed: str) -> None:
    devices.use_all_cores()
    if distributed:
        jax.distributed.initialize(distributed[0], *map(int, distributed[1:]))
    found = {}
    for name, case in json.loads(cases).items():
        variables, loss, correct = trained(**case)
        found |= {f"{name}{jax.tree_util.keystr(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(variables)}
        found |= {f"{name} loss": loss, f"{name} correct": correct}
    if processes.is_first():
        np.savez(out, **found)


def trained(
    m: int,
    b: int,
    devices: int,
    first: int = 0,
    last: int = STEPS,
    save: str = "",
    restore: str = "",
    model: str = "resnet8",
    base_lr: float = 2**-10,
    photographs: str = "",
    image_size: int | None = None,
    parts: int | None = None,
    norm: str = "batch",
    random_images: bool = False,
) -> tuple[dict, float, int]:
    """Returns (params, batch_stats) after steps first…last-1, the sum of their losses, and the number of correct test images.

    Trains on digits, random images or a folder of streamed photographs; `parts` is the micro-batch size. A checkpoint is loaded
    from the folder `restore` before training and saved to the folder `save` after it, where these are given.
    """
    config = experiment.default_config()
    config.model = {"name": model, "norm": norm}
    config.grid = {"batch_sizes": (m,), "bn_batch_sizes": (b,), "base_lrs": (base_lr,)}
    config.data_devices, config.weight_decay, config.dataset.augment = devices, 1e-4, True
    config.micro_batch_size = parts
    if photographs:
        config.dataset.name, config.dataset.data_dir, config.dataset.image_size = "folder", photographs, image_size
        config.dataset.workers = 1
    chosen = experiment.from_config(config)
    run = chosen.runs()[0]
    dataset = data.random("cifar10") if random_images else data.load(chosen.dataset.name, photographs, image_size)
    job = jobs.Job(jobs.Setup(chosen, dataset), m, b)
    with closing(input_pipeline(dataset, chosen)) as pipeline:
        program = job.compile(pipeline)
        state = program.start(program.empty(), {0: lanes.initialiser(job.model_of(None), dataset.example)(0)})
        if restore:
            checkpoints = Checkpoints(Path(restore), chosen)
            content = processes.on_first(lambda: checkpoints.restore(program.template))
            zeros = program.zeros()
            jax.tree.map(lambda into, x: into.__setitem__(0, x[0]), zeros, content[0])
            state = program.put(zeros)
        others = [None] * (program.lanes - 1)
        while first < last:
            lane = LaneSteps(run, 1, first, first * m, last - first)
            steps = pipeline.steps(program, m, [lane, *others], program.segment_steps)[0]
            load = pipeline.prepare(program, m, [lane._replace(steps=steps, evaluate=first + steps == last), *others])
            settings = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(jnp.float32), job.settings([run, *others]))
            state, report = program.run(state, settings, load.segment, load.pool, load.test)
            first += steps
        state, report = jax.tree.map(np.asarray, processes.readable((state, report), program.mesh))
    if save and processes.is_first():
        Checkpoints(Path(save), chosen).save(state, [run, *others])
    variables = jax.tree.map(lambda x: x[0], (state.train.params, state.train.batch_stats))
    return variables, report.loss_sum[0], report.tested["test"].sums["accuracy"][0]


if __name__ == "__main__":
    main(*sys.argv[1:])
