"""Where images come from: `load(name)` gives a `Dataset` of uint8 images and int32 labels, held in memory.

A dataset is added with one loader, `data_dir -> Dataset`, and one entry in `_LOADERS`.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smallbatch_jax import fields
from smallbatch_jax.data import prepared
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.digits import load_digits
from smallbatch_jax.data.folder import load_folder
from smallbatch_jax.experiment import InputError

__all__ = ["DATASETS", "Dataset", "load", "num_train_examples", "random"]

_LOADERS: dict[str, Callable[[str | os.PathLike | None], Dataset]] = {
    "digits": load_digits,
    "folder": load_folder,
    **prepared.LOADERS,
}
DATASETS = tuple(_LOADERS)


class _Size(NamedTuple):
    train: int
    test: int
    image: tuple[int, int, int]
    classes: int


_SIZES = {
    "digits": _Size(1_437, 360, (8, 8, 1), 10),
    "cifar10": _Size(50_000, 10_000, (32, 32, 3), 10),
    "cifar100": _Size(50_000, 10_000, (32, 32, 3), 100),
}


def load(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset:
    """Loads a dataset by name.

    Args:
      name: one of DATASETS.
      data_dir: the folder that holds the data; None for a dataset that needs none.
      image_size: None, the one value so far: all images share one size and live in memory.
    Returns:
      A Dataset with train_images uint8[N, H, W, C] and train_labels int32[N]; the same arrays on every call.
    Raises:
      InputError: one line that names the field or the file, what it got and what it accepts.
    """
    fields.choice(DATASETS, "dataset")("dataset.name", name)
    if image_size is not None:
        raise InputError(
            f"dataset.image_size: got {image_size!r}, but streaming is not available yet; "
            "use None, for images that share one size"
        )
    return _LOADERS[name](data_dir or None)  # "" is no folder either


def num_train_examples(name: str, data_dir: str | os.PathLike | None = None) -> int:
    """The size of a dataset's training set; for those with a fixed one the data need not be there."""
    return _SIZES[name].train if name in _SIZES else len(load(name, data_dir).train_labels)


def random(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset:
    """Random images and labels of the sizes of a dataset, which need not be there: to measure how fast it trains.

    A folder's sizes are known from the folder alone; it is loaded.
    """
    if name not in _SIZES:
        return load(name, data_dir, image_size)
    size, draw = _SIZES[name], np.random.default_rng(0)

    def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = draw.integers(0, 256, (count, *size.image), np.uint8)
        return images, draw.integers(0, size.classes, count, np.int32)

    return Dataset(*examples(size.train), *examples(size.test), size.classes)
