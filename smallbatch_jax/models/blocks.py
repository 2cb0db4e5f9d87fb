"""Sums over the examples of a batch that come out the same, to the last bit, however many devices hold it.

A sum of floating-point numbers depends on its order, and in training its last bit counts in the end: it turns a ReLU that is
all but zero, and so a gradient. So a batch is cut into *blocks* of consecutive examples, 1, 2, 4 or 8 of them. Every sum over
examples is taken of each block by itself, by the same code for each, and the sums of the blocks are added in pairs, and those
in pairs again: a binary tree. A device that holds 1, 2 or 4 of the blocks makes a branch of that tree, and what devices made
is added as the rest of it. All else is computed of each image by itself; only that XLA:CPU rounds a matrix product of few
rows otherwise than the same rows among many, so a small share is filled up with zeros (`filled`).

How the batch of a step is cut is said by `of(…)` around what is traced, as precision is by `jax.default_matmul_precision`.
Without it, and on GPU and TPU, where exchanging branches would cost more than it is worth, a device's examples are one block,
and sums over devices are left to the collective.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.models.fusion import rounded

PyTree = Any

MOST = 8  # blocks of a batch
SMALLEST = 2  # examples in a block: sums over one at a time cost a kernel's gradient too much
# What XLA:CPU (jax 0.10.2) computes by other code: products of fewer rows than so many, and sums over fewer numbers or more.
ENOUGH_ROWS, ENOUGH_NUMBERS, MOST_NUMBERS = 64, 4096, 32768
LONGEST_SUM = 128  # in a matrix product, above which it is cut where there are many threads


class Blocks(NamedTuple):
    """How a batch is cut, and how many of its examples are worked on at a time: the same however many devices there are."""

    size: int  # examples of a block
    together: int  # examples that one device by itself would take at a time


def block_size(batch_size: int, bn_batch_size: int) -> int:
    """Examples of a block: as few as there may be, so that blocks and BN batches hold whole ones of the other.

    Args:
      batch_size: m.
      bn_batch_size: b, a divisor of it.
    """
    size = batch_size
    while batch_size // size < MOST and size % 2 == 0 and size // 2 >= SMALLEST and _nested(size // 2, bn_batch_size):
        size //= 2
    return size


def _nested(one: int, other: int) -> bool:
    return one % other == 0 or other % one == 0


_current: ContextVar[Blocks | None] = ContextVar("blocks", default=None)


@contextmanager
def of(blocks: Blocks | None) -> Iterator[None]:
    """What is traced within it sums over a batch that is cut so."""
    token = _current.set(blocks if jax.default_backend() == "cpu" else None)
    try:
        yield
    finally:
        _current.reset(token)


def together(n: int) -> int:
    """Of how many examples the n here are a share: what an implementation may be chosen by."""
    now = _current.get()
    return n if now is None else now.together


def count(n: int) -> int:
    """How many blocks n examples make; 1 if they are part of one."""
    now = _current.get()
    return 1 if now is None or n % now.size else n // now.size


def units(n: int, groups: int) -> int:
    """How many pieces n examples make of which each is of one block and of one of the groups, BN batches."""
    blocks = count(n)
    return max(blocks, groups) if _nested(blocks, groups) else groups


def tree(parts: PyTree) -> PyTree:
    """Σ over the leading axis of each array, in pairs."""
    length = len(jax.tree.leaves(parts)[0])
    if length == 1:
        return jax.tree.map(lambda x: x[0], parts)
    left = length - length % 2

    def in_pairs(x: jax.Array) -> jax.Array:
        pairs = x[0:left:2] + x[1:left:2]
        return jnp.concatenate([pairs, x[left:]]) if length % 2 else pairs

    return tree(jax.tree.map(in_pairs, parts))


def total(pieces: jax.Array, n: int) -> jax.Array:
    """Σ over the leading axis of an array that has as much for each block of n examples."""
    blocks = count(n)
    if len(pieces) % blocks:
        return pieces.sum(0)
    return tree(tree(rounded(pieces).reshape(blocks, -1, *pieces.shape[1:]).swapaxes(0, 1)))


def shared(parameter: jax.Array, pieces: int, n: int) -> jax.Array:
    """[…] → [pieces, …], a copy for each piece of n examples; its gradient is their `total`."""

    @jax.custom_vjp
    def copies(parameter: jax.Array) -> jax.Array:
        return jnp.broadcast_to(parameter[None], (pieces, *parameter.shape))

    copies.defvjp(lambda parameter: (copies(parameter), None), lambda _, gradients: (total(gradients, n),))
    return copies(parameter)


@jax.custom_vjp
def add_shared(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias, float[n, …, C] and float[C]."""
    return y + bias.reshape(*(1,) * (y.ndim - 1), -1)


def _add_shared_backward(_, dy):
    blocks = count(len(dy))
    return dy, tree(channel_sums(in_runs(dy, blocks), blocks))


