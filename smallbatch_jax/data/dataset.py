"""Dataset: labelled examples in memory, checked once, on construction."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from smallbatch_jax.config import fields
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import order

if TYPE_CHECKING:
    import jax

_SPLIT_SEED = 2**31 - 1  # used by `with_validation`; no run uses this order


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples for training and for testing.

    Build one from your own arrays to train on them; anything `np.asarray` takes will do. Floating images of any width
    become float32 and are used as given; uint8 images are normalised on the device with `channel_statistics`.
    Features need not be pictures: images of shape [N, features] are fine.

    The labels determine the task: integers are classes, floating point numbers are regression targets. Integer examples
    [N, T] are sequences of tokens; without labels the model predicts each next token.

    Raises:
      InputError: one line that names the argument, what it got and what it accepts.
    """

    train_images: np.ndarray  # uint8 or float32 [N, ...], pictures as [N, H, W, C]; tokens int32[N, T]
    train_labels: Any  # int32[N] in [0, num_classes); targets float32[N, ...]; None: the tokens themselves
    test_images: np.ndarray  # [M, ...], of the training images' dtype and shape
    test_labels: Any  # [M, ...], like train_labels
    num_classes: int | None = None  # number of classes, or of distinct tokens; None for regression
    class_names: tuple[str, ...] | None = None  # the name of each label, if the source has names
    # Examples for choosing the best run, which the test set then confirms (`with_validation` takes them from the training set).
    validation_images: np.ndarray | None = None  # [K, ...]
    validation_labels: Any = None  # [K, ...]

    def __post_init__(self):
        num_classes = self.num_classes
        if num_classes is not None:
            num_classes = fields.integer(1)("Dataset.num_classes", fields.plain(num_classes))
        given = self.class_names
        names = tuple(given) if np.iterable(given) and not isinstance(given, str) else ()
        if given is not None and (len(names) != num_classes or not all(isinstance(name, str) for name in names)):
            raise InputError(f"Dataset.class_names: got {given!r}; it accepts None or {num_classes} strings, one a class")
        if self.validation_images is None and self.validation_labels is not None:
            raise InputError("Dataset.validation_labels: given without validation_images; give both, or neither")
        checked: dict[str, Any] = {"num_classes": num_classes, "class_names": names or None}
        for split in ["train", "test"] + ["validation"] * (self.validation_images is not None):
            name = f"{split}_labels"
            images = checked[f"{split}_images"] = _checked_images(f"{split}_images", getattr(self, f"{split}_images"))
            labels = checked[name] = _checked_labels(name, getattr(self, name), num_classes, images)
            if len(images) != len(labels):
                raise InputError(f"Dataset.{name}: got {len(labels)} labels for {len(images)} images; one each is needed")
            for kind, what, array in (("images", "examples", images), ("labels", "labels", labels)):
                got, train = (f"{x.dtype} of shape {x.shape[1:]}" for x in (array, checked[f"train_{kind}"]))
                if got != train:
                    raise InputError(f"Dataset.{split}_{kind}: got {what} {got}, but those of train_{kind} are {train}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def task(self) -> str:
        """Task that the labels imply, a name in `config.catalog.TASKS`."""
        if self.num_classes is None:
            return "regression"
        return "next_token" if self.train_images.dtype == np.int32 and self.train_labels.ndim == 2 else "classification"

    def splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns (images, labels) of each split that is evaluated: "test", and "validation" if there is one."""
        names = ["test"] + ["validation"] * (self.validation_images is not None)
        return {name: (getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")) for name in names}

    def with_subset(self, count: int | None) -> "Dataset":
        """Returns the dataset with `count` training examples: the first of each class, equally many if there are enough."""
        if count is None:
            return self
        count = subset_size(self.num_train, count)
        import pandas as pd

        classes = self.train_labels if self.task == "classification" else np.zeros(self.num_train, int)
        rank = pd.Series(classes).groupby(classes).cumcount()  # index of an example within its class
        kept = np.sort(np.argsort(rank, kind="stable")[:count])
        return replace(self, train_images=self.train_images[kept], train_labels=self._labels(kept))

    def with_validation(self, fraction: float) -> "Dataset":
        """Returns the dataset with a random share of its training examples, the same on every call, as validation split."""
        if not fraction:
            return self
        if self.validation_images is not None:
            raise InputError("dataset.validation_fraction: the dataset has a validation split already; use 0")
        count = validation_size(self.num_train, fraction)
        mixed = order.epoch_permutation(_SPLIT_SEED, 0, self.num_train)
        held, kept = np.sort(mixed[:count]), np.sort(mixed[count:])
        validation = {"validation_images": self.train_images[held], "validation_labels": self._labels(held)}
        return replace(self, train_images=self.train_images[kept], train_labels=self._labels(kept), **validation)

    def _labels(self, chosen: np.ndarray) -> np.ndarray | None:
        """Returns the labels of some training examples, as the constructor takes them."""
        return None if self.task == "next_token" else self.train_labels[chosen]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.train_images.shape[1:]

    @property
    def example(self) -> "jax.ShapeDtypeStruct":
        """Shape and dtype of one example, as a model receives it."""
        return as_received(self.image_shape, self.train_images.dtype)

    @property
    def target(self) -> "jax.ShapeDtypeStruct":
        """Shape and dtype of one label."""
        return as_received(self.train_labels.shape[1:], self.train_labels.dtype)

    @property
    def num_train(self) -> int:
        return len(self.train_labels)

    @property
    def num_test(self) -> int:
        return len(self.test_labels)

    def digest(self) -> str:
        """Returns a name for exactly these arrays, so that their results are not mixed with those of others."""
        total = hashlib.sha256(f"{self.num_classes}".encode())
        splits = [array for split in self.splits().values() for array in split]
        for array in (self.train_images, self.train_labels, *splits):
            total.update(f"{array.dtype}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()[:16]

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean, std), float32[C] each, that normalise the images over their last axis.

        For uint8 images they are the mean and the (population) standard deviation of each channel over all training
        images, in units of 0..255, exact to float32 rounding; the deviation of a constant channel is given as 1, so
        that one can divide by it. Float images and tokens are used as given: their mean is 0 and their std is 1.
        """
        channels = self.train_images.shape[-1]
        if self.train_images.dtype != np.uint8:
            return np.zeros(channels, np.float32), np.ones(channels, np.float32)
        return mean_and_deviation(*channel_sums(self.train_images), self.train_images.size // channels)


def subset_size(num_train: int, count: int | None) -> int:
    """Returns how many of the training examples a subset has."""
    if count is not None and count > num_train:
        raise InputError(f"dataset.subset: got {count}, but there are only {num_train} training examples.")
    return num_train if count is None else count


def validation_size(num_train: int, fraction: float) -> int:
    """Returns how many of the training examples become the validation split."""
    count = round(fraction * num_train)
    if fraction and not 0 < count < num_train:
        raise InputError(f"dataset.validation_fraction: {fraction:g} of {num_train} examples leaves a split empty")
    return count


def as_received(shape: Sequence[int], dtype: Any) -> "jax.ShapeDtypeStruct":
    """Returns the shape and dtype in which a model receives an example stored as `dtype`: tokens int32, images float32."""
    import jax

    return jax.ShapeDtypeStruct(tuple(shape), np.int32 if dtype == np.int32 else np.float32)


def channel_sums(images: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns Σx and Σx² per channel of uint8[N, ..., C], as Python integers."""
    flat = images.reshape(len(images), -1)
    totals = flat.sum(axis=0, dtype=np.uint64), np.einsum("nx,nx->x", flat, flat, dtype=np.uint64)
    sums, squares = (total.reshape(-1, images.shape[-1]).sum(axis=0).tolist() for total in totals)
    return sums, squares


def mean_and_deviation(sums: Sequence[int], squares: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each channel's mean and standard deviation, float32[C], of `count` values; a deviation of 0 becomes 1."""
    # Python's integers do not round, so a constant channel has a variance of exactly 0.
    variance = [(count * xx - x * x) / count**2 for x, xx in zip(sums, squares, strict=True)]
    std = np.sqrt(np.array(variance))
    return np.array([x / count for x in sums], np.float32), np.where(std > 0, std, 1).astype(np.float32)


def _as_array(name: str, value: Any) -> np.ndarray:
    if np.ma.is_masked(value):
        raise InputError(
            f"Dataset.{name}: got an array with masked values; it accepts one without, fill them or leave them out"
        )
    try:
        array = np.asarray(value)
        foreign = array.dtype.kind == "V" and "float" in array.dtype.name  # such as JAX's bfloat16
        return array.astype(np.float32) if foreign else array
    except Exception as error:  # of any type: the array may be another library's
        reason = " ".join(str(error).split())
        raise InputError(f"Dataset.{name}: cannot be made an array ({reason}); it accepts a numpy array") from error


def _checked_images(name: str, value: Any) -> np.ndarray:
    """Returns uint8 or finite float32 [N, ...], or tokens int32[N, T], with N and every other axis at least 1."""
    images = _as_array(name, value)
    tokens = images.dtype != np.uint8 and np.issubdtype(images.dtype, np.integer) and images.ndim == 2
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating) and not tokens:
        raise InputError(
            f"Dataset.{name}: got dtype {images.dtype}; it accepts uint8 (0..255) or floating point, used as given, or tokens "
            "as integers [N, T]. For pixels in 0..255 give images.astype(np.uint8)"
        )
    if images.ndim < 2 or images.size == 0:
        raise InputError(f"Dataset.{name}: got shape {images.shape}; it accepts [N, H, W, C] or [N, ...], no axis empty")
    if tokens and not 0 <= images.min() <= images.max() < 2**31:
        raise InputError(f"Dataset.{name}: got tokens from {images.min()} to {images.max()}; it accepts 0 to {2**31 - 1}")
    if tokens:
        return images.astype(np.int32, copy=False)
    return images if images.dtype == np.uint8 else _finite(name, images)


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array as float32; raises InputError for values that are not finite in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(np.float32, copy=False)
        finite = np.isfinite(array.min()) and np.isfinite(array.max())
    if not finite:
        raise InputError(f"Dataset.{name}: got values that are not finite in float32; it accepts finite values alone")
    return array


def _checked_labels(name: str, value: Any, num_classes: int | None, images: np.ndarray) -> np.ndarray:
    """Returns classes int32[N] in [0, num_classes), next tokens int32[N, T], or targets float32[N, ...]."""
    if value is None and (images.dtype != np.int32 or num_classes is None or images.shape[1] < 2):
        raise InputError(
            f"Dataset.{name}: got None, which stands for the next token of sequences: integers [N, T ≥ 2] as "
            f"{name.replace('labels', 'images')}, and the number of different tokens as num_classes"
        )
    labels = images if value is None else _as_array(name, value)
    if num_classes is None:
        if not np.issubdtype(labels.dtype, np.floating) or labels.ndim < 1 or labels.size == 0:
            raise InputError(
                f"Dataset.{name}: got {labels.dtype} of shape {labels.shape} without num_classes; it accepts floating point "
                "targets [N, ...], or integers with num_classes"
            )
        return _finite(name, labels)
    if labels is not images and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
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
