"""Batch norm compared with its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import assert_all_close, normal, with_gradients
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from smallbatch_jax.models.norm import BatchNorm


def batch_norm(batch_size=None, **options):
    """Returns (x, scale, bias) → the output in training."""
    module = BatchNorm(batch_size, **options)
    return lambda x, scale, bias: module.apply(norm_variables(scale, bias), x, True, mutable=["batch_stats"])[0]


def train(module, variables, x) -> Any:
    """Returns (output, new batch_stats) of one call in training."""
    y, state = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]))(variables, x)
    return y, state["batch_stats"]


def norm_variables(scale, bias, mean=None, var=None):
    mean = jnp.zeros(scale.shape) if mean is None else mean
    var = jnp.ones(scale.shape) if var is None else var
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 5), (2, 5)])
def test_norm_over_the_whole_batch_is_that_of_flax(shape, platform):
    """With b = N, output and gradients of image, scale and bias equal flax.linen.BatchNorm's with two-pass variance."""
    flax_norm = nn.BatchNorm(use_running_average=False, epsilon=1e-5, use_fast_variance=False)

    def theirs(x, scale, bias):
        return flax_norm.apply(norm_variables(scale, bias), x, mutable=["batch_stats"])[0]

    x, scale, bias = normal(*shape), normal(5, seed=1), normal(5, seed=2)
    assert_all_close(
        with_gradients(batch_norm(shape[0], platform=platform), x, scale, bias),
        with_gradients(theirs, x, scale, bias),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("shape", "batch_size"), [((6, 4, 3, 5), 2), ((6, 5), 3), ((4, 2, 1, 5), 1)])
def test_sub_batches_are_normalised_each_by_itself(shape, batch_size):
    """b < N equals the norm of b = N applied to consecutive chunks of b, and so do its gradients."""

    def by_chunks(x, scale, bias):
        chunks = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
        return jnp.concatenate([batch_norm()(chunk, scale, bias) for chunk in chunks])

    arrays = normal(*shape), normal(5, seed=1), normal(5, seed=2)
    assert_all_close(with_gradients(batch_norm(batch_size), *arrays), with_gradients(by_chunks, *arrays))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_variance_in_one_pass_is_taken_about_the_running_mean(platform):
    """With mean 10⁴, deviation 1 and a running mean one deviation away, it is right to 1 %."""
    x = 1e4 + np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype(np.float32)
    variables = norm_variables(jnp.ones(2), jnp.zeros(2), jnp.full(2, 1e4 + 1.0))
    _, batch_stats = train(BatchNorm(platform=platform), variables, x)
    moved = (np.asarray(batch_stats["var"]) - 0.99) / 0.01
    np.testing.assert_allclose(moved, x.astype(np.float64).var((0, 1, 2), ddof=1), rtol=0.01)


def test_variance_is_two_pass():
    """With mean 10⁴ and deviation 1 in float32, the output is right to 0.005 and the running variance to 1 %.

    E[x²] - μ² would be lost in rounding: 10⁸ is held to ±4.
    """
    x = 1e4 + np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype(np.float32)
    exact = x.astype(np.float64)
    deviation = exact.std((0, 1, 2))
    variables = norm_variables(jnp.ones(2), jnp.zeros(2))
    found, batch_stats = train(BatchNorm(), variables, x)
    np.testing.assert_allclose(found, (exact - exact.mean((0, 1, 2))) / deviation, atol=5e-3)
    moved = (np.asarray(batch_stats["var"]) - 0.99) / 0.01
    np.testing.assert_allclose(moved, exact.var((0, 1, 2), ddof=1), rtol=0.01)


