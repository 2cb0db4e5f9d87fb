"""What XLA:CPU fuses, and how to keep it from computing again what it could keep, and from rounding as the fusion has it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def computed_once(x: jax.Array) -> jax.Array:
    """x, an array, unchanged, which XLA:CPU is kept from computing again wherever it is used.

    XLA:CPU fuses cheap element-wise work into each of its uses and so repeats it: the comparisons of a max pool 36 times
    over, a concatenation in a loop that is no longer a vector's. It drops an `optimization_barrier` before it fuses, but
    does not fuse through a call; here of a function that is not to be inlined and gives back what it was given, which
    costs nothing.
    """
    if jax.default_backend() != "cpu":
        return x
    with set_xla_metadata(inlineable="false"):
        return _given_back(x)


@jax.jit
def _given_back(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)  # or JAX would leave the call out where it takes the gradient


def rounded(x: jax.Array) -> jax.Array:
    """x, a floating-point array, unchanged, of which the compiler is kept from making something that it would not be by itself.

    Where a product and the sum that it goes into are in one fusion, LLVM makes them one operation that rounds once; and what is
    one fusion here may be two in a program of another shape. It does not look through a choice: here between x and infinity
    where x is infinite.
    """
    if jax.default_backend() != "cpu":
        return x
    return jnp.where(x > jnp.finfo(x.dtype).max, jnp.inf, x)