add_shared.defvjp(lambda y, bias: (add_shared(y, bias), None), _add_shared_backward)


def in_runs(x: jax.Array, pieces: int) -> jax.Array:
    """float[N, …, C] → [R, n, C]: as many runs of each piece, of at most `MOST_NUMBERS` numbers where sums are by blocks.

    What is to be summed is best worked on in this shape: XLA:CPU makes one loop of the work and its sum then. But not of the
    products of a single run, which it sums 30 times as slowly: a batch that is one run, on any number of devices, is made two.
    """
    now, channels = _current.get(), x.shape[-1]
    pixels = x.size // channels // pieces
    if now is not None:
        largest = max(1, MOST_NUMBERS // channels)
        pixels = max(d for d in range(1, pixels + 1) if pixels % d == 0 and d <= largest)
    alone = pixels * channels == x.size and (now is None or now.together == now.size) and jax.default_backend() == "cpu"
    return x.reshape(-1, pixels // 2 if alone and pixels % 2 == 0 else pixels, channels)


def for_runs(rows: jax.Array, runs: int) -> jax.Array:
    """[G, C], of groups of as many runs each → [R, 1, C], or [1, 1, C] where that is as good."""
    return (rows if len(rows) == 1 else jnp.repeat(rows, runs // len(rows), 0))[:, None]


def channel_sums(runs: jax.Array, pieces: int) -> jax.Array:
    """Σ of each piece, float[R, n, C] → [U, C], the same for each whatever U.

    The sums of its runs are added as a tree; runs of zeros are summed too where there are few numbers in all, or where a share
    is a single run, which by itself XLA:CPU would sum by other code.
    """
    now, count = _current.get(), len(runs)
    if now is not None:
        least = max(-(-ENOUGH_NUMBERS // runs[0].size), 1 if now.together == now.size else 2)
        if count < least:
            runs = jnp.concatenate([runs, jnp.zeros((least - count, *runs.shape[1:]), runs.dtype)])
    return tree(runs.sum(1)[:count].reshape(pieces, -1, runs.shape[-1]).swapaxes(0, 1))


def summed(function: Callable[..., PyTree], at_once: int, *images: PyTree) -> PyTree:
    """Σ of what `function` gives of a few images at a time, in their order in each block, then over the blocks.

    Args:
      function: of a few images, as many of each of `images`; gives arrays that are sums over them.
      at_once: images at a time, a divisor of their number, and of a block or a multiple of it.
      images: arrays [n, …].
    """
    n = len(jax.tree.leaves(images)[0])
    if at_once == n:
        return function(*images)
    pieces = n // at_once
    blocks = min(count(n), pieces)
    few = jax.tree.map(lambda a: a.reshape(pieces, at_once, *a.shape[1:]), images)
    if pieces == blocks:
        return tree(lax.map(lambda images: function(*images), few))
    found = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], few))

    def add(totals: PyTree, piece: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
        block, images = piece
        return jax.tree.map(lambda total, found: total.at[block].add(found), totals, function(*images)), None

    start = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), found)
    return tree(lax.scan(add, start, (jnp.arange(pieces) // (pieces // blocks), few))[0])


def at_once(n: int, most: int) -> int:
    """The largest divisor of a block of n that is not above `most`; the block's size if that is under half of it."""
    size = n // count(n)
    largest = max(d for d in range(1, min(most, size) + 1) if size % d == 0)
    return largest if 2 * largest >= min(most, size) else size


def filled(function: Callable[[jax.Array], jax.Array], rows: int, images: jax.Array) -> jax.Array:
    """`function(images)`, which works on each image by itself and makes matrix products with `rows` rows of each."""
    now, n = _current.get(), len(images)
    enough = 0 if now is None else min(now.together, -(-ENOUGH_ROWS // rows))
    if n >= enough:
        return function(images)
    missing = jnp.zeros((enough - n, *images.shape[1:]), images.dtype)
    return function(jnp.concatenate([images, missing]))[:n]


def over_devices(x: jax.Array, axis_name: str) -> jax.Array:
    """Σ over the devices along a mesh axis, the same on each; where sums are by blocks, as a tree.

    Each device adds a part for all, and they hand out what they found. No `ppermute`, by which they could add in pairs: all
    devices of the mesh take part in one on CPU, and those with other lanes may have no step to take.
    """
    devices = lax.axis_size(axis_name)
    if _current.get() is None or devices & (devices - 1) or devices == 2:  # of two the sum has one order
        return lax.psum(x, axis_name)
    parts = jnp.pad(x.ravel(), (0, -x.size % devices)).reshape(devices, -1)
    mine = tree(lax.all_to_all(parts, axis_name, 0, 0))
    return lax.all_gather(mine, axis_name, tiled=True)[: x.size].reshape(x.shape)
