"""Linear layers, initialised as the paper says (§3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from smallbatch_jax.models.chunks import with_statistics
from smallbatch_jax.models.conv import Pads, conv
from smallbatch_jax.models.fusion import computed_once
from smallbatch_jax.models.norm import BatchNorm, Deferred, normalised

MANY_IMAGES = 64  # from which a batch is taken a few images at a time
FEW_EXAMPLES = 2  # up to which a dense kernel's gradient is a sum of outer products
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
    return y + parameters["bias"].astype(dtype).reshape(1, 1, 1, -1) if "bias" in parameters else y


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
    at_once = _images_at_once(n)
    if batch_norm and train and at_once < n and norm.sub_batches(n) == 1:
        images = tuple(x.x if isinstance(x, Deferred) else x for x in pending.inputs)
        shared: Any = tuple(x[1:] if isinstance(x, Deferred) else None for x in pending.inputs)

        def of_few(shared: Any, images: Any) -> tuple[jax.Array, Any]:
            parameters, moments = shared
            few = [x if rest is None else Deferred(x, *rest) for x, rest in zip(images, moments, strict=True)]
            made = pending.prepare(*few)
            return convolve(made, parameters), made if keep else None

        outputs: Any = with_statistics(of_few, at_once, (parameters, shared), images)
        (y, made), statistics = outputs
        return made, norm.deferred(y, train, statistics)
    made = pending.made()
    y = convolve(made, parameters)
    if batch_norm:
        y = norm.deferred(y, train)
    elif norm is not None:
        y = norm(y, train)
    return made if keep else None, y


def _images_at_once(n: int) -> int:
    """The largest divisor of a large n that is not above `IMAGES_AT_ONCE`; n if that is too small, and off CPU."""
    if n < MANY_IMAGES or jax.default_backend() != "cpu":
        return n
    largest = max(d for d in range(1, IMAGES_AT_ONCE + 1) if n % d == 0)
    return largest if 2 * largest >= IMAGES_AT_ONCE else n


def Dense(features: int, use_bias: bool = True, dtype: Any = jnp.float32, name: str | None = None) -> nn.Dense:
    """A fully-connected layer [N, D] → [N, features] with He initialisation."""
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=he_normal, dot_general=_dot_general, name=name)


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **_: Any) -> jax.Array:
    """What `nn.Dense` computes of a matrix x, as `_product`; of other shapes as it comes."""
    if x.ndim == 2 and precision is None and dimension_numbers == (((1,), (0,)), ((), ())):
        return _product(x, kernel)
    return lax.dot_general(x, kernel, dimension_numbers, precision)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, D] · [D, features]; the kernel's gradient for few examples as a sum of outer products.

    XLA:CPU has no fast product for so short a sum, and it can fuse this one with the update of the kernel.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _product_backward(residuals, dy):
    x, kernel = residuals
    if len(x) <= FEW_EXAMPLES and jax.default_backend() == "cpu":
        outer = [x[n][:, None] * dy[n][None, :] for n in range(len(x))]
        return dy @ kernel.T, sum(outer[1:], outer[0])
    return dy @ kernel.T, x.T @ dy


_product.defvjp(_product_forward, _product_backward)
