"""Datasets that TensorFlow Datasets prepared once: read without TensorFlow, then kept as uint8 arrays."""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smallbatch_jax.data import cache
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.experiment import InputError

SPLITS = ("train", "test")


def load_prepared(name: str, data_dir: str | os.PathLike | None) -> Dataset:
    """A dataset with images of one size and the splits train and test, from the newest version below data_dir/name.

    Args:
      name: TFDS's name, "cifar10" or "cifar100".
      data_dir: where `prepare_data.py` put it; None takes TFDS's own default, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      InputError: if it is not there, with the command that prepares it; or cannot be read.
    """
    version = newest_version(name, data_dir)
    files = sorted(path for path in version.iterdir() if path.is_file())
    listing = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    key = hashlib.sha256("\n".join([str(version.resolve()), str(cache.FORMAT_VERSION), *listing]).encode()).hexdigest()[:32]
    builder = _builder(name, version)
    counts = [int(builder.info.splits[split].num_examples) for split in SPLITS]

    kept = {part: cache.directory() / f"{name}-{part}-{key}.npy" for part in ("images", "labels")}
    images, labels = (cache.read(path, sum(counts)) for path in kept.values())
    if images is None or labels is None:
        images, labels = _read(builder, version)
        cache.write(kept["images"], images, replaces=f"{name}-images-*.npy")
        cache.write(kept["labels"], labels, replaces=f"{name}-labels-*.npy")
    train_images, test_images = np.split(images, counts[:1])
    train_labels, test_labels = np.split(labels.reshape(-1).astype(np.int32), counts[:1])
    label = builder.info.features["label"]
    return Dataset(train_images, train_labels, test_images, test_labels, label.num_classes, tuple(label.names))


LOADERS = {name: partial(load_prepared, name) for name in ("cifar10", "cifar100")}


def default_data_dir() -> Path:
    """TFDS's own: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def newest_version(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The folder data_dir/name/VERSION of the highest version that is complete."""
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    versions = []
    for info in (root / name).glob("*/dataset_info.json"):
        parts = info.parent.name.split(".")
        if len(parts) == 3 and all(part.isdecimal() for part in parts):  # not incomplete.XXX_3.0.2
            versions.append(([int(part) for part in parts], info.parent))
    if not versions:
        raise InputError(
            f"dataset.data_dir: {name} is not in {str(root)!r}. Once, where the network is: "
            f"python experiments/prepare_data.py --dataset={name} --data_dir={root}"
        )
    return max(versions)[1]


def _builder(name: str, version: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(str(version))
        _ = [builder.info.splits[split].num_examples for split in SPLITS]
    except Exception as error:  # TFDS promises no particular error for a damaged folder
        raise InputError(f"dataset.data_dir: {str(version)!r} cannot be read as {name}: {error}") from error
    return builder


def _read(builder: Any, version: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every image uint8[N, H, W, C] and label, training examples first; labels as uint8[N, 1, 1, 1], for the cache."""
    images, labels = [], []
    try:
        for split in SPLITS:
            for example in builder.as_data_source(split=split):
                images.append(example["image"])
                labels.append(example["label"])
        return np.stack(images), np.array(labels, np.uint8).reshape(-1, 1, 1, 1)
    except Exception as error:
        raise InputError(
            f"dataset.data_dir: the records in {str(version)!r} cannot be read ({error}); files in array_record can be, "
            "which prepare_data.py writes."
        ) from error
