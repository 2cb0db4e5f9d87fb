"""A model and dataset so small that their program compiles in a second, shared by the tests that train."""

import signal
from typing import Any

import numpy as np
from flax import linen as nn

from smallbatch_jax.config import experiment
from smallbatch_jax.data import Dataset, order
from smallbatch_jax.models.layers import Dense
from smallbatch_jax.models.norm import BatchNorm
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results


class TinyModel(nn.Module):
    """An MLP with one batch-normalised hidden layer, which the paper's tests need: 2·2·1 pixels → 8 → 3 classes."""

    bn_batch_size: int | None = None
    bn_decay: float = 0.99

    @nn.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        x = Dense(8)(images.reshape(images.shape[0], -1))
        x = nn.relu(BatchNorm(self.bn_batch_size, self.bn_decay)(x, train))
        return Dense(3)(x)


class PlainModel(nn.Module):
    """An MLP without batch norm, so that a high learning rate makes its loss overflow within a few steps."""

    @nn.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        x = nn.relu(Dense(8)(images.reshape(images.shape[0], -1)))
        return Dense(3)(nn.relu(Dense(8)(x)))


def dataset(num_train: int = 50, num_test: int = 20) -> Dataset:
    """Returns a dataset of 2×2 images in three classes that are easy to tell apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, num_train + num_test)
    centres = np.array([[200, 30, 30, 30], [30, 200, 30, 30], [30, 30, 200, 30]])
    images = np.clip(centres[labels] + rng.normal(0, 25, (len(labels), 4)), 0, 255).astype(np.uint8).reshape(-1, 2, 2, 1)
    return Dataset(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], 3)


def grid(**fields: Any) -> experiment.Experiment:
    """Returns an experiment of 3 epochs, m = 4 and three base_lrs; `fields` replace fields of the grid or the experiment."""
    config = experiment.default_config()
    config.epochs = 3
    config.weight_decay = 1e-3
    config.checkpoint_seconds = 1e6
    config.grid.batch_sizes, config.grid.base_lrs = (4,), (2**-9, 2**-7, 2**-5)
    for name, value in fields.items():
        section = config.grid if name in config.grid else config
        section[name] = value
    return experiment.from_config(config)


def batch_indices(seed: int, first_step: int, num_steps: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Returns the example indices of steps first_step … first_step+num_steps-1 at one batch size: int32[num_steps, m]."""
    found = order.stream(seed, first_step * batch_size, num_steps * batch_size, num_examples)
    return found.reshape(num_steps, batch_size)


def rows(workdir: Any, **where: Any) -> Any:
    """Returns the stored rows whose columns have the given values."""
    frame = results.load(workdir)
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame.reset_index(drop=True)


class StopAfter(NoProgress):
    """Progress display that sends this process a signal after a number of segments, as a user would."""

    def __init__(self, segments: int, signum: int = signal.SIGTERM):
        self.left, self.signum = segments, signum

    def show(self, status: Any, doing: str) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.signum)
