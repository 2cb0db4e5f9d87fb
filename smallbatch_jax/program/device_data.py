"""Images on the devices that train on them: a whole dataset, or as many as are needed at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.data import Dataset, order
from smallbatch_jax.program.devices import DATA, LANE
from smallbatch_jax.program.processes import put
from smallbatch_jax.program.train import Array

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
        return normalised(images, self.mean, self.deviation)


def normalised(images: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """float32[n, …] of images [n, …, C], by the mean and deviation of their channels."""
    leading = (1,) * (images.ndim - 1)
    return (images.astype(jnp.float32) - mean.reshape(*leading, -1)) / deviation.reshape(*leading, -1)


class Pool(NamedTuple):
    """The training images that the lanes of each device see in one segment, for a dataset that is streamed."""

    images: Array  # uint8[rows, devices that share a batch, P, H, W, C]
    labels: Array  # int32[rows, devices that share a batch, P]
    mean: Array  # float32[C]
    deviation: Array  # float32[C]

    def on_this_device(self) -> DeviceData:
        """The device's own part, under `shard_map`; there is no test set in it."""
        return DeviceData(self.images[0, 0], self.labels[0, 0], None, None, None, None, self.mean, self.deviation)


POOL = Pool(P(LANE, DATA), P(LANE, DATA), P(), P())  # how it lies on a mesh


class TestImages(NamedTuple):
    """Some of the test set, of a dataset that is streamed, spread over the devices that share a batch."""

    images: Array  # uint8[n, H, W, C]
    labels: Array  # int32[n]
    counts: Array  # bool[n], False where there is none, or a broken one

    __test__ = False  # not one of pytest's


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
