"""Batch normalisation with a batch size of its own (§2.3, §3.6), and the alternatives for tiny batches that the paper names."""

import pkgutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from smallbatch_jax.config.catalog import NORMS
from smallbatch_jax.config.fields import InputError


class BatchNorm(nn.Module):
    """Batch norm (Eq. 10-11) over BN groups of b consecutive examples of the SGD batch, vectorised.

    The statistics of a group are its mean and *two-pass* variance E[(x-μ)²] over examples and pixels, in float32: the
    one-pass E[x²]-μ² loses too many digits at b = 2. The running averages take one update per call, towards the mean over
    the groups of their means and of their unbiased variances (divisor n-1, n = b·pixels).

    A group may be smaller than a device's shard, or span several devices, which then exchange their statistics (§5). Running
    averages are updated from the groups of this device alone: average ``batch_stats`` over the devices after the step, as
    `program.train` does.

    Attributes:
      batch_size: b; None takes the whole batch, ordinary batch norm.
      momentum: weight of the old running average at each step.
      epsilon: ε of Eq. 10.
      axis_name: mesh axis over which the SGD batch is sharded evenly, consecutive examples on each device; b then divides a
        shard, or is a multiple of it that divides the batch.
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
          ValueError: if `train` and the batch is not a whole number of BN groups.
          InputError: if `train` and a BN group has a single value per channel (n = 1), whose output would be constant.
        """
        features, dtype = x.shape[-1], self.dtype or x.dtype
        running_mean: Any = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var: Any = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        if not train:
            gain = lax.rsqrt(running_var.value + self.epsilon) * scale
            mean, gain, bias = (v.reshape((1,) * (x.ndim - 1) + (-1,)) for v in (running_mean.value, gain, bias))
            return ((x - mean) * gain + bias).astype(dtype)

        groups, span = self._groups(len(x))
        grouped = x.astype(jnp.float32).reshape(groups, -1, *x.shape[1:])
        mean, var = _statistics(lax.stop_gradient(grouped), self.axis_name, span)  # [G, 1, …, 1, C]
        r, d = self._correction(mean, var, running_mean.value, running_var.value)
        if not self.is_initializing():
            n = grouped[0].size // features * span
            self._require_spread(n, x.shape)
            for running, statistic in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
                average = statistic.reshape(groups, features).mean(0)
                running.value = self.momentum * running.value + (1 - self.momentum) * average
        scale, bias = (jnp.broadcast_to(v.reshape((1,) * x.ndim + (-1,)), mean.shape) for v in (scale, bias))
        y: Any = _normalise(grouped, mean, var + self.epsilon, r * scale, d * scale + bias, self.axis_name, span)
        return y.reshape(x.shape).astype(dtype)

    def _groups(self, examples: int) -> tuple[int, int]:
        """Returns the number of BN groups on this device, and the number of devices that each group spans."""
        devices = 1 if self.axis_name is None or self.is_initializing() else lax.axis_size(self.axis_name)
        b = examples * devices if self.batch_size is None else self.batch_size
        if examples % b == 0:
            return examples // b, 1
        if b % examples == 0 and examples * devices % b == 0:
            return 1, b // examples
        shard = f", on each of {devices} devices" if devices > 1 else ""
        raise ValueError(f"bn_batch_size: {b} does not divide the batch of {examples} examples it is applied to{shard}")

    def _require_spread(self, n: int, shape: tuple[int, ...]) -> None:
        if n == 1:
            pixels = "×".join(map(str, shape[1:-1])) or "no"
            raise InputError(
                f"bn_batch_size: the batch norm {'/'.join(self.path)} would take mean and variance over 1 value per channel "
                f"(BN groups of 1 example, {pixels} pixels) and give a constant. Use BN groups of 2 or more, or no batch "
                "norm there (alexnet: norm batch_conv_only)."
            )

    def _correction(self, mean: jax.Array, var: jax.Array, running_mean: Any, running_var: Any) -> tuple[Any, Any]:
        """Returns the renorm correction (r, d), [G, 1, …, 1, C]; (1, 0) for plain batch norm."""
        del mean, var, running_mean, running_var
        return 1.0, 0.0


