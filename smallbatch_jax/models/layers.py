"""Linear layers, initialised as the paper says (§3.1)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.models import blocks
from smallbatch_jax.models.conv import Pads, conv
from smallbatch_jax.models.fusion import computed_once
from smallbatch_jax.models.product import product

# He et al. (2015b), Eq. 10: a Gaussian (not a truncated one) of variance 2 / fan-in; all layers, the logits' too.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0); NaN stays NaN."""
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = computed_once(relu(x))
    return y, y


def _relu_backward(y, dy):
    return (computed_once(jnp.where(y > 0, dy, 0)),)


relu.defvjp(_relu_forward, _relu_backward)


class Conv(nn.Module):
    """2-D convolution [N, H, W, C] → [N, H', W', features] by `models.conv`; float32 parameters, computed in `dtype`."""

    features: int
    kernel_size: tuple[int, int]
    strides: Sequence[int] = (1, 1)
    padding: str | Pads = "SAME"
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", he_normal, (*self.kernel_size, x.shape[-1], self.features), jnp.float32)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return blocks.add_shared(y, bias.astype(self.dtype))


class Dense(nn.Module):
    """A fully-connected layer [N, D] → [N, features] with He initialisation; float32 parameters, computed in `dtype`."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", he_normal, (x.shape[-1], self.features), jnp.float32)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return blocks.add_shared(y, bias.astype(self.dtype))
