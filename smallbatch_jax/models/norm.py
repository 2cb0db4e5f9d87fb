"""Batch normalisation with a batch size of its own (§2.3, §3.6), and the alternatives for tiny batches that the paper names."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


class BatchNorm(nn.Module):
    """Batch norm (Eq. 10-11) over consecutive sub-batches of b examples of the SGD batch, vectorised.

    The statistics of a sub-batch are the mean and the *two-pass* variance E[(x-μ)²] over its examples and pixels, in
    float32: the one-pass E[x²]-μ² loses too many digits at b = 2. The running averages move once per SGD step, towards
    the mean over the sub-batches of their means and of their unbiased variances (divisor max(n-1, 1), n = b·pixels).

    Attributes:
      batch_size: b; None takes the whole batch, the ordinary batch norm.
      momentum: weight of the old running average at each step.
      epsilon: ε of Eq. 10.
      axis_name: mesh axis over which the SGD batch is spread; every device then holds whole sub-batches.
      dtype: of the output; None keeps the input's.
    """

    batch_size: int | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float[N, …, C], over all axes but the last; by running averages unless `train`.

        Raises:
          ValueError: if `train` and b does not divide N.
        """
        features = x.shape[-1]
        dtype = self.dtype or x.dtype
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        self._declare()
        if not train:
            gain = lax.rsqrt(running_var.value + self.epsilon) * scale
            return (_trailing(gain, x) * (x - _trailing(running_mean.value, x)) + _trailing(bias, x)).astype(dtype)

        groups = _sub_batches(x, self.batch_size)  # [G, b, …, C]
        mean, var = _statistics(lax.stop_gradient(groups))  # [G, 1, …, C]
        factor, shift = self._correction(mean, var, running_mean.value, running_var.value)
        per_channel, offset = _trailing(scale, groups), _trailing(bias, groups)
        normalised: Any = _normalise(groups, mean, var, factor * per_channel, shift * per_channel + offset, self.epsilon)
        if not self.is_initializing():
            n = groups.size // (groups.shape[0] * features)
            unbiased = var * (n / max(n - 1, 1))
            self._move(running_mean, mean)
            self._move(running_var, unbiased)
        return normalised.reshape(x.shape).astype(dtype)

    def _declare(self) -> None:
        """Makes the variables of a subclass, which must be the same in training and evaluation."""

    def _correction(
        self, mean: jax.Array, var: jax.Array, running_mean: jax.Array, running_var: jax.Array
    ) -> tuple[jax.Array | float, jax.Array | float]:
        """What Eq. 10 is multiplied by and moved by, from the statistics [G, 1, …, C] and the running ones before the step."""
        del mean, var, running_mean, running_var
        return 1.0, 0.0

    def _move(self, running: Any, of_sub_batches: jax.Array) -> None:
        """One step of a running average towards the mean over all sub-batches of the SGD batch."""
        now = of_sub_batches.reshape(-1, of_sub_batches.shape[-1]).mean(0)
        if self.axis_name is not None:
            now = lax.pmean(now, self.axis_name)
        running.value = self.momentum * running.value + (1 - self.momentum) * lax.stop_gradient(now)