class BatchRenorm(BatchNorm):
    """Batch renormalisation (Ioffe 2017): training sees what the running averages would give, within bounds.

    x̂ = (x - μ_B)/σ_B · r + d, with r = σ_B/σ kept within [1/r_max, r_max] and d = (μ_B - μ)/σ within ±d_max; no gradient
    flows through r and d. As in the original, r_max rises from 1 to 3 and d_max from 0 to 5 while the running averages
    settle, from update `first` to update `last`, which are chosen here for a momentum of 0.99.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    first: int = 500
    last: int = 2500

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        updates: Any = self.variable("batch_stats", "updates", jnp.zeros, (), jnp.float32)
        y = super().__call__(x, train)
        if train and not self.is_initializing():
            updates.value += 1
        return y

    def _correction(self, mean: jax.Array, var: jax.Array, running_mean: Any, running_var: Any) -> tuple[Any, Any]:
        updates: Any = self.get_variable("batch_stats", "updates")
        freedom = jnp.clip((updates - self.first) / (self.last - self.first), 0.0, 1.0)
        r_max, d_max = 1 + (self.r_max - 1) * freedom, self.d_max * freedom
        running_mean, running_var = (v.reshape((1,) * (mean.ndim - 1) + (-1,)) for v in (running_mean, running_var))
        running_deviation = jnp.sqrt(running_var + self.epsilon)
        r = jnp.clip(jnp.sqrt(var + self.epsilon) / running_deviation, 1 / r_max, r_max)
        return r, jnp.clip((mean - running_mean) / running_deviation, -d_max, d_max)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over groups of 16 channels of one example, so that no batch is too small.

    Wu & He find 16 channels per group nearly as good as 32 groups per layer, for which the layers here are too narrow.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float[N, …, C], the same way whether or not it is training."""
        del train
        normalise = nn.GroupNorm(None, 16, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name="norm")
        return normalise(x).astype(self.dtype or x.dtype)


def make_norm(
    norm: str, bn_batch_size: int | None, bn_decay: float, axis_name: str | None, dtype: Any, name: str
) -> nn.Module | None:
    """Returns the layer that `config.catalog.NORMS` names; None for "none"."""
    entry = NORMS[norm]
    if entry.layer is None:
        return None
    layer = pkgutil.resolve_name(entry.layer)
    if entry.batch_statistics:
        return layer(bn_batch_size, bn_decay, axis_name=axis_name, dtype=dtype, name=name)
    return layer(dtype=dtype, name=name)


def _statistics(x: jax.Array, axis_name: str | None, span: int) -> tuple[jax.Array, jax.Array]:
    """Mean and two-pass variance of each BN group of x, float32[G, n, …, C] → [G, 1, …, 1, C] each."""
    axes = tuple(range(1, x.ndim - 1))
    mean = _group_mean(x.mean(axes, keepdims=True), axis_name, span)
    return mean, _group_mean(jnp.square(x - mean).mean(axes, keepdims=True), axis_name, span)


def _group_mean(values: jax.Array, axis_name: str | None, span: int) -> jax.Array:
    """Mean over the `span` consecutive devices that share a BN group."""
    if axis_name is None or span == 1:
        return values
    of_devices = lax.all_gather(values, axis_name)
    return of_devices.reshape(-1, span, *values.shape).mean(1)[lax.axis_index(axis_name) // span]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalise(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, axis_name: str | None, span: int
) -> jax.Array:
    """(x - μ)/√var · scale + bias for x [G, n, …, C] and its own statistics; var includes ε.

    The gradient is written out (Ioffe & Szegedy 2015, §3): it needs two sums over the batch, automatic differentiation five.
    """
    return (x - mean) * (lax.rsqrt(var) * scale) + bias


def _normalise_forward(x, mean, var, scale, bias, axis_name, span):
    return _normalise(x, mean, var, scale, bias, axis_name, span), (x, mean, var, scale)


def _normalise_backward(axis_name, span, residuals, dy):
    x, mean, var, scale = residuals
    axes, n, rstd = tuple(range(1, x.ndim - 1)), x[0].size // x.shape[-1], lax.rsqrt(var)
    dbias, dscale = dy.sum(axes, keepdims=True), rstd * (dy * (x - mean)).sum(axes, keepdims=True)
    mean_dy, mean_dy_xhat = (_group_mean(total / n, axis_name, span) for total in (dbias, dscale))
    dx = rstd * scale * (dy - mean_dy - (x - mean) * (rstd * mean_dy_xhat))
    return dx, jnp.zeros_like(mean), jnp.zeros_like(var), dscale, dbias


_normalise.defvjp(_normalise_forward, _normalise_backward)
