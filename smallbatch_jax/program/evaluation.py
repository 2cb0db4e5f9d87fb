"""Evaluation of one run on whole splits of the data, by its running averages or by precise statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.program import device_data
from smallbatch_jax.program.device_data import DeviceData, TestImages
from smallbatch_jax.program.tasks import Array, Batch, Task
from smallbatch_jax.program.train import Model, TrainState, make_eval_step

PRECISE_IMAGES = 4096  # training images for precise statistics; all, if there are fewer


class Tested(NamedTuple):
    """Scores of a run on a split of the data, summed over its examples."""

    sums: dict[str, Array]  # float32[] each, the loss and the task's metrics by name
    examples: Array  # int32[]

    @classmethod
    def zeros(cls, task: Task) -> "Tested":
        """Returns the scores on no examples."""
        return cls({name: jnp.float32(0) for name in ("loss", *task.metrics)}, jnp.int32(0))


def make_evaluate(model: Model, task: Task, axis_name: str | None = None) -> Callable[..., dict[str, Tested]]:
    """Returns (state, data) → the scores by split of resident data; the devices along `axis_name` each evaluate a shard."""
    test = make_test(model, task, axis_name)

    def evaluate(state: TrainState, data: DeviceData) -> dict[str, Tested]:
        def add(total: Tested, batch: TestImages) -> tuple[Tested, None]:
            if axis_name is not None:
                batch = _shard(batch, axis_name)
            return jax.tree.map(jnp.add, total, test(state, data.normalise(batch.images), batch)), None

        return {name: lax.scan(add, Tested.zeros(task), split)[0] for name, split in data.splits.items()}

    return evaluate


def make_test(model: Model, task: Task, axis_name: str | None = None) -> Callable[..., Tested]:
    """Returns (state, images, batch) → scores on a test batch; images are float32[n, …], normalised, sharded on `axis_name`.

    The loss is NaN if running averages are not finite: a variance that overflowed gives activations of zero, and thus a
    finite loss although the run has diverged.
    """
    eval_step = make_eval_step(model, task)

    def test(state: TrainState, images: jax.Array, batch: TestImages) -> Tested:
        tested = Tested(eval_step(state, Batch(images, batch.labels), batch.counts), batch.counts.sum(dtype=jnp.int32))
        if axis_name is not None:
            tested = lax.psum(tested, axis_name)
        finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), state.batch_stats), True)
        return tested._replace(sums=tested.sums | {"loss": jnp.where(finite, tested.sums["loss"], jnp.nan)})

    return test


def _shard(batch: TestImages, axis_name: str) -> TestImages:
    """Returns this device's shard of each array [n, …], padded with zeros (and counts of False) to equal shards."""
    devices, n = lax.axis_size(axis_name), len(batch.labels)
    size = -(-n // devices)

    def part(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, size * devices - n), *((0, 0),) * (array.ndim - 1)))
        return lax.dynamic_slice_in_dim(padded, lax.axis_index(axis_name) * size, size)

    return TestImages(*map(part, batch))


def with_precise_statistics(evaluate: Callable[..., Any], model: Model) -> Callable[..., Any]:
    """Returns `evaluate` with running averages replaced by the mean of the statistics of many BN groups of training images.

    These are the statistics that training would see at the current parameters, in BN groups of the same size; like test
    images, the images are not augmented. The run's own running averages do not change. `model` has bn_decay 0, so that its
    running averages after a batch are that batch's statistics.
    """
    b = model.bn_batch_size

    def evaluate_precisely(state: TrainState, data: DeviceData) -> dict[str, Tested]:
        images = min(PRECISE_IMAGES, len(data.shuffled))
        size = b * max(1, min(device_data.LARGEST_EVAL_BATCH, images) // b)  # BN groups at once: changes rounding only
        batches = max(1, images // size)

        def add(total: Any, indices: jax.Array) -> tuple[Any, None]:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            images = data.normalise(data.train_images[indices])
            _, found = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return jax.tree.map(jnp.add, total, found["batch_stats"]), None

        indices = data.shuffled[: batches * size].reshape(batches, size)
        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, state.batch_stats), indices)
        return evaluate(state._replace(batch_stats=jax.tree.map(lambda x: x / batches, total)), data)

    return evaluate_precisely
