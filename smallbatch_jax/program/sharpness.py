"""The sharpness of a run: the largest eigenvalue of the Hessian of its training loss."""

from typing import Any

import jax
import jax.numpy as jnp

from smallbatch_jax.program.diagnostics import Sample

ITERATIONS = 8  # agrees with 50 to 1e-5 on ResNet-8 with batch norm, trained on digits for 8 epochs (2026-11-26); 6 to 1e-3


def sharpness(sample: Sample) -> tuple[jax.Array]:
    """Returns the largest algebraic eigenvalue of the Hessian of the mean loss, by ITERATIONS steps of Lanczos's method.

    A step is one Hessian-vector product over the sample, the derivative of its gradient along a vector. The vectors are
    neither kept nor reorthogonalised: their rounding errors only duplicate eigenvalues that are already found. The estimate
    approaches the eigenvalue from below.

    Returns:
      The eigenvalue, float[], as the only value; NaN without a sub-batch.
    """
    if not sample.count:
        return (jnp.float32(jnp.nan),)
    params = sample.params

    def step(carry: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        before, vector, beta = carry
        image = sample.mean(lambda one: sample.product(vector, one))
        alpha = (image * vector).sum()
        rest = image - alpha * vector - beta * before
        length = jnp.linalg.norm(rest)
        return (vector, rest / jnp.where(length > 0, length, 1), length), (alpha, length)

    first = jax.random.normal(jax.random.key(0), params.shape, params.dtype)
    start = jnp.zeros_like(params), first / jnp.linalg.norm(first), jnp.zeros((), params.dtype)
    _, (alphas, betas) = jax.lax.scan(step, start, None, ITERATIONS)
    ended = jnp.cumsum(betas == 0) - (betas == 0) > 0  # steps after the last vector, which would add eigenvalues of 0
    alphas = jnp.where(ended, alphas[0], alphas)
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    return (jnp.linalg.eigvalsh(tridiagonal)[-1],)
