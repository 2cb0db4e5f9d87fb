"""Dataset: labelled examples in memory, checked once, as they enter training."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from smallbatch_jax.config import fields
from smallbatch_jax.config.experiment import InputError

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples for training and for testing.

    Build one from your own arrays to train on them; anything `np.asarray` takes will do. Floating images of any width
    become float32 and are used as given; uint8 images are normalised on the device with `channel_statistics`.
    Features need not be pictures: images of shape [N, features] are fine.

    Raises:
      InputError: one line that names the argument, what it got and what it accepts.
    """

    train_images: np.ndarray  # uint8 or float32 [N, ...], pictures as [N, H, W, C]
    train_labels: np.ndarray  # int32[N], in [0, num_classes)
    test_images: np.ndarray  # [M, ...], of the training images' dtype and shape
    test_labels: np.ndarray  # int32[M]
    num_classes: int
    class_names: tuple[str, ...] | None = None  # the name of each label, where the source has names

    def __post_init__(self):
        num_classes = fields.integer(1)("Dataset.num_classes", fields.plain(self.num_classes))
        checked: dict[str, Any] = {
            "num_classes": num_classes,
            "class_names": _checked_class_names(self.class_names, num_classes),
            "train_images": _checked_images("train_images", self.train_images),
            "test_images": _checked_images("test_images", self.test_images),
            "train_labels": _checked_labels("train_labels", self.train_labels, num_classes),
            "test_labels": _checked_labels("test_labels", self.test_labels, num_classes),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the class is frozen for everyone else
        for split in ("train", "test"):
            images, labels = len(checked[f"{split}_images"]), len(checked[f"{split}_labels"])
            if images != labels:
                raise InputError(f"Dataset.{split}_labels: got {labels} labels for {images} images; one each is needed")
        train, test = (f"{images.dtype} of shape {images.shape[1:]}" for images in (self.train_images, self.test_images))
        if test != train:
            raise InputError(f"Dataset.test_images: got examples {test}, but those of train_images are {train}")

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.train_images.shape[1:]

    @property
    def example(self) -> "jax.ShapeDtypeStruct":
        """Shape and dtype of one example, as a model receives it."""
        return as_received(self.image_shape, self.train_images.dtype)

    @property
    def num_train(self) -> int:
        return len(self.train_labels)

    @property
    def num_test(self) -> int:
        return len(self.test_labels)

    def digest(self) -> str:
        """Returns a name for exactly these arrays, so that their results are not mixed with those of others."""
        total = hashlib.sha256(f"{self.num_classes}".encode())
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            total.update(f"{array.dtype}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()[:16]

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean, std), float32[C] each, that normalise the images over their last axis.

        For uint8 images they are the mean and the (population) standard deviation of each channel over all training
        images, in units of 0..255, exact to float32 rounding; the deviation of a constant channel is given as 1, so
        that one can divide by it. Float images are used as given: their mean is 0 and their std is 1.
        """
        channels = self.train_images.shape[-1]
        if self.train_images.dtype != np.uint8:
            return np.zeros(channels, np.float32), np.ones(channels, np.float32)
        return mean_and_deviation(*channel_sums(self.train_images), self.train_images.size // channels)


def as_received(shape: Sequence[int], dtype: Any) -> "jax.ShapeDtypeStruct":
    """Returns what a model receives of an example stored as `dtype`: tokens as they are, images as float32."""
    import jax

    return jax.ShapeDtypeStruct(tuple(shape), np.int32 if dtype == np.int32 else np.float32)


def channel_sums(images: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns Σx and Σx² per channel of uint8[N, ..., C], as Python integers."""
    flat = images.reshape(len(images), -1)
    totals = flat.sum(axis=0, dtype=np.uint64), np.einsum("nx,nx->x", flat, flat, dtype=np.uint64)
    sums, squares = (total.reshape(-1, images.shape[-1]).sum(axis=0).tolist() for total in totals)
    return sums, squares


def mean_and_deviation(sums: Sequence[int], squares: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each channel's mean and standard deviation, float32[C], of `count` values; the deviation 1 where it is 0."""
    # Python's integers do not round, so a constant channel has a variance of exactly 0.
    variance = [(count * xx - x * x) / count**2 for x, xx in zip(sums, squares, strict=True)]
    std = np.sqrt(np.array(variance))
    return np.array([x / count for x in sums], np.float32), np.where(std > 0, std, 1).astype(np.float32)


def _checked_class_names(names: Any, num_classes: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise InputError(f"Dataset.class_names: got {names!r}; it accepts None or {num_classes} strings, one a class")
    return tuple(names)


def _as_array(name: str, value: Any) -> np.ndarray:
    if np.ma.is_masked(value):
        raise InputError(
            f"Dataset.{name}: got an array with masked values; it accepts one without, fill them or leave them out"
        )
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Dataset.{name}: cannot be made an array ({reason}); it accepts a numpy array") from error


def _checked_images(name: str, value: Any) -> np.ndarray:
    """Returns uint8 or finite float32 [N, ...] with N and every other axis at least 1."""
    images = _as_array(name, value)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(
            f"Dataset.{name}: got dtype {images.dtype}; it accepts uint8 (0..255) or floating point, used as given. "
            "For pixels in 0..255 give images.astype(np.uint8)"
        )
    if images.ndim < 2 or images.size == 0:
        raise InputError(f"Dataset.{name}: got shape {images.shape}; it accepts [N, H, W, C] or [N, ...], no axis empty")
    if images.dtype == np.uint8:
        return images
    with np.errstate(over="ignore", invalid="ignore"):
        images = images.astype(np.float32, copy=False)
        finite = np.isfinite(images.min()) and np.isfinite(images.max())
    if not finite:
        raise InputError(f"Dataset.{name}: got values that are not finite in float32; it accepts finite values alone")
    return images


def _checked_labels(name: str, value: Any, num_classes: int) -> np.ndarray:
    """Returns int32[N] in [0, num_classes)."""
    labels = _as_array(name, value)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        way = ""
        if labels.ndim == 2:
            way = ", as labels[:, 0]" if labels.shape[1] == 1 else ", as labels.argmax(1) gives them of one-hot rows"
        raise InputError(
            f"Dataset.{name}: got {labels.dtype} of shape {labels.shape}; it accepts integers of shape [N], "
            f"one class number for each image{way}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        way = "; subtract 1" if (labels.min(), labels.max()) == (1, num_classes) else ""
        raise InputError(
            f"Dataset.{name}: got labels from {labels.min()} to {labels.max()}; "
            f"with num_classes={num_classes} it accepts 0 to {num_classes - 1}{way}"
        )
    return labels.astype(np.int32, copy=False)
