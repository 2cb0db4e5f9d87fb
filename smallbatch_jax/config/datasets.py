"""The named datasets: one entry each, with the facts that config validation, `data`, the commands and figures need.

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
    """Description of a value of `dataset.name`."""

    title: str  # in figures
    loader: str | None = None  # "module:attribute" of `data_dir -> data.Dataset`; None if the images do not fit in memory
    stream: str | None = None  # "module:attribute" of `(data_dir, image_size) -> data.Photographs`; None if never streamed
    size: DatasetSize | None = None  # None if known only from the files
    prepared: bool = False  # whether TensorFlow Datasets prepares it, under the same name (`experiments/prepare_data.py`)
    test_metric: str | None = None  # name of the test accuracy in figures, if its authors use another


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
