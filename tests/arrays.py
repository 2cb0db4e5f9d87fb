"""Arrays to test on, and how close results must be; shared by the tests of the models' parts."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(function, *primals):
    """Output, and gradients of a random weighting of it."""

    @jax.jit
    def both(*primals):
        y, pullback = jax.vjp(function, *primals)
        return y, *pullback(normal(*y.shape, seed=9, dtype=y.dtype))

    return both(*primals)


def assert_all_close(ours, theirs, rtol=1e-5, atol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol, atol)
