"""Training and test images decoded ahead of their use by worker processes, in the order in which they are asked for.

Grain runs the workers. Its pipelines have one fixed order, and lanes have many: so all that can be asked for is numbered
(`Numbered`), each worker is a pipeline of its own over every Wth batch of these numbers, and is sent to another number when a
run begins or resumes there. What is found under a number depends on the number alone, not on who asks or when.
"""

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from smallbatch_jax.data import order, slots
from smallbatch_jax.data.photographs import Photographs, Source
from smallbatch_jax.data.slots import Slots

MESSAGE_BYTES = 2**22  # of images that a worker decodes before it hands them over
MOST_PER_MESSAGE = 64
MESSAGES_AHEAD = 2  # per worker, beside the one that it works on
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


class Numbered:
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
            content, label = source.read(example), source.label(example)
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


class _Messages:
    """What workers send at once: so many images of consecutive numbers."""

    def __init__(self, numbered: Numbered, size: int, slots: Slots | None):
        """`slots` for the images; without, they are a part of the message."""
        self._numbered, self._size, self._slots = numbered, size, slots

    def __len__(self) -> int:
        return -(-len(self._numbered) // self._size)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """As `Decoded`; in place of the images the number of the slots' filling, if there are slots."""
        found = self._numbered.empty(self._size, with_images=self._slots is None)
        filling, images = (None, found.images) if self._slots is None else self._slots.fill()
        for i in range(self._size):
            image, *others = self._numbered.image(index * self._size + i, images[i])
            if not others[-1]:
                images[i] = image
            found.labels[i], found.examples[i], found.sound[i] = others
        return (images if filling is None else np.int64(filling), *found[1:])


class Lost(Exception):
    """A worker process ended by itself."""


class Ahead:
    """Reads `Numbered` images from any number on, with worker processes that stay ahead."""

    def __init__(self, numbered: Numbered, image_bytes: int, workers: int):
        """`workers` processes; 0 for a thread of this process."""
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain asks for flags of its own, in a notebook too
            flags.FLAGS.mark_as_parsed()
        room = _shared_memory() // 2 // (max(1, workers) * slots.COUNT)
        self._per_message = max(1, min(MOST_PER_MESSAGE, MESSAGE_BYTES // image_bytes, room // image_bytes))
        # What is left of a message, a kilobyte, goes by a pipe: Grain would make shared memory for each array of each.
        options = grain.experimental.DatasetOptions(min_shm_size=2**16)
        self._workers = []
        shape = numbered.empty(self._per_message).images.shape
        self._slots = [Slots(shape) for _ in range(workers)]
        for worker in range(workers or 1):
            given = _Messages(numbered, self._per_message, self._slots[worker] if workers else None)
            messages = grain.MapDataset.source(given)[worker :: workers or 1]
            pipeline = messages.to_iter_dataset(grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=1))
            if workers:
                ahead = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=MESSAGES_AHEAD)
                pipeline = pipeline.mp_prefetch(ahead, worker_init_fn=_begin_worker)
            self._workers.append(iter(grain.experimental.WithOptionsIterDataset(pipeline, options)))
        # A pipeline begins its process when it is first asked, in whose thread the answer is unpacked too.
        self._asking = ThreadPoolExecutor(len(self._workers))
        self._asked: list[Future[Any] | None] = [None] * len(self._workers)
        self._message: Decoded | None = None  # at hand
        self._filling: tuple[Slots, int] | None = None  # where its images are
        self._next = 0  # the number of the image after it
        self.number = 0  # that comes next

    def seek(self, number: int) -> None:
        """Goes on from this number."""
        from grain.experimental import set_next_index

        if number == self.number:
            return
        if self._message is None:
            self._ask()  # a pipeline cannot be sent anywhere before it began
        self._await_answers()
        message = number // self._per_message
        for position, worker in enumerate(self._workers):
            set_next_index(worker, max(0, -(-(message - position) // len(self._workers))))
        self._message, self._next, self.number = None, message * self._per_message, number

    def take(self, out: Decoded) -> None:
        """Fills the arrays with the images that come next."""
        filled, wanted = 0, len(out.labels)
        while filled < wanted:
            if self._message is None or self.number == self._next:
                self._message = self._receive(self._next // self._per_message)
                self._next += len(self._message.labels)
            have = len(self._message.labels) - (self._next - self.number)
            count = min(wanted - filled, self._next - self.number)
            for array, message in zip(out, self._message, strict=True):
                array[filled : filled + count] = message[have : have + count]
            if self._filling:
                self._filling[0].require(self._filling[1])
            filled, self.number = filled + count, self.number + count

    def _receive(self, message: int) -> Decoded:
        """A message; every worker is asked for its next one in the meantime."""
        self._ask()
        worker = message % len(self._workers)
        answer, self._asked[worker] = self._asked[worker], None
        assert answer is not None
        try:
            found = answer.result()
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise Lost(f"a process that decodes images was lost: {str(error).split('. ')[0]}") from error
        self._ask()
        if not self._slots:
            return Decoded(*found)
        self._filling = self._slots[worker], int(found[0])
        return Decoded(self._slots[worker].read(int(found[0])), *found[1:])

    def _ask(self) -> None:
        """Asks the workers that have nothing to do for their next message."""
        for worker, asked in enumerate(self._asked):
            if asked is None:
                self._asked[worker] = self._asking.submit(next, self._workers[worker])

    def _await_answers(self) -> None:
        wait([asked for asked in self._asked if asked is not None])
        self._asked = [None] * len(self._workers)

    def close(self) -> None:
        self._await_answers()
        for _ in self._asking.map(lambda worker: worker.close(), self._workers):
            pass
        self._asking.shutdown()
        # Nothing of Grain's is left to the end of the interpreter, when it would complain.
        self._workers, self._message, self._filling = [], None, None
        for memory in self._slots:
            memory.close()


def _shared_memory() -> int:
    """Bytes of shared memory that are free, through which workers hand images over; containers may have little."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 2**40
    return found.f_bavail * found.f_frsize


def _begin_worker(index: int, count: int) -> None:
    """A worker outlives a signal, which all processes of a terminal get, and does not outlive its parent."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
