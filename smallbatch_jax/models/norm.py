"""Batch normalisation with a batch size of its own (§2.3, §3.6)."""

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
        if not train:
            gain = lax.rsqrt(running_var.value + self.epsilon) * scale
            return (_trailing(gain, x) * (x - _trailing(running_mean.value, x)) + _trailing(bias, x)).astype(dtype)

        groups = _sub_batches(x, self.batch_size)  # [G, b, …, C]
        axes = tuple(range(1, groups.ndim - 1))
        mean = groups.mean(axes, keepdims=True)  # [G, 1, …, C]
        centred = groups - mean
        var = jnp.square(centred).mean(axes, keepdims=True)
        if not self.is_initializing():
            n = groups.size // (groups.shape[0] * features)
            unbiased = var * (n / max(n - 1, 1))
            self._move(running_mean, mean)
            self._move(running_var, unbiased)
        normalised = centred * lax.rsqrt(var + self.epsilon)
        scaled = normalised * _trailing(scale, groups) + _trailing(bias, groups)
        return scaled.reshape(x.shape).astype(dtype)

    def _move(self, running: Any, of_sub_batches: jax.Array) -> None:
        """One step of a running average towards the mean over all sub-batches of the SGD batch."""
        now = of_sub_batches.reshape(-1, of_sub_batches.shape[-1]).mean(0)
        if self.axis_name is not None:
            now = lax.pmean(now, self.axis_name)
        running.value = self.momentum * running.value + (1 - self.momentum) * lax.stop_gradient(now)


def _sub_batches(x: jax.Array, batch_size: int | None) -> jax.Array:
    """float[N, …, C] → float32[N/b, b, …, C]."""
    b = x.shape[0] if batch_size is None else batch_size
    if x.shape[0] % b:
        raise ValueError(f"bn_batch_size: {b} does not divide the batch of {x.shape[0]} examples it is applied to")
    return x.reshape(-1, b, *x.shape[1:]).astype(jnp.float32)


def _trailing(per_channel: jax.Array, like: jax.Array) -> jax.Array:
    """[C] → [1, …, 1, C] of `like`'s rank."""
    return per_channel.reshape((1,) * (like.ndim - 1) + (-1,))
