"""Every image that training and testing may ask for, by number: which one it is, and how it is cropped.

What is found under a number depends on the number alone, not on who asks or when: on the seed, the epoch and the example.
"""

from typing import Any, NamedTuple

import numpy as np

from smallbatch_jax.data import order
from smallbatch_jax.data.photographs import Photographs, Source

BEYOND = 2**20  # numbers after the last image, which workers run into: at an end they could not be sent back


class Block(NamedTuple):
    """Of every `batch` consecutive examples the `count` from `first` on: what one process sees of each batch."""

    batch: int
    first: int
    count: int


WHOLE = Block(1, 0, 1)


class Decoded(NamedTuple):
    """Images in the order in which they were asked for."""

    images: np.ndarray  # uint8[n, S, S, 3]; zeros where broken
    labels: np.ndarray  # int32[n]
    examples: np.ndarray  # int32[n], their numbers in the training or test set
    sound: np.ndarray  # bool[n], False where a file could not be read or decoded


class SampleIndex:
    """Every image that may be asked for: of each seed its stream of epochs (`data.order`), then the test set."""

    def __init__(
        self,
        photographs: Photographs,
        seeds: tuple[int, ...],
        epochs: int,
        augment: bool,
        color_jitter: bool,
        train: Block = WHOLE,
        test: Block = WHOLE,
    ):
        self._photographs, self._augment, self._color_jitter = photographs, augment, color_jitter
        self._blocks = train, test
        self._seeds = seeds
        self._size = photographs.image_size
        # The last batch of a run may reach into the epoch after its last one.
        self._per_seed = _numbers((epochs + 1) * photographs.num_train, train)
        self._num_test = _numbers(photographs.num_test, test)
        self._permutation: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._seeds) * self._per_seed + self._num_test + BEYOND

    def training(self, seed: int, position: int) -> int:
        """The number of the image at a position of a seed's stream; the first of a batch, where blocks are parts of batches."""
        batch, _, count = self._blocks[0]
        return self._seeds.index(seed) * self._per_seed + position // batch * count

    def testing(self, position: int) -> int:
        """The number of the image at a position of the test set."""
        batch, _, count = self._blocks[1]
        return len(self._seeds) * self._per_seed + position // batch * count

    def empty(self, count: int, with_images: bool = True) -> Decoded:
        """Arrays for so many images."""
        images = np.empty((count if with_images else 0, self._size, self._size, 3), np.uint8)
        return Decoded(images, np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.bool_))

    def position(self, number: int) -> int:
        """Where in a seed's stream the training image of a number is."""
        return _position(number % self._per_seed, self._blocks[0])

    def example(self, number: int) -> int:
        """Which of the training set the image of a number is."""
        epoch, offset = divmod(self.position(number), self._photographs.num_train)
        return self._in_order(self._seeds[number // self._per_seed], epoch, offset)

    def __getitem__(self, index: int) -> Decoded:
        """The image of a number; arrays without their first axis."""
        return self.image(index)

    def image(self, number: int, out: np.ndarray | None = None) -> Decoded:
        """The same, with the image in `out` if that is given."""
        which = number // self._per_seed
        if which < len(self._seeds):
            epoch = self.position(number) // self._photographs.num_train
            return self.train_image(self._seeds[which], epoch, self.example(number), out)
        example = _position(number - len(self._seeds) * self._per_seed, self._blocks[1])
        if example >= self._photographs.num_test:
            return self._no_image(0)
        return self._image(self._photographs.test, example, None, out)

    def train_image(self, seed: int, epoch: int, example: int, out: np.ndarray | None = None) -> Decoded:
        """A training image as a run of this seed sees it in an epoch of its stream, from 0."""
        draw = None
        if self._augment:  # not by the key that the order of an epoch is drawn with: seeds and epochs are below 2^32
            key = np.array([2**32 + seed, epoch * 2**32 + example], np.uint64)
            draw = np.random.Generator(np.random.Philox(key=key))
        return self._image(self._photographs.train, example, draw, out)

    def _image(self, source: Source, example: int, draw: np.random.Generator | None, out: np.ndarray | None) -> Decoded:
        from smallbatch_jax.data import views

        try:
            content, label = source.read(example)
            if draw is None:
                image = views.center_view(content, self._size, source.upright, out)
            else:
                image = views.training_view(content, self._size, draw, self._color_jitter, source.upright, out)
        except MemoryError:
            raise
        except Exception:  # whatever a damaged file makes of a decoder; who asked decides what becomes of it
            return self._no_image(example)
        return Decoded(image, np.int32(label), np.int32(example), np.bool_(True))  # pyright: ignore[reportArgumentType]

    def _no_image(self, example: int) -> Decoded:
        image = np.zeros((self._size, self._size, 3), np.uint8)
        return Decoded(image, np.int32(0), np.int32(example), np.bool_(False))  # pyright: ignore[reportArgumentType]

    def _in_order(self, seed: int, epoch: int, offset: int) -> int:
        if self._permutation is None or self._permutation[0] != (seed, epoch):
            # Only the last is kept, here and not in `order`: of a million examples each takes 5 MB, in every worker.
            drawn = order.epoch_permutation.__wrapped__(seed, epoch, self._photographs.num_train)
            self._permutation = (seed, epoch), drawn
        return int(self._permutation[1][offset])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_permutation": None}


def _numbers(positions: int, block: Block) -> int:
    return -(-positions // block.batch) * block.count


def _position(number: int, block: Block) -> int:
    """Of the number-th example of all blocks."""
    return number // block.count * block.batch + block.first + number % block.count
