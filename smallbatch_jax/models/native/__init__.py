"""Convolution in machine code made for the processor at hand, as functions of JAX.

XLA:CPU takes convolutions from libraries that do well with many features and none too well with the 16 to 64 of small networks.
The code here is written by this program for each shape (`loops`), compiled by LLVM (`routine`, by llvmlite) in a tenth of a
second, and called by XLA through its foreign function interface (`call`). It runs on one core: a device's.
"""

import logging
from functools import cache
from typing import Any

import jax

from smallbatch_jax.models.native.correlation import Correlation
from smallbatch_jax.models.native.processor import Processor, processor

__all__ = ["Correlation", "correlate", "kernel_gradient", "possible"]


def possible(features: int) -> bool:
    """Whether there is machine code for this processor and so many features: they must be whole vectors."""
    here = processor()
    return here is not None and features % here.lanes == 0 and _works(here)


@cache
def _works(here: Processor) -> bool:
    """Whether LLVM makes code here that XLA takes; where not it is said once."""
    from smallbatch_jax.models.native.call import registered

    try:
        registered("correlation", Correlation((1, 1), 1, here.lanes, (1, 1), (1, 1), (0, 0)), here)
    except Exception as error:  # whatever LLVM or XLA raises: nothing is lost but speed
        logging.warning("Convolutions are XLA's, which are slower: it takes no machine code of ours (%s).", error)
        return False
    return True


def correlate(of: Correlation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """float32[N, H, W, C] and float32[kh, kw, C, O] → float32[N, H', W', O], as `Correlation` says; each image by itself."""
    return _call("correlation", of, (len(x), *of.outputs, of.features), x, kernel)


def kernel_gradient(of: Correlation, blocks: int, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Of a correlation without dilation the sums over each block of images, the same whatever other blocks there are.

    Args:
      of: the correlation.
      blocks: B, how many parts the images are in, as many consecutive ones in each.
      x: float32[N, H, W, C].
      dy: float32[N, H', W', O].

    Returns:
      float32[B, kh, kw, C, O].
    """
    return _call("kernel_gradient", of, (blocks, *of.window, of.channels, of.features), x, dy)


def _call(routine: str, of: Correlation, *rest: Any) -> jax.Array:
    from smallbatch_jax.models.native.call import call  # LLVM is loaded where it is needed

    here = processor()
    assert here is not None, "to be asked before: possible()"
    return call(routine, of, here, *rest)
