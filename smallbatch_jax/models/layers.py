"""Layers of the paper's models: linear layers initialised as in §3.1, ReLU, and the fields that all models have."""

import pkgutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.config.catalog import NORMS
from smallbatch_jax.models.conv import Pads, conv
from smallbatch_jax.models.materialise import materialised

# He et al. (2015b), Eq. 10: a Gaussian (not truncated) of variance 2 / fan-in, in all layers including the logits.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """Returns max(x, 0), with gradient 0 at 0; NaN stays NaN."""
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = materialised(jnp.maximum(x, 0))
    return y, y


relu.defvjp(_relu_forward, lambda y, dy: (materialised(jnp.where(y > 0, dy, 0)),))


class Conv(nn.Module):
    """2-D convolution [N, H, W, C] → [N, H', W', features]; float32 parameters, computed in `dtype` (see `models.conv`).

    Gradients and second derivatives are supported; forward mode (`jax.jvp` of the layer itself) is not.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int | Sequence[int] = (1, 1)
    padding: str | int | Pads = "SAME"
    use_bias: bool = True
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, images: int | None = None) -> jax.Array:
        kernel = self.param("kernel", he_normal, (*self.kernel_size, x.shape[-1], self.features), jnp.float32)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding, self.platform, images)
        return _add_bias(self, y) if self.use_bias else y


class Dense(nn.Module):
    """A fully-connected layer [N, D] → [N, features] with He initialisation; float32 parameters, computed in `dtype`."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", he_normal, (x.shape[-1], self.features), jnp.float32).astype(self.dtype)
        few = self.platform == "cpu" and len(x) <= FEW_EXAMPLES
        y = (_product_of_few if few else jnp.matmul)(x.astype(self.dtype), kernel)
        return _add_bias(self, y) if self.use_bias else y


def _add_bias(layer: Any, y: jax.Array) -> jax.Array:
    bias = layer.param("bias", nn.initializers.zeros, (y.shape[-1],), jnp.float32)
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


FEW_EXAMPLES = 32


@jax.custom_vjp
def _product_of_few(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel, [N, D] · [D, F] → [N, F], with the kernel's gradient as a sum of N outer products.

    XLA:CPU has no fast matrix product for so short a sum; it fuses the outer products with the update of the kernel.
    """
    return x @ kernel


def _product_of_few_backward(residuals, dy):
    x, kernel = residuals
    return dy @ kernel.T, sum(x[i][:, None] * dy[i][None, :] for i in range(len(x)))


_product_of_few.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_of_few_backward)


class PaperModel(nn.Module):
    """Base class of the paper's models: the layers, and the fields, which are the arguments of `models.create_model`."""

    num_classes: int
    norm: str = "batch"
    bn_batch_size: int | None = None
    bn_decay: float = 0.99
    axis_name: str | None = None
    dtype: Any = jnp.float32
    platform: str | None = None

    def conv(
        self, x: jax.Array, features: int, size: int, stride: int, train: bool, name: str, norm: str, images: int | None = None
    ) -> jax.Array:
        """Applies a convolution of odd size, padded by half of it on all sides, and its normalisation in place of a bias.

        With `images`, x is float[N·H, W, C], the rows of that many images.
        """
        pads = ((size // 2, size // 2), (size // 2, size // 2))
        layer = Conv(features, (size, size), (stride, stride), pads, norm == "none", self.dtype, self.platform, name=name)
        return self.normalise(layer(x, images), norm, train, f"{name}_norm", images)

    def normalise(self, x: jax.Array, norm: str, train: bool, name: str, images: int | None = None) -> jax.Array:
        """Applies the layer that `config.catalog.NORMS` has for `norm`; returns x for "none"."""
        entry = NORMS[norm]
        if entry.layer is None:
            return x
        layer: Any = partial(pkgutil.resolve_name(entry.layer), dtype=self.dtype, name=name)
        if not entry.batch_statistics:
            return layer()(x, train)
        layer = partial(layer, self.bn_batch_size, self.bn_decay, axis_name=self.axis_name, platform=self.platform)
        return layer()(x, train, images)

    def dense(self, x: jax.Array, features: int, name: str, bias: bool = True) -> jax.Array:
        return Dense(features, bias, self.dtype, self.platform, name=name)(x)

    def logits(self, x: jax.Array) -> jax.Array:
        return self.dense(x, self.num_classes, "logits").astype(jnp.float32)
