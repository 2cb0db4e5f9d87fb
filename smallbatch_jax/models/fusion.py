"""What XLA:CPU fuses, and how to keep it from computing again what it could keep, and from rounding as the fusion has it."""

import jax
import jax.numpy as jnp


def computed_once(x: jax.Array) -> jax.Array:
    """x, a floating-point array, unchanged, which XLA:CPU is kept from computing again wherever it is used.

    XLA:CPU fuses cheap element-wise work into each of its uses and so repeats it: the comparisons of a max pool 36 times
    over, a concatenation in a loop that is no longer a vector's. It drops an `optimization_barrier` before it fuses, but
    does not repeat a division; here by ones that it cannot know to be ones.
    """
    if jax.default_backend() != "cpu":
        return x
    return x / jnp.where(x > jnp.inf, 2, 1).astype(x.dtype)


def rounded(x: jax.Array) -> jax.Array:
    """x, a floating-point array, unchanged, of which the compiler is kept from making something that it would not be by itself.

    Where a product and the sum that it goes into are in one fusion, LLVM makes them one operation that rounds once; and what is
    one fusion here may be two in a program of another shape. It does not look through a choice: here between x and infinity
    where x is infinite.
    """
    if jax.default_backend() != "cpu":
        return x
    return jnp.where(x > jnp.finfo(x.dtype).max, jnp.inf, x)
