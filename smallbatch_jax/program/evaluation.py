"""Evaluation of one run on the whole test set, by its running averages or by precise statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.models import blocks
from smallbatch_jax.models.blocks import Blocks
from smallbatch_jax.program import device_data
from smallbatch_jax.program.device_data import DeviceData, TestImages
from smallbatch_jax.program.train import Array, Batch, Model, TrainState, make_eval_step

PRECISE_IMAGES = 4096  # training images that precise statistics are taken over, or all if there are fewer


class Tested(NamedTuple):
    """What a run found on test images."""

    loss: Array  # float32[], mean cross-entropy; of some of a streamed test set, the sum
    correct: Array  # int32[], classified rightly
    images: Array  # int32[], how many they were


def make_evaluate(model: Model, axis_name: str | None = None) -> Callable[[TrainState, DeviceData], Tested]:
    """The evaluation of a run, shared out among the devices along `axis_name` if they all hold it."""
    eval_step = make_eval_step(model)

    def evaluate(state: TrainState, data: DeviceData) -> Tested:
        """Mean cross-entropy and number right over the whole test set; NaN if running averages are not finite.

        A variance that overflowed gives zeros for activations, and so a finite loss of a network that is lost.
        """

        def one(correct: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
            images, labels, counts = batch if axis_name is None else _share(batch, axis_name)
            with _as_one_device(data.test_counts.shape[1], axis_name):
                losses, right = eval_step(state, Batch(data.normalise(images), labels), counts)
            return correct + right, losses

        correct, losses = lax.scan(one, jnp.int32(0), (data.test_images, data.test_labels, data.test_counts))
        loss, correct = _over_devices(losses, correct, axis_name, data.test_counts.shape[1])
        images = data.test_counts.sum(dtype=jnp.int32)
        return Tested(jnp.where(_sound(state), loss / images, jnp.nan), correct, images)

    return evaluate


def make_test(model: Model, axis_name: str | None = None) -> Callable[[TrainState, jax.Array, TestImages], Tested]:
    """The evaluation of a run on some of the test set, this device's part along `axis_name`, float32[n, …] normalised: sums."""
    eval_step = make_eval_step(model)

    def test(state: TrainState, images: jax.Array, part: TestImages) -> Tested:
        n = len(part.counts) * (1 if axis_name is None else lax.axis_size(axis_name))
        with _as_one_device(n, axis_name):
            losses, correct = eval_step(state, Batch(images, part.labels), part.counts)
        count = part.counts.sum(dtype=jnp.int32)
        loss, correct, count = *_over_devices(losses[None], correct, axis_name, n), _sum(count, axis_name)
        return Tested(jnp.where(_sound(state), loss, jnp.nan), correct, count)

    return test


def _as_one_device(n: int, axis_name: str | None) -> Any:
    """Within it a share of n images is worked on so that each has what it has where one device holds them all."""
    return blocks.of(None if axis_name is None else Blocks(n, n))


def _over_devices(losses: jax.Array, correct: jax.Array, axis_name: str | None, n: int) -> tuple[jax.Array, jax.Array]:
    """The sums of the losses, float32[batches, this device's share of n], and of the numbers right."""
    if axis_name is not None:
        losses = lax.all_gather(losses, axis_name, axis=1, tiled=True)[:, :n]
    return losses.sum(1).sum(), _sum(correct, axis_name)


def _sum(number: jax.Array, axis_name: str | None) -> jax.Array:
    return number if axis_name is None else lax.psum(number, axis_name)


def _sound(state: TrainState) -> Any:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), state.batch_stats), True)


def _share(batch: tuple[jax.Array, ...], axis_name: str) -> tuple[jax.Array, ...]:
    """This device's part of each array [n, …]; what fills up the last part is zeros, or False."""
    size = -(-len(batch[0]) // lax.axis_size(axis_name))
    first = lax.axis_index(axis_name) * size
    missing = size * lax.axis_size(axis_name) - len(batch[0])

    def part(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
        return lax.dynamic_slice_in_dim(padded, first, size)

    return tuple(map(part, batch))


def with_precise_statistics(evaluate: Callable[..., Tested], model: Model) -> Callable[..., Tested]:
    """`evaluate`, with running averages replaced by the mean of the statistics of many BN batches of training images.

    They are what training would see with the parameters as they are, in BN batches of the same size; only that the images
    are as stored, not augmented, as the test images are not. The run's own running averages stay as they were. `model`
    forgets at once (bn_decay 0), so that after a batch its averages are that batch's.
    """
    b = model.bn_batch_size

    def evaluate_precisely(state: TrainState, data: DeviceData) -> Tested:
        images = min(PRECISE_IMAGES, len(data.shuffled))
        size = b * max(1, min(device_data.LARGEST_EVAL_BATCH, images) // b)  # how many BN batches at once changes rounding only
        batches = max(1, images // size)
        indices = data.shuffled[: batches * size].reshape(batches, size)

        def one(total: Any, indices: jax.Array) -> tuple[Any, None]:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            images = data.normalise(data.train_images[indices])
            _, found = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return jax.tree.map(jnp.add, total, found["batch_stats"]), None

        total, _ = lax.scan(one, jax.tree.map(jnp.zeros_like, state.batch_stats), indices)
        return evaluate(state._replace(batch_stats=jax.tree.map(lambda x: x / batches, total)), data)

    return evaluate_precisely


def not_evaluated() -> Tested:
    return Tested(jnp.array(jnp.nan, jnp.float32), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))
