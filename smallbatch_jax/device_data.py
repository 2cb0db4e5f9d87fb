"""A dataset on the devices that train on it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.data import Dataset, order
from smallbatch_jax.processes import put
from smallbatch_jax.train import Array

LARGEST_EVAL_BATCH = 256


class DeviceData(NamedTuple):
    """A dataset on the device; images as they are stored, normalised when a batch is taken."""

    train_images: Array  # uint8 or float32 [N, …]
    train_labels: Array  # int32[N]
    test_images: Array  # uint8 or float32 [batches, n, …], padded with zeros
    test_labels: Array  # int32[batches, n]
    test_counts: Array  # bool[batches, n], False where padded
    shuffled: Array  # int32[N], the training examples in a random order, for precise statistics
    mean: Array  # float32[C]
    deviation: Array  # float32[C]

    def normalise(self, images: jax.Array) -> jax.Array:
        """float32[n, …] by the training set's channel mean and deviation."""
        leading = (1,) * (images.ndim - 1)
        return (images.astype(jnp.float32) - self.mean.reshape(*leading, -1)) / self.deviation.reshape(*leading, -1)


def to_device(dataset: Dataset, mesh: Mesh) -> DeviceData:
    """The dataset, whole on every device of the mesh, its test set cut into even batches."""
    mean, deviation = dataset.channel_statistics()
    num_test = len(dataset.test_labels)
    batches = -(-num_test // LARGEST_EVAL_BATCH)
    size = -(-num_test // batches)

    def in_batches(array: np.ndarray) -> np.ndarray:
        padded = np.zeros((batches * size, *array.shape[1:]), array.dtype)
        padded[:num_test] = array
        return padded.reshape(batches, size, *array.shape[1:])

    data = DeviceData(
        dataset.train_images,
        dataset.train_labels,
        in_batches(dataset.test_images),
        in_batches(dataset.test_labels),
        in_batches(np.ones(num_test, bool)),
        order.epoch_permutation(0, 0, len(dataset.train_labels)),
        mean,
        deviation,
    )
    return put(data, NamedSharding(mesh, P()))
