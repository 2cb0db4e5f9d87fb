"""What is kept from being fused is computed once, on CPU, and is what it was."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallbatch_jax.models.fusion import computed_once, rounded

X = np.array([[-1.5, 0.0, 2.0], [np.inf, -np.inf, np.nan]], np.float32)


def uses(keep, x):
    """Two uses, of which one is a sum: XLA:CPU would take the maximum for each."""
    y = keep(jnp.maximum(x * 2, 0))
    return y * 3, (y * y).sum(0)


def maxima(function):
    return jax.jit(function).lower(np.ones((64, 64), np.float32)).compile().as_text().count(" maximum(")


def test_what_has_several_uses_is_computed_once():
    assert maxima(lambda x: uses(lambda y: y, x)) == 2  # or this test could not fail
    assert maxima(lambda x: uses(computed_once, x)) == 1
    in_a_loop = jax.vmap(lambda x: jax.lax.scan(lambda c, _: (c, uses(computed_once, x)), 0, None, 3)[1])
    assert maxima(lambda x: in_a_loop(x[None])) == 1


def test_its_gradient_is_computed_once_too_and_the_value_still_is():
    """JAX leaves out a call that gives back what it was given, where it takes the gradient."""

    def value(x):
        outputs: Any = uses(computed_once, x)
        return outputs[0].sum() + outputs[1].sum()

    text = jax.jit(jax.value_and_grad(value)).lower(np.ones((64, 64), np.float32)).compile().as_text()
    assert text.count(" call(") == 2


@pytest.mark.parametrize("function", [computed_once, rounded])
def test_values_and_gradients_are_what_they_were(function):
    np.testing.assert_array_equal(jax.jit(function)(X), X)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: (function(x) * x).sum()))(X[0]), 2 * X[0])
    assert function(jnp.bfloat16(1.5)).dtype == jnp.bfloat16
