"""Datasets: `load(name)` returns a `Dataset`, which is held in memory, or `Photographs`, which are streamed.

DATASETS (`config/datasets.py`) names the loader of each dataset. The package may import only `config`.
"""

import os
from pkgutil import resolve_name

import numpy as np

from smallbatch_jax.config import experiment, extras, fields
from smallbatch_jax.config.datasets import DATASETS
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data.dataset import Dataset, subset_size, validation_size
from smallbatch_jax.data.streaming.photographs import IMAGENET_STATISTICS, Photographs, SyntheticImages

__all__ = ["DATASETS", "Dataset", "Photographs", "load", "load_section", "num_train_examples", "random"]

SMALLEST_IMAGE = 8  # pixels, of a streamed image


def load(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset | Photographs:
    """Loads a dataset by name.

    Args:
      name: one of DATASETS.
      data_dir: the folder that holds the data; None for a dataset that needs none.
      image_size: None for images that share one size and live in memory; S for photographs that are read on demand,
        resized and cropped to S × S pixels ("folder" and "imagenet2012").
    Returns:
      A Dataset with train_images uint8[N, H, W, C] and train_labels int32[N], the same arrays on every call; or Photographs.
    Raises:
      InputError: one line that names the field or the file, what it got and what it accepts.
    """
    fields.choice(tuple(DATASETS), "dataset")("dataset.name", name)
    entry, data_dir = DATASETS[name], data_dir or None  # "" names no folder either
    if image_size is None:
        if entry.loader is None:
            raise InputError(f"dataset.image_size: got None, but {name} does not fit in memory; use 224, or another size.")
        return resolve_name(entry.loader)(data_dir)
    fields.integer(SMALLEST_IMAGE, 4096)("dataset.image_size", image_size)
    if entry.stream is None:
        streamed = ", ".join(other for other, known in DATASETS.items() if known.stream)
        raise InputError(
            f"dataset.image_size: got {image_size!r}, but the images of {name} share one size and live in memory; use None. "
            f"Streamed are {streamed}."
        )
    extras.require("photographs", "dataset.image_size")
    return resolve_name(entry.stream)(data_dir, image_size)


def load_section(chosen: experiment.Dataset, random_images: bool = False) -> Dataset | Photographs:
    """Returns the data that a config's section `dataset` selects, or random images of the same shapes."""
    found = (random if random_images else load)(chosen.name, chosen.data_dir, chosen.image_size)
    return divided(found, chosen.subset, chosen.validation_fraction)


def divided(dataset: Dataset | Photographs, subset: int | None, validation_fraction: float) -> Dataset | Photographs:
    """Returns the dataset with a subset of its training examples and a validation split; refuses both for streamed images."""
    if isinstance(dataset, Dataset):
        return dataset.with_subset(subset).with_validation(validation_fraction)
    if subset is not None:
        raise InputError("dataset.subset: streamed images are used whole; use None.")
    if validation_fraction:
        raise InputError("dataset.validation_fraction: streamed images have no validation split; use 0.")
    return dataset


def num_train_examples(chosen: experiment.Dataset) -> int:
    """Returns the number of training examples of the section `dataset`, from DATASETS if known there."""
    size = DATASETS[chosen.name].size
    if size is None:
        return load_section(chosen).num_train
    count = subset_size(size.train, chosen.subset)
    return count - validation_size(count, chosen.validation_fraction)


def random(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset | Photographs:
    """Returns random images and labels with a dataset's sizes, to measure speed where its files are missing.

    Arguments as for `load`. A folder is loaded, since only its files tell its sizes. Streamed photographs are synthetic JPEGs.
    """
    size = DATASETS[name].size
    if size is None:
        return load(name, data_dir, image_size)
    if DATASETS[name].stream:
        extras.require("photographs", f"dataset.name={name}")
        train, test = (SyntheticImages(count, size.num_classes) for count in (size.train, size.test))
        return Photographs(train, test, image_size or size.image_shape[0], size.num_classes, (), IMAGENET_STATISTICS)
    rng = np.random.default_rng(0)
    train, test = (
        (rng.integers(0, 256, (count, *size.image_shape), np.uint8), rng.integers(0, size.num_classes, count, np.int32))
        for count in (size.train, size.test)
    )
    return Dataset(*train, *test, size.num_classes)
