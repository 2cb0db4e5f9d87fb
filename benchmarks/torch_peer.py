"""The same training step in PyTorch, as fast as PyTorch makes it; the baseline of `benchmark.py --peer`.

Only worker processes import PyTorch.
"""

import ctypes
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from smallbatch_jax.config.experiment import InputError

EXAMPLES = 4096  # random images, kept on the device
PAD = 4  # pixels of padding in the augmentation (§3.1)
LEARNING_RATE = 0.01  # has no influence on the speed
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Step:
    """A training step."""

    model: str  # "alexnet" or "resnetD" of D = 6n+2 layers
    norm: str  # "none" or "batch", over the whole batch
    num_classes: int
    image_shape: Sequence[int]  # H, W, C
    batch_size: int  # m, images per update
    augment: bool  # whether each image is padded by 4 pixels, cropped at random and flipped at random
    weight_decay: float  # λ of the penalty (λ/2)‖θ‖²

    def __post_init__(self) -> None:
        layers = re.fullmatch(r"resnet(\d+)", self.model)
        if self.model != "alexnet" and not (layers and int(layers[1]) >= 8 and int(layers[1]) % 6 == 2):
            raise InputError(f"--peer: has no model {self.model!r}; it accepts alexnet and resnetD of D = 6n+2 layers.")
        if self.norm not in ("none", "batch"):
            raise InputError(f"--peer: has no norm {self.norm!r}; it accepts none and batch.")


class Setup(NamedTuple):
    """Configuration of one worker."""

    threads: int
    device: str = "cpu"
    graphs: bool = False  # CUDA graphs


@contextmanager
def peer(step: Step, accelerator: bool) -> Iterator[Callable[[float], dict[str, float]]]:
    """Starts workers for each way in which PyTorch can use this machine; stops them at the end of the block.

    Args:
      step: training step of the workers.
      accelerator: whether to train on the GPU, eagerly and with CUDA graphs, instead of on every core of the CPU, as one
        process of N threads and as N processes of one thread.

    Yields:
      A function that trains for some seconds in one way after the other, and returns images per second by way.

    Raises:
      InputError: if a worker fails.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers: dict[str, list[ProcessPoolExecutor]] = {}
        for way, (processes, setup) in _ways(accelerator).items():
            pools = [ProcessPoolExecutor(1, spawn, _end_with_parent) for _ in range(processes)]
            workers[way] = [stack.enter_context(pool) for pool in pools]
            _ask(workers[way], _warm_up, step, setup)  # the next way starts on a quiet machine
        yield lambda seconds: {way: sum(_ask(members, _rate, seconds)) for way, members in workers.items()}


def _ways(accelerator: bool) -> dict[str, tuple[int, Setup]]:
    """Returns the number of workers and their setup, by name of the way."""
    cores = len(os.sched_getaffinity(0))
    if accelerator:
        return {"eager": (1, Setup(cores, "cuda")), "CUDA graphs": (1, Setup(cores, "cuda", graphs=True))}
    return {_counted(1, cores): (1, Setup(cores)), _counted(cores, 1): (cores, Setup(1))}


def _counted(processes: int, threads: int) -> str:
    return f"{processes} process{'es' * (processes > 1)} x {threads} thread{'s' * (threads > 1)}"


def _ask(workers: Sequence[ProcessPoolExecutor], function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls a function in all workers at once."""
    try:
        return [future.result() for future in [worker.submit(function, *args) for worker in workers]]
    except BrokenProcessPool:
        raise InputError("--peer: a PyTorch process ended: it was killed") from None
    except Exception as error:
        raise InputError(f"--peer: a PyTorch process ended: {type(error).__name__}: {error}") from None


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _warm_up(step: Step, setup: Setup) -> None:
    """Builds and warms up this worker's training step."""
    global _train
    _train = make_step(step, setup)
    for _ in range(3):
        _train()


def _rate(seconds: float) -> float:
    """Trains for some seconds; returns the images per second."""
    images, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        images += _train()
    return images / elapsed


