"""The same training step in PyTorch, as fast as PyTorch makes it: what `benchmark.py --peer` compares with.

Workers are subprocesses, each `python benchmarks/torch_peer.py JSON` with the fields of `Step` and threads, device and graphs.
A worker prints "ready" once it is warm; then for each line of stdin, a number of seconds, it trains for about that long and
prints the images per second. Only workers import PyTorch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from smallbatch_jax.config.experiment import InputError

EXAMPLES = 4096  # random images, kept on the device
PAD = 4  # pixels, of the augmentation (§3.1)
LEARNING_RATE = 0.01  # has no influence on the speed


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
      model: "alexnet" or "resnetD" of D = 6n+2 layers.
      norm: "none" or "batch", over the whole batch.
      num_classes: logits per image.
      image_shape: H, W, C.
      batch_size: m, images per update.
      augment: whether each image is padded by 4 pixels, cropped at random and flipped at random.
      weight_decay: λ of the penalty (λ/2)‖θ‖².
    """

    model: str
    norm: str
    num_classes: int
    image_shape: Sequence[int]
    batch_size: int
    augment: bool
    weight_decay: float

    def __post_init__(self) -> None:
        layers = re.fullmatch(r"resnet(\d+)", self.model)
        if self.model != "alexnet" and not (layers and int(layers[1]) >= 8 and int(layers[1]) % 6 == 2):
            raise InputError(f"--peer: has no model {self.model!r}; it accepts alexnet and resnetD of D = 6n+2 layers.")
        if self.norm not in ("none", "batch"):
            raise InputError(f"--peer: has no norm {self.norm!r}; it accepts none and batch.")


@contextmanager
def peer(step: Step, accelerator: bool) -> Iterator[Callable[[float], dict[str, float]]]:
    """Starts workers for each way in which PyTorch can use this machine; ends them with the block.

    Args:
      step: what they train.
      accelerator: whether to train on the GPU, eagerly and with CUDA graphs, instead of on every core of the CPU, as one
        process of N threads and as N processes of one thread.

    Yields:
      A function that trains for some seconds in one way after the other, and returns images per second by way.

    Raises:
      InputError: if a worker ends before it is told to.
    """
    with ExitStack() as stack:
        workers: dict[str, list[_Worker]] = {}
        for way, tasks in _ways(accelerator).items():
            workers[way] = [stack.enter_context(_Worker(asdict(step) | task)) for task in tasks]
            for worker in workers[way]:
                worker.answer()  # "ready"; the next way starts on a quiet machine

        def measure(seconds: float) -> dict[str, float]:
            speeds = {}
            for way, members in workers.items():
                for worker in members:
                    worker.ask(seconds)
                speeds[way] = sum(float(worker.answer()) for worker in members)
            return speeds

        yield measure


def _ways(accelerator: bool) -> dict[str, list[dict[str, Any]]]:
    """The tasks of the workers of each way, by the way's name."""
    cores = len(os.sched_getaffinity(0))
    if accelerator:
        task = {"threads": cores, "device": "cuda"}
        return {"eager": [task | {"graphs": False}], "CUDA graphs": [task | {"graphs": True}]}
    task = {"device": "cpu", "graphs": False}
    ways = {_counted(1, cores): [task | {"threads": cores}]}
    return ways | {_counted(cores, 1): [task | {"threads": 1}] * cores}


def _counted(processes: int, threads: int) -> str:
    return f"{processes} process{'es' * (processes > 1)} x {threads} thread{'s' * (threads > 1)}"


