"""A command for tests: trains a few steps of some cases on the devices there are, and writes down what came out.

    python tests/spread.py OUT.npz CASES.json [COORDINATOR PROCESSES PROCESS]

A case is {"batch_size", "bn_batch_size", "data_devices"} and optionally other fields of a config. With a coordinator it is one
of several processes, and the first writes.
"""

import json
import sys

import jax
import numpy as np

from smallbatch_jax import data, driver, experiment, jobs, lanes, processes
from smallbatch_jax.data import order
from smallbatch_jax.device_data import to_device

STEPS = 20
BASE_LR = 2**-10


def main(out: str, cases: str, *distributed: str) -> None:
    driver.use_all_cores()
    if distributed:
        jax.distributed.initialize(distributed[0], *map(int, distributed[1:]))
    found = {}
    for case in json.loads(cases):
        params, correct, loss = trained(**case)
        name = "-".join(str(value) for value in case.values())
        found |= {f"{name}/{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        found |= {f"{name}/correct": correct, f"{name}/loss": loss}
    if processes.is_first():
        np.savez(out, **found)


def trained(batch_size: int, bn_batch_size: int, data_devices: int, model: str = "resnet8", **fields):
    """Parameters and running averages after the steps, and test images right and training loss."""
    config = experiment.default_config()
    config.model = {"name": model, "norm": "batch"}
    config.grid = {"batch_sizes": (batch_size,), "bn_batch_sizes": (bn_batch_size,), "base_lrs": (BASE_LR,)}
    config.data_devices, config.weight_decay, config.dataset.augment = data_devices, 1e-4, True
    config.update(fields)
    chosen = experiment.from_config(config)
    dataset = data.load("digits")
    job = jobs.Job(
        chosen,
        dataset,
        jobs.named_model(chosen, 10, 0.99),
        batch_size,
        bn_batch_size,
        chosen.runs(),
        None,
        data_devices=data_devices,
    )
    on_device = to_device(dataset, lanes.lane_mesh())
    program = job.compile(on_device)
    state = program.start(program.empty(), {0: lanes.initialiser(job.model_of(None), on_device)(0)})
    indices = np.zeros((program.lanes, program.segment_steps, batch_size), np.int32)
    indices[0, :STEPS] = order.batch_indices(0, 0, STEPS, batch_size, job.num_examples)
    first = np.arange(program.lanes) == 0
    segment = lanes.Segment(indices, np.where(first, STEPS, 0).astype(np.int32), first)
    state, report = program.run(state, job.settings([chosen.runs()[0]] + [None] * (program.lanes - 1)), segment)
    state, report = jax.tree.map(lambda x: np.asarray(x)[0], processes.readable((state, report), program.mesh))
    return (state.train.params, state.train.batch_stats), report.test_correct, report.loss_sum / STEPS


if __name__ == "__main__":
    main(*sys.argv[1:])
