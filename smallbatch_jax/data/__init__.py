"""Where images come from: `load(name)` gives a `Dataset` of uint8 images and int32 labels, held in memory; or `Photographs`.

A dataset is added with one loader, `data_dir -> Dataset`, and one entry in `_LOADERS`; one that is streamed with
`(data_dir, image_size) -> Photographs` in `_STREAMS`.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smallbatch_jax.config import extras, fields
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import prepared
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.digits import load_digits
from smallbatch_jax.data.folder import load_folder, stream_folder
from smallbatch_jax.data.photographs import Photographs, SyntheticImages

__all__ = ["DATASETS", "Dataset", "Photographs", "load", "num_train_examples", "random"]

_LOADERS: dict[str, Callable[[str | os.PathLike | None], Dataset]] = {
    "digits": load_digits,
    "folder": load_folder,
    **prepared.LOADERS,
}
_STREAMS: dict[str, Callable[[str | os.PathLike | None, int], Photographs]] = {"folder": stream_folder, **prepared.STREAMS}
DATASETS = tuple(dict.fromkeys((*_LOADERS, *_STREAMS)))
SMALLEST_IMAGE = 8  # pixels, of a streamed image


class _Size(NamedTuple):
    train: int
    test: int
    image: tuple[int, int, int]
    classes: int


_SIZES = {
    "digits": _Size(1_437, 360, (8, 8, 1), 10),
    "cifar10": _Size(50_000, 10_000, (32, 32, 3), 10),
    "cifar100": _Size(50_000, 10_000, (32, 32, 3), 100),
    "imagenet2012": _Size(1_281_167, 50_000, (224, 224, 3), 1_000),
}


def load(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset | Photographs:
    """Loads a dataset by name.

    Args:
      name: one of DATASETS.
      data_dir: the folder that holds the data; None for a dataset that needs none.
      image_size: None for images that share one size and live in memory; S for photographs that are read as they are needed,
        resized and cropped to S × S pixels ("folder" and "imagenet2012").
    Returns:
      A Dataset with train_images uint8[N, H, W, C] and train_labels int32[N], the same arrays on every call; or Photographs.
    Raises:
      InputError: one line that names the field or the file, what it got and what it accepts.
    """
    fields.choice(DATASETS, "dataset")("dataset.name", name)
    data_dir = data_dir or None  # "" is no folder either
    if image_size is None:
        if name not in _LOADERS:
            raise InputError(f"dataset.image_size: got None, but {name} does not fit in memory; use 224, or another size.")
        return _LOADERS[name](data_dir)
    fields.integer(SMALLEST_IMAGE, 4096)("dataset.image_size", image_size)
    if name not in _STREAMS:
        raise InputError(
            f"dataset.image_size: got {image_size!r}, but the images of {name} share one size and live in memory; use None. "
            f"Streamed are {', '.join(_STREAMS)}."
        )
    extras.require("photographs", "dataset.image_size")
    return _STREAMS[name](data_dir, image_size)


def num_train_examples(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> int:
    """The size of a dataset's training set; for those with a fixed one the data need not be there."""
    return _SIZES[name].train if name in _SIZES else load(name, data_dir, image_size).num_train


def random(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset | Photographs:
    """Random images and labels of the sizes of a dataset, which need not be there: to measure how fast it trains.

    A folder's sizes are known from the folder alone; it is loaded. Photographs are made up, encoded as JPEG.
    """
    if name not in _SIZES:
        return load(name, data_dir, image_size)
    if name in _STREAMS:
        extras.require("photographs", f"dataset.name={name}")
        size = _SIZES[name]
        train, test = (SyntheticImages(count, size.classes) for count in (size.train, size.test))
        return Photographs(train, test, image_size or size.image[0], size.classes, (), prepared.IMAGENET_STATISTICS)
    size, draw = _SIZES[name], np.random.default_rng(0)

    def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = draw.integers(0, 256, (count, *size.image), np.uint8)
        return images, draw.integers(0, size.classes, count, np.int32)

    return Dataset(*examples(size.train), *examples(size.test), size.classes)
