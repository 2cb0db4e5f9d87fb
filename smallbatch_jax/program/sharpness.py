"""The sharpness of a run: the largest eigenvalue of the Hessian of its training loss."""

from typing import Any

import jax
import jax.numpy as jnp

from smallbatch_jax.program.diagnostics import Gradient, mean_over

ITERATIONS = 10


def sharpness(
    gradient: Gradient, params: jax.Array, sub_batches: Any, size: int, axis_name: str | None = None
) -> tuple[jax.Array]:
    """Returns the largest algebraic eigenvalue of the Hessian of the mean loss, by ITERATIONS steps of Lanczos's method.

    A step is one Hessian-vector product over the sample, the derivative of its gradient along a vector. The vectors are not
    kept, and not made orthogonal again: what rounding does to them duplicates eigenvalues that are found already. The estimate
    approaches the eigenvalue from below.

    Args:
      gradient: (params, sub-batch) → mean gradient, float[P]; differentiable, forward, by params.
      params: float[P].
      sub_batches: stacked along a leading axis; those of this device.
      size: examples in each.
      axis_name: mesh axis whose devices hold equally many sub-batches each.

    Returns:
      The eigenvalue, float[], as the only value; NaN without a sub-batch.
    """
    del size
    if not len(jax.tree.leaves(sub_batches)[0]):
        return (jnp.float32(jnp.nan),)

    def product(vector: jax.Array) -> jax.Array:
        def of_one(one: Any) -> jax.Array:
            return jax.jvp(lambda params: gradient(params, one), (params,), (vector,))[1]

        return mean_over(of_one, params, sub_batches, axis_name)

    def step(carry: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        before, vector, beta = carry
        image = product(vector)
        alpha = (image * vector).sum()
        rest = image - alpha * vector - beta * before
        length = jnp.linalg.norm(rest)
        return (vector, rest / jnp.where(length > 0, length, 1), length), (alpha, length)

    first = jax.random.normal(jax.random.key(0), params.shape, params.dtype)
    start = jnp.zeros_like(params), first / jnp.linalg.norm(first), jnp.zeros((), params.dtype)
    _, (alphas, betas) = jax.lax.scan(step, start, None, ITERATIONS)
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    return (jnp.linalg.eigvalsh(tridiagonal)[-1],)
