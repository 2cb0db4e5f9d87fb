"""Which examples step k sees: the endless concatenation of per-epoch permutations, cut into batches.

Step k takes positions k·m … k·m+m-1 of that stream, so nothing is dropped and a batch may straddle two epochs. The
stream is a function of (seed, epoch) alone: every base learning rate and batch size sees the examples in the same order.
It is drawn on the host, and so is the same on every device and for images that never fit on one.
"""

import functools

import numpy as np


def epoch_end(epoch: int, num_examples: int, batch_size: int) -> int:
    """Updates taken when epoch `epoch` (1…E) ends: floor(epoch·N/m + 1/2), in exact integers. 0 for epoch 0."""
    return (2 * epoch * num_examples + batch_size) // (2 * batch_size)


def total_steps(epochs: int, num_examples: int, batch_size: int) -> int:
    """Updates in a run of E epochs over N examples: E·N/m to the nearest, whatever m costs the same work (§3.1)."""
    return epoch_end(epochs, num_examples, batch_size)


def epoch_of_step(step: int, num_examples: int, batch_size: int) -> int:
    """The epoch (1…) that update `step` (from 0) belongs to: the first that ends after it."""
    # Near step·m/N; the rounding of epoch ends to whole steps moves it by at most one.
    epoch = max(1, step * batch_size // num_examples)
    while epoch_end(epoch, num_examples, batch_size) <= step:
        epoch += 1
    return epoch


@functools.lru_cache(maxsize=64)
def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of the examples in epoch `epoch` (from 0) of the stream: int32[N], read-only.

    Philox is keyed with (seed, epoch), so no epoch's order needs the ones before it. The cache serves the lanes of a
    sweep, which mostly share their seeds and epochs.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    permutation = generator.permutation(num_examples).astype(np.int32)
    permutation.flags.writeable = False
    return permutation


def batch_indices(seed: int, first_step: int, num_steps: int, batch_size: int, num_examples: int) -> np.ndarray:
    """The examples of updates first_step … first_step+num_steps-1: int32[num_steps, m]."""
    position, stop = first_step * batch_size, (first_step + num_steps) * batch_size
    pieces = []
    while position < stop:
        epoch, offset = divmod(position, num_examples)
        piece = epoch_permutation(seed, epoch, num_examples)[offset : offset + stop - position]
        pieces.append(piece)
        position += len(piece)
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    return stream.reshape(num_steps, batch_size)
