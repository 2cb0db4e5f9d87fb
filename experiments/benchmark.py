"""How fast a config's model trains on this machine: images/s of whole segments, all lanes at once.

    python experiments/benchmark.py --config=configs/fig08_resnet32.py --random_images --peer

Each batch size is one program: the config's number of learning rates (of no consequence to the speed, so all are tiny and
none diverges), images gathered by index, augmented if the config says so. --peer times a PyTorch training step of the same
model between our segments, each way PyTorch can use the machine by itself, and gives our ratio to the best. --plain does so
with plain `lax.conv` (what `flax.linen.Conv` calls) under vmap over the lanes and scan. --json prints, as the last line,
what `plan.py --elsewhere` reads.
"""

import ctypes
import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import command
import torch_peer
from absl import flags

from smallbatch_jax.config import experiment, extras
from smallbatch_jax.config.experiment import Experiment, InputError

CONFIG = command.define_config_flag()
BATCH_SIZES = flags.DEFINE_list("batch_sizes", None, "Batch sizes; the config's if not given.")
SECONDS = flags.DEFINE_float("seconds", 2.0, "Seconds of one timing.", lower_bound=0.05)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timings of each kind, in turn; the median is printed.", lower_bound=1)
PEER = flags.DEFINE_bool("peer", False, "Also time PyTorch, in turn with ours.")
PLAIN = flags.DEFINE_bool("plain", False, "Also time plain convolutions under vmap and scan, in turn with ours.")
RANDOM = flags.DEFINE_bool("random_images", False, "Random images of the right shape: the data need not be here.")
JSON = flags.DEFINE_bool("json", False, "Print the results as one line of JSON at the end.")

MOST_IMAGES = 2**30  # of a run, which no timing gets to the end of, and which steps of one image still count

Measure = Callable[[float], dict[str, float]]  # seconds → images/s by way


