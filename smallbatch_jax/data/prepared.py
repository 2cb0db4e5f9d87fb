"""Datasets that TensorFlow Datasets prepared once: read without TensorFlow, then kept as uint8 arrays.

TFDS's own reader imports whatever module the folder's features.json names, and hands the images to any of Pillow's decoders,
some of which start other programs. This module reads JSON, text, records and PNG, and nothing else.
"""

import hashlib
import io
import json
import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import cache, decode
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.paths import nearby
from smallbatch_jax.data.streaming.photographs import IMAGENET_STATISTICS, Photographs, Records, parsed_example

SPLITS = ("train", "test")


def load_prepared(name: str, data_dir: str | os.PathLike | None) -> Dataset:
    """Loads images of one size with the splits train and test, from the newest version below data_dir/name.

    Args:
      name: TFDS's name, "cifar10" or "cifar100".
      data_dir: where `prepare_data.py` put it; None takes TFDS's own default, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      InputError: if it is not there, with the command that prepares it; or cannot be read.
    """
    version = newest_version(name, data_dir)
    key = _key(version)
    counts, class_names = _info(name, version, SPLITS)

    kept = {part: cache.directory() / f"{name}-{part}-{key}.npy" for part in ("images", "labels")}
    images, labels = (cache.read(path, sum(counts)) for path in kept.values())
    if images is None or labels is None:
        images, labels = _read(name, version, counts)
        cache.write(kept["images"], images, replaces=f"{name}-images-*.npy")
        cache.write(kept["labels"], labels, replaces=f"{name}-labels-*.npy")
    train_images, test_images = np.split(images, counts[:1])
    train_labels, test_labels = np.split(labels.reshape(-1).astype(np.int32), counts[:1])
    return Dataset(train_images, train_labels, test_images, test_labels, len(class_names), class_names)


load_cifar10, load_cifar100 = partial(load_prepared, "cifar10"), partial(load_prepared, "cifar100")


def stream_imagenet(data_dir: str | os.PathLike | None, image_size: int) -> Photographs:
    """Opens ImageNet (ILSVRC 2012) as `prepare_data.py` stored it; its 50,000 validation images are the test set.

    Raises:
      InputError: if it is not there, with the command that prepares it; or cannot be read.
    """
    name, splits = "imagenet2012", ("train", "validation")
    version = newest_version(name, data_dir)
    counts, class_names = _info(name, version, splits)
    train, test = (Records(_record_files(name, version, split), n) for split, n in zip(splits, counts, strict=True))
    return Photographs(train, test, image_size, len(class_names), class_names, IMAGENET_STATISTICS, _key(version))


def default_data_dir() -> Path:
    """Returns TFDS's own: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def newest_version(name: str, data_dir: str | os.PathLike | None) -> Path:
    """Returns the folder data_dir/name/VERSION of the highest version that is complete."""
    if not isinstance(data_dir, (str, os.PathLike, type(None))):
        raise InputError(f"dataset.data_dir: got {data_dir!r}; {name!r} accepts the path of a folder")
    root = default_data_dir() if data_dir is None else Path(os.path.expanduser(os.fsdecode(data_dir)))
    try:
        folders = [info.parent for info in (root / name).glob("*/dataset_info.json")]
    except OSError as error:
        raise InputError(f"dataset.data_dir: cannot list {str(root / name)!r} ({error.strerror})") from error
    versions = {}
    for folder in folders:
        numbers = folder.name.split(".")
        if len(numbers) == 3 and all(number.isdecimal() for number in numbers):  # not incomplete.XXX_3.0.2
            versions[tuple(map(int, numbers))] = folder
    if not versions:
        other = nearby(root, lambda path: any((path / name).glob("[0-9]*/dataset_info.json")))
        way = f"Give {str(other)!r}, where it is." if other else f"Once, where the network is: {_command(name, root)}"
        raise InputError(f"dataset.data_dir: {name} is not in {str(root)!r}. {way}")
    return versions[max(versions)]


def _command(name: str, root: Path) -> str:
    return f"python experiments/prepare_data.py --dataset={name} --data_dir={shlex.quote(str(root))}"


def _record_files(name: str, version: Path, split: str) -> list[str]:
    paths = sorted(map(str, version.glob(f"{name}-{split}.array_record-*")))
    if not paths:
        raise InputError(_not_array_record(name, version))
    return paths


def _not_array_record(name: str, version: Path) -> str:
    """Returns the error for a folder without array_record files: its format, and the command that prepares the right one."""
    try:
        stored = str(json.loads((version / "dataset_info.json").read_text()).get("fileFormat") or "tfrecord")  # TFDS's default
    except (OSError, ValueError, AttributeError):
        stored = "another format"
    root = version.parent.parent
    if stored == "array_record":
        way = f"lacks its array_record files; delete it and prepare it again: {_command(name, root)}"
    else:
        again = _command(name, root / "array_record")
        way = f"was prepared as {stored}, and array_record alone is read. Prepare it in another folder and give that: {again}"
    return f"dataset.data_dir: {str(version)!r} {way}"


def _key(version: Path) -> str:
    """Returns a name that changes with the place of the folder and with its listing."""
    try:
        files = sorted(path for path in version.iterdir() if path.is_file())
        listing = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    except OSError as error:
        raise InputError(f"dataset.data_dir: {str(version)!r} cannot be read ({error.strerror})") from error
    listed = "\n".join([str(version.resolve()), str(cache.FORMAT_VERSION), *listing])
    return hashlib.sha256(os.fsencode(listed)).hexdigest()[:32]


def _info(name: str, version: Path, names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Returns the number of examples of each split, and the names of the classes."""
    try:
        splits = json.loads((version / "dataset_info.json").read_text())["splits"]
        shards = {split["name"]: split["shardLengths"] for split in splits}
        counts = [sum(int(length) for length in shards[split]) for split in names]
        features = json.loads((version / "features.json").read_text())["featuresDict"]["features"]
        num_classes = int(features["label"]["classLabel"]["numClasses"])
        lines = (version / "label.labels.txt").read_text().splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
        if len(classes) != num_classes:
            raise ValueError(f"label.labels.txt has {len(classes)} names for {num_classes} classes")
    except Exception as error:  # JSON of an unexpected shape can raise anything
        raise InputError(
            f"dataset.data_dir: {str(version)!r} cannot be read as {name}: {type(error).__name__}: {error}"
        ) from error
    return counts, classes


def _read(name: str, version: Path, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8[N, H, W, C], training examples first, and labels uint8[N, 1, 1, 1], the shape of the cache."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    files = [_record_files(name, version, split) for split in SPLITS]
    found: list[tuple[bytes, int]] = []
    try:
        for paths, count in zip(files, counts, strict=True):
            with ArrayRecordDataSource(paths) as records:
                if len(records) != count:
                    raise ValueError(f"{len(records)} of {count} examples are there")
                found.extend(map(parsed_example, records))
        contents, labels = zip(*found, strict=True)
        with decode.quiet_pillow():
            images = np.stack([decode.decode(io.BytesIO(content)) for content in contents])
        return images, np.array(labels, np.uint8).reshape(-1, 1, 1, 1)
    except Exception as error:
        raise InputError(
            f"dataset.data_dir: the records in {str(version)!r} cannot be read ({error}); delete them and prepare them again: "
            f"{_command(name, version.parent.parent)}"
        ) from error
