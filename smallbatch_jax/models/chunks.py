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

PyTree = Any


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_statistics(
    function: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]], at_once: int, shared: PyTree, images: PyTree
) -> tuple[tuple[jax.Array, PyTree], tuple[jax.Array, jax.Array]]:
    """`function(shared, images)`, and the channel statistics of the first array it gives.

    Args:
      function: works on every image by itself; gives (x, others), float[n, …, C] and arrays [n, …], of n images. It must not
        close over traced arrays.
      at_once: images per chunk, a divisor of their number N. The function's own intermediate results are computed again in
        the backward pass.
      shared: arrays that are the same for all images.
      images: arrays [N, …].

    Returns:
      (x, others) of all N images, and mean and variance of x over all axes but the last, float32[C].
    """
    return _forward(function, at_once, shared, images)[0]


def _forward(function, at_once, shared, images):
    def chunk(carry, few):
        count, mean, squares = carry
        x, others = function(shared, few)
        values = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        chunk_mean = values.mean(0)
        chunk_squares = jnp.square(values - chunk_mean[None]).sum(0)
        # Chan, Golub & LeVeque 1979: of `count` chunks and one more of the same size.
        difference = chunk_mean - mean
        mean = mean + difference / (count + 1)
        squares = squares + chunk_squares + jnp.square(difference) * (len(values) * count / (count + 1))
        return (count + 1, mean, squares), (x, others)

    features = jax.eval_shape(function, shared, jax.tree.map(lambda a: a[:at_once], images))[0].shape[-1]
    start = jnp.float32(0), jnp.zeros(features, jnp.float32), jnp.zeros(features, jnp.float32)
    (_, mean, squares), chunks = lax.scan(chunk, start, _in_chunks(images, at_once))
    x, others = _joined(chunks)
    return ((x, others), (mean, squares / (x.size // features))), (shared, images, x, mean)


def _backward(function, at_once, residuals, cotangents):
    shared, images, x, mean = residuals
    (dx, dothers), (dmean, dvar) = cotangents
    n = x.size // x.shape[-1]

    def chunk(total, few):
        images, x, dx, dothers = few
        of_mean, of_var, mean_ = (a.reshape((1,) * (x.ndim - 1) + (-1,)) for a in (dmean / n, 2 * dvar / n, mean))
        dx = dx + (of_mean + of_var * (x - mean_)).astype(dx.dtype)
        _, pullback = jax.vjp(function, shared, images)
        dshared, dimages = pullback((dx, dothers))
        return jax.tree.map(jnp.add, total, dshared), dimages

    start = jax.tree.map(jnp.zeros_like, shared)
    dshared, dimages = lax.scan(chunk, start, _in_chunks((images, x, dx, dothers), at_once))
    return dshared, _joined(dimages)


with_statistics.defvjp(_forward, _backward)


def _in_chunks(images: PyTree, at_once: int) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), images)


def _joined(chunks: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)
