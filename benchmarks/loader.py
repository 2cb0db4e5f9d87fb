"""How fast photographs are read here, decoded and cropped for training: the input of a streamed dataset, nothing trained.

    python experiments/loader.py --config=configs/fig12_resnet50.py --config.dataset.data_dir=DIR [--peer] [--json]
    python experiments/loader.py --config=configs/fig12_resnet50.py --random_images

Prints images/s, the median of rounds in which all ways take turns, each with as many processes (--config.dataset.workers):

  bare     every process decodes and crops by itself, and throws away what it gets: what this machine can do at most
  ours     Grain's workers, their images received in this process, as training receives them
  torch    with --peer: torch's DataLoader on PIL, the same crops; needs pip install -e ".[peer]"

and how many processes one accelerator would need that trains so many images/s (--images_per_second).
"""

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import command
from absl import flags

from smallbatch_jax.config import experiment, extras
from smallbatch_jax.config.experiment import InputError

if TYPE_CHECKING:
    from smallbatch_jax.data.numbered import SampleIndex

CONFIG = command.define_config_flag()
SECONDS = flags.DEFINE_float("seconds", 3.0, "Seconds of each way in each round.", lower_bound=0.1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)
RATE = flags.DEFINE_float("images_per_second", 3000.0, "What the accelerator trains.", lower_bound=1)
PEER = flags.DEFINE_bool("peer", False, "Also torch's DataLoader.")
RANDOM = flags.DEFINE_bool("random_images", False, "On made-up photographs of 500 x 375: the data need not be here.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")

RECEIVED = 64  # images at a time
SETTLE_SECONDS = 1.5  # in which the processes of the way before fill up what they decode ahead, and stop


def main() -> int:
    if PEER.value:
        extras.require("peer", "--peer")
    chosen = experiment.from_config(command.given_config(CONFIG))
    from smallbatch_jax import data
    from smallbatch_jax.data.numbered import SampleIndex

    source = chosen.dataset
    photographs = (data.random if RANDOM.value else data.load)(source.name, source.data_dir, source.image_size)
    if not isinstance(photographs, data.Photographs):
        raise InputError(f"dataset.image_size: got None, so {source.name} is not streamed; use a size in pixels.")
    workers = source.workers or len(os.sched_getaffinity(0))
    numbered = SampleIndex(photographs, (0,), 1000, source.augment, source.color_jitter)
    print(f"{photographs.num_train:,} photographs to {source.image_size} pixels, {workers} processes", flush=True)
    with ExitStack() as stack:
        ways = {"bare": _bare(numbered, workers, stack), "ours": _ours(numbered, source.image_size or 0, workers, stack)}
        if PEER.value:
            ways["torch"] = _torch(numbered, photographs, workers, stack)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS.value):
            for name, way in ways.items():
                time.sleep(SETTLE_SECONDS)
                found[name].append(way(SECONDS.value))
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


def _bare(numbered: "SampleIndex", workers: int, stack: ExitStack) -> Callable[[float], float]:
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers, _remember, (numbered,)))
    pool.map(_decode_for, [(0, 0.1)] * workers, chunksize=1)  # all have begun

    def rate(seconds: float) -> float:
        return sum(pool.map(_decode_for, [(worker * 10_000, seconds) for worker in range(workers)], chunksize=1))

    return rate


_NUMBERED: "list[SampleIndex]" = []


def _remember(numbered: "SampleIndex") -> None:
    import cv2

    cv2.setNumThreads(0)
    _NUMBERED.append(numbered)


def _decode_for(job: tuple[int, float]) -> float:
    """Images/s of one process alone, from a number on."""
    number, seconds = job
    first, began = number, time.perf_counter()
    while time.perf_counter() - began < seconds:
        _NUMBERED[0][number]
        number += 1
    return (number - first) / (time.perf_counter() - began)


def _ours(numbered: "SampleIndex", size: int, workers: int, stack: ExitStack) -> Callable[[float], float]:
    import numpy as np

    from smallbatch_jax.data.numbered import Decoded
    from smallbatch_jax.data.stream import Ahead

    ahead = Ahead(numbered, size * size * 3, workers)
    stack.callback(ahead.close)
    out = Decoded(np.empty((RECEIVED, size, size, 3), "u1"), *(np.empty(RECEIVED, kind) for kind in ("i4", "i4", "?")))

    def rate(seconds: float) -> float:
        _drain(lambda: ahead.take(out))
        return _rate(lambda: ahead.take(out), RECEIVED, seconds)

    return rate


def _torch(numbered: "SampleIndex", photographs, workers: int, stack: ExitStack) -> Callable[[float], float]:
    import torch_loader

    batches = torch_loader.batches(numbered, photographs, workers, RECEIVED)

    def rate(seconds: float) -> float:
        _drain(lambda: next(batches))
        return _rate(lambda: next(batches), RECEIVED, seconds)

    return rate


def _drain(receive: Callable[[], object]) -> None:
    """Takes what was decoded while another way was measured, until images come no faster than they are made."""
    for _ in range(12):
        receive()


def _rate(receive: Callable[[], object], images: int, seconds: float) -> float:
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        receive()
        count += images
    return count / elapsed


if __name__ == "__main__":
    command.run(main)
