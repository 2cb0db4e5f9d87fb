"""Batch normalisation with a batch size of its own (§2.3, §3.6), and the alternatives for tiny batches that the paper names."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


class Deferred(NamedTuple):
    """A layer's output that is yet to be normalised: y = (x - mean)·gain + bias, for G groups of as many examples each."""

    x: jax.Array  # [N, …, C]
    mean: jax.Array  # float32[G, C], as all below
    gain: jax.Array
    bias: jax.Array


def normalised(deferred: Deferred | jax.Array) -> jax.Array:
    """[N, …, C] in the dtype of x, computed in float32; an array is as it should be."""
    if not isinstance(deferred, Deferred):
        return deferred
    x = deferred.x
    groups = x.reshape(len(deferred.mean), -1, *x.shape[1:]).astype(jnp.float32)
    return _affine(groups, deferred.mean, deferred.gain, deferred.bias).reshape(x.shape).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch norm (Eq. 10-11) over consecutive sub-batches of b examples of the SGD batch, vectorised.

    Where a batch is spread over devices, consecutive examples on each, a sub-batch may be smaller than a device's share, or
    be that of several devices, which then exchange their statistics: what it gives does not depend on their number (§5).

    The statistics of a sub-batch are the mean and the *two-pass* variance E[(x-μ)²] over its examples and pixels, in
    float32: the one-pass E[x²]-μ² loses too many digits at b = 2. The running averages move once per SGD step, towards
    the mean over the sub-batches of their means and of their unbiased variances (divisor max(n-1, 1), n = b·pixels).

    Attributes:
      batch_size: b; None takes the whole batch, the ordinary batch norm.
      momentum: weight of the old running average at each step.
      epsilon: ε of Eq. 10.
      axis_name: mesh axis over which the SGD batch is spread, as many examples on each device; b then divides a device's
        share, or is a multiple of it that divides the batch.
      dtype: of the output; None keeps the input's.
    """

    batch_size: int | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float[N, …, C], over all axes but the last; by running averages unless `train`.

        Raises:
          ValueError: if `train` and the batch is not made of whole sub-batches.
        """
        return normalised(self.deferred(x, train)).astype(self.dtype or x.dtype)

    @nn.compact
    def deferred(self, x: jax.Array, train: bool, statistics: tuple[jax.Array, jax.Array] | None = None) -> "Deferred":
        """`__call__` but for the work on x itself, which `normalised` does; the running averages move.

        Args:
          x: float[N, …, C].
          train: whether to normalise by the batch's statistics, not by the running averages.
          statistics: mean and variance of x over all axes but the last, float32[C], where they are known and
            `sub_batches(N)` is 1.

        Raises:
          ValueError: if `train` and the batch is not made of whole sub-batches.
        """
        features = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        self._declare()
        if not train:
            return Deferred(x, *_per_group(running_mean.value, lax.rsqrt(running_var.value + self.epsilon) * scale, bias))

        groups, devices = self._cut(len(x))
        if statistics:
            mean, var = _per_group(*statistics)
        else:
            mean, var = _statistics(x.reshape(groups, -1, *x.shape[1:]).astype(jnp.float32))  # [G, C]
        if devices > 1:
            of_group: Any = _over_devices(mean, var, self.axis_name, devices)
            mean, var = of_group
        known = (lax.stop_gradient(mean), lax.stop_gradient(var), running_mean.value[None], running_var.value[None])
        factor, shift = self._correction(*known)
        if not self.is_initializing():
            n = x.size // mean.size * devices
            self._move((running_mean, mean), (running_var, var * (n / max(n - 1, 1))))
        offset = jnp.broadcast_to(shift * scale[None] + bias[None], mean.shape)
        return Deferred(x, mean, lax.rsqrt(var + self.epsilon) * (factor * scale[None]), offset)

    def sub_batches(self, examples: int) -> int:
        """How many sub-batches a device's share of the SGD batch makes; 1 if it takes several devices to make one."""
        return self._cut(examples)[0]

    def _cut(self, examples: int) -> tuple[int, int]:
        """How many sub-batches `examples` on a device make, and of how many devices each is."""
        devices = 1 if self.axis_name is None or self.is_initializing() else lax.axis_size(self.axis_name)
        b = examples * devices if self.batch_size is None else self.batch_size
        if examples % b == 0:
            return examples // b, 1
        if b % examples == 0 and examples * devices % b == 0:
            return 1, b // examples
        there = f"{examples} examples it is applied to" + (f", on each of {devices} devices" if devices > 1 else "")
        raise ValueError(f"bn_batch_size: {b} does not divide the batch of {there}")

    def _declare(self) -> None:
        """Makes the variables of a subclass, which must be the same in training and evaluation."""

    def _correction(
        self, mean: jax.Array, var: jax.Array, running_mean: jax.Array, running_var: jax.Array
    ) -> tuple[jax.Array | float, jax.Array | float]:
        """What Eq. 10 is multiplied by and moved by, from the statistics [G, C] and the running ones [1, C] before the step."""
        del mean, var, running_mean, running_var
        return 1.0, 0.0

    def _move(self, *averages: tuple[Any, jax.Array]) -> None:
        """One step of each running average towards the mean over all sub-batches of the SGD batch."""
        now: Any = [lax.stop_gradient(of_sub_batches.mean(0)) for _, of_sub_batches in averages]
        if self.axis_name is not None:
            now = lax.pmean(jnp.stack(now), self.axis_name)
        for (running, _), value in zip(averages, now, strict=True):
            running.value = self.momentum * running.value + (1 - self.momentum) * value


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
        running_deviation = jnp.sqrt(running_var + self.epsilon)
        r = jnp.clip(jnp.sqrt(var + self.epsilon) / running_deviation, 1 / r_max, r_max)
        d = jnp.clip((mean - running_mean) / running_deviation, -d_max, d_max)
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


