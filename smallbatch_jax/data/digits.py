"""Scikit-learn's handwritten digits: 1,797 pictures of 8 × 8 that need no download."""

import os

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data.dataset import Dataset

_INK_LEVELS = 16  # a pixel is the number of inked pixels, 0..16, in a block of 4 × 4


def load_digits(data_dir: str | os.PathLike | None = None) -> Dataset:
    """Returns 1,437 training and 360 test digits, uint8[N, 8, 8, 1] with 0..255 for the source's 0..16.

    The split is a fixed rule without random numbers, so it is the same with every version of every library. The
    source lists its digits writer by writer; sorted by class, and by writer within a class, every fifth is a test
    example. Every class and every writer is in both splits in the same proportion, so test accuracy is that on known
    writers. Within a split the source's order is kept.

    Raises:
      InputError: if data_dir is given, since no folder is read.
    """
    if data_dir is not None:
        raise InputError(
            f"dataset.data_dir: got {str(data_dir)!r}, but digits comes with scikit-learn and reads no folder; use None"
        )
    from sklearn import datasets

    ink, labels = map(np.asarray, datasets.load_digits(return_X_y=True))
    images = np.rint(ink * (255 / _INK_LEVELS)).astype(np.uint8).reshape(-1, 8, 8, 1)
    in_test = np.zeros(len(labels), bool)
    in_test[np.argsort(labels, kind="stable")[::5]] = True
    names = tuple("0123456789")
    return Dataset(images[~in_test], labels[~in_test], images[in_test], labels[in_test], len(names), names)
