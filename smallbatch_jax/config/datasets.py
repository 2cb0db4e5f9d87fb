"""Datasets that have a name: one entry for each, with what config validation, `data`, the commands and figures know about it.

A new dataset is a loader and an entry in DATASETS. Loaders are named, not imported: `pkgutil.resolve_name` loads
"module:attribute".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSize:
    """Size of a dataset, known before it is read: numbers of examples and classes, and the shape [H, W, C] of an image."""

    train: int
    test: int
    image_shape: tuple[int, int, int]
    num_classes: int


@dataclass(frozen=True)
class DatasetEntry:
    """A value of `dataset.name`.

    Attributes:
      title: name in figures.
      loader: "module:attribute" of `data_dir -> data.Dataset`, for images that share one size and live in memory; None if they
        do not fit.
      stream: "module:attribute" of `(data_dir, image_size) -> data.Photographs`, for images that are streamed; None if they
        never are.
      size: None where only the files tell.
      prepared: whether TensorFlow Datasets prepares it, under the same name (`experiments/prepare_data.py`).
      test_metric: name of the test accuracy in figures, where its authors call it something else.
    """

    title: str
    loader: str | None = None
    stream: str | None = None
    size: DatasetSize | None = None
    prepared: bool = False
    test_metric: str | None = None


DATASETS = {
    "digits": DatasetEntry("digits", "smallbatch_jax.data.digits:load_digits", size=DatasetSize(1_437, 360, (8, 8, 1), 10)),
    "folder": DatasetEntry("folder", "smallbatch_jax.data.folder:load_folder", "smallbatch_jax.data.folder:stream_folder"),
    "cifar10": DatasetEntry(
        "CIFAR-10",
        "smallbatch_jax.data.prepared:load_cifar10",
        size=DatasetSize(50_000, 10_000, (32, 32, 3), 10),
        prepared=True,
    ),
    "cifar100": DatasetEntry(
        "CIFAR-100",
        "smallbatch_jax.data.prepared:load_cifar100",
        size=DatasetSize(50_000, 10_000, (32, 32, 3), 100),
        prepared=True,
    ),
    "imagenet2012": DatasetEntry(
        "ImageNet",
        stream="smallbatch_jax.data.prepared:stream_imagenet",
        size=DatasetSize(1_281_167, 50_000, (224, 224, 3), 1_000),
        prepared=True,
        test_metric="top-1 validation accuracy",
    ),
}
