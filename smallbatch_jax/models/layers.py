"""Linear layers, initialised as the paper says (§3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.models import blocks
from smallbatch_jax.models.chunks import with_statistics
from smallbatch_jax.models.conv import Pads, conv
from smallbatch_jax.models.fusion import computed_once
from smallbatch_jax.models.norm import BatchNorm, Deferred, normalised
from smallbatch_jax.models.product import product

MANY_IMAGES = 64  # from which a batch is taken a few images at a time
IMAGES_AT_ONCE = 8  # from one convolution's output to the next one's, so that what lies between stays in the cache

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

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function()(x, self.parameters(x.shape[-1]))

    @nn.compact
    def parameters(self, channels: int) -> dict[str, jax.Array]:
        """The kernel [*kernel_size, C, features], and the bias [features] if there is one."""
        kernel = self.param("kernel", he_normal, (*self.kernel_size, channels, self.features), jnp.float32)
        if not self.use_bias:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)}

    def function(self) -> Callable[[jax.Array, dict[str, jax.Array]], jax.Array]:
        """What it computes of x and its parameters."""
        return partial(_convolved, strides=tuple(self.strides), padding=self.padding, dtype=self.dtype)


def _convolved(
    x: jax.Array, parameters: dict[str, jax.Array], strides: Sequence[int], padding: str | Pads, dtype: Any
) -> jax.Array:
    y = conv(x.astype(dtype), parameters["kernel"].astype(dtype), strides, padding)
    return blocks.add_shared(y, parameters["bias"].astype(dtype)) if "bias" in parameters else y


@dataclass(frozen=True)
class Pending:
    """A layer's input that is not made yet: `prepare(*inputs)`, which works on every image by itself.

    What prepares it is done where it is used, so that a few images at a time can go from one convolution's output to the
    next one's. Inputs are arrays [N, …] or `norm.Deferred`.
    """

    prepare: Callable[..., jax.Array]
    inputs: tuple[Any, ...]

    def made(self) -> jax.Array:
        return self.prepare(*self.inputs)


def as_it_is(x: jax.Array) -> jax.Array:
    return x


def activated(y: Any) -> jax.Array:
    """ReLU of what `conv_norm` gave."""
    return relu(normalised(y))


def conv_norm(pending: Pending, layer: Conv, norm: Any, train: bool, channels: int, keep: bool = True) -> tuple[Any, Any]:
    """A convolution of an input yet to be made, and batch norm up to the work on each image.

    Args:
      pending: makes float[N, H, W, C].
      layer, norm: the convolution, and the layer from `norm.make_norm` that follows it, None for none.
      train: see `BatchNorm`.
      channels: C.
      keep: whether the input as it was made is wanted.

    Returns:
      The input, or None, and the convolution's output: `norm.Deferred` if it is batch norm that follows, else the array.
    """
    parameters, convolve = layer.parameters(channels), layer.function()
    batch_norm = isinstance(norm, BatchNorm)
    n = len(jax.tree.leaves(pending.inputs)[0])
    if batch_norm and train and norm.is_ordinary(n) and (at_once := _images_at_once(n)):
        images = tuple(x.x if isinstance(x, Deferred) else x for x in pending.inputs)
        moments: Any = tuple(x[1:-1] if isinstance(x, Deferred) else None for x in pending.inputs)

        def of_few(parameters: Any, moments: Any, images: Any) -> tuple[jax.Array, Any]:
            few = [x if rest is None else Deferred(x, *rest) for x, rest in zip(images, moments, strict=True)]
            made = pending.prepare(*few)
            return convolve(made, parameters), made if keep else None

        outputs: Any = with_statistics(of_few, at_once, parameters, moments, images)
        (y, made), statistics = outputs
        return made, norm.deferred(y, train, statistics)
    made = pending.made()
    y = convolve(made, parameters)
    if batch_norm:
        y = norm.deferred(y, train)
    elif norm is not None:
        y = norm(y, train)
    return made if keep else None, y


def _images_at_once(n: int) -> int | None:
    """How many images of a large batch are taken from one convolution's output to the next one's, on CPU; else None."""
    if blocks.together(n) < MANY_IMAGES or jax.default_backend() != "cpu":
        return None
    size = blocks.at_once(n, IMAGES_AT_ONCE)
    return size if size <= IMAGES_AT_ONCE else None


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
