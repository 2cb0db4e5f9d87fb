"""Measures how fast this machine reads, decodes and crops photographs, the input of a streamed dataset; trains nothing.

    python benchmarks/loader.py --config=configs/fig12_resnet50.py --config.dataset.data_dir=DIR [--peer] [--json]
    python benchmarks/loader.py --config=configs/fig12_resnet50.py --random_images

Prints images/s of each way, the median of rounds in which they take turns, each with --config.dataset.workers processes:

  bare     every process decodes and crops by itself and drops the images: the upper bound of this machine
  ours     this process receives the images as training does, from Grain's worker processes
  torch    with --peer: torch's DataLoader on PIL, the same crops; needs pip install -e ".[peer]"

and the number of processes that an accelerator training --images_per_second images/s needs.
"""

import io
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
from absl import flags

from smallbatch_jax.config import experiment, extras
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import Photographs
from smallbatch_jax.data.streaming.prefetch import Prefetcher
from smallbatch_jax.data.streaming.sample_index import SampleIndex
from smallbatch_jax.program.devices import cores

CONFIG = command.define_config_flag()
SECONDS = flags.DEFINE_float("seconds", 3.0, "Seconds of each way in each round.", lower_bound=0.1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)
RATE = flags.DEFINE_float("images_per_second", 3000.0, "Images/s that the accelerator trains.", lower_bound=1)
PEER = flags.DEFINE_bool("peer", False, "Also torch's DataLoader.")
RANDOM = flags.DEFINE_bool("random_images", False, "Use synthetic photographs of 500 x 375, without the data.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")

BATCH = 64  # images received at a time
DRAINED = 12  # batches not timed: they were decoded while another way was measured
SETTLE_SECONDS = 1.5  # until the processes of the previous way have filled their buffers and stop


class TorchvisionWay:
    """Item k is the image at position k of the training stream, cropped and flipped by PIL as in torchvision's examples."""

    def __init__(self, index: SampleIndex, photographs: Photographs):
        self._index, self._photographs = index, photographs

    def __len__(self) -> int:
        return 1000 * self._photographs.num_train

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        from smallbatch_jax.data.streaming import views

        size, rng = self._photographs.image_size, np.random.default_rng(position)
        content, label = self._photographs.train.read(self._index.training_image(position)[2])
        image = Image.open(io.BytesIO(content)).convert("RGB")
        low, high = (round(side * size / views.IMAGE_SIZE) for side in (views.CENTRE, views.LARGEST))
        side = size * min(image.size) / rng.integers(low, high)
        left, top = (rng.random() * (length - side) for length in image.size)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image), label


def bare_rate(index: SampleIndex, worker: int, seconds: float) -> float:
    """Decodes and crops in one process and drops the images; returns images/s."""
    import cv2

    cv2.setNumThreads(0)
    numbers = itertools.count(worker * 10_000)
    index[next(numbers)]  # caches the order of the epoch
    return _rate(lambda: index[next(numbers)], 1, seconds)


def _rate(receive: Callable[[], object], images: int, seconds: float) -> float:
    """Calls `receive`, which gets `images` images, for some seconds; returns images/s."""
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        receive()
        count += images
    return count / elapsed


def main() -> int:
    if PEER.value:
        extras.require("peer", "--peer")
    source = experiment.from_config(command.given_config(CONFIG)).dataset
    photographs = command.load_data(source, RANDOM.value)
    if not isinstance(photographs, Photographs):
        raise InputError(f"dataset.image_size: got None, so {source.name} is not streamed; use a size in pixels.")
    workers = source.workers or cores()
    index = SampleIndex(photographs, (0,), source)
    print(f"{photographs.num_train:,} photographs to {photographs.image_size} pixels, {workers} processes", flush=True)
    with ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
        pool.starmap(bare_rate, [(index, 0, 0.1)] * workers, chunksize=1)  # waits until all have begun
        prefetcher = Prefetcher(index, 3 * photographs.image_size**2, workers)
        stack.callback(prefetcher.close)
        prefetcher.seek(0)
        receivers: dict[str, Callable[[], object]] = {"ours": lambda: prefetcher.take(BATCH)}
        if PEER.value:
            from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

            pictures = TorchvisionWay(index, photographs)
            batches = iter(DataLoader(pictures, BATCH, num_workers=workers, multiprocessing_context="spawn"))
            receivers["torch"] = lambda: next(batches)
        found: dict[str, list[float]] = {name: [] for name in ("bare", *receivers)}
        for _ in range(ROUNDS.value):
            time.sleep(SETTLE_SECONDS)
            jobs = [(index, worker, SECONDS.value) for worker in range(workers)]
            found["bare"].append(sum(pool.starmap(bare_rate, jobs, chunksize=1)))
            for name, receive in receivers.items():
                time.sleep(SETTLE_SECONDS)
                for _ in range(DRAINED):
                    receive()
                found[name].append(_rate(receive, BATCH, SECONDS.value))
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


if __name__ == "__main__":
    command.run(main)
