"""Micro-batch sizes, and the gradients of dense layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallbatch_jax.models import micro_batch_size
from smallbatch_jax.models.layers import Dense


@pytest.mark.parametrize("examples", [1, 2, 3, 40])
def test_dense_gradients_of_few_examples_are_those_of_a_product(examples):
    """Up to 32 examples the kernel's gradient is a sum of outer products."""
    module = Dense(3, platform="cpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(examples, 4)), jnp.float32)
    params: Any = jax.tree.map(jnp.asarray, module.init(jax.random.key(0), x))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(examples, 3)), jnp.float32)
    y, pullback = jax.vjp(lambda p, x: module.apply(p, x), params, x)
    dparams, dx = pullback(dy)
    kernel = params["params"]["kernel"]
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dparams["params"]["kernel"], np.asarray(x).T @ np.asarray(dy), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dparams["params"]["bias"], dy.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "m", "b", "parts"),
    [
        ("none", 128, 128, 32), ("none", 32, 32, None), ("none", 31, 31, None), ("none", 48, 48, 24),
        ("none", 62, 62, 31), ("none", 127, 127, None), ("group", 64, 64, 32),
        ("batch", 128, 128, None), ("batch", 128, 8, 32), ("batch", 128, 64, 64), ("batch", 96, 12, 24),
        ("batch_renorm", 64, 2, 32), ("batch_conv_only", 64, 16, 32), ("batch", 256, 4, 32),
    ],
)  # fmt: skip
def test_parts_hold_whole_bn_batches_and_divide_the_batch(norm, m, b, parts):
    """A micro-batch has about 32 examples; there is none if a BN group is the whole batch or no size fits."""
    assert micro_batch_size(norm, m, b) == parts


def test_off_cpu_the_batch_is_whole():
    assert micro_batch_size("none", 128, 128, platform="gpu") is None
    assert micro_batch_size("none", 128, 128, 16, platform="gpu") == 16
