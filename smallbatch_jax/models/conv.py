"""2-D convolution, by the algorithm that is fastest on the target platform.

A TPU runs `lax.conv_general_dilated`, on rows if the model passes few images as their rows. A GPU runs it for large batches;
for small ones it runs a matrix product of shifted copies of the image (im2col), because cuDNN computes the grouped convolutions
of many lanes one group after the other. On CPU `lax.conv_general_dilated` is slow inside a loop, because XLA:CPU
brings only the convolutions of the entry computation into the layout of its fast path (jax issue 12868), and slow under
`vmap` over kernels. A CPU therefore runs this package's machine code (`models.native`; float32 with whole vectors of
features), else im2col. docs/speed.md has the measurements.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from smallbatch_jax.config.fields import InputError
from smallbatch_jax.models import native
from smallbatch_jax.models.pool import Pads, windows

Strides = tuple[int, int]

# Maximum elements of a batch's shifted copies for im2col on GPU: in full float32, and where tensor cores round to less.
SMALL_COPIES, SMALL_COPIES_ROUNDED = 5_000_000, 600_000
IMAGES_AT_ONCE = 16  # images that im2col copies at a time, k² shifted copies of each


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = (1, 1),
    padding: str | int | Pads = "SAME",
    platform: str | None = None,
    images: int | None = None,
) -> jax.Array:
    """2-D cross-correlation, as `lax.conv_general_dilated` computes it.

    Args:
      x: float[N, H, W, C].
      kernel: float[kh, kw, C, O].
      strides: along H and W, or one for both.
      padding: "SAME", "VALID", or ((top, bottom), (left, right)) in pixels, or one number for all.
      platform: "cpu", "gpu" or "tpu", the target of compilation; None decides at compile time.
      images: N, if x is float[N·H, W, C], the concatenated rows of images, and H' = H / stride. A TPU stores few images in
        tiles that are mostly padding, but their rows in full tiles.

    Returns:
      float[N, H', W', O], or float[N·H', W', O]. On CPU the gradient is written out (`jax.custom_vjp`): reverse mode and second
      derivatives are supported, forward mode (`jax.jvp` of the convolution itself) is not.

    Raises:
      InputError: if x is not images, or the kernel is larger than the padded image.
    """
    if x.ndim != (3 if images else 4):
        raise InputError(f"Conv: got an input of shape {list(x.shape)}, accepts images [N, H, W, C].")
    strides = (strides, strides) if isinstance(strides, int) else (strides[0], strides[1])
    image = (len(x) // images, x.shape[1]) if images else x.shape[1:3]
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    elif isinstance(padding, str):
        rows, columns = lax.padtype_to_pads(image, kernel.shape[:2], strides, padding)
        padding = (rows, columns)
    padded = [size + sum(pads) for size, pads in zip(image, padding, strict=True)]
    if padded[0] < kernel.shape[0] or padded[1] < kernel.shape[1]:
        raise InputError(f"Conv: got a kernel of {list(kernel.shape[:2])} pixels, accepts at most the padded image, {padded}.")
    if images:
        return _conv_of_rows(x, kernel, strides, padding, images)
    on = {name: partial(f, strides=strides, pads=padding) for name, f in _BY_PLATFORM.items()}
    if platform is None:
        return lax.platform_dependent(x, kernel, cpu=on["cpu"], cuda=on["gpu"], default=on["tpu"])
    return on[platform](x, kernel)


def _lax_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_of_rows(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, images: int) -> jax.Array:
    """Stacks each row and its neighbours as channels, then convolves all rows along their columns at once."""
    height = len(x) // images
    row = lax.broadcasted_iota(jnp.int32, (len(x), 1, 1), 0) % height
    neighbours = []
    for offset in range(-pads[0][0], kernel.shape[0] - pads[0][0]):
        moved = lax.pad(x, jnp.zeros((), x.dtype), ((-offset, offset, 0), (0, 0, 0), (0, 0, 0)))
        of_image = (row + offset >= 0) & (row + offset < height)
        neighbours.append(jnp.where(of_image, moved, 0)[:: strides[0]])
    flat = kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1, kernel.shape[3])
    dimensions = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(jnp.concatenate(neighbours, -1), flat, strides[1:], pads[1:], dimension_numbers=dimensions)


def _gpu_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]  # at which JAX traces this
    full = x.dtype == np.float32 and precision in ("highest", "float32")
    copies = len(x) * math.prod(_correlation(x, kernel, strides, pads).outputs) * math.prod(kernel.shape[:3])
    small = copies <= (SMALL_COPIES if full else SMALL_COPIES_ROUNDED)
    return (_im2col_conv if small else _lax_conv)(x, kernel, strides, pads)


def _cpu_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    if kernel.shape[:2] == (1, 1):
        return _im2col_conv(x, kernel, strides, pads)
    if x.dtype == np.float32 and native.possible(kernel.shape[-1]):
        return _native_conv(x, kernel, strides, pads)
    some_images = jax.checkpoint(lambda image: _im2col_conv(image[None], kernel, strides, pads)[0])  # does not keep the copies
    return lax.map(some_images, x, batch_size=IMAGES_AT_ONCE)


def _im2col_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    patches = jnp.concatenate(windows(padded, kernel.shape[:2], strides), axis=-1)  # [N, H', W', kh·kw·C]
    return patches @ kernel.reshape(-1, kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _native_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    return _native_forward(x, kernel, strides, pads)[0]


def _native_forward(x, kernel, strides, pads):
    return native.correlate(_correlation(x, kernel, strides, pads), x, kernel), (x, kernel)


def _native_backward(strides, pads, residuals, dy):
    """Output y reads inputs y·stride - low + i for i < k. So dx is the correlation of dy, dilated by the stride, with the
    kernel flipped and its channels swapped."""
    x, kernel = residuals
    shape = _correlation(x, kernel, strides, pads)
    if native.possible(shape.channels):
        dx = native.correlate(shape.of_image_gradient(), dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    else:  # the first layer's images: their gradient is never used, and XLA drops it
        (dx,) = jax.linear_transpose(lambda x: _lax_conv(x, kernel, strides, pads), x)(dy)
    return dx, native.kernel_gradient(shape, x, dy)


_native_conv.defvjp(_native_forward, _native_backward)

_BY_PLATFORM = {"cpu": _cpu_conv, "gpu": _gpu_conv, "tpu": _lax_conv}


def _correlation(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> native.Correlation:
    (kh, kw, channels, features), (height, width) = kernel.shape, x.shape[1:3]
    rows = (height + sum(pads[0]) - kh) // strides[0] + 1
    columns = (width + sum(pads[1]) - kw) // strides[1] + 1
    return native.Correlation((height, width), channels, features, (kh, kw), (rows, columns), (pads[0][0], pads[1][0]), strides)
