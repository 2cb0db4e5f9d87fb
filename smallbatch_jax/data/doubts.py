"""Warnings about a user's own arrays that can be trained on but may not be what was meant."""

import hashlib

import numpy as np

from smallbatch_jax.data.dataset import Dataset

LARGE = 100  # floats scaled for training stay below it
_SAMPLE = 1024  # images whose spread is compared


def doubts(dataset: Dataset) -> list[str]:
    """Returns one sentence for each property of the data that its owner should check; empty if there is none."""
    train, test = dataset.train_images, dataset.test_images
    found = []
    if train.dtype == np.int32:
        pixels = dataset.task == "classification" and train.max() < 256
        return ["integers [N, T] are taken as tokens; for pixels in 0..255 give images.astype(np.uint8)."] if pixels else []
    largest = float(np.abs(train).max()) if train.dtype != np.uint8 else 0.0
    if largest > LARGE:
        found.append(
            f"train_images are floats that reach {largest:g} and are used as given; scale them, or give pixels as uint8."
        )
    if train.dtype == np.uint8 and train.max() <= 1:
        found.append("train_images are uint8 with no value above 1; floats in 0..1 lose their values when made uint8.")
    spreads = [float(images[:_SAMPLE].std(dtype=np.float64)) for images in (train, test)]
    if max(spreads) > 10 * min(spreads):
        found.append(
            f"values of train_images spread by {spreads[0]:.3g} and of test_images by {spreads[1]:.3g}; scale both alike."
        )
    if (train == train[:1]).all():
        found.append("all train_images are the same.")
    classes = dataset.num_classes or 0
    missing = np.flatnonzero(np.bincount(dataset.train_labels, minlength=classes) == 0) if classes else ()
    if len(missing):
        few = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        found.append(f"{len(missing)} of {dataset.num_classes} classes have no training example: {few}.")
    if dataset.num_test > dataset.num_train:
        found.append(f"there are more test examples ({dataset.num_test}) than training examples ({dataset.num_train}).")
    seen = {_content(image) for image in train}
    shared = sum(_content(image) in seen for image in test)
    if shared > dataset.num_test // 100:
        found.append(
            f"{shared} of {dataset.num_test} test images are training images too; test accuracy overstates that on new ones."
        )
    return found


def _content(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
