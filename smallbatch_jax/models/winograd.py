"""3×3 convolution of stride 1 by Winograd's minimal filtering F(2×2, 3×3) (Lavin & Gray 2016, arXiv:1509.09308, §4.1).

A 2×2 tile of outputs takes 16 products a channel and feature in place of 36: with a tile X of 4×4 inputs and a kernel K,
Y = Aᵀ[(G K Gᵀ) ⊙ (Bᵀ X B)]A. Over many tiles the 16 element-wise products are 16 matrix products of [tiles, channels] with
[channels, features]; the transforms are sums of shifted copies. In float32 the error is that of the direct sum to within a
factor of two or three (tested). Each of the three products of a convolution is one: the gradient of the image is a
convolution itself, and that of the kernel is K' = Gᵀ[Σ (Bᵀ X B)ᵀ(A Y' Aᵀ)]G.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from smallbatch_jax.models.fusion import computed_once

WINDOW = (3, 3)
FROM_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])  # Bᵀ
FROM_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # G
TO_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])  # Aᵀ

Tiles = dict[tuple[int, int], jax.Array]  # by row and column within the tile: [..., C] of all tiles


def tiles(sizes: Sequence[int]) -> int:
    """Of an image of so many rows and columns of output pixels."""
    return -(-sizes[0] // 2) * -(-sizes[1] // 2)


def correlate(x: jax.Array, kernel: jax.Array, lows: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """y[a] = Σ_i x[a + i - low] kernel[i] for output pixels a < size; x is zero outside.

    Args:
      x: [N, H, W, C].
      kernel: [3, 3, C, O].
      lows: zeros before the first row and column; sizes: H', W'.

    Returns:
      [N, H', W', O].
    """
    transformed = _kernel_transform(kernel.dtype) @ kernel.reshape(9, -1)
    kernels = transformed.reshape(4, 4, *kernel.shape[2:])
    products = {at: tiles @ kernels[at] for at, tiles in _input_tiles(x, lows, sizes).items()}
    corners = {at: computed_once(corner) for at, corner in _transform(TO_OUTPUT, products).items()}
    rows = [computed_once(jnp.concatenate([corners[r, 0], corners[r, 1]], -1)) for r in range(2)]
    n, down, along, _ = rows[0].shape
    return jnp.stack(rows, 2).reshape(n, 2 * down, 2 * along, -1)[:, : sizes[0], : sizes[1]]


def kernel_gradient(x: jax.Array, dy: jax.Array, lows: Sequence[int]) -> jax.Array:
    """dw[i, c, o] = Σ_n,a x[n, a + i - low, c] dy[n, a, o], [3, 3, C, O]."""
    height, width, features = dy.shape[1:]
    even = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)))
    corners = {(r, s): lax.slice(even, (0, r, s, 0), even.shape, (1, 2, 2, 1)) for r, s in np.ndindex(2, 2)}
    output_tiles = _transform(TO_OUTPUT.T, corners)
    input_tiles = _input_tiles(x, lows, (height, width))
    products = [tiles.reshape(-1, x.shape[-1]).T @ output_tiles[at].reshape(-1, features) for at, tiles in input_tiles.items()]
    gradient = _kernel_transform(dy.dtype).T @ jnp.stack(products).reshape(16, -1)
    return jnp.reshape(gradient, (*WINDOW, x.shape[-1], features))


def _kernel_transform(dtype: Any) -> np.ndarray:
    """[16, 9], K → G K Gᵀ with both flattened: as a matrix product, for a kernel is small and its sums are long."""
    return np.kron(FROM_KERNEL, FROM_KERNEL).astype(dtype)


def _input_tiles(x: jax.Array, lows: Sequence[int], sizes: Sequence[int]) -> Tiles:
    """Bᵀ X B of the tiles that the outputs take, 16 arrays [N, ⌈H'/2⌉, ⌈W'/2⌉, C]."""
    n, height, width, channels = x.shape
    down, along = -(-sizes[0] // 2), -(-sizes[1] // 2)
    pads = [(low, 2 * count + 2 - low - size, 0) for low, count, size in zip(lows, (down, along), (height, width), strict=True)]
    padded = computed_once(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *pads, (0, 0, 0))))
    pixels = {
        (i, j): lax.slice(padded, (0, i, j, 0), (n, i + 2 * down - 1, j + 2 * along - 1, channels), (1, 2, 2, 1))
        for i, j in np.ndindex(4, 4)
    }
    return _transform(FROM_INPUT, pixels)


def _transform(matrix: np.ndarray, tile: Mapping[tuple[int, int], jax.Array]) -> Tiles:
    """M X Mᵀ of a tile X, as sums of the few entries of X that count: a matrix product with so small an M is slow."""
    to, count = matrix.shape

    def entry(a: int, b: int) -> jax.Array:
        factors = ((matrix[a, i] * matrix[b, j], (i, j)) for i, j in itertools.product(range(count), repeat=2))
        terms = [tile[at] if factor == 1 else float(factor) * tile[at] for factor, at in factors if factor]
        return sum(terms[1:], terms[0])

    return {(a, b): entry(a, b) for a, b in itertools.product(range(to), repeat=2)}
