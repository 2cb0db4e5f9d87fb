"""Prefetcher: images decoded ahead of their use by a Grain pipeline, in the order in which they are requested.

A Grain pipeline has one order and lanes have many. Every image that can be requested therefore has a number (SampleIndex),
and the pipeline jumps to another number when a run begins or resumes there. Its worker processes keep running.
"""

import gc
import multiprocessing
import os
import shutil
import signal
import threading
from typing import Any

import numpy as np

from smallbatch_jax.data.streaming.sample_index import Decoded, SampleIndex

MESSAGE_BYTES = 2**22  # image bytes per message from a worker
MOST_PER_MESSAGE = 64
MESSAGES_AHEAD = 2  # per worker; Grain holds as many again in this process
SHARED_ABOVE = 2**10  # bytes of an array; smaller ones go through a pipe, whose writes are atomic up to 4,096 bytes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # sent to all processes of a job


class WorkerDied(Exception):
    """Raised if a worker process ended unexpectedly."""


class Prefetcher:
    """Reader of consecutive images of a SampleIndex from any number; `seek` sets the number."""

    def __init__(self, index: SampleIndex, image_bytes: int, workers: int):
        """`workers` processes decode; 0 decodes in one thread of this process."""
        import grain
        from absl import flags
        from grain._src.python.dataset.transformations import process_prefetch

        process_prefetch.ProcessPrefetchDatasetIterator._process_failed = _has_failed
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, in a notebook too
            flags.FLAGS.mark_as_parsed()
        # Images are handed over in shared memory, of which a container may have little.
        free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 2**40
        room = free // 2 // (max(1, workers) * (2 * MESSAGES_AHEAD + 3))
        most = max(1, min(MOST_PER_MESSAGE, MESSAGE_BYTES // image_bytes, room // image_bytes))
        self._per_message = 2 ** (most.bit_length() - 1)  # divides STREAM, so that no message spans two streams
        self._workers = workers
        # Consecutive images are one element of the pipeline, a message, since Grain spends 0.14 ms on each element.
        messages = grain.MapDataset.source(index).batch(self._per_message, drop_remainder=True)
        pipeline = messages.to_iter_dataset(grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=2))
        if workers:
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=MESSAGES_AHEAD)
            pipeline = pipeline.mp_prefetch(options, worker_init_fn=_begin_worker)
        shared = grain.experimental.DatasetOptions(min_shm_size=SHARED_ABOVE)
        self._pipeline: Any = iter(grain.experimental.WithOptionsIterDataset(pipeline, shared))
        self._message: tuple[int, Decoded] | None = None  # last message received, and its index
        self.number: int | None = None  # number of the next image

    def seek(self, number: int) -> None:
        """Continues from this number."""
        if number == self.number:
            return
        message = number // self._per_message
        state = self._pipeline.get_state()
        if self._workers:  # worker w of W makes messages w, w + W, …
            firsts = [-(-(message - worker) // self._workers) for worker in range(self._workers)]
            state |= {
                "next_index_in_cycle": message % self._workers,
                "iterators_in_use_states": [{"next_index": first} for first in firsts],
            }
        else:
            state |= {"next_index": message}
        self._pipeline.set_state(state)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a worker holds them until `_begin_worker` ignores them
        try:
            self._pipeline.start_prefetch()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._message, self.number = None, number

    def take(self, count: int) -> Decoded:
        """Returns the next `count` images.

        Raises:
          WorkerDied: if one of the processes has ended.
        """
        assert self.number is not None, "seek comes first"
        parts = []
        while count or not parts:
            index, first = divmod(self.number, self._per_message)
            if self._message is None or self._message[0] != index:
                self._message = index, self._receive()
            taken = min(count, self._per_message - first)
            parts.append([array[first : first + taken] for array in self._message[1]])
            self.number, count = self.number + taken, count - taken
        return Decoded(*map(np.concatenate, zip(*parts, strict=True)))

    def _receive(self) -> Decoded:
        try:
            return next(self._pipeline)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            reason = str(error).split(". ")[0]
        raise WorkerDied(f"a process that decodes images died: {reason}")  # without Grain's frames, which hold its queues

    def close(self) -> None:
        """Ends the workers, and frees what Python would report as leaked at exit."""
        self._pipeline.close()
        self._message = self._pipeline = None
        gc.collect()


def _has_failed(self: Any) -> bool:
    """Does the same as Grain's own check, and also ends the wait for a worker that died before it confirmed a new state.

    Grain 0.2.18 waits for it forever, for instance where a worker imports a script that raises an error.
    """
    process = self._prefetch_process
    if process is None or process.exitcode in (None, 0):
        return False
    self._set_state_count = 0
    return True


def _begin_worker(index: int, count: int) -> None:
    """Makes a worker ignore signals, so that a last segment can be trained, and end with its parent."""
    import cv2

    for held in SIGNALS:
        signal.signal(held, signal.SIG_IGN)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
