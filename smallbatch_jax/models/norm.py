"""Batch normalisation with a batch size of its own (§2.3, §3.6), and the alternatives for tiny batches that the paper names."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from smallbatch_jax.config.fields import InputError
from smallbatch_jax.models.norm_kernels import Over, normalise, statistics


class BatchNorm(nn.Module):
    """Batch norm (Eq. 10-11) over BN groups of b consecutive examples of the SGD batch, vectorised.

    The statistics of a group are its mean and its variance about that mean, over examples and pixels, in float32: E[x²]-μ²
    would lose too many digits at b = 2. (On GPU and TPU one pass computes E[(x-s)²] - (μ-s)², s the running mean.) Each call
    updates the running averages once, towards the mean over groups of the groups' means and unbiased variances (divisor n-1,
    n = b·pixels).

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
        mean, var = statistics(lax.stop_gradient(grouped), running_mean.value, over)  # [G, 1, …, 1, C], without G if it is 1
        scale, bias = (jnp.broadcast_to(v.reshape((1,) * (mean.ndim - 1) + (-1,)), mean.shape) for v in (scale, bias))
        scale, bias = self._corrected(scale, bias, mean, var)
        if not self.is_initializing():
            n = x.size // features // groups * span
            self._require_spread(n, x.shape)
            for running, statistic in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
                average = statistic.reshape(groups, features).mean(0)
                running.value = self.momentum * running.value + (1 - self.momentum) * average
        y: Any = normalise(grouped, mean, lax.rsqrt(var + self.epsilon), scale, bias, over)
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
