"""Memory that a worker process shares with its parent, for images on their way: no page of it is new but the first time."""

import math
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

COUNT = 12  # more than a worker's messages that can be under way at once


class Slots:
    """Slots for messages, which the worker fills in turn; a pickled copy is the worker's end.

    Each filling has a number. What is read is checked to be of the number asked for still: should a worker ever be further
    ahead than there are slots, that is an error and not another image.
    """

    def __init__(self, shape: tuple[int, ...]):
        """`shape` of the images of a message, uint8."""
        self._shape = shape
        self._memory: SharedMemory | None = SharedMemory(create=True, size=COUNT * (math.prod(shape) + 8))
        self._name = self._memory.name
        self._filled = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_shape": self._shape, "_name": self._name, "_memory": None, "_filled": 0}

    def fill(self) -> tuple[int, np.ndarray]:
        """The next filling: its number, and the images to be written."""
        self._filled += 1
        images, numbers = self._arrays()
        numbers[self._filled % COUNT] = self._filled
        return self._filled, images[self._filled % COUNT]

    def read(self, filling: int) -> np.ndarray:
        """The images of a filling; to be copied, and `require` asked afterwards."""
        return self._arrays()[0][filling % COUNT]

    def require(self, filling: int) -> None:
        """Refuses what was read if its slot has been filled anew."""
        if self._arrays()[1][filling % COUNT] != filling:
            raise RuntimeError(f"images were overwritten before they were read: filling {filling} of {COUNT} slots")

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if self._memory is None:
            self._memory = SharedMemory(self._name)
        images = np.ndarray((COUNT, *self._shape), np.uint8, self._memory.buf)
        return images, np.ndarray(COUNT, np.int64, self._memory.buf, images.nbytes)

    def close(self) -> None:
        """The memory is freed once the worker has ended too."""
        if self._memory is not None:
            self._memory.unlink()
            with suppress(BufferError):  # an image of it is still in someone's hand
                self._memory.close()
            self._memory = None
