"""Max pooling whose gradient is deterministic and, on CPU, fast."""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.models.materialise import materialised

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
WINDOW, STRIDE = 3, 2  # pixels


def max_pool(x: jax.Array, padding: Pads | None = None) -> jax.Array:
    """Applies max pooling with 3×3 windows and stride 2, [N, H, W, C] → [N, H', W', C].

    Padding is ((top, bottom), (left, right)) in pixels, each at most 2; None for SAME: H' = ⌈H/2⌉, W' = ⌈W/2⌉.

    The gradient goes to the first of equal maxima, row by row. It consists of slices and comparisons, which are deterministic
    (XLA's select-and-scatter need not be) and several times as fast on CPU.
    """
    rows, columns = padding or lax.padtype_to_pads(x.shape[1:3], (WINDOW, WINDOW), (STRIDE, STRIDE), "SAME")
    return _max_pool(x, (rows, columns), x.shape[1:3])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, pads: Pads, sizes: Pair) -> jax.Array:
    return _max_pool_forward(x, pads, sizes)[0]


def _max_pool_forward(x, pads, sizes):
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    pooled, *others = windows(padded, (WINDOW, WINDOW), (STRIDE, STRIDE))
    winner = jnp.zeros(pooled.shape)  # offset of the maximum in its window
    for offset, other in enumerate(others, start=1):
        # A NaN must not lose a comparison, or a diverged run would go unseen.
        stays = (pooled >= other) | jnp.isnan(pooled)
        pooled, winner = jnp.where(stays, pooled, other), jnp.where(stays, winner, float(offset))
    return pooled, materialised(winner)


def _max_pool_backward(pads, sizes, winner, dy):
    """Sums, for each pixel, the dy of the windows whose maximum it is; at most ⌈k/s⌉² windows contain a pixel.

    Write a padded pixel as s·t + r. Window t - d contains it at offset s·d + r, so that all pixels of one remainder r have the
    same offsets; remainders form a separate axis.
    """
    k, s = WINDOW, STRIDE
    tiles = [-(-(size + low) // s) for size, (low, _) in zip(sizes, pads, strict=True)]
    row = lax.broadcasted_iota(jnp.float32, (1, 1, s, 1, 1, 1), 2)
    column = lax.broadcasted_iota(jnp.float32, (1, 1, 1, 1, s, 1), 4)
    dx = jnp.zeros((dy.shape[0], tiles[0], s, tiles[1], s, dy.shape[-1]), dy.dtype)
    for before in itertools.product(range(-(-k // s)), repeat=2):
        axes = zip(before, tiles, dy.shape[1:3], strict=True)
        shift = [(0, 0, 0), *((d, count - windows - d, 0) for d, count, windows in axes), (0, 0, 0)]
        i, j = row + s * before[0], column + s * before[1]
        won = _tiled(winner, shift) == jnp.where((i < k) & (j < k), i * k + j, -1)
        dx = dx + jnp.where(won, _tiled(dy, shift), 0)
    dx = dx.reshape(dy.shape[0], tiles[0] * s, tiles[1] * s, dy.shape[-1])
    (top, _), (left, _) = pads
    return (dx[:, top : top + sizes[0], left : left + sizes[1]],)


def _tiled(windows: jax.Array, shift: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Shifts [N, H', W', C] and reshapes it to [N, T, 1, U, 1, C]."""
    return jnp.expand_dims(lax.pad(windows, jnp.zeros((), windows.dtype), shift), (2, 4))


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def windows(padded: jax.Array, window: Sequence[int], strides: Sequence[int]) -> list[jax.Array]:
    """Returns the pixel at each offset of the window for all output positions: kh·kw arrays [N, H', W', C], row by row."""
    n, height, width, channels = padded.shape
    (kh, kw), (sh, sw) = window, strides
    rows, columns = (height - kh) // sh * sh + 1, (width - kw) // sw * sw + 1
    return [
        lax.slice(padded, (0, i, j, 0), (n, i + rows, j + columns, channels), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]
