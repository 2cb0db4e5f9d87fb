"""Random arrays, gradients and tolerances shared by the tests of the models' layers."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(function, *primals):
    """Returns the output, and the gradients of a randomly weighted sum of it with respect to each primal."""

    @jax.jit
    def both(*primals):
        y, pullback = jax.vjp(function, *primals)
        return y, *pullback(normal(*y.shape, seed=9, dtype=y.dtype))

    return both(*primals)


def assert_all_close(ours, theirs, rtol=1e-5, atol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol, atol)
