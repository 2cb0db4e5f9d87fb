"""A layer and the statistics of its output, a few images at a time.

Batch norm needs the mean and variance of a layer's output over the whole batch before the next layer can begin, so every
activation of the batch goes to memory and comes back. What lies between two such outputs (normalise, ReLU, convolution) works
on each image by itself: done in a loop over a few images, its intermediate arrays stay in the cache, forward and backward, and
nothing between the outputs is ever stored. The statistics are those of the whole batch, combined from chunk to chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.models import blocks
from smallbatch_jax.models.fusion import rounded

PyTree = Any


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_statistics(
    function: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]],
    at_once: int,
    shared: PyTree,
    of_blocks: PyTree,
    images: PyTree,
) -> tuple[tuple[jax.Array, PyTree], tuple[jax.Array, jax.Array]]:
    """`function(shared, of_block, images)` of all images, and the channel statistics of the first array it gives.

    Args:
      function: works on every image by itself; gives (x, others), float[n, …, C] and arrays [n, …], of n images of one block,
        of whose arrays it is given each with a leading axis of 1. It must not close over traced arrays.
      at_once: images per chunk, a divisor of a block's. The function's own intermediate results are computed again in the
        backward pass.
      shared: arrays that are the same for all images.
      of_blocks: arrays that are the same for all images of a block (`blocks.count` of N), [B, …].
      images: arrays [N, …].

    Returns:
      (x, others) of all N images, and mean and variance of x in each block over all axes but the last, float32[B, C].
    """
    return _forward(function, at_once, shared, of_blocks, images)[0]


def _forward(function, at_once, shared, of_blocks, images):
    n = len(jax.tree.leaves(images)[0])
    of_chunk, per_block = _of_chunks(of_blocks, n, at_once)

    def chunk(carry, few):
        mean, squares = carry
        position, of_block, images = few
        x, others = function(shared, of_block, images)
        numbers, runs = x.size // x.shape[-1], blocks.in_runs(x.astype(jnp.float32), 1)
        chunk_mean = rounded(blocks.channel_sums(runs, 1)[0] / numbers)
        chunk_squares = blocks.channel_sums(jnp.square(runs - chunk_mean[None, None]), 1)[0]
        # Chan, Golub & LeVeque 1979: of `position` chunks and one more of the same size; a block begins at 0. Rounded, as what
        # is a loop's step in one program may be several in another.
        difference, part = jnp.where(position > 0, chunk_mean - mean, 0), 1 / (position + 1)
        mean = jnp.where(position > 0, mean, chunk_mean) + rounded(difference * part)
        between = jnp.square(difference) * (numbers * position * part)
        squares = jnp.where(position > 0, squares, 0) + chunk_squares + rounded(between)
        return (mean, squares), ((x, others), (mean, squares))

    few = jax.tree.map(lambda a: a[:at_once], images), jax.tree.map(lambda a: a[:1], of_blocks)
    features = jax.eval_shape(function, shared, few[1], few[0])[0].shape[-1]
    start = jnp.zeros(features, jnp.float32), jnp.zeros(features, jnp.float32)
    positions = jnp.arange(n // at_once, dtype=jnp.float32) % per_block
    _, (chunks, moments) = lax.scan(chunk, start, (positions, of_chunk, _in_chunks(images, at_once)))
    x, others = _joined(chunks)
    means, squares = (a[per_block - 1 :: per_block] for a in moments)  # as each block ended
    return ((x, others), (means, squares / (x.size // features // len(means)))), (shared, of_blocks, images, x, means)


def _backward(function, at_once, residuals, cotangents):
    shared, of_blocks, images, x, mean = residuals
    (dx, dothers), (dmean, dvar) = cotangents
    n = len(x)
    count = len(mean)
    values = x.size // x.shape[-1] // count  # of a channel in a block
    moments = dmean / values, 2 * dvar / values, mean
    (of_chunk, moments), per_block = _of_chunks((of_blocks, moments), n, at_once)

    def chunk(totals, few):
        block, of_block, moments, images, x, dx, dothers = few
        of_mean, of_var, mean = (a.reshape((1,) * (x.ndim - 1) + (-1,)) for a in moments)
        dx = dx + (of_mean + of_var * (x - mean)).astype(dx.dtype)
        _, pullback = jax.vjp(function, shared, of_block, images)
        dshared, dof_block, dimages = pullback((dx, dothers))
        return jax.tree.map(lambda total, d: total.at[block].add(d), totals, dshared), (dof_block, dimages)

    start = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), shared)
    chunks = jnp.arange(n // at_once) // per_block, of_chunk, moments, *_in_chunks((images, x, dx, dothers), at_once)
    totals, (dof_chunk, dimages) = lax.scan(chunk, start, chunks)
    dof_blocks = jax.tree.map(lambda a: a.reshape(count, per_block, *a.shape[2:]).sum(1), dof_chunk)
    return blocks.tree(totals), dof_blocks, _joined(dimages)


with_statistics.defvjp(_forward, _backward)


def _of_chunks(of_blocks: PyTree, n: int, at_once: int) -> tuple[PyTree, int]:
    """Arrays of the blocks of n images as those of their chunks, [chunks, 1, …]; and how many chunks a block has."""
    per_block = n // blocks.count(n) // at_once
    return jax.tree.map(lambda a: jnp.repeat(a, per_block, 0)[:, None], of_blocks), per_block


def _in_chunks(images: PyTree, at_once: int) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), images)


def _joined(chunks: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)
