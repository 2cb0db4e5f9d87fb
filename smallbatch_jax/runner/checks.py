"""Checks that an experiment fits its data, and warnings about the user's own arrays."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from smallbatch_jax.config.experiment import OWN, Experiment, InputError
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.doubts import doubts
from smallbatch_jax.program import processes
from smallbatch_jax.program.train import TrainState

MOST_CHANNELS = 4  # channels of a picture: grey, RGB or RGBA


def require_fitting(experiment: Experiment, dataset: Dataset | Photographs) -> None:
    """Raises InputError for options of an experiment that its dataset does not support."""
    experiment.require_examples(dataset.num_train)
    if experiment.micro_batch_size is not None and experiment.model.name.startswith(OWN):
        raise InputError(
            "micro_batch_size: the batches of an own model are not split, since it may use all of a batch; use None."
        )
    streamed = isinstance(dataset, Photographs)
    suits = "classification" if streamed else dataset.task
    if experiment.task != suits and not experiment.task.startswith(OWN):
        raise InputError(
            f"task: {experiment.task!r} does not go with the dataset's labels; use {suits!r}, or a loss of your own."
        )
    if dataset.num_classes == 1:
        raise InputError("dataset: has a single class, so every prediction is correct; it accepts two or more.")
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
    if streamed and experiment.diagnostics:
        raise InputError(
            f"diagnostics: {experiment.diagnostics} read training images again at every evaluation, which dataset.image_size "
            "streams. Use ()."
        )
    if streamed and experiment.schedule.batch_growth > 1 and processes.several():
        raise InputError(
            f"schedule.batch_growth: got {experiment.schedule.batch_growth}, but each of several hosts streams its "
            "slice of batches of one size; use 1."
        )
    if not experiment.model.name.startswith(OWN):
        if dataset.num_classes is None:
            raise InputError(f"model.name: {experiment.model.name} gives logits of classes, but the labels are real numbers.")
        _require_pictures(f"model.name: {experiment.model.name} takes images [N, H, W, C]", dataset.image_shape)
    if experiment.dataset.augment:
        _require_pictures("dataset.augment: crops and flips images [H, W, C] (use False for others)", dataset.image_shape)


def require_disk(experiment: Experiment, state: TrainState) -> None:
    """Raises InputError if the parameters to keep would take more disk than `keep_gib`."""
    if experiment.keep_parameters is None:
        return
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.batch_stats))]
    runs = experiment.runs()
    kept = len(runs) if experiment.keep_parameters == "all" else len({run.batch_size for run in runs})
    needed = kept * sum(sizes) / 2**30
    if needed > experiment.keep_gib:
        fewer = ", or keep_parameters='best'" if experiment.keep_parameters == "all" else ""
        raise InputError(
            f"keep_gib: got {experiment.keep_gib:g}, the parameters of {kept} runs, {sum(sizes):,} bytes each, take "
            f"{needed:.3g} GiB; use at least that{fewer}."
        )


def _require_pictures(reason: str, image_shape: Sequence[int]) -> None:
    """Raises InputError if images are not pictures [H, W, C]; the message begins with `reason`."""
    if len(image_shape) == 2:
        way = "add the axis of channels, images[..., None]"
    elif len(image_shape) != 3:
        way = "reshape them"
    elif axes := transposed(image_shape):
        way = f"that is {image_shape[2]} channels: if another axis is the channels, use images.transpose{axes}"
    else:
        return
    raise InputError(f"{reason}, but the dataset's have shape {list(image_shape)}; {way}.")


def transposed(image_shape: Sequence[int]) -> tuple[int, ...] | None:
    """Returns the axes that would put the channels of images [N, …] last; None if they seem to be last already."""
    if len(image_shape) != 3 or image_shape[2] <= MOST_CHANNELS or min(image_shape[:2]) > MOST_CHANNELS:
        return None
    return (0, 2, 3, 1) if image_shape[0] <= image_shape[1] else (0, 1, 3, 2)


def data_warnings(experiment: Experiment, dataset: Dataset | Photographs) -> list[str]:
    """Returns a one-sentence warning for each property of the user's own arrays that is probably unintended."""
    name, shape = experiment.dataset.name, list(dataset.image_shape)
    if not isinstance(dataset, Dataset) or not (name == "folder" or name.startswith(OWN)):
        return []
    found = doubts(dataset)
    axes = transposed(shape)
    if axes or (len(shape) == 3 and shape[0] < shape[1] == shape[2]):
        meant = "[H, C, W]" if axes == (0, 1, 3, 2) else "[C, H, W]"
        way = f"if they are {meant}, use images.transpose{axes or (0, 2, 3, 1)}"
        found.append(f"images of shape {shape} are normalised as [H, W, C]; {way}.")
    elif len(shape) == 2 and dataset.train_images.dtype == np.uint8:
        found.append(f"uint8 images of shape {shape} are normalised by column; for grey pictures give images[..., None].")
    return found