def make_step(step: Step, setup: Setup) -> Callable[[], int]:
    """Returns a function that trains on random batches, waits for the device and returns the number of images."""
    import torch  # pyright: ignore[reportMissingImports]

    device = setup.device
    torch.set_num_threads(setup.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # like our precision "float32"; matrix products have it by default
    images = torch.randint(0, 256, (EXAMPLES, *step.image_shape), dtype=torch.uint8, device=device)
    labels = torch.randint(0, step.num_classes, (EXAMPLES,), device=device)
    mean = images.float().mean((0, 1, 2)).reshape(1, -1, 1, 1)
    deviation = images.float().std((0, 1, 2)).reshape(1, -1, 1, 1)
    if step.augment:
        windows, labels = _crops(torch, images, mean), labels.repeat(2)
    network = build_model(step.model, step.norm, step.num_classes, step.image_shape)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, weight_decay=step.weight_decay)

    def batch_loss(batch: Any, targets: Any) -> Any:
        batch = (batch.permute(0, 3, 1, 2).float() - mean) / deviation  # as channels_last, without a copy
        return torch.nn.functional.cross_entropy(network(batch), targets)

    if setup.graphs:
        batch_loss = torch.compile(batch_loss, mode="reduce-overhead")

    def train() -> int:
        steps = 1 if device == "cpu" else 16  # steps for each synchronisation with the GPU
        for _ in range(steps):
            chosen = torch.randint(0, len(labels), (step.batch_size,), device=device)
            if step.augment:
                top, left = torch.randint(0, 2 * PAD + 1, (2, step.batch_size), device=device)
                batch = windows[chosen, top, left]
            else:
                batch = images[chosen]
            optimizer.zero_grad(set_to_none=True)
            batch_loss(batch, labels[chosen]).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return steps * step.batch_size

    return train


def _crops(torch: Any, images: Any, mean: Any) -> Any:
    """Returns every crop of every image, then of its mirror image, as a view uint8[2n, top, left, H, W, C] to gather from."""
    n, height, width, channels = images.shape
    padded = mean.round().to(torch.uint8).reshape(channels).repeat(n, height + 2 * PAD, width + 2 * PAD, 1)
    padded[:, PAD:-PAD, PAD:-PAD] = images
    padded = torch.cat([padded, padded.flip(2)])
    return padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)


def build_model(model: str, norm: str, num_classes: int, image_shape: Sequence[int]) -> Any:
    """Returns our model of this name as an nn.Module of images [N, C, H, W]."""
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import pad  # pyright: ignore[reportMissingImports]

    normed = norm == "batch"
    height, width, channels = image_shape

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[Any]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not normed)
        return [layer, nn.BatchNorm2d(outputs, momentum=0.01)] if normed else [layer]

    def dense(inputs: int, outputs: int) -> list[Any]:
        norms = [nn.BatchNorm1d(outputs, momentum=0.01)] if normed else []
        return [nn.Linear(inputs, outputs, bias=not normed), *norms, nn.ReLU(True)]

    class Flatten(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)  # no copy, for the channels are last in memory

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            self.stride, self.zeros = outputs // inputs, (outputs - inputs) // 2
            self.body = nn.Sequential(*conv(inputs, outputs, 3, self.stride), nn.ReLU(True), *conv(outputs, outputs, 3))

        def forward(self, x: Any) -> Any:
            shortcut = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.zeros, self.zeros)) if self.zeros else x
            return self.body(x).add_(shortcut).relu_()

    layers: list[Any] = []
    if model == "alexnet":
        for index, (kernel, features) in enumerate([(5, 16), (3, 48), (3, 96), (3, 64), (3, 64)]):
            layers += [*conv(channels, features, kernel), nn.ReLU(True)]
            channels = features
            if index in (0, 1, 4):  # SAME: an odd side is padded at both ends, an even one at its end
                layers.append(nn.MaxPool2d(3, 2, (height % 2, width % 2), ceil_mode=True))
                height, width = (height + 1) // 2, (width + 1) // 2
        layers += [Flatten(), *dense(height * width * channels, 256), *dense(256, 256)]
        return nn.Sequential(*layers, nn.Linear(256, num_classes))
    blocks = (int(model.removeprefix("resnet")) - 2) // 6
    widths = [16, *(width for width in (16, 32, 64) for _ in range(blocks))]
    layers = [*conv(channels, 16, 3), nn.ReLU(True), *(Block(*pair) for pair in pairwise(widths))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(64, num_classes))