def main() -> int:
    if PEER.value:
        extras.require("peer", "--peer")
        # JAX would otherwise take most of a GPU's memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = _of_batch_sizes(experiment.from_config(command.given_config(CONFIG)))
    command.start_jax()
    import jax

    from smallbatch_jax import data
    from smallbatch_jax.runner import planning

    load = data.random if RANDOM.value else data.load
    dataset = load(chosen.dataset.name, chosen.dataset.data_dir, chosen.dataset.image_size)
    chosen = dataclasses.replace(chosen, epochs=max(1, min(10_000, MOST_IMAGES // dataset.num_train)))
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    augmented = "augmented" if chosen.dataset.augment else "as they are"
    print(f"{chosen.model.name}, norm {chosen.model.norm}, images {dataset.image_shape} {augmented}")
    print(f"{device}, jax {jax.__version__}, {chosen.precision}; ", end="", flush=True)
    print(f"matrix product: {planning.matrix_rate() / 1e9:,.0f} GFLOP/s")
    print(f"{'m':>6}{'lanes':>7}{'images/s':>10}  {'(lowest-highest)':<18}{'GFLOP/s':>8}{'compile':>9}{'memory':>10}")
    results = []
    for trial in planning.measure(chosen, dataset):
        results.append(_time(trial, dataset))
        print(_lines(results[-1]), flush=True)
    if JSON.value:
        print(json.dumps({"device": device, "jax": jax.__version__, "results": results}))
    return 0


def _of_batch_sizes(chosen: Experiment) -> Experiment:
    """The experiment with the batch sizes asked for, ordinary batch norm, and learning rates at which nothing diverges."""
    given = BATCH_SIZES.value or [str(m) for m in chosen.grid.batch_sizes]
    sizes = tuple(int(m) for m in given if m.isascii() and m.isdigit())
    if len(set(sizes) - {0}) < len(given):
        raise InputError(f"--batch_sizes={','.join(given)}: must be different whole numbers from 1 on, with commas between.")
    rates = tuple(2.0**-24 * (1 + i) for i in range(len(chosen.grid.base_lrs)))
    grid = experiment.Grid(batch_sizes=sizes, base_lrs=rates)
    return dataclasses.replace(chosen, drawn_from=(), grid=grid)


def _time(trial: Any, dataset: Any) -> dict[str, Any]:
    """One batch size: our segments, in turn with what they are compared with."""
    from smallbatch_jax.program import devices
    from smallbatch_jax.runner import planning

    job, program = trial.job, trial.program
    _reset_peak()
    before = devices.peak_bytes_in_use()
    trial.warm_up()
    trial.train(SECONDS.value)
    trial.evaluate()
    measured = devices.peak_bytes_in_use() - before
    with ExitStack() as stack:
        ways: list[Measure] = [lambda seconds: {"ours": _rate(*trial.train(seconds))}]
        if PEER.value:
            ways.append(stack.enter_context(_peer(job, dataset, not program.any_length)).measure)
        if PLAIN.value:
            ways.append(_plain(job.experiment, job.batch_size, dataset))
        rates: dict[str, list[float]] = {}
        for _ in range(REPEATS.value):
            for measure in ways:
                for way, rate in measure(SECONDS.value).items():
                    rates.setdefault(way, []).append(rate)
    flops = planning.flops_per_image(job.model_of(None), dataset.image_shape)
    return {
        "model": job.experiment.model.name,
        "norm": job.experiment.model.norm,
        "augment": job.experiment.dataset.augment,
        "precision": job.experiment.precision,
        "batch_size": job.batch_size,
        "lanes": len(job.runs),
        "images_per_second": median(rates["ours"]),
        "rates": rates,
        "flops_per_image": flops,
        "seconds_to_compile": program.compile_seconds,
        "peak_bytes": program.peak_bytes,
        "measured_bytes": measured,
    }


def _rate(images: int, seconds: float) -> float:
    return images / seconds


def _peer(job: Any, dataset: Any, accelerator: bool) -> torch_peer.Peer:
    chosen, image_shape = job.experiment, dataset.image_shape
    model = chosen.model.name, chosen.model.norm, dataset.num_classes, image_shape
    return torch_peer.Peer(*model, job.batch_size, chosen.dataset.augment, chosen.weight_decay, accelerator)


def _plain(chosen: Experiment, batch_size: int, dataset: Any) -> Measure:
    """The same program, its lanes side by side and its convolutions as `lax.conv` makes them."""
    from smallbatch_jax.data import Photographs
    from smallbatch_jax.models.conv import forced
    from smallbatch_jax.runner import planning

    if isinstance(dataset, Photographs):
        raise InputError(f"--plain: takes images that lie in memory; {chosen.dataset.name} is streamed.")
    images = 16 * batch_size  # of an epoch, the shortest segment there is side by side: this is slow
    few = dataclasses.replace(dataset, train_images=dataset.train_images[:images], train_labels=dataset.train_labels[:images])
    only = dataclasses.replace(chosen, grid=dataclasses.replace(chosen.grid, batch_sizes=(batch_size,)))
    with forced("plain"):
        trial = next(planning.measure(only, few, mapping="vmap"))
    trial.warm_up()
    return lambda seconds: {"plain": _rate(*trial.train(seconds))}


def _lines(result: dict[str, Any]) -> str:
    """The row of a batch size, and one below it for each thing that it was compared with."""
    rates = result["rates"]
    speed = result["images_per_second"]
    gflops = speed * result["flops_per_image"] / 1e9
    lines = [
        f"{result['batch_size']:>6}{result['lanes']:>7}{speed:>10,.0f}  {_spread(rates['ours']):<18}{gflops:>8,.0f}"
        f"{result['seconds_to_compile']:>7.1f} s{result['measured_bytes'] / 2**20:>6,.0f} MiB"
    ]
    others = {way: median(found) for way, found in rates.items() if way != "ours"}
    for way, rate in others.items():
        lines.append(f"{'':>13}{rate:>10,.0f}  {_spread(rates[way]):<18}  {way}: ours is {speed / rate:.2f} x")
    return "\n".join(lines)


def _spread(rates: list[float]) -> str:
    return f"({min(rates):,.0f}-{max(rates):,.0f})"


def _reset_peak() -> None:
    """Lets the peak of this process's memory be measured anew, where the system can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling left behind would be taken first, and not be seen
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    command.run(main)
