"""SampleIndex: every image that training and testing may request, by number.

The image under a number is a function of (seed, epoch, example) alone, no matter who requests it or when.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from smallbatch_jax.config.experiment import Dataset as DatasetConfig
from smallbatch_jax.data import order
from smallbatch_jax.data.streaming.photographs import Photographs, Source

STREAM = 2**40  # numbers reserved for each seed and for the test set, more than any run reads


class BatchSlice(NamedTuple):
    """This process's slice of each global batch: `count` of every `batch` consecutive examples, beginning at `first`."""

    batch: int
    first: int
    count: int


WHOLE = BatchSlice(1, 0, 1)
# Without `order`'s cache, whose permutations of a million examples take 5 MB each, in every worker.
_last_permutation = functools.lru_cache(maxsize=1)(order.epoch_permutation.__wrapped__)


class Decoded(NamedTuple):
    """Images in the order in which they were requested."""

    images: Any  # uint8[n, S, S, 3]; zeros where not valid
    labels: Any  # int32[n]
    examples: Any  # int32[n], their indices in the training or test set
    valid: Any  # bool[n], False where a file could not be read or decoded


@dataclass(frozen=True, eq=False, repr=False)
class SampleIndex:
    """All images by number: for each seed the stream of its epochs (`data.order`), then the test set."""

    photographs: Photographs
    seeds: tuple[int, ...]
    config: DatasetConfig  # says whether training images are augmented
    train: BatchSlice = WHOLE  # leaves out the images of other processes
    test: BatchSlice = WHOLE

    def __len__(self) -> int:
        return (len(self.seeds) + 1) * STREAM

    def training(self, seed: int, position: int) -> int:
        """Returns the number of this process's first image of the batch that begins at a position of a seed's stream."""
        return self.seeds.index(seed) * STREAM + position // self.train.batch * self.train.count

    def testing(self, position: int) -> int:
        """Returns the number of this process's first image of the test batch that begins at a position."""
        return len(self.seeds) * STREAM + position // self.test.batch * self.test.count

    def training_image(self, number: int) -> tuple[int, int, int]:
        """Returns (seed, epoch from 0, example) of a number."""
        stream, within = divmod(number, STREAM)
        seed, num_train = self.seeds[stream], self.photographs.num_train
        epoch, offset = divmod(_position(within, self.train), num_train)
        return seed, epoch, int(_last_permutation(seed, epoch, num_train)[offset])

    def __getitem__(self, index: int) -> Decoded:
        """Returns the image of a number, without the first axis of `Decoded`'s arrays."""
        stream, within = divmod(index, STREAM)
        if stream < len(self.seeds):
            return self.decode_training(*self.training_image(index))
        example = _position(within, self.test)
        if example >= self.photographs.num_test:
            return self._not_valid(0)
        return self._decode(self.photographs.test, example, None)

    def decode_training(self, seed: int, epoch: int, example: int) -> Decoded:
        """Returns a training image as a run of this seed sees it in an epoch of its stream, from 0."""
        rng = None
        if self.config.augment:  # distinct from the key of an epoch's order, whose words are below 2^32
            key = np.array([2**32 + seed, epoch * 2**32 + example], np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key))
        return self._decode(self.photographs.train, example, rng)

    def _decode(self, source: Source, example: int, rng: np.random.Generator | None) -> Decoded:
        from smallbatch_jax.data.streaming import views

        size = self.photographs.image_size
        try:
            content, label = source.read(example)
            if rng is None:
                image = views.center_view(content, size, source.upright)
            else:
                image = views.training_view(content, size, rng, self.config.color_jitter, source.upright)
        except MemoryError:
            raise
        except Exception:  # a damaged file can raise anything from within a decoder; the caller decides what it means
            return self._not_valid(example)
        return Decoded(image, np.int32(label), np.int32(example), np.bool_(True))

    def _not_valid(self, example: int) -> Decoded:
        image = np.zeros(self.photographs.image_shape, np.uint8)
        return Decoded(image, np.int32(0), np.int32(example), np.bool_(False))


def _position(within: int, part: BatchSlice) -> int:
    """Returns the position in the stream of example number `within` of this process's slices."""
    return within // part.count * part.batch + part.first + within % part.count
