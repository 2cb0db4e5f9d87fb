"""Statistics and normalisation of batch norm, with the gradient written out; what differs between platforms is here."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Over(NamedTuple):
    """The axes and devices over which a BN group's statistics are computed."""

    axes: tuple[int, ...]  # examples and pixels
    axis_name: str | None
    span: int  # consecutive devices along axis_name that share a group
    platform: str | None


def statistics(x: jax.Array, near: Any, over: Over) -> tuple[jax.Array, jax.Array]:
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
def normalise(x: jax.Array, mean: jax.Array, rstd: jax.Array, scale: jax.Array, bias: jax.Array, over: Over) -> jax.Array:
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


normalise.defvjp(_normalise_forward, _normalise_backward)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics_of(over: Over, x: jax.Array, mean: jax.Array, rstd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and rstd unchanged, with the derivatives by x that a Hessian-vector product needs."""
    return mean, rstd


@_statistics_of.defjvp
def _(over, primals, tangents):
    (x, mean, rstd), dx = primals, tangents[0]
    dmean, product = (total / _size(x, over) for total in _means_of_group(over, *_two_sums(dx, dx * (x - mean), over)))
    return (mean, rstd), (dmean, -(rstd**3) * product)