def _per_group(*per_channel: jax.Array) -> tuple[jax.Array, ...]:
    """[C] → [1, C] of each: all examples are one group."""
    return tuple(a[None] for a in per_channel)


# The gradients by hand: the automatic ones would sum over the batch five times, these do it twice (Ioffe & Szegedy 2015, §3).


@jax.custom_vjp
def _statistics(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and two-pass variance of each group, float32[G, b, …, C] → [G, C]."""
    axes = tuple(range(1, groups.ndim - 1))
    mean = groups.mean(axes)
    return mean, jnp.square(groups - _spread(mean, groups)).mean(axes)


def _statistics_forward(groups):
    mean, var = _statistics(groups)
    return (mean, var), (groups, mean)


def _statistics_backward(residuals, cotangents):
    groups, mean = residuals
    dmean, dvar = (_spread(d, groups) * (mean.size / groups.size) for d in cotangents)
    return (dmean + 2 * dvar * (groups - _spread(mean, groups)),)


_statistics.defvjp(_statistics_forward, _statistics_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _over_devices(mean: jax.Array, var: jax.Array, axis_name: str, devices: int) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each group of `devices` consecutive devices, from those of every device's examples, all [1, C].

    Their variances and the variance of their means (Chan, Golub & LeVeque 1979): as exact as one two-pass formula.
    """
    return _over_devices_forward(mean, var, axis_name, devices)[0]


def _over_devices_forward(mean, var, axis_name, devices):
    means, variances = _of_group(jnp.stack([mean, var]), axis_name, devices)
    of_group = means.mean(0)
    return (of_group, (variances + jnp.square(means - of_group[None])).mean(0)), mean - of_group


def _over_devices_backward(axis_name, devices, difference, cotangents):
    # Every device's loss depends on the statistics of its group: what they all ask for is summed.
    dmean, dvar = _of_group(jnp.stack(cotangents), axis_name, devices).sum(1) / devices
    return dmean + 2 * dvar * difference, dvar


_over_devices.defvjp(_over_devices_forward, _over_devices_backward)


def _of_group(pair: jax.Array, axis_name: str, devices: int) -> jax.Array:
    """[2, 1, C] of this device → [2, devices, 1, C] of its group, the same on each device of it."""
    of_all = lax.all_gather(pair, axis_name, axis=1)
    first = lax.axis_index(axis_name) // devices * devices
    return lax.dynamic_slice_in_dim(of_all, first, devices, axis=1)


@jax.custom_vjp
def _affine(groups: jax.Array, mean: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean)·gain + bias of each group, float32[G, b, …, C] with the rest [G, C]."""
    return (groups - _spread(mean, groups)) * _spread(gain, groups) + _spread(bias, groups)


def _affine_forward(groups, mean, gain, bias):
    return _affine(groups, mean, gain, bias), (groups, mean, gain)


def _affine_backward(residuals, dy):
    groups, mean, gain = residuals
    axes = tuple(range(1, groups.ndim - 1))
    dbias = dy.sum(axes)
    dgain = (dy * (groups - _spread(mean, groups))).sum(axes)
    return dy * _spread(gain, groups), -gain * dbias, dgain, dbias


_affine.defvjp(_affine_forward, _affine_backward)


def _spread(per_group: jax.Array, groups: jax.Array) -> jax.Array:
    """[G, C] → [G, 1, …, C] of the groups' rank."""
    return per_group.reshape(len(per_group), *(1,) * (groups.ndim - 2), -1)
