"""Convolution and max pooling that stay fast inside `scan` and under `vmap`.

`lax.conv` is fast where it stands alone, but inside a loop XLA:CPU runs its backward pass as a naive loop (jax issue 12868:
convolutions are brought into the layout of the fast path in the entry computation only), and under `vmap` over kernels it
becomes a grouped convolution, slow on CPU and GPU alike. Two implementations avoid both:

- `canonical`: `lax.conv` with a backward pass whose two convolutions are written in the fast layout, bit for bit the same;
- `patches`: k² shifted copies of the image side by side, then one matrix product (im2col): no convolution is left.

Which one runs depends on the backend and the layer's shape alone, by `PATCHES_UP_TO_PIXELS`; never on timing at run time.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")

# Output pixels per image up to which `patches` runs. CPU: measured 2026-11-22 on 2 cores (AMD EPYC, AVX-512) with the
# reduced AlexNet: at 8×8 `patches` trains 3 times as fast as `canonical`; at 32×32 it is level at m = 2 and 10-25 % slower
# from m = 32 on. Elsewhere unmeasured: lanes under `vmap` favour batched matrix products over grouped convolutions.
PATCHES_UP_TO_PIXELS = {"cpu": 16}

Pads = tuple[tuple[int, int], tuple[int, int]]


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int] = (1, 1), padding: str | Pads = "SAME") -> jax.Array:
    """2-D cross-correlation, as `lax.conv_general_dilated` computes it.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, C, O].
      strides: along H and W.
      padding: "SAME", "VALID", or ((top, bottom), (left, right)) in pixels.

    Returns:
      [N, H', W', O].
    """
    spatial, window = x.shape[1:3], kernel.shape[:2]
    strides = (strides[0], strides[1])
    if isinstance(padding, str):
        (top, bottom), (left, right) = lax.padtype_to_pads(spatial, window, strides, padding)
        padding = ((top, bottom), (left, right))
    pixels = 1
    for size, k, stride, (low, high) in zip(spatial, window, strides, padding, strict=True):
        pixels *= (size + low + high - k) // stride + 1
    implementation = _patches_conv if pixels <= PATCHES_UP_TO_PIXELS.get(jax.default_backend(), 1 << 30) else _canonical_conv
    return implementation(x, kernel, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)


def _canonical_forward(x, kernel, strides, pads):
    return _canonical_conv(x, kernel, strides, pads), (x, kernel)


def _canonical_backward(strides, pads, residuals, dy):
    """Both gradients as NHWC/HWIO/NHWC convolutions of explicitly transposed arrays.

    The forward output at y reads input y·stride - low + i, i < k. So dx is the convolution of dy, dilated by the stride,
    with the kernel flipped and its channels swapped; dw is that of x, channels for batch, with dy dilated as the kernel.
    What the strides leave unread at the end of x is made up by the high pads.
    """
    x, kernel = residuals
    dx_pads, dw_pads = [], []
    for axis, (stride, (low, high)) in enumerate(zip(strides, pads, strict=True)):
        size, k, out = x.shape[1 + axis], kernel.shape[axis], dy.shape[1 + axis]
        unread = size + low + high - k - (out - 1) * stride
        dx_pads.append((k - 1 - low, k - 1 - high + unread))
        dw_pads.append((low, high - unread))
    dx = lax.conv_general_dilated(
        dy,
        jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2),
        (1, 1),
        dx_pads,
        lhs_dilation=strides,
        dimension_numbers=NHWC,
    )
    dw = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        dw_pads,
        rhs_dilation=strides,
        dimension_numbers=NHWC,
    )
    return dx, dw.transpose(1, 2, 0, 3)


_canonical_conv.defvjp(_canonical_forward, _canonical_backward)


def _patches_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    kh, kw, _, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    patches = jnp.concatenate(_windows(padded, (kh, kw), strides), axis=-1)  # [N, H', W', kh·kw·C]
    flat = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, features)
    return flat.reshape(*patches.shape[:-1], features)


def max_pool(x: jax.Array, window: Sequence[int] = (3, 3), strides: Sequence[int] = (2, 2)) -> jax.Array:
    """Max pooling with SAME padding, [N, H, W, C] → [N, ⌈H/s⌉, ⌈W/s⌉, C].

    The maximum of shifted slices: its gradient is deterministic (XLA's select-and-scatter need not be), and goes to the
    first of equal maxima.
    """
    pads = lax.padtype_to_pads(x.shape[1:3], tuple(window), tuple(strides), "SAME")
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    pooled, *others = _windows(padded, window, strides)
    for other in others:
        # A NaN must not lose a comparison, or a diverged run would go unseen.
        pooled = jnp.where((pooled >= other) | jnp.isnan(pooled), pooled, other)
    return pooled


def _windows(padded: jax.Array, window: Sequence[int], strides: Sequence[int]) -> list[jax.Array]:
    """The pixel at each offset of the window, for all output positions: kh·kw arrays [N, H', W', C], row by row."""
    n, height, width, channels = padded.shape
    (kh, kw), (sh, sw) = window, strides
    rows, columns = (height - kh) // sh * sh + 1, (width - kw) // sw * sw + 1
    return [
        lax.slice(padded, (0, i, j, 0), (n, i + rows, j + columns, channels), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]
