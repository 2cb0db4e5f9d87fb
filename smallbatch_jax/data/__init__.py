"""Where images come from: `load(name)` gives a `Dataset` of uint8 images and int32 labels, held in memory.

A dataset is added with one loader, `data_dir -> Dataset`, and one entry in `_LOADERS`.
"""

import os
from collections.abc import Callable

from smallbatch_jax import fields
from smallbatch_jax.data import prepared
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.digits import load_digits
from smallbatch_jax.data.folder import load_folder
from smallbatch_jax.experiment import InputError

__all__ = ["DATASETS", "Dataset", "load"]

_LOADERS: dict[str, Callable[[str | os.PathLike | None], Dataset]] = {
    "digits": load_digits,
    "folder": load_folder,
    **prepared.LOADERS,
}
DATASETS = tuple(_LOADERS)


def load(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Dataset:
    """Loads a dataset by name.

    Args:
      name: one of DATASETS.
      data_dir: the folder that holds the data; None for a dataset that needs none.
      image_size: None, the one value so far: all images share one size and live in memory.
    Returns:
      A Dataset with train_images uint8[N, H, W, C] and train_labels int32[N]; the same arrays on every call.
    Raises:
      InputError: one line that names the field or the file, what it got and what it accepts.
    """
    fields.choice(DATASETS, "dataset")("dataset.name", name)
    if image_size is not None:
        raise InputError(
            f"dataset.image_size: got {image_size!r}, but streaming is not available yet; "
            "use None, for images that share one size"
        )
    return _LOADERS[name](data_dir or None)  # "" is no folder either


def num_train_examples(name: str, data_dir: str | os.PathLike | None = None) -> int:
    """The size of a dataset's training set; for those with a fixed one the data need not be there."""
    fixed = {"digits": 1_437, "cifar10": 50_000, "cifar100": 50_000}
    return fixed[name] if name in fixed else len(load(name, data_dir).train_labels)
