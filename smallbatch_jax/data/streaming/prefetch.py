"""Training and test images decoded ahead of their use by worker processes, in the order in which they are asked for.

Grain runs the workers. Its pipelines have one fixed order, and lanes have many: so all that can be asked for is numbered
(`numbered.py`), each worker is a pipeline of its own over every Wth message of these numbers, and is sent to another number
when a run begins or resumes there.
"""

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from smallbatch_jax.data import slots
from smallbatch_jax.data.numbered import Decoded, SampleIndex
from smallbatch_jax.data.slots import Slots

MESSAGE_BYTES = 2**22  # of images that a worker decodes before it hands them over
MOST_PER_MESSAGE = 64
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # that all processes of a job may get
MESSAGES_AHEAD = 2  # per worker, beside the one that it works on


class _Messages:
    """What workers send at once: so many images of consecutive numbers."""

    def __init__(self, numbered: SampleIndex, size: int, slots: Slots | None):
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
    """Reads `SampleIndex` images from any number on, with worker processes that stay ahead."""

    def __init__(self, numbered: SampleIndex, image_bytes: int, workers: int):
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
        self._asking = ThreadPoolExecutor(len(self._workers), initializer=_hold_signals)
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
        except StopIteration as end:  # there is no last number: the worker was lost on the way to another
            raise Lost("a process that decodes images was lost") from end
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


def _hold_signals() -> None:
    """A process that this thread begins holds these signals until it can say what to do with them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _begin_worker(index: int, count: int) -> None:
    """A worker outlives the signals, and does not outlive its parent."""
    import cv2

    for held in SIGNALS:
        signal.signal(held, signal.SIG_IGN)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
