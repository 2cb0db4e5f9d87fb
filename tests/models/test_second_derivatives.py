"""Hessian-vector products through layers with custom gradients equal those of plain formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jax import lax

from smallbatch_jax.models.conv import conv
from smallbatch_jax.models.layers import _product_of_few, relu
from smallbatch_jax.models.norm import BatchNorm
from smallbatch_jax.models.pool import max_pool, windows

SAME = ((1, 1), (1, 1))


def hessian_vector_product(function, *primals):
    """Returns the product for a loss whose own curvature is not constant, along random vectors."""

    def gradient(*primals):
        return jax.grad(lambda *primals: jnp.sin(function(*primals)).sum(), tuple(range(len(primals))))(*primals)

    vectors = tuple(normal(*x.shape, seed=7 + i) for i, x in enumerate(primals))
    return jax.jit(lambda *primals: jax.jvp(gradient, primals, vectors)[1])(*primals)


def plain_conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (2, 2), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def plain_batch_norm(x, scale, bias):
    groups = x.reshape(2, 4, *x.shape[1:])
    mean, var = (f(groups, axis=(1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    y = (groups - mean) / jnp.sqrt(var + 1e-5) * scale.reshape(1, 1, 1, 1, -1) + bias.reshape(1, 1, 1, 1, -1)
    return y.reshape(x.shape)


def batch_norm(platform, x, scale, bias):
    zeros = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": zeros}
    return BatchNorm(4, platform=platform).apply(variables, x, True, mutable=["batch_stats"])[0]


def plain_max_pool(x):
    return jnp.stack(windows(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-jnp.inf), (3, 3), (2, 2))).max(0)


CASES = {
    "relu": (relu, jax.nn.relu, [(6, 5)]),
    "dense": (_product_of_few, jnp.matmul, [(6, 5), (5, 3)]),
    "pool": (max_pool, plain_max_pool, [(2, 6, 6, 3)]),
    "native convolution": (
        functools.partial(conv, strides=(2, 2), padding=SAME, platform="cpu"),
        plain_conv,
        [(3, 12, 12, 16), (3, 3, 16, 16)],
    ),
    "batch norm": (functools.partial(batch_norm, "cpu"), plain_batch_norm, [(8, 3, 3, 2), (2,), (2,)]),
    "batch norm in one pass": (functools.partial(batch_norm, "gpu"), plain_batch_norm, [(8, 3, 3, 2), (2,), (2,)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hessian_vector_product_is_that_of_the_plain_formula(case):
    function, plain, shapes = CASES[case]
    primals = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours, theirs = hessian_vector_product(function, *primals), hessian_vector_product(plain, *primals)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
