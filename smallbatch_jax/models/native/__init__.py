"""Convolution in machine code made for the processor at hand, as functions of JAX."""

import jax

from smallbatch_jax.models.native.call import call
from smallbatch_jax.models.native.convolution import Correlation
from smallbatch_jax.models.native.routine import processor

__all__ = ["Correlation", "correlate", "kernel_gradient", "possible"]


def possible(features: int) -> bool:
    """Whether there is machine code for this processor and so many features: they must be whole vectors."""
    here = processor()
    return here is not None and features % here.lanes == 0


def correlate(of: Correlation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """float32[N, H, W, C] and float32[kh, kw, C, O] → float32[N, H', W', O]; see `Correlation`. Each image by itself."""
    return call("correlation", of, (len(x), *of.outputs, of.features), x, kernel)


def kernel_gradient(of: Correlation, blocks: int, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Of a correlation without dilation the sums over each block of images, the same whatever other blocks there are.

    Args:
      of: the correlation.
      blocks: B, how many parts the images are in, consecutive ones in each.
      x: float32[N, H, W, C].
      dy: float32[N, H', W', O].

    Returns:
      float32[B, kh, kw, C, O].
    """
    return call("kernel_gradient", of, (blocks, *of.window, of.channels, of.features), x, dy)
