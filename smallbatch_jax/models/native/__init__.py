"""2-D convolution of float32 images on CPU, in machine code generated for each shape; imports no other package of this project.

It makes small networks train fast. XLA:CPU delegates convolutions to libraries tuned for hundreds of features, and inside a
loop it computes their gradients naively (jax issue 12868); the networks here have 16 to 64 features and train inside loops.

`loops` writes the loops of one shape in the instructions of `routine`, which compiles them with LLVM (llvmlite) in 0.05 to
0.1 s; nothing is padded, copied or transposed. `ffi` makes a routine a JAX operation, which uses one core. `processor` lists
the vector units: AVX-512, AVX2 and NEON.

Against XLA's convolutions in their fastest layout, ResNet-8 with batch norm trained 1.59 × as fast at m = 4, 1.52 × at 32 and
1.29 × at 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-25; docs/speed.md). NEON code is tested but was never timed.
"""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp

from smallbatch_jax.models.native.correlation import Correlation
from smallbatch_jax.models.native.processor import Processor, processor

__all__ = ["Correlation", "correlate", "kernel_gradient", "possible"]


def possible(features: int) -> bool:
    """Returns whether this machine can run such a convolution with `features` outputs, which must fill whole vectors."""
    here = _processor()
    return here is not None and features % here.lanes == 0


@cache
def _processor() -> Processor | None:
    """Returns this machine's vector unit; None, after one warning, if LLVM cannot compile for it or XLA refuses the code."""
    try:
        from smallbatch_jax.models.native.ffi import registered

        here = processor()
        if here:
            registered("correlation", Correlation((1, 1), 1, here.lanes, (1, 1), (1, 1), (0, 0)), here)
        return here
    except Exception as error:  # whatever llvmlite or XLA raises: only speed is lost
        logging.warning("Convolutions run in XLA, which is slower: generated machine code cannot be used (%s).", error)
        return None


def correlate(shape: Correlation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns float32[N, H', W', O], the correlation of x, float32[N, H, W, C], with kernel, float32[kh, kw, C, O]."""
    return _call("correlation", shape, (len(x), *shape.outputs, shape.features), x, kernel)


def kernel_gradient(shape: Correlation, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the gradient of Σ y·dy with respect to the kernel of a correlation without dilation, float32[kh, kw, C, O].

    x, float32[N, H, W, C], are its images and dy, float32[N, H', W', O], the cotangents of its outputs.
    """
    return _call("kernel_gradient", shape, (*shape.window, shape.channels, shape.features), x, dy)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _call(routine: str, shape: Correlation, result: tuple[int, ...], a: jax.Array, b: jax.Array) -> jax.Array:
    """Applies a routine to float32 arrays; `result` is the shape of the float32 array that it returns."""
    from smallbatch_jax.models.native.ffi import registered  # loads LLVM only where it is used

    here = _processor()
    assert here is not None, "possible() must be asked first"
    target = registered(routine, shape, here)
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(result, jnp.float32), vmap_method="sequential")(a, b)


@_call.defjvp
def _(routine, shape, result, primals, tangents):
    """Differentiates a routine, which is linear in each array.

    Forward mode only: `conv` defines the gradient, and a Hessian-vector product is the forward derivative of that gradient.
    """
    (a, b), (da, db) = primals, tangents
    call = partial(_call, routine, shape, result)
    return call(a, b), call(da, b) + call(a, db)
