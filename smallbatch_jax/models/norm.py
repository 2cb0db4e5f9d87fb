"""Batch normalisation with a batch size of its own (§2.3, §3.6), and the alternatives for tiny batches that the paper names."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from smallbatch_jax.config.fields import InputError


class BatchNorm(nn.Module):
    """Batch norm (Eq. 10-11) over BN groups of b consecutive examples of the SGD batch, vectorised.

    The statistics of a group are its mean and its variance about that mean, over examples and pixels, in float32: E[x²]-μ²
    would lose too many digits at b = 2. (On GPU and TPU one pass computes E[(x-s)²] - (μ-s)², s the running mean; see
    `_statistics`.) Each call updates the running averages once, towards the mean over groups of the
    groups' means and unbiased variances (divisor n-1, n = b·pixels).

    A group may be smaller than a device's shard, or span several devices, which then exchange their statistics (§5). Running
    averages are updated from the groups of this device alone: average ``batch_stats`` over the devices after the step, as
    `program.train` does.

    Attributes:
      batch_size: b; None takes the whole batch, ordinary batch norm.
      momentum: weight of the old running average at each step.
      epsilon: ε of Eq. 10.
      axis_name: mesh axis over which the SGD batch is sharded evenly, consecutive examples on each device; b then divides a
        shard, or is a multiple of it that divides the batch.
      dtype: output dtype; None keeps the input's.
      platform: "gpu" and "tpu" compute both statistics in one pass over the input; any other value is valid everywhere.
    """

    batch_size: int | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, examples: int | None = None) -> jax.Array:
        """Normalises x, float[N, …, C], over all axes but the last; by running averages unless `train`.

        With `examples`, x is float[N·rows, …, C], the concatenated rows of that many examples.

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

        groups, span = self._groups(examples or len(x))
        grouped = x.astype(jnp.float32)
        if groups > 1:
            grouped = grouped.reshape(groups, -1, *x.shape[1:])
        over = Over(tuple(range(grouped.ndim - x.ndim, grouped.ndim - 1)), self.axis_name, span, self.platform)
        mean, var = _statistics(lax.stop_gradient(grouped), running_mean.value, over)  # [G, 1, …, 1, C], without G if it is 1
        scale, bias = (jnp.broadcast_to(v.reshape((1,) * (mean.ndim - 1) + (-1,)), mean.shape) for v in (scale, bias))
        scale, bias = self._corrected(scale, bias, mean, var)
        if not self.is_initializing():
            n = x.size // features // groups * span
            self._require_spread(n, x.shape)
            for running, statistic in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
                average = statistic.reshape(groups, features).mean(0)
                running.value = self.momentum * running.value + (1 - self.momentum) * average
        y: Any = _normalise(grouped, mean, lax.rsqrt(var + self.epsilon), scale, bias, over)
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

    def _corrected(self, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scale and bias, [G, 1, …, 1, C], unchanged; `BatchRenorm` corrects them."""
        return scale, bias


class BatchRenorm(BatchNorm):
    """Batch renormalisation (Ioffe 2017): training normalises as the running averages would, within bounds.

    x̂ = (x - μ_B)/σ_B · r + d, with r = σ_B/σ kept within [1/r_max, r_max] and d = (μ_B - μ)/σ within ±d_max; no gradient
    flows through r and d. As in the original, r_max rises from 1 to 3 and d_max from 0 to 5 while the running averages
    settle, from update `first` to update `last`, which are chosen here for a momentum of 0.99.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    first: int = 500
    last: int = 2500

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, examples: int | None = None) -> jax.Array:
        updates: Any = self.variable("batch_stats", "updates", jnp.zeros, (), jnp.float32)
        y = super().__call__(x, train, examples)
        if train and not self.is_initializing():
            updates.value += 1
        return y

    def _corrected(self, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
        updates: Any = self.get_variable("batch_stats", "updates")
        freedom = jnp.clip((updates - self.first) / (self.last - self.first), 0.0, 1.0)
        r_max, d_max = 1 + (self.r_max - 1) * freedom, self.d_max * freedom
        running: Any = (self.get_variable("batch_stats", name) for name in ("mean", "var"))
        running_mean, running_var = (v.reshape((1,) * (mean.ndim - 1) + (-1,)) for v in running)
        running_deviation = jnp.sqrt(running_var + self.epsilon)
        r = jnp.clip(jnp.sqrt(var + self.epsilon) / running_deviation, 1 / r_max, r_max)
        d = jnp.clip((mean - running_mean) / running_deviation, -d_max, d_max)
        return r * scale, d * scale + bias


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over groups of 16 channels of one example, so that no batch is too small.

    Wu & He find 16 channels per group nearly as good as 32 groups per layer, for which the layers here are too narrow.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float[N, …, C], the same way whether or not it is training."""
        normalise = nn.GroupNorm(None, 16, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name="norm")
        return normalise(x).astype(self.dtype or x.dtype)


class Over(NamedTuple):
    """The axes and devices over which a BN group's statistics are computed."""

    axes: tuple[int, ...]  # examples and pixels
    axis_name: str | None
    span: int  # consecutive devices along axis_name that share a group
    platform: str | None


def _statistics(x: jax.Array, near: Any, over: Over) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of each BN group of x, float32[G, n, …, C] → [G, 1, …, 1, C] each; without G if it is 1.

    Two passes: the mean, then the mean of (x - μ)². On GPU and TPU one pass: the mean of (x - s)², with s = `near`, the running
    mean, less (μ - s)². It loses digits only where a batch's mean is many deviations away from the running mean.
    """
    if over.platform in ("gpu", "tpu"):
        near = near.reshape((1,) * (x.ndim - 1) + (-1,))
        means, squares = (total / _size(x, over) for total in _two_sums(x, jnp.square(x - near), over))
        variances = jnp.maximum(squares - jnp.square(means - near), 0.0)
    else:
        means = x.mean(over.axes, keepdims=True)
        variances = jnp.square(x - means).mean(over.axes, keepdims=True)
    if over.span == 1:
        return means, variances
    means, variances = _of_group(over, means, variances)
    mean = means.mean(0)
    return mean, (variances + jnp.square(means - mean[None])).mean(0)


def _two_sums(a: jax.Array, b: jax.Array, over: Over) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of two arrays over the axes, kept with size 1; on GPU in one reduction, hence one kernel."""
    if over.platform != "gpu":  # a TPU sums both within the convolution that makes the arrays; a CPU has no vector code for it
        return a.sum(over.axes, keepdims=True), b.sum(over.axes, keepdims=True)
    zero = jnp.zeros((), a.dtype)
    sums = lax.reduce((a, b), (zero, zero), lambda total, x: (total[0] + x[0], total[1] + x[1]), over.axes)
    return jnp.expand_dims(sums[0], over.axes), jnp.expand_dims(sums[1], over.axes)


def _size(x: jax.Array, over: Over) -> int:
    """Returns the number of values per channel of a BN group on this device."""
    return math.prod(x.shape[axis] for axis in over.axes)


def _of_group(over: Over, *values: jax.Array) -> list[jax.Array]:
    """Gathers each array from all devices that share this device's BN group, [span, …], in one exchange."""
    of_devices = lax.all_gather(jnp.stack(values), over.axis_name)
    of_groups = of_devices.reshape(-1, over.span, *of_devices.shape[1:])
    return list(jnp.unstack(of_groups[lax.axis_index(over.axis_name) // over.span], axis=1))


def _means_of_group(over: Over, *values: jax.Array) -> list[jax.Array]:
    """Returns the mean of each array over the devices that share this one's BN group."""
    return list(values) if over.span == 1 else [v.mean(0) for v in _of_group(over, *values)]


# Number of values per group above which summing dy·x̂ gives fewer kernels than summing dy·(x - μ), because XLA:GPU then sums in
# two kernels. A step of 13 lanes of ResNet-20 has 252 kernels instead of 271 at m = 128; at m = 4 dy·(x - μ) gives 223 instead
# of 228 (compiled for an H100 by jax 0.10.2, 2026-11-26).
ONE_STAGE = 4096


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalise(x: jax.Array, mean: jax.Array, rstd: jax.Array, scale: jax.Array, bias: jax.Array, over: Over) -> jax.Array:
    """Returns (x - μ)/√(σ² + ε) · scale + bias for x [G, n, …, C] and its own statistics; rstd is 1/√(σ² + ε).

    The gradient is written out (Ioffe & Szegedy 2015, §3): it needs two sums over the batch, automatic differentiation five.
    """
    return (x - mean) * (rstd * scale) + bias


def _normalise_forward(x, mean, rstd, scale, bias, over):
    mean, rstd = _statistics_of(over, x, mean, rstd)
    return (x - mean) * (rstd * scale) + bias, (x, mean, rstd, scale)


def _normalise_backward(over, residuals, dy):
    x, mean, rstd, scale = residuals
    inner, outer = (rstd, 1.0) if over.platform == "gpu" and _size(x, over) > ONE_STAGE else (1.0, rstd)
    centred = (x - mean) * inner
    dbias, product = _two_sums(dy, dy * centred, over)
    of_group = _means_of_group(over, dbias, product)
    dx = rstd * scale * (dy - (of_group[0] + centred * (outer * outer * of_group[1])) / _size(x, over))
    return dx, jnp.zeros_like(mean), jnp.zeros_like(rstd), outer * product, dbias


_normalise.defvjp(_normalise_forward, _normalise_backward)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics_of(over: Over, x: jax.Array, mean: jax.Array, rstd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and rstd unchanged, with the derivatives by x that a Hessian-vector product needs."""
    return mean, rstd


@_statistics_of.defjvp
def _(over, primals, tangents):
    (x, mean, rstd), dx = primals, tangents[0]
    dmean, product = (total / _size(x, over) for total in _means_of_group(over, *_two_sums(dx, dx * (x - mean), over)))
    return (mean, rstd), (dmean, -(rstd**3) * product)
