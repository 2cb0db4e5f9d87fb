"""Batch normalisation with a batch size of its own (§2.3, §3.6), and the alternatives for tiny batches that the paper names."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.models import blocks
from smallbatch_jax.models.fusion import rounded

# The collection that a step asks for, which may take a batch in parts or on several devices: of each batch norm the sums of
# means and of variances, of how many pieces they are, and the momentum. Where nobody does, running averages move at once.
MOVES = "batch_moves"


class BatchNorm(nn.Module):
    """Batch norm (Eq. 10-11) over consecutive sub-batches of b examples of the SGD batch, vectorised.

    Where a batch is spread over devices, consecutive examples on each, a sub-batch may be smaller than a device's share, or
    be that of several devices, which then exchange their statistics: what it gives does not depend on their number (§5).

    The statistics of a sub-batch are the mean and the *two-pass* variance E[(x-μ)²] over its examples and pixels, in
    float32: the one-pass E[x²]-μ² loses too many digits at b = 2. The running averages move once per SGD step, towards
    the mean over the sub-batches of their means and of their unbiased variances (divisor n-1, n = b·pixels).

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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float[N, …, C], over all axes but the last; by running averages unless `train`.

        Raises:
          ValueError: if `train` and the batch is not made of whole sub-batches.
          InputError: if `train` and a sub-batch has a single value per channel (n = 1), whose output is constant.
        """
        features, examples = x.shape[-1], len(x)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        self._declare()
        if not train:
            mean, gain, bias = _per_piece(running_mean.value, lax.rsqrt(running_var.value + self.epsilon) * scale, bias)
            return _normalised(x, mean, gain, bias).astype(self.dtype or x.dtype)

        groups, devices = self._cut(examples)
        pieces = blocks.units(examples, groups)
        found: Any = _statistics(x.astype(jnp.float32), pieces, self.axis_name, groups, devices)
        mean, var = found  # [U, C], those of its group for each piece
        known = (lax.stop_gradient(mean), lax.stop_gradient(var), running_mean.value[None], running_var.value[None])
        factor, shift = self._correction(*known)
        if not self.is_initializing():
            n = x.size // features // groups * devices
            self._require_spread(n, x)
            self._move(examples, mean, var * (n / (n - 1)))
        scale, bias = (blocks.shared(parameter, pieces, examples) for parameter in (scale, bias))
        gain, bias = lax.rsqrt(var + self.epsilon) * (factor * scale), shift * scale + bias
        return _normalised(x, mean, gain, bias, groups).astype(self.dtype or x.dtype)

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

    def _require_spread(self, n: int, x: jax.Array) -> None:
        """Refuses statistics over a single value, whose mean it is and whose variance is 0: the output is constant."""
        if n == 1:
            pixels = "×".join(map(str, x.shape[1:-1])) or "no"
            raise InputError(
                f"bn_batch_size: the batch norm {'/'.join(self.path)} would take mean and variance over 1 value per channel "
                f"(BN batches of 1 example, {pixels} pixels) and give a constant. Use BN batches of 2 or more, or no batch "
                "norm there (alexnet: norm batch_conv_only)."
            )

    def _declare(self) -> None:
        """Makes the variables of a subclass, which must be the same in training and evaluation."""

    def _correction(
        self, mean: jax.Array, var: jax.Array, running_mean: jax.Array, running_var: jax.Array
    ) -> tuple[jax.Array | float, jax.Array | float]:
        """What Eq. 10 is multiplied by and moved by, from the statistics [U, C] and the running ones [1, C] before the step."""
        del mean, var, running_mean, running_var
        return 1.0, 0.0

    def _move(self, examples: int, mean: jax.Array, var: jax.Array) -> None:
        """One step of the running averages towards the means over all sub-batches of the SGD batch; or what goes into it."""
        pieces = len(mean)
        sums: Any = jnp.stack([blocks.total(lax.stop_gradient(of_pieces), examples) for of_pieces in (mean, var)])
        if self.is_mutable_collection(MOVES):
            self.put_variable(MOVES, "sums", sums)
            self.put_variable(MOVES, "pieces", jnp.float32(pieces))
            self.put_variable(MOVES, "momentum", jnp.float32(self.momentum))
            return
        if self.axis_name is not None:
            pieces *= lax.axis_size(self.axis_name)
            sums = blocks.over_devices(sums, self.axis_name)
        for name, total in zip(("mean", "var"), sums, strict=True):
            running: Any = self.get_variable("batch_stats", name)
            self.put_variable("batch_stats", name, _moved(running, total, pieces, self.momentum))


def _moved(running: jax.Array, total: Any, pieces: Any, momentum: Any) -> jax.Array:
    # Only in some programs the compiler knows pieces and momentum; it then makes products of quotients, and one of constants.
    mean = rounded(total * (1 / pieces))
    return rounded(momentum * running) + rounded((1 - momentum) * mean)


def move(batch_stats: Any, moves: Any) -> Any:
    """The running averages after a step, from those before it and the mean of what `MOVES` held of each part of the batch."""
    if "sums" not in moves:
        return {name: move(of_module, moves[name]) if name in moves else of_module for name, of_module in batch_stats.items()}
    sums, pieces, momentum = (rounded(moves[name]) for name in ("sums", "pieces", "momentum"))
    moved = {
        name: _moved(batch_stats[name], total, pieces, momentum) for name, total in zip(("mean", "var"), sums, strict=True)
    }
    return {**batch_stats, **moved}


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
        normalise = nn.GroupNorm(
            None, self.channels_per_group, epsilon=self.epsilon, use_bias=False, use_scale=False, use_fast_variance=False
        )
        scaled = _Affine(name="norm")(normalise(x.astype(jnp.float32)))
        return scaled.astype(self.dtype or x.dtype)


class _Affine(nn.Module):
    """x·scale + bias, of each channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        pieces = blocks.count(len(x))
        scale, bias = (blocks.shared(parameter, pieces, len(x)) for parameter in (scale, bias))
        return _normalised(x, jnp.zeros_like(scale), scale, bias)


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