class BatchRenorm(BatchNorm):
    """Batch renormalisation (Ioffe 2017): training sees what the running averages would give, to within bounds.

    x̂ = (x - μ_B)/σ_B · r + d, with r = σ_B/σ kept within [1/r_max, r_max] and d = (μ_B - μ)/σ within ±d_max; no gradient
    flows through r and d. As in the original r_max rises from 1 to 3 and d_max from 0 to 5, once the running averages mean
    something; the steps at which they do are chosen here for a momentum of 0.99: from `first` to `last` updates.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    first: int = 500
    last: int = 2500

    def _declare(self) -> None:
        self.variable("batch_stats", "updates", jnp.zeros, (), jnp.float32)

    def _correction(
        self, mean: jax.Array, var: jax.Array, running_mean: jax.Array, running_var: jax.Array
    ) -> tuple[jax.Array | float, jax.Array | float]:
        updates: Any = self.get_variable("batch_stats", "updates")
        freedom = jnp.clip((updates - self.first) / (self.last - self.first), 0.0, 1.0)
        r_max, d_max = 1 + (self.r_max - 1) * freedom, self.d_max * freedom
        if not self.is_initializing():
            self.put_variable("batch_stats", "updates", updates + 1)
        running_deviation = _trailing(jnp.sqrt(running_var + self.epsilon), mean)
        r = jnp.clip(jnp.sqrt(var + self.epsilon) / running_deviation, 1 / r_max, r_max)
        d = jnp.clip((mean - _trailing(running_mean, mean)) / running_deviation, -d_max, d_max)
        return r, d


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018), by groups of 16 channels of one example, so that no batch is too small.

    They find 16 channels a group nearly as good as 32 groups a layer, which the narrow layers here could not have.
    """

    channels_per_group: int = 16
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float[N, …, C], the same way whether or not it is training."""
        del train
        norm = nn.GroupNorm(
            None, self.channels_per_group, epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name="norm"
        )
        return norm(x)


def make_norm(
    kind: str, bn_batch_size: int | None, bn_decay: float, axis_name: str | None, dtype: Any, name: str
) -> nn.Module | None:
    """The layer of a `model.norm`: "batch", "batch_renorm" or "group"; None for "none"."""
    if kind == "none":
        return None
    if kind == "group":
        return GroupNorm(dtype=dtype, name=name)
    batch_norm = {"batch": BatchNorm, "batch_renorm": BatchRenorm}[kind]
    return batch_norm(bn_batch_size, bn_decay, axis_name=axis_name, dtype=dtype, name=name)


def _sub_batches(x: jax.Array, batch_size: int | None) -> jax.Array:
    """float[N, …, C] → float32[N/b, b, …, C]."""
    b = x.shape[0] if batch_size is None else batch_size
    if x.shape[0] % b:
        raise ValueError(f"bn_batch_size: {b} does not divide the batch of {x.shape[0]} examples it is applied to")
    return x.reshape(-1, b, *x.shape[1:]).astype(jnp.float32)


def _statistics(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and two-pass variance of each group, [G, 1, …, C]."""
    axes = tuple(range(1, groups.ndim - 1))
    mean = groups.mean(axes, keepdims=True)
    return mean, jnp.square(groups - mean).mean(axes, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalise(x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Eq. 10-11 of x, float32[G, b, …, C], whose groups have this mean and variance, [G, 1, …, C].

    The gradient with respect to x takes mean and variance as the functions of x that they are; none is given for them. By
    hand (Ioffe & Szegedy 2015, §3) it reads x twice and keeps nothing else: half the memory traffic of the automatic one.
    """
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias


def _normalise_forward(x, mean, var, scale, bias, epsilon):
    return _normalise(x, mean, var, scale, bias, epsilon), (x, mean, var, scale, bias)


def _normalise_backward(epsilon, residuals, dy):
    x, mean, var, scale, bias = residuals
    axes = tuple(range(1, x.ndim - 1))
    inverse = lax.rsqrt(var + epsilon)
    standard = (x - mean) * inverse
    mean_dy = dy.mean(axes, keepdims=True)
    mean_product = (dy * standard).mean(axes, keepdims=True)
    dx = inverse * scale * (dy - mean_dy - standard * mean_product)
    n = x.size // mean.size

    def like(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        return gradient if parameter.shape[0] == gradient.shape[0] else gradient.sum(0, keepdims=True)

    return dx, None, None, like(n * mean_product, scale), like(n * mean_dy, bias)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _trailing(per_channel: jax.Array, like: jax.Array) -> jax.Array:
    """[C] → [1, …, 1, C] of `like`'s rank."""
    return per_channel.reshape((1,) * (like.ndim - 1) + (-1,))
