"""Counts the floating-point operations of a model, and measures how many a device does per second."""

import math
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.program.train import Model, init_state


def flops_per_image(model: Model, image_shape: Sequence[int]) -> float:
    """Returns the floating-point operations per image of a training step's convolutions and dense layers.

    A multiply-add is two operations, and padding is included. Each layer has a forward pass and gradients of its kernel and of
    its input; the first layer needs no gradient of its input.
    """
    multiply_adds: list[int] = []

    def count(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = method(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            kernel = context.module.get_variable("params", "kernel")
            multiply_adds.append(math.prod(kernel.shape[:-1]) * y.size)
        return y

    with nn.intercept_methods(count):
        jax.eval_shape(lambda: init_state(model, jnp.zeros((1, *image_shape)), jnp.int32(0)))
    return 2.0 * (3 * sum(multiply_adds) - sum(multiply_adds[:1]))


def matrix_rate(size: int = 1024, products: int = 16) -> float:
    """Returns one device's floating-point operations per second in products of square float32 matrices, the best of five."""

    def loop(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: (x @ a) * (1 / size), a)

    a = jnp.ones((size, size))
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(loop).lower(a).compile()
    compiled(a).block_until_ready()
    seconds = timeit.repeat(lambda: compiled(a).block_until_ready(), number=1, repeat=5)
    return 2 * size**3 * products / min(seconds)