def _per_piece(*per_channel: jax.Array) -> tuple[jax.Array, ...]:
    """[C] → [1, C] of each: all examples are one piece."""
    return tuple(a[None] for a in per_channel)


# The gradients by hand: the automatic ones would sum over the batch five times, these do it twice (Ioffe & Szegedy 2015, §3).


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _statistics(x: jax.Array, pieces: int, axis_name: str | None, groups: int, devices: int) -> tuple[jax.Array, jax.Array]:
    """Mean and two-pass variance of float32[N, …, C] in the group that each of its pieces is of, [U, C]; see `_of_groups`."""
    return _statistics_forward(x, pieces, axis_name, groups, devices)[0]


def _statistics_forward(x, pieces, axis_name, groups, devices):
    runs, numbers = blocks.in_runs(x, pieces), x.size // x.shape[-1] // pieces
    mean = rounded(blocks.channel_sums(runs, pieces) / numbers)
    var = blocks.channel_sums(jnp.square(runs - blocks.for_runs(mean, len(runs))), pieces) / numbers
    mean, var = _of_groups(mean, var, axis_name, groups, devices)
    return (mean, var), (x, mean)


def _statistics_backward(pieces, axis_name, groups, devices, residuals, cotangents):
    x, mean = residuals
    numbers = x.size // x.shape[-1] // pieces
    of_groups = x.reshape(groups, -1, *x.shape[1:])
    asked = _gathered(jnp.stack(cotangents), axis_name, groups, devices)
    dmean, dvar = (rounded(blocks.tree(of_pieces) / (len(of_pieces) * numbers)) for of_pieces in asked)
    dmean, dvar = (_spread(rows, of_groups) for rows in (dmean, dvar))
    return ((dmean + 2 * dvar * (of_groups - _spread(_of_first(mean, groups), of_groups))).reshape(x.shape),)


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _of_groups(
    mean: jax.Array, var: jax.Array, axis_name: str | None, groups: int, devices: int
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the group that each piece is of, from those of the pieces, all [U, C].

    The U pieces make G groups, or with those of `devices` consecutive devices one. Their variances and the variance of their
    means (Chan, Golub & LeVeque 1979): as exact as one two-pass formula.
    """
    means, variances = _gathered(jnp.stack([mean, var]), axis_name, groups, devices)  # [K, G, C]
    of_group = blocks.tree(means) / len(means)
    spread = blocks.tree(variances + rounded(jnp.square(means - of_group[None]))) / len(means)
    mean_of_piece, var_of_piece = (jnp.repeat(a, len(mean) // groups, 0) for a in (of_group, spread))
    return mean_of_piece, var_of_piece


def _gathered(pair: jax.Array, axis_name: str | None, groups: int, devices: int) -> jax.Array:
    """[2, U, C] of this device's pieces → [2, K, G, C] of the K pieces of each group, the same on each device of one."""
    pair = rounded(pair)
    if devices > 1:
        of_all = lax.all_gather(pair, axis_name, axis=1, tiled=True)
        here = pair.shape[1]
        first = lax.axis_index(axis_name) // devices * devices * here
        pair = lax.dynamic_slice_in_dim(of_all, first, devices * here, axis=1)
    return pair.reshape(2, groups, -1, pair.shape[-1]).swapaxes(1, 2)


def _normalised(x: jax.Array, mean: jax.Array, gain: jax.Array, bias: jax.Array, groups: int | None = None) -> jax.Array:
    """(x - mean)·gain + bias in float32; mean, gain and bias [U, C] of each of U pieces of x [N, …, C], or of its groups alike.

    A piece is a sub-batch of the batch norm, or what a block has of one (`models.blocks`).
    """
    return _affine(x.astype(jnp.float32), mean, gain, bias, groups or len(mean))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _affine(x: jax.Array, mean: jax.Array, gain: jax.Array, bias: jax.Array, groups: int) -> jax.Array:
    """(x - mean)·gain + bias, float32[N, …, C] with the rest [U, C] of each piece, and the same for all pieces of a group."""
    of_groups = x.reshape(groups, -1, *x.shape[1:])
    mean, gain, bias = (_spread(_of_first(of_pieces, groups), of_groups) for of_pieces in (mean, gain, bias))
    return ((of_groups - mean) * gain + bias).reshape(x.shape)


def _affine_forward(x, mean, gain, bias, groups):
    return _affine(x, mean, gain, bias, groups), (x, mean, gain)


def _affine_backward(groups, residuals, dy):
    x, mean, gain = residuals
    pieces = len(mean)
    runs, dy_runs = (blocks.in_runs(a, pieces) for a in (x, dy))
    products = dy_runs * (runs - blocks.for_runs(_of_first(mean, groups), len(runs)))
    dbias, dgain = (blocks.channel_sums(a, pieces) for a in (dy_runs, products))
    dy_of_groups = dy.reshape(groups, -1, *x.shape[1:])
    dx = (dy_of_groups * _spread(_of_first(gain, groups), dy_of_groups)).reshape(x.shape)
    return dx, -gain * dbias, dgain, dbias


_affine.defvjp(_affine_forward, _affine_backward)


def _of_first(of_pieces: jax.Array, groups: int) -> jax.Array:
    """[U, C] → [G, C], that of the first piece of each group."""
    return of_pieces[:: len(of_pieces) // groups]


def _spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """[G, C] → [G, 1, …, C] of the rank of another array."""
    return rows.reshape(len(rows), *(1,) * (like.ndim - 2), -1)