@pytest.mark.parametrize(("shape", "batch_size"), [((6, 4, 3, 5), 2), ((6, 5), 3), ((6, 5), None), ((4, 3, 5), 1)])
def test_running_averages_move_once_per_call_towards_the_mean_over_sub_batches(shape, batch_size):
    """They become 0.99 of the old plus 0.01 of the mean of the sub-batches' means and unbiased variances."""
    x, old_mean, old_var = normal(*shape), normal(5, seed=1), jnp.abs(normal(5, seed=2))
    variables = norm_variables(jnp.ones(5), jnp.zeros(5), old_mean, old_var)
    _, batch_stats = train(BatchNorm(batch_size), variables, x)
    groups = np.asarray(x, np.float64).reshape(shape[0] // (batch_size or shape[0]), -1, 5)
    n = groups.shape[1]
    variances = groups.var(1) * n / (n - 1)
    expected = {"mean": 0.99 * old_mean + 0.01 * groups.mean(1).mean(0), "var": 0.99 * old_var + 0.01 * variances.mean(0)}
    for name, values in expected.items():
        np.testing.assert_allclose(batch_stats[name], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 4, None])
def test_a_batch_sharded_over_devices_is_normalised_as_on_one(batch_size):
    """Output and gradients agree with four examples on each of two devices and BN groups below, at and above a shard."""
    x, scale, bias, weights = normal(8, 3, 5), normal(5, seed=1), normal(5, seed=2), normal(8, 3, 5, seed=3)

    def loss(axis_name):
        def of_shard(x, scale, bias, weights):
            norm = BatchNorm(batch_size, axis_name=axis_name)
            y, state = norm.apply(norm_variables(scale, bias), x, True, mutable=["batch_stats"])
            return (y * weights).mean(), (y, state["batch_stats"])

        return jax.value_and_grad(of_shard, (0, 1, 2), has_aux=True)

    def of_device(*shard):
        (value, (y, stats)), (dx, *grads) = loss("data")(*shard)
        return y, dx, jax.lax.pmean((value, stats, grads), "data")

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    shard, whole = P("data"), P()
    spread = jax.shard_map(
        of_device, mesh=mesh, in_specs=(shard, whole, whole, shard), out_specs=(shard, shard, whole), check_vma=False
    )
    y, dx, (value, stats, grads) = jax.jit(spread)(x, scale, bias, weights)
    (expected, (expected_y, expected_stats)), (expected_dx, *expected_grads) = jax.jit(loss(None))(x, scale, bias, weights)
    found, wanted = (y, dx / 2, value, stats, grads), (expected_y, expected_dx, expected, expected_stats, expected_grads)
    assert_all_close(jax.tree.leaves(found), jax.tree.leaves(wanted), rtol=1e-4, atol=1e-5)


def test_evaluation_uses_running_averages_with_epsilon_1e_5():
    """The output is (x - mean) / √(var + 10⁻⁵)·scale + bias for any b, and no average moves; var = 0 leaves only ε."""
    x, scale, bias, mean, var = normal(3, 2, 4), *(normal(4, seed=s) for s in (1, 2, 3)), jnp.array([0.0, 1e-5, 1.0, 4.0])
    found, state = jax.jit(lambda v: BatchNorm(2).apply(v, x, False, mutable=["batch_stats"]))(
        norm_variables(scale, bias, mean, var)
    )
    divisor = jnp.sqrt(jnp.array([1e-5, 2e-5, 1.00001, 4.00001]))
    expected = (np.asarray(x) - np.asarray(mean)[None, None]) / divisor[None, None] * scale[None, None] + bias[None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(state["batch_stats"]["mean"], mean)
    np.testing.assert_array_equal(state["batch_stats"]["var"], var)


def test_statistics_of_bfloat16_are_float32():
    """Means are taken in float32 (bfloat16 cannot represent 257), and the output is bfloat16 again."""
    x = jnp.repeat(jnp.array([256.0, 258.0], jnp.bfloat16), 32).reshape(64, 1)
    variables = norm_variables(jnp.ones(1), jnp.zeros(1))
    found, batch_stats = train(BatchNorm(), variables, x)
    assert (found.dtype, batch_stats["mean"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), [[-1.0]] * 32 + [[1.0]] * 32, rtol=1e-4)


def test_norm_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="bn_batch_size: 4 does not divide the batch of 6"):
        batch_norm(4)(normal(6, 5), jnp.ones(5), jnp.zeros(5))