class _Worker:
    """One subprocess, killed when its block ends."""

    def __init__(self, spec: dict[str, Any]):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
        environment["OMP_NUM_THREADS"] = str(spec["threads"])
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed on exit; a pipe could fill up)
        line = [sys.executable, os.path.abspath(__file__), json.dumps(spec)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        self._process = subprocess.Popen(line, **pipes, env=environment, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def ask(self, seconds: float) -> None:
        assert self._process.stdin
        try:
            print(seconds, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None

    def answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            raise self._failure()
        return line

    def _failure(self) -> InputError:
        status = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), f"exit status {status}")
        return InputError(f"--peer: a PyTorch process ended: {last}")


def main(spec: dict[str, Any]) -> None:
    """Runs a worker until stdin ends."""
    step, synchronise = make_step(spec)
    steps_at_once = 1 if spec["device"] == "cpu" else 16  # the GPU is waited for after so many
    for _ in range(3):
        step()
    synchronise()
    print("ready", flush=True)
    for line in sys.stdin:
        steps, began, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < float(line):
            for _ in range(steps_at_once):
                step()
            synchronise()
            steps, elapsed = steps + steps_at_once, time.perf_counter() - began
        print(steps * spec["batch_size"] / elapsed, flush=True)


def make_step(spec: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns a function that takes one SGD step on a random batch, and one that waits for the device."""
    import torch  # pyright: ignore[reportMissingImports]

    device, augment, batch_size = spec["device"], spec["augment"], spec["batch_size"]
    torch.set_num_threads(spec["threads"])
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # like our precision "float32"; matrix products have it by default
    images = torch.randint(0, 256, (EXAMPLES, *spec["image_shape"]), dtype=torch.uint8, device=device)
    labels = torch.randint(0, spec["num_classes"], (EXAMPLES,), device=device)
    mean = images.float().mean((0, 1, 2)).reshape(1, -1, 1, 1)
    deviation = images.float().std((0, 1, 2)).reshape(1, -1, 1, 1)
    if augment:
        windows, labels = _crops(torch, images, mean), labels.repeat(2)
    network = build_model(spec["model"], spec["norm"], spec["num_classes"], spec["image_shape"])
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, weight_decay=spec["weight_decay"])

    def batch_loss(batch: Any, targets: Any) -> Any:
        batch = (batch.permute(0, 3, 1, 2).float() - mean) / deviation  # as channels_last, without a copy
        return torch.nn.functional.cross_entropy(network(batch), targets)

    if spec["graphs"]:
        batch_loss = torch.compile(batch_loss, mode="reduce-overhead")

    def step() -> None:
        chosen = torch.randint(0, len(labels), (batch_size,), device=device)
        if augment:
            top, left = torch.randint(0, 2 * PAD + 1, (2, batch_size), device=device)
            batch = windows[chosen, top, left]
        else:
            batch = images[chosen]
        optimizer.zero_grad(set_to_none=True)
        batch_loss(batch, labels[chosen]).backward()
        optimizer.step()

    return step, torch.cuda.synchronize if device == "cuda" else lambda: None


def _crops(torch: Any, images: Any, mean: Any) -> Any:
    """Returns every crop of every image, then of its mirror image, as a view uint8[2n, top, left, H, W, C] to gather from."""
    n, height, width, channels = images.shape
    padded = mean.round().to(torch.uint8).reshape(channels).repeat(n, height + 2 * PAD, width + 2 * PAD, 1)
    padded[:, PAD:-PAD, PAD:-PAD] = images
    padded = torch.cat([padded, padded.flip(2)])
    image, row, column, channel = padded.stride()
    offsets = 2 * PAD + 1
    return padded.as_strided((2 * n, offsets, offsets, height, width, channels), (image, row, column, row, column, channel))


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
        layer = nn.Linear(inputs, outputs, bias=not normed)
        return [layer, nn.BatchNorm1d(outputs, momentum=0.01)] if normed else [layer]

    class Flatten(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)  # no copy, for the channels are last in memory

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.new, self.stride = outputs - inputs, stride
            self.body = nn.Sequential(*conv(inputs, outputs, 3, stride), nn.ReLU(True), *conv(outputs, outputs, 3))

        def forward(self, x: Any) -> Any:
            shortcut = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new // 2)) if self.stride == 2 else x
            return self.body(x).add_(shortcut).relu_()

    layers: list[Any] = []
    if model == "alexnet":
        for index, (kernel, features) in enumerate([(5, 16), (3, 48), (3, 96), (3, 64), (3, 64)]):
            layers += [*conv(channels, features, kernel), nn.ReLU(True)]
            channels = features
            if index in (0, 1, 4):  # SAME: an odd side is padded at both ends, an even one at its end
                layers.append(nn.MaxPool2d(3, 2, (height % 2, width % 2), ceil_mode=True))
                height, width = (height + 1) // 2, (width + 1) // 2
        layers += [Flatten(), *dense(height * width * channels, 256), nn.ReLU(True), *dense(256, 256), nn.ReLU(True)]
        return nn.Sequential(*layers, nn.Linear(256, num_classes))
    layers += [*conv(channels, 16, 3), nn.ReLU(True)]
    channels = 16
    for features in (16, 32, 64):
        for block in range((int(model[6:]) - 2) // 6):
            layers.append(Block(channels, features, 2 if features > 16 and not block else 1))
            channels = features
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(64, num_classes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
