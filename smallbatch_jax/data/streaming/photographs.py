"""Photographs of many sizes, more than fit in memory: read and decoded as they are needed, never kept.

A source gives the bytes of each file and its label; `views.py` says how they become images of one size, `stream.py` decodes
them ahead of their use.
"""

import functools
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import decode, order

DIGEST_IMAGES = 64  # of each split, that name a dataset without a listing
STATISTICS_IMAGES = 1024  # training images that the channels' mean and deviation are taken over


class Source(Protocol):
    """The encoded pictures of one split. Worker processes get a copy: it must be pickled in little space."""

    upright: bool  # whether pictures are turned as their EXIF says

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The content of a picture's file, and its label; raises whatever reading it raises."""
        ...

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        ...


class Files:
    """Pictures that are files below a folder."""

    upright = True

    def __init__(self, root: str, paths: Sequence[str], labels: np.ndarray):
        """Paths begin with root; labels int32[N]."""
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

    upright = False  # as everyone reads ImageNet

    def __init__(self, paths: Sequence[str], count: int):
        self._paths, self._count = list(paths), count

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[bytes, int]:
        from tensorflow_datasets.proto import tf_example_pb2

        record = self._records[index]
        feature = tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]
        (image,), (label,) = feature["image"].bytes_list.value, feature["label"].int64_list.value
        return image, int(label)

    def name(self, index: int) -> str:
        return f"{self._paths[0]}… record {index}"

    @functools.cached_property
    def _records(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._paths)

    def __getstate__(self) -> dict:
        return {"_paths": self._paths, "_count": self._count}  # not the open files


class SyntheticImages:
    """Made-up photographs of 500×375, to measure how fast real ones would be read."""

    upright = False

    def __init__(self, count: int, num_classes: int):
        import cv2
        import simplejpeg

        self._count, self._num_classes = count, num_classes
        coarse = np.random.default_rng(0).integers(0, 256, (8, 47, 63, 3), np.uint8)  # which smoothed takes 60 KB, as one does
        smooth = (cv2.resize(image, (500, 375), interpolation=cv2.INTER_CUBIC) for image in coarse)
        self._contents = [simplejpeg.encode_jpeg(image, 92) for image in smooth]

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[bytes, int]:
        return self._contents[index % len(self._contents)], index % self._num_classes

    def name(self, index: int) -> str:
        return f"made-up photograph {index}"


@dataclass(frozen=True, eq=False)
class Photographs:
    """A dataset that is streamed: images uint8[S, S, 3] and labels in [0, num_classes)."""

    train: Source
    test: Source
    image_size: int  # S
    num_classes: int
    class_names: tuple[str, ...]
    statistics: tuple[np.ndarray, np.ndarray] | None = None  # of the channels, in 0 … 255, where they are known
    listing: str = ""  # names what is there: changes when a file does

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, 3)

    @property
    def num_train(self) -> int:
        return len(self.train)

    @property
    def num_test(self) -> int:
        return len(self.test)

    def digest(self) -> str:
        """A name for these pictures, such that results of others are not mixed with theirs.

        Without a listing, from the content of some of them, always the same.
        """
        digest = hashlib.sha256(f"{self.listing} {self.image_size} {self.num_classes}".encode())
        for source in () if self.listing else (self.train, self.test):
            digest.update(f"{len(source)}".encode())
            for index in np.linspace(0, len(source) - 1, DIGEST_IMAGES, dtype=int).tolist() if len(source) else ():
                content, label = source.read(index)
                digest.update(f"{label} {hashlib.sha256(content).hexdigest()}".encode())
        return digest.hexdigest()[:16]

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, deviation), float32[C] each, in units of 0 … 255, of the training images.

        Where they are not known from elsewhere: of 1,024 of them at random, always the same, as they look for testing.
        """
        return self.statistics or self._sampled

    @functools.cached_property
    def _sampled(self) -> tuple[np.ndarray, np.ndarray]:
        from smallbatch_jax.data.views import center_view

        def sums(index: int) -> tuple[np.ndarray, np.ndarray] | None:
            with suppress(Exception):  # a broken one is told of when it is to be trained on
                pixels = (
                    center_view(self.train.read(index)[0], self.image_size, self.train.upright).reshape(-1, 3).astype(np.uint32)
                )
                return pixels.sum(axis=0, dtype=np.uint64), np.square(pixels).sum(axis=0, dtype=np.uint64)
            return None

        chosen = order.epoch_permutation(0, 0, self.num_train)[:STATISTICS_IMAGES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [pair for pair in pool.map(sums, chosen.tolist()) if pair is not None]
        if not found:
            name = self.train.name(int(chosen[0]))
            raise InputError(f"dataset.data_dir: none of {len(chosen)} training images can be decoded, {name!r} for one")
        pixels = len(found) * self.image_size**2
        mean, mean_square = (np.sum(column, axis=0) / pixels for column in zip(*found, strict=True))
        deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
        return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)


def what_is_wrong(source: Source, index: int) -> str:
    """What is the matter with a picture that could not be read or decoded."""
    content = None
    try:
        content, _ = source.read(index)
        decode.decode(io.BytesIO(content), source.upright)
    except Exception as error:
        return decode.what_is_wrong(error, content == b"")
    return "could not be decoded before, and can be now"
