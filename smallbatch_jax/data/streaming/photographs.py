"""Photographs: a dataset of pictures of many sizes, decoded on demand and never kept.

A source gives the bytes of each file and its label; `views.py` makes images of one size, `prefetch.py` decodes ahead.
"""

import functools
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import decode, order
from smallbatch_jax.data.dataset import as_received, channel_sums, mean_and_deviation

if TYPE_CHECKING:
    import jax

DIGEST_IMAGES = 64  # pictures per split whose content identifies a dataset without a listing
STATISTICS_IMAGES = 1024  # training images sampled for the channels' mean and deviation
# Mean and deviation of ImageNet's training images by which they are commonly normalised, in 0 … 255.
IMAGENET_STATISTICS = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)


class Source(Protocol):
    """The encoded pictures of one split. Each worker process gets a copy, so it must pickle small."""

    upright: bool  # whether pictures are turned as their EXIF says

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the content of a picture's file and its label; raises whatever reading raises."""
        ...

    def name(self, index: int) -> str:
        """Returns the name of a picture for messages."""
        ...


class Files:
    """Pictures that are files below a folder."""

    upright = True

    def __init__(self, root: str, paths: Sequence[str], labels: np.ndarray):
        """Takes paths that begin with root, and labels int32[N]."""
        self._root = root
        # One array of bytes: a million strings would take seconds to pickle for each worker process.
        self._paths = np.array([os.fsencode(path.removeprefix(root).lstrip(os.sep)) for path in paths], np.bytes_)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        with open(self.name(index), "rb") as file:
            return file.read(), int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._paths[index]))


class Records:
    """Pictures in array_record files, as TensorFlow Datasets writes them."""

    upright = False  # ImageNet is commonly read without its EXIF

    def __init__(self, paths: Sequence[str], count: int):
        self._paths, self._count = paths, count

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[bytes, int]:
        return parsed_example(self._records[index])

    def name(self, index: int) -> str:
        return f"{self._paths[0]}… record {index}"

    @functools.cached_property
    def _records(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._paths)


def parsed_example(record: bytes) -> tuple[bytes, int]:
    """Returns the encoded image and the label of a record that TensorFlow Datasets wrote."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]
    (image,), (label,) = feature["image"].bytes_list.value, feature["label"].int64_list.value
    return image, int(label)


class SyntheticImages:
    """Random JPEGs of 500 × 375 pixels and 60 KB, like ImageNet's, to measure how fast real ones would be read."""

    upright = False

    def __init__(self, count: int, num_classes: int):
        import cv2
        import simplejpeg

        self._count, self._num_classes = count, num_classes
        coarse = np.random.default_rng(0).integers(0, 256, (8, 47, 63, 3), np.uint8)
        smooth = (cv2.resize(image, (500, 375), interpolation=cv2.INTER_CUBIC) for image in coarse)
        self._contents = [simplejpeg.encode_jpeg(image, 92) for image in smooth]

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[bytes, int]:
        return self._contents[index % len(self._contents)], index % self._num_classes

    def name(self, index: int) -> str:
        return f"synthetic photograph {index}"


@dataclass(frozen=True, eq=False)
class Photographs:
    """A dataset that is streamed: images uint8[S, S, 3] and labels in [0, num_classes)."""

    train: Source
    test: Source
    image_size: int  # S, in pixels
    num_classes: int
    class_names: tuple[str, ...]
    statistics: tuple[np.ndarray, np.ndarray] | None = None  # mean and deviation of the channels in 0 … 255, if known
    listing: str = ""  # the names of the files, or a digest of them
    test_labels: np.ndarray | None = None  # int32[N]; None if known only from the records

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, 3)

    @property
    def example(self) -> "jax.ShapeDtypeStruct":
        """Shape and dtype of one image, as a model receives it."""
        return as_received(self.image_shape, np.uint8)

    @property
    def target(self) -> "jax.ShapeDtypeStruct":
        """Shape and dtype of one label."""
        return as_received((), np.int32)

    @property
    def num_train(self) -> int:
        return len(self.train)

    @property
    def num_test(self) -> int:
        return len(self.test)

    def digest(self) -> str:
        """Returns a digest of these pictures, so that their results are not mixed with those of others.

        Without a listing it is computed from the content of a fixed few of them.
        """
        digest = hashlib.sha256(f"{self.listing} {self.image_size} {self.num_classes}".encode())
        for source in () if self.listing else (self.train, self.test):
            digest.update(f"{len(source)}".encode())
            for index in np.linspace(0, len(source) - 1, DIGEST_IMAGES, dtype=int).tolist() if len(source) else ():
                content, label = source.read(index)
                digest.update(f"{label} {hashlib.sha256(content).hexdigest()}".encode())
        return digest.hexdigest()[:16]

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean, deviation), float32[C] each, in units of 0 … 255, of the training images in their test view.

        If they are unknown, they are computed from a fixed random sample of 1,024 images.

        Raises:
          InputError: if none of those can be decoded.
        """
        return self.statistics or self._sampled_statistics

    @functools.cached_property
    def _sampled_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        from smallbatch_jax.data.streaming.views import center_view

        def sums_of(index: int) -> np.ndarray | None:
            with suppress(Exception):  # an undecodable picture is reported when it is trained on
                image = center_view(self.train.read(index)[0], self.image_size, self.train.upright)
                return np.array(channel_sums(image[None]), object)
            return None

        chosen = order.epoch_permutation(0, 0, self.num_train)[:STATISTICS_IMAGES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [pair for pair in pool.map(sums_of, chosen.tolist()) if pair is not None]
        if not found:
            name = self.train.name(int(chosen[0]))
            raise InputError(f"dataset.data_dir: none of {len(chosen)} training images can be decoded, {name!r} for one")
        sums, squares = np.sum(found, axis=0)
        return mean_and_deviation(sums, squares, len(found) * self.image_size**2)


def what_is_wrong(source: Source, index: int) -> str:
    """Describes why a picture could not be read or decoded."""
    try:
        decode.decode(io.BytesIO(source.read(index)[0]), source.upright)
    except Exception as error:
        return decode.what_is_wrong(error)
    return "could not be decoded before, and can be now"
