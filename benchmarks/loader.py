"""How fast photographs are read here, decoded and cropped for training: the input of a streamed dataset, nothing trained.

    python benchmarks/loader.py --config=configs/fig12_resnet50.py --config.dataset.data_dir=DIR [--peer] [--json]
    python benchmarks/loader.py --config=configs/fig12_resnet50.py --random_images

Prints images/s, the median of rounds in which all ways take turns, each with as many processes (--config.dataset.workers):

  bare     every process decodes and crops by itself and drops the images: the most that this machine can do
  ours     images received in this process as training receives them, from Grain's worker processes
  torch    with --peer: torch's DataLoader on PIL, the same crops; needs pip install -e ".[peer]"

and how many processes an accelerator that trains so many images/s (--images_per_second) would need.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
from absl import flags

from smallbatch_jax.config import experiment, extras
from smallbatch_jax.config.experiment import InputError

if TYPE_CHECKING:
    from smallbatch_jax.data.streaming.sample_index import SampleIndex

CONFIG = command.define_config_flag()
SECONDS = flags.DEFINE_float("seconds", 3.0, "Seconds of each way in each round.", lower_bound=0.1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)
RATE = flags.DEFINE_float("images_per_second", 3000.0, "What the accelerator trains.", lower_bound=1)
PEER = flags.DEFINE_bool("peer", False, "Also torch's DataLoader.")
RANDOM = flags.DEFINE_bool("random_images", False, "On synthetic photographs of 500 x 375: the data need not be here.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")

RECEIVED = 64  # images at a time
DRAINED = 12  # times that many, decoded while another way was measured, which are not timed
SETTLE_SECONDS = 1.5  # in which the processes of the way before fill their buffers, and stop
Receive = Callable[[], object]


def main() -> int:
    if PEER.value:
        extras.require("peer", "--peer")
    chosen = experiment.from_config(command.given_config(CONFIG))
    from smallbatch_jax import data
    from smallbatch_jax.data.streaming.prefetch import Prefetcher
    from smallbatch_jax.data.streaming.sample_index import SampleIndex

    source = chosen.dataset
    photographs = (data.random if RANDOM.value else data.load)(source.name, source.data_dir, source.image_size)
    if not isinstance(photographs, data.Photographs):
        raise InputError(f"dataset.image_size: got None, so {source.name} is not streamed; use a size in pixels.")
    workers = source.workers or len(os.sched_getaffinity(0))
    index = SampleIndex(photographs, (0,), source)
    print(f"{photographs.num_train:,} photographs to {photographs.image_size} pixels, {workers} processes", flush=True)
    with ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers, _begin, (index,)))
        pool.map(_decode_for, [(0, 0.1)] * workers, chunksize=1)  # all have begun
        prefetcher = Prefetcher(index, 3 * photographs.image_size**2, workers)
        stack.callback(prefetcher.close)
        prefetcher.seek(0)
        receivers: dict[str, Receive] = {"ours": lambda: prefetcher.take(RECEIVED)}
        if PEER.value:
            import torch_loader

            batches = torch_loader.batches(index, photographs, workers, RECEIVED)
            receivers["torch"] = lambda: next(batches)
        found: dict[str, list[float]] = {name: [] for name in ("bare", *receivers)}
        for _ in range(ROUNDS.value):
            time.sleep(SETTLE_SECONDS)
            jobs = [(worker * 10_000, SECONDS.value) for worker in range(workers)]
            found["bare"].append(sum(pool.map(_decode_for, jobs, chunksize=1)))
            for name, receive in receivers.items():
                time.sleep(SETTLE_SECONDS)
                found[name].append(_rate(receive, SECONDS.value))
    _report(found, workers)
    return 0


def _report(found: dict[str, list[float]], workers: int) -> None:
    rates = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        ratio = statistics.median(ours / other for ours, other in zip(found["ours"], values, strict=True))
        versus = "" if name == "ours" else f"   ours / {name}: {ratio:.2f}"
        print(f"{name:<6}{rates[name]:>8,.0f} images/s ({min(values):,.0f} … {max(values):,.0f}){versus}")
    needed = math.ceil(RATE.value / (rates["ours"] / workers))
    print(f"{RATE.value:,.0f} images/s would need {needed} such processes, each on a core of its own")
    if JSON.value:
        print(json.dumps({"workers": workers, "images_per_second": rates, "rounds": found}))


_INDEX: "list[SampleIndex]" = []  # of a process of the bare decoder


def _begin(index: "SampleIndex") -> None:
    import cv2

    cv2.setNumThreads(0)
    _INDEX.append(index)


def _decode_for(job: tuple[int, float]) -> float:
    """Returns the images/s of one process, which begins at a number and goes on for so many seconds."""
    first, seconds = job
    number, began = first, time.perf_counter()
    while time.perf_counter() - began < seconds:
        _INDEX[0][number]
        number += 1
    return (number - first) / (time.perf_counter() - began)


def _rate(receive: Receive, seconds: float) -> float:
    """Returns images/s, once images come no faster than they are made."""
    for _ in range(DRAINED):
        receive()
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        receive()
        count += RECEIVED
    return count / elapsed


if __name__ == "__main__":
    command.run(main)
