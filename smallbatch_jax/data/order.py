"""The training order: an endless stream of per-epoch permutations of the examples, cut into batches.

Step k takes positions k·m … k·m+m-1 of the stream, so nothing is dropped and a batch may straddle two epochs. The
stream is a function of (seed, epoch) alone: every base learning rate and batch size sees the examples in the same order.
The host draws it, so it is the same on every device and for streamed images.
"""

import functools

import numpy as np


def epoch_end(epoch: int, num_examples: int, batch_size: int) -> int:
    """Returns the number of updates before the end of an epoch (1…E): floor(epoch·N/m + 1/2) exactly; 0 for epoch 0."""
    return (2 * epoch * num_examples + batch_size) // (2 * batch_size)


def total_steps(epochs: int, num_examples: int, batch_size: int) -> int:
    """Returns the number of updates in a run of E epochs over N examples: round(E·N/m), constant work for every m (§3.1)."""
    return epoch_end(epochs, num_examples, batch_size)


def epoch_of_step(step: int, num_examples: int, batch_size: int) -> int:
    """Returns the epoch (1…) that update `step` (from 0) belongs to: the first one that ends after that update."""
    # The rounding of epoch ends to whole steps moves it from step·m/N by at most one.
    epoch = max(1, step * batch_size // num_examples)
    while epoch_end(epoch, num_examples, batch_size) <= step:
        epoch += 1
    return epoch


@functools.lru_cache(maxsize=64)
def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of the examples in an epoch (from 0) of the stream: int32[N], read-only.

    Philox is keyed with (seed, epoch), so no epoch's order needs the ones before it. The lanes of a sweep mostly
    share seeds and epochs, hence the cache.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    permutation = generator.permutation(num_examples).astype(np.int32)
    permutation.flags.writeable = False
    return permutation


def batch_indices(seed: int, first_step: int, num_steps: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Returns the examples of updates first_step … first_step+num_steps-1: int32[num_steps, m]."""
    first, stop = first_step * batch_size, (first_step + num_steps) * batch_size
    epochs = range(first // num_examples, -(-stop // num_examples))
    stream = [epoch_permutation(seed, epoch, num_examples) for epoch in epochs] or [np.empty(0, np.int32)]
    skipped = first - first // num_examples * num_examples
    return np.concatenate(stream)[skipped : skipped + stop - first].reshape(num_steps, batch_size)
