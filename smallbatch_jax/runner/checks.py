"""Checks that an experiment fits its data, and warnings about the user's own arrays."""

from collections.abc import Sequence

import numpy as np

from smallbatch_jax.config.experiment import OWN, Experiment, InputError
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.doubts import doubts

MOST_CHANNELS = 4  # of a picture: grey, RGB, RGBA


def require_fitting(experiment: Experiment, dataset: Dataset | Photographs) -> None:
    """Refuses options of an experiment that its dataset does not support."""
    experiment.require_examples(dataset.num_train)
    streamed = isinstance(dataset, Photographs)
    if experiment.dataset.color_jitter and not (streamed and experiment.dataset.augment):
        raise InputError(
            "dataset.color_jitter: is a part of the augmentation of streamed images; use it with dataset.image_size and "
            "dataset.augment."
        )
    if streamed and experiment.model.bn_statistics == "precise":
        raise InputError(
            "model.bn_statistics: 'precise' reads training images again at every evaluation, which dataset.image_size streams. "
            "Use 'running'."
        )
    if not experiment.model.name.startswith(OWN):
        _require_images(experiment.model.name, dataset.image_shape)
    if experiment.dataset.augment:
        _require_pictures(dataset.image_shape)


def data_warnings(experiment: Experiment, dataset: Dataset | Photographs) -> list[str]:
    """Returns one sentence for each property of the user's own arrays that may not be what was meant."""
    name, shape = experiment.dataset.name, dataset.image_shape
    if not isinstance(dataset, Dataset) or not (name == "folder" or name.startswith(OWN)):
        return []
    found = doubts(dataset)
    pixels = dataset.train_images.dtype == np.uint8
    axes = transposed(shape)
    if axes:
        normalised = " and normalised accordingly" if pixels else ""
        found.append(
            f"images of shape {_shown(shape)} are taken as [H, W, C]{normalised}; to put the channels last, use "
            f"images.transpose{axes}."
        )
    elif len(shape) == 3 and shape[0] < shape[1] == shape[2]:
        found.append(
            f"images of shape {_shown(shape)} are taken as [H, W, C]; if they are [C, H, W], use images.transpose(0, 2, 3, 1)."
        )
    elif len(shape) == 2 and pixels:
        found.append(
            f"uint8 images of shape {_shown(shape)} are normalised by column; for grey pictures give images[..., None]."
        )
    return found


def transposed(image_shape: Sequence[int]) -> tuple[int, ...] | None:
    """Returns the axes that would put the channels of images [N, …] last; None if they seem to be last already."""
    if len(image_shape) != 3 or image_shape[2] <= MOST_CHANNELS or min(image_shape[:2]) > MOST_CHANNELS:
        return None
    return (0, 2, 3, 1) if image_shape[0] <= image_shape[1] else (0, 1, 3, 2)


def _require_images(model: str, image_shape: Sequence[int]) -> None:
    """Refuses images of a shape that a model of the paper cannot take."""
    if len(image_shape) != 3:
        way = "add the axis of channels, images[..., None]" if len(image_shape) == 2 else "reshape them"
        raise InputError(
            f"model.name: {model} takes images [N, H, W, C], those of the dataset are {_shown(image_shape)} each; {way}."
        )
    axes = transposed(image_shape)
    if axes:
        raise InputError(
            f"model.name: {model} takes images [N, H, W, C]; {_shown(image_shape)} would be {image_shape[0]}×{image_shape[1]} "
            f"pixels of {image_shape[2]} channels. If another axis is the channels, use images.transpose{axes}."
        )


def _require_pictures(image_shape: Sequence[int]) -> None:
    """Refuses augmentation of anything but pictures [H, W, C]."""
    got = f"dataset.augment: crops and flips images [H, W, C], the dataset has {_shown(image_shape)}"
    if len(image_shape) != 3:
        raise InputError(f"{got}; use False.")
    axes = transposed(image_shape)
    if axes:
        raise InputError(f"{got}, which looks like channels in front; use images.transpose{axes}.")


def _shown(image_shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, image_shape))}]"
