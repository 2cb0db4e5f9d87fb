"""Measures how fast a config's model trains on this machine: images/s of whole segments, all lanes at once.

    python experiments/benchmark.py --config=configs/fig08_resnet32.py --random_images --peer

Each batch size is one program with a lane for each learning rate of the config; the rates used here are so small that no run
diverges.
--peer times a PyTorch training step of the same model between our segments, in each way that PyTorch can use the machine, and
prints our speed relative to each. --json prints, as the last line, the input of `plan.py --elsewhere`.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import command
from absl import flags

from smallbatch_jax.config import experiment, extras
from smallbatch_jax.config.experiment import Experiment, InputError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

CONFIG = command.define_config_flag()
BATCH_SIZES = command.DEFINE_numbers("batch_sizes", None, "Batch sizes; the config's if not given.")
SECONDS = command.DEFINE_number("seconds", "2", "Seconds of one timing.", 0.05, 1e4)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timings of each kind, in turn; the median is printed.", lower_bound=1)
PEER = flags.DEFINE_bool("peer", False, "Also time PyTorch, in turn with ours.")
RANDOM = flags.DEFINE_bool("random_images", False, "Random images of the right shape, without the data.")
JSON = flags.DEFINE_bool("json", False, "Print the results as one line of JSON at the end.")

MOST_IMAGES = 2**30  # per run: more than any timing reaches, and int32 still holds the steps at m = 1


def main() -> int:
    chosen = _with_batch_sizes(experiment.from_config(command.given_config(CONFIG)))
    if PEER.value:
        if chosen.optimizer != experiment.Optimizer():
            raise InputError(f"--peer: its step is SGD without momentum, the config's optimizer is {chosen.optimizer.name}.")
        extras.require("peer", "--peer")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of a GPU's memory for itself
    command.start_jax()
    import jax
    import timing

    from smallbatch_jax.runner import flops, planning
    from smallbatch_jax.runner.jobs import Setup

    dataset = command.load_data(chosen.dataset, RANDOM.value)
    chosen.require_examples(dataset.num_train)
    chosen = dataclasses.replace(chosen, epochs=max(1, min(10_000, MOST_IMAGES // dataset.num_train)))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    augmented = "augmented" if chosen.dataset.augment else "as they are"
    print(f"{chosen.model.name}, norm {chosen.model.norm}, images {dataset.image_shape} {augmented}")
    print(f"{device}, jax {jax.__version__}, {chosen.precision}; ", end="", flush=True)
    print(f"matrix product: {flops.matrix_rate() / 1e9:,.0f} GFLOP/s")
    print(f"{'m':>6}{'lanes':>7}{'images/s':>10}  {'(lowest-highest)':<18}{'GFLOP/s':>8}{'compile':>9}{'memory':>10}")
    results = []
    for trial in planning.measure(Setup(chosen, dataset)):
        results.append(timing.time_program(trial, dataset, SECONDS.value, REPEATS.value, PEER.value))
        print(timing.format_row(results[-1]), flush=True)
    if JSON.value:
        print(json.dumps({"device": device, "jax": jax.__version__, "results": results}))
    return 0


def _with_batch_sizes(chosen: Experiment) -> Experiment:
    """Returns the experiment with the requested batch sizes, constant in training, plain batch norm and tiny rates."""
    sizes = BATCH_SIZES.value or chosen.grid.batch_sizes
    rates = tuple(2.0**-24 * (1 + i) for i in range(len(chosen.grid.base_lrs)))
    grid, schedule = experiment.Grid(batch_sizes=sizes, base_lrs=rates), experiment.Schedule()
    return dataclasses.replace(chosen, drawn_from=(), grid=grid, schedule=schedule)


if __name__ == "__main__":
    command.run(main)
