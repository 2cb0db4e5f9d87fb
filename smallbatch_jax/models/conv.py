"""Convolution that stays fast inside `scan` and under `vmap`.

`lax.conv` is fast where it stands alone, but inside a loop XLA:CPU runs its backward pass as a naive loop (jax issue 12868:
convolutions are brought into the layout of the fast path in the entry computation only), and under `vmap` over kernels it
becomes a grouped convolution, slow on CPU and GPU alike. Three implementations avoid both:

- `native`: machine code of our own for the CPU at hand, see `models.native`; float32, and features in whole vectors;
- `direct`: convolutions in XLA:CPU's fast layout only, forward and backward, made wide enough and small enough to be fast;
- `patches`: k² shifted copies of the image side by side, then one matrix product (im2col): no convolution is left.

Which one runs depends on the backend, the processor and the layer's shape alone, by `_choose`; never on timing at run time.
`docs/speed.md` has the measurements behind the choice. `plain` is `lax.conv` as it comes, for comparison.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.models import blocks, native
from smallbatch_jax.models.fusion import computed_once
from smallbatch_jax.models.pool import windows
from smallbatch_jax.models.product import product

NHWC = ("NHWC", "HWIO", "NHWC")

# Output pixels per image up to which `patches` runs. Off CPU unmeasured: lanes under `vmap` favour batched matrix products
# over grouped convolutions.
PATCHES_UP_TO_PIXELS = {"cpu": 16}

NARROW, DEEP = 16, 48  # features up to which XLA:CPU has no fast convolution, unless there are so many input channels
IMAGES_AT_ONCE = 4  # of a kernel's gradient, so that its transposed copies stay in the cache

Pads = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int]


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
    chosen = _forced.get() or _choose(x, kernel, strides, padding)
    if chosen == "native" and not natively(x, kernel):
        chosen = "direct"
    return IMPLEMENTATIONS[chosen](x, kernel, strides, padding)


def _choose(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> "Implementation":
    pixels = math.prod(_output_size(*axis) for axis in zip(x.shape[1:3], kernel.shape[:2], strides, pads, strict=True))
    if kernel.shape[:2] == (1, 1) or pixels <= PATCHES_UP_TO_PIXELS.get(jax.default_backend(), 1 << 30):
        return "patches"  # of one pixel they are the image itself: nothing is copied, and the product is 2 to 4 times as fast
    return "native" if natively(x, kernel) else "direct"


def natively(x: Any, kernel: Any) -> bool:
    """Whether there is machine code for a convolution of these, arrays or their shapes and dtypes."""
    return jax.default_backend() == "cpu" and x.dtype == jnp.float32 and native.possible(kernel.shape[-1])


@contextmanager
def forced(implementation: "Implementation") -> Iterator[None]:
    """Within it every `conv` that is traced is by this implementation: for tests and for measuring."""
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def _output_size(size: int, window: int, stride: int, pads: tuple[int, int]) -> int:
    return (size + sum(pads) - window) // stride + 1


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _direct_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    sizes = [_output_size(*axis) for axis in zip(x.shape[1:3], kernel.shape[:2], strides, pads, strict=True)]
    columns = _columns_at_once(kernel.shape[2], kernel.shape[3], sizes[1])
    lows = (pads[0][0], pads[1][0])
    correlate = partial(_correlate, kernel=kernel, lows=lows, sizes=sizes, strides=strides, columns=columns)
    return blocks.filled(correlate, math.prod(sizes) // columns, x)


def _direct_forward(x, kernel, strides, pads):
    return _direct_conv(x, kernel, strides, pads), (x, kernel)


def _direct_backward(strides, pads, residuals, dy):
    """Both gradients as convolutions in the fast layout.

    The forward output at y reads input y·stride - low + i, i < k. So dx is the correlation of dy, dilated by the stride,
    with the kernel flipped and its channels swapped.
    """
    x, kernel = residuals
    dy = computed_once(dy)  # or the work on it that came before is done again, element by element, in the transposed copy
    flipped = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    dx = _image_gradient(x, dy, flipped, strides, pads)
    return dx, _kernel_gradient(x, dy, kernel.shape[:2], strides, (pads[0][0], pads[1][0]))


_direct_conv.defvjp(_direct_forward, _direct_backward)


def _image_gradient(x: jax.Array, dy: jax.Array, flipped: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    lows = [k - 1 - low for k, (low, _) in zip(flipped.shape[:2], pads, strict=True)]
    columns = strides[1] if strides[1] > 1 else _columns_at_once(flipped.shape[2], flipped.shape[3], x.shape[2])
    correlate = partial(_correlate, kernel=flipped, lows=lows, sizes=x.shape[1:3], dilation=strides, columns=columns)
    return blocks.filled(correlate, math.prod(x.shape[1:3]) // (strides[0] * columns), dy)


def _columns_at_once(channels: int, features: int, width: int) -> int:
    """Neighbouring columns whose features one product computes together, so that it is wide enough to be fast."""
    columns = 1 if features > NARROW or channels >= DEEP else 2 if channels >= 8 else 4
    return columns if width % columns == 0 else 1


def _correlate(
    x: jax.Array,
    kernel: jax.Array,
    lows: Sequence[int],
    sizes: Sequence[int],
    strides: Strides = (1, 1),
    dilation: Strides = (1, 1),
    columns: int = 1,
) -> jax.Array:
    """Σ_i x[(a·stride + i - low)/dilation] kernel[i] for output pixels a, over the taps i that meet a pixel of x.

    Output rows and columns of the same remainder meet the same taps. Rows are computed one remainder (modulo the
    dilation) at a time, so that no product with the zeros of a dilated x is taken; `columns` neighbouring columns, a
    multiple of the dilation, as so many times the features, by a kernel that holds a shifted copy for each. What such a
    kernel wastes on zeros it more than wins by its width.
    """
    n, features = x.shape[0], kernel.shape[-1]
    wide, first_column = _shifted_copies(kernel, 1, lows[1], strides[1], dilation[1], range(columns))
    out_rows, out_columns = -(-sizes[0] // dilation[0]), -(-sizes[1] // columns)
    steps = strides[0], columns * strides[1] // dilation[1]
    column_pads = _pads(x.shape[2], wide.shape[1], first_column, steps[1], out_columns)
    rows = []
    for row in range(dilation[0]):
        part, first_row = _shifted_copies(wide, 0, lows[0], strides[0], dilation[0], range(row, row + 1))
        row_pads = _pads(x.shape[1], part.shape[0], first_row, steps[0], out_rows)
        rows.append(_convolve(x, part, steps, (row_pads, column_pads)))
    y = rows[0] if len(rows) == 1 else computed_once(jnp.stack(rows, 2))
    y = y.reshape(n, out_rows * dilation[0], out_columns * columns, features)
    return y[:, : sizes[0], : sizes[1]]


def _shifted_copies(
    kernel: jax.Array, axis: int, low: int, stride: int, dilation: int, outputs: range
) -> tuple[jax.Array, int]:
    """The taps that each of some neighbouring outputs takes from the input pixels that any of them reads.

    Returns:
      The kernel along `axis` over those input pixels, its features once for each output; and the first of those pixels,
      counted from the one that output 0 would read at tap `low`.
    """
    taps = kernel.shape[axis]
    starts = [(low - a * stride) % dilation for a in outputs]
    firsts = [(a * stride + start - low) // dilation for a, start in zip(outputs, starts, strict=True)]
    counts = [len(range(start, taps, dilation)) for start in starts]
    first = min(firsts)
    window = max(1, max(at + count for at, count in zip(firsts, counts, strict=True)) - first)
    copies = []
    for start, at, count in zip(starts, firsts, counts, strict=True):
        widths = [(0, 0)] * kernel.ndim
        widths[axis] = (at - first, window - count - (at - first))
        cut = lax.slice_in_dim(kernel, min(start, taps), taps, dilation, axis)
        copies.append(jnp.pad(cut, widths))
    return (copies[0] if len(copies) == 1 else jnp.concatenate(copies, -1)), first


def _pads(size: int, window: int, first: int, stride: int, outputs: int) -> tuple[int, int]:
    """Pads of an axis so that output 0 reads from pixel `first` on, and there are `outputs` of them."""
    return -first, (outputs - 1) * stride + window + first - size


def _kernel_gradient(x: jax.Array, dy: jax.Array, window: Sequence[int], strides: Strides, lows: Sequence[int]) -> jax.Array:
    """dw[i, c, o] = Σ_n,y x[n, y·stride + i - low, c] dy[n, y, o], a few images at a time so that they stay in the cache."""
    gradient = partial(_kernel_gradient_of_few, window=window, strides=strides, lows=lows)
    return blocks.summed(gradient, blocks.at_once(len(x), IMAGES_AT_ONCE), x, dy)


def _kernel_gradient_of_few(
    x: jax.Array, dy: jax.Array, window: Sequence[int], strides: Strides, lows: Sequence[int]
) -> jax.Array:
    """The correlation of x, channels for batch, with dy, dilated by the stride, as the kernel.

    Where features are few, two columns of dy are taken as twice the features: each finds its own gradient in a window
    that holds both.
    """
    n, rows, width, features = dy.shape
    (kh, kw), channels = window, x.shape[-1]
    columns = 2 if features <= NARROW and width % 2 == 0 else 1
    wide = kw + (columns - 1) * strides[1]
    pairs = dy.reshape(n, rows, width // columns, columns * features)
    dilation = (strides[0], columns * strides[1])
    pads = [
        (low, out + (count - 1) * step - low - size)
        for low, out, count, step, size in zip(lows, (kh, wide), pairs.shape[1:3], dilation, x.shape[1:3], strict=True)
    ]
    both = _convolve(x.transpose(3, 1, 2, 0), pairs.transpose(1, 2, 0, 3), (1, 1), pads, dilation).reshape(
        channels, kh, wide, columns, features
    )
    own = [both[:, :, s * strides[1] : s * strides[1] + kw, s] for s in range(columns)]
    return sum(own[1:], own[0]).transpose(1, 2, 0, 3)


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Strides, pads: Sequence[tuple[int, int]], kernel_dilation: Strides = (1, 1)
) -> jax.Array:
    """`lax.conv_general_dilated`, cropping where a pad is negative.

    XLA:CPU (jax 0.10.2) reads beyond the array where one pad of an axis is negative and the other positive.
    """
    crops = [(0, 0, 0), *((min(low, 0), min(high, 0), 0) for low, high in pads), (0, 0, 0)]
    if any(low < 0 or high < 0 for low, high, _ in crops):
        x = lax.pad(x, jnp.zeros((), x.dtype), crops)
    pads = [(max(low, 0), max(high, 0)) for low, high in pads]
    return lax.conv_general_dilated(x, kernel, strides, pads, rhs_dilation=kernel_dilation, dimension_numbers=NHWC)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _native_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    return native.correlate(_correlation(x, kernel, strides, pads), x, kernel)


def _correlation(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> native.Correlation:
    (kh, kw, channels, features), (height, width) = kernel.shape, x.shape[1:3]
    rows, columns = (_output_size(*axis) for axis in zip((height, width), (kh, kw), strides, pads, strict=True))
    return native.Correlation((height, width), channels, features, (kh, kw), (rows, columns), (pads[0][0], pads[1][0]), strides)


def _native_forward(x, kernel, strides, pads):
    return _native_conv(x, kernel, strides, pads), (x, kernel)


def _native_backward(strides, pads, residuals, dy):
    """As `_direct_backward`. The few channels of a first layer's image are no vector; of its gradient no use is made."""
    x, kernel = residuals
    of = _correlation(x, kernel, strides, pads)
    flipped = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    if native.possible(of.channels):
        dx = native.correlate(of.of_image_gradient(), dy, flipped)
    else:
        dx = _image_gradient(x, dy, flipped, strides, pads)
    return dx, native.kernel_gradient(of, x, dy)


_native_conv.defvjp(_native_forward, _native_backward)


def _patches_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    kh, kw, _, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    patches = jnp.concatenate(windows(padded, (kh, kw), strides), axis=-1)  # [N, H', W', kh·kw·C]
    flat = product(patches.reshape(len(x), -1, patches.shape[-1]), kernel.reshape(-1, features))
    return flat.reshape(*patches.shape[:-1], features)


def _plain_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)


Implementation = Literal["native", "direct", "patches", "plain"]
IMPLEMENTATIONS: dict[str, Any] = {
    "native": _native_conv,
    "direct": _direct_conv,
    "patches": _patches_conv,
    "plain": _plain_conv,
}
_forced: ContextVar[Implementation | None] = ContextVar("forced", default=None)
