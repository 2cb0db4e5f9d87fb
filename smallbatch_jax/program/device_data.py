"""Images on devices: a whole dataset, or a pool of the training images that one segment needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from smallbatch_jax.data import Dataset, order
from smallbatch_jax.program.devices import DATA, LANE
from smallbatch_jax.program.processes import put
from smallbatch_jax.program.tasks import Array

LARGEST_EVAL_BATCH = 256


class DeviceData(NamedTuple):
    """A dataset on the device; images keep their stored dtype and are normalised when a batch is taken."""

    train_images: Array  # uint8, float32 or int32 (tokens) [N, …]
    train_labels: Array  # int32[N], float32[N, …] or int32[N, T], depending on the task
    shuffled: Array  # int32[N], the training examples in a random order, for precise statistics; None in a pool
    mean: Array  # float32[C]
    deviation: Array  # float32[C]
    splits: "dict[str, TestImages]"  # for evaluation, [batches, n, …] each; none in a pool

    def normalise(self, images: jax.Array) -> jax.Array:
        """Returns images, float32[n, …], normalised by the training set's channel mean and deviation."""
        return normalised(images, self.mean, self.deviation)


def normalised(images: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """Returns images [n, …, C] as float32, normalised by a mean and a deviation for each channel; tokens as they are."""
    if images.dtype == jnp.int32:
        return images
    leading = (1,) * (images.ndim - 1)
    return (images.astype(jnp.float32) - mean.reshape(*leading, -1)) / deviation.reshape(*leading, -1)


class Pool(NamedTuple):
    """The training images that the lanes of each device see in one segment, for a dataset that is streamed."""

    images: Array  # uint8[rows, devices that share a batch, P, H, W, C]
    labels: Array  # int32[rows, devices that share a batch, P]
    mean: Array  # float32[C]
    deviation: Array  # float32[C]

    def on_this_device(self) -> DeviceData:
        """Returns the pool of this device, under `shard_map`; it has no test set."""
        return DeviceData(self.images[0, 0], self.labels[0, 0], None, self.mean, self.deviation, {})


POOL = Pool(P(LANE, DATA), P(LANE, DATA), P(), P())  # sharding of a Pool


class TestImages(NamedTuple):
    """A batch of examples to evaluate; a streamed one is sharded over the devices that share a batch."""

    images: Array  # [n, …], as the dataset stores them
    labels: Array  # [n, …]
    counts: Array  # bool[n], False for padding and for images that cannot be decoded

    __test__ = False  # pytest would collect it by its name


def to_device(dataset: Dataset, mesh: Mesh) -> DeviceData:
    """Puts the whole dataset onto every device of the mesh, the other splits in batches of equal size."""
    mean, deviation = dataset.channel_statistics()
    shuffled = order.epoch_permutation(0, 0, len(dataset.train_labels))
    splits = {name: _in_batches(images, labels) for name, (images, labels) in dataset.splits().items()}
    data = DeviceData(dataset.train_images, dataset.train_labels, shuffled, mean, deviation, splits)
    return put(data, mesh, P())


def _in_batches(images: np.ndarray, labels: np.ndarray) -> TestImages:
    """Returns a split in batches of equal size, at most LARGEST_EVAL_BATCH, the last one padded with zeros."""
    batches = -(-len(labels) // LARGEST_EVAL_BATCH)

    def padded(array: np.ndarray) -> np.ndarray:
        missing = -len(array) % batches
        whole = np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
        return whole.reshape(batches, -1, *array.shape[1:])

    return TestImages(padded(images), padded(labels), padded(np.ones(len(labels), bool)))
