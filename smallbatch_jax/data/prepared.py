"""Datasets that TensorFlow Datasets prepared, read without TensorFlow and then cached as uint8 arrays or streamed.

TFDS's own reader imports whatever module the folder's features.json names, and hands the images to any of Pillow's decoders,
some of which start other programs. This module reads JSON, text, records and PNG, and nothing else.
"""

import hashlib
import io
import json
import os
import re
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import cache, decode
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.paths import nearby
from smallbatch_jax.data.streaming.photographs import IMAGENET_STATISTICS, Photographs, Records, parsed_example


class Prepared(NamedTuple):
    """One version of a dataset, as TFDS prepared it."""

    folder: Path  # DATA_DIR/NAME/VERSION
    key: str  # changes with the folder's path and listing
    class_names: tuple[str, ...]
    counts: list[int]  # examples of each split
    records: list[list[str]]  # array_record files of each split


def load_prepared(name: str, data_dir: str | os.PathLike | None) -> Dataset:
    """Loads images of one size with the splits train and test, from the newest version below data_dir/name.

    The name is TFDS's, and data_dir the folder that `prepare_data.py` wrote to; None takes `default_data_dir()`.

    Raises:
      InputError: if it is not there, with the command that prepares it; or cannot be read.
    """
    found = _open(newest_version(name, data_dir), ("train", "test"))
    arrays = cache.kept(name, found.key, sum(found.counts), lambda: _read(found))
    (train_images, test_images), (train_labels, test_labels) = (
        np.split(arrays[kind], found.counts[:1]) for kind in ("images", "labels")
    )
    return Dataset(train_images, train_labels, test_images, test_labels, len(found.class_names), found.class_names)


load_cifar10, load_cifar100 = partial(load_prepared, "cifar10"), partial(load_prepared, "cifar100")


def stream_imagenet(data_dir: str | os.PathLike | None, image_size: int) -> Photographs:
    """Opens ImageNet (ILSVRC 2012) as `prepare_data.py` stored it; its 50,000 validation images are the test set.

    Raises:
      InputError: if it is not there, with the command that prepares it; or cannot be read.
    """
    found = _open(newest_version("imagenet2012", data_dir), ("train", "validation"))
    train, test = map(Records, found.records, found.counts)
    names = " ".join(os.path.basename(path) for paths in found.records for path in paths)
    return Photographs(train, test, image_size, len(found.class_names), found.class_names, IMAGENET_STATISTICS, names)


def default_data_dir() -> Path:
    """Returns TFDS's default folder: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def newest_version(name: str, data_dir: str | os.PathLike | None) -> Path:
    """Returns the folder data_dir/name/VERSION of the highest version that is complete."""
    if not isinstance(data_dir, (str, os.PathLike, type(None))):
        raise InputError(f"dataset.data_dir: got {data_dir!r}; {name!r} accepts the path of a folder")
    root = default_data_dir() if data_dir is None else Path(os.path.expanduser(os.fsdecode(data_dir)))
    try:
        found = versions(root / name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"dataset.data_dir: cannot list {str(root / name)!r} ({reason})") from error
    if not found:
        other = nearby(root, lambda path: bool(versions(path / name)))
        way = f"Give {str(other)!r}, where it is." if other else f"Prepare it, with a network: {_command(name, root)}"
        raise InputError(f"dataset.data_dir: {name} is not in {str(root)!r}. {way}")
    return max(found, key=lambda folder: tuple(map(int, folder.name.split("."))))


def versions(folder: Path) -> list[Path]:
    """Returns the folders of a dataset's complete versions, such as 3.0.2 but not incomplete.XXX_3.0.2."""
    found = [info.parent for info in folder.glob("*/dataset_info.json")]
    return [version for version in found if re.fullmatch(r"\d+\.\d+\.\d+", version.name)]


def _command(name: str, root: Path) -> str:
    return f"python experiments/prepare_data.py --dataset={name} --data_dir={shlex.quote(str(root))}"


def _open(folder: Path, splits: tuple[str, ...]) -> Prepared:
    """Reads TFDS's description of a dataset; raises InputError if there are no array_record files."""
    name = folder.parent.name
    try:
        files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        listing = [f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in files]
        info = json.loads((folder / "dataset_info.json").read_text())
        named = {split["name"]: split["shardLengths"] for split in info["splits"]}
        shards = [[int(length) for length in named[split]] for split in splits]
        features = json.loads((folder / "features.json").read_text())["featuresDict"]["features"]
        num_classes = int(features["label"]["classLabel"]["numClasses"])
        class_names = tuple(filter(None, map(str.strip, (folder / "label.labels.txt").read_text().splitlines())))
        if len(class_names) != num_classes:
            raise ValueError(f"label.labels.txt has {len(class_names)} names for {num_classes} classes")
    except Exception as error:  # JSON of an unexpected shape can raise anything
        raise InputError(
            f"dataset.data_dir: {str(folder)!r} cannot be read as {name}: {type(error).__name__}: {error}"
        ) from error
    records = [sorted(map(str, folder.glob(f"{name}-{split}.array_record-*"))) for split in splits]
    if not all(records):
        stored = info.get("fileFormat", "tfrecord")  # TFDS's default
        raise InputError(
            f"dataset.data_dir: {str(folder)!r} was prepared as {stored}, and lacks array_record files, the only format read. "
            f"Prepare it in another folder and give that: {_command(name, folder.parent.parent / 'array_record')}"
        )
    for split, there, lengths in zip(splits, records, shards, strict=True):
        if len(there) != len(lengths):
            raise InputError(
                f"dataset.data_dir: {str(folder)!r} has {len(there)} of the {len(lengths)} array_record files of {split}; "
                f"delete it and prepare it again: {_command(name, folder.parent.parent)}"
            )
    content = "\n".join([str(folder.resolve()), str(cache.FORMAT_VERSION), *listing])
    return Prepared(folder, hashlib.sha256(os.fsencode(content)).hexdigest()[:32], class_names, [*map(sum, shards)], records)


def _read(prepared: Prepared) -> dict[str, np.ndarray]:
    """Returns "images" uint8[N, H, W, C], training examples first, and "labels" int32[N]."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    found: list[tuple[bytes, int]] = []
    try:
        for paths, count in zip(prepared.records, prepared.counts, strict=True):
            with ArrayRecordDataSource(paths) as records:
                if len(records) != count:
                    raise ValueError(f"{len(records)} of {count} examples found")
                found.extend(map(parsed_example, records))
        contents, labels = zip(*found, strict=True)
        with decode.quiet_pillow():
            images = np.stack([decode.decode(io.BytesIO(content)) for content in contents])
        return {"images": images, "labels": np.array(labels, np.int32)}
    except Exception as error:
        folder = prepared.folder
        raise InputError(
            f"dataset.data_dir: the records in {str(folder)!r} cannot be read ({error}); delete them and prepare them again: "
            f"{_command(folder.parent.name, folder.parent.parent)}"
        ) from error
