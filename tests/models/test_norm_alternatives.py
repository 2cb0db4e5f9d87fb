"""The two alternatives to batch norm that the paper names for tiny batches (§2.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallbatch_jax.models.norm import BatchNorm, BatchRenorm, GroupNorm

X = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (8, 4, 4, 32)), jnp.float32)


def renorm(updates, mean, var, bn_batch_size=4, **bounds):
    """Returns (training output, statistics after it, evaluation output) of a layer that has taken `updates` updates."""
    layer = BatchRenorm(bn_batch_size, **bounds)
    params = {"scale": jnp.full(32, 1.5), "bias": jnp.full(32, -0.5)}
    stats = {"mean": jnp.full(32, mean), "var": jnp.full(32, var), "updates": jnp.float32(updates)}
    out, mutated = layer.apply({"params": params, "batch_stats": stats}, X, True, mutable=["batch_stats"])
    return out, mutated["batch_stats"], layer.apply({"params": params, "batch_stats": stats}, X, False)


@pytest.mark.parametrize("updates", [0, 499, 500])
def test_batch_renorm_begins_as_batch_norm(updates):
    out, stats, _ = renorm(updates, 0.0, 1.0)
    params = {"scale": jnp.full(32, 1.5), "bias": jnp.full(32, -0.5)}
    plain = {"mean": jnp.zeros(32), "var": jnp.ones(32)}
    expected, mutated = BatchNorm(4).apply({"params": params, "batch_stats": plain}, X, True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], mutated["batch_stats"]["mean"])
    np.testing.assert_allclose(stats["var"], mutated["batch_stats"]["var"])
    assert stats["updates"] == updates + 1


def test_batch_renorm_ends_with_training_equal_to_evaluation_while_its_bounds_are_not_met():
    """Ioffe (2017), Eq. 1: with r and d free, x̂ is (x - μ)/σ by the running averages."""
    out, _, evaluated = renorm(2500, 1.8, 8.0)
    np.testing.assert_allclose(out, evaluated, rtol=1e-4, atol=1e-4)
    assert abs(out - renorm(500, 1.8, 8.0)[0]).max() > 0.05


def test_batch_renorm_keeps_r_and_d_within_their_bounds():
    """With running averages that are far off, σ_B/σ = 30 is clipped to 3 and (μ_B - μ)/σ = 20 to 5."""
    out, _, _ = renorm(10_000, 0.0, 0.01)
    normalised = (out + 0.5) / 1.5
    groups = normalised.reshape(2, 4 * 4 * 4, 32)
    np.testing.assert_allclose(groups.mean(1), 5.0, rtol=1e-4)
    np.testing.assert_allclose(groups.std(1), 3.0, rtol=1e-3)


def test_no_gradient_flows_through_r_and_d():
    """The gradient with respect to x is thus batch norm's times r, and its sum over a sub-batch's examples is 0."""

    def total(x):
        stats = {"mean": jnp.zeros(32), "var": jnp.full(32, 0.5), "updates": jnp.float32(1e4)}
        params = {"scale": jnp.ones(32), "bias": jnp.zeros(32)}
        out, _ = BatchRenorm(4).apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return (out * X**2).sum()

    gradient = jax.grad(total)(X)
    assert abs(gradient).max() > 0.1
    np.testing.assert_allclose(gradient.reshape(2, -1, 32).sum(1), 0.0, atol=2e-3)


def test_group_norm_gives_every_16_channels_of_one_example_mean_0_and_variance_1():
    layer = GroupNorm()
    variables = layer.init(jax.random.key(0), X, True)
    out = layer.apply(variables, X, True)
    groups = np.asarray(out).reshape(8, 16, 2, 16)
    np.testing.assert_allclose(groups.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(groups.var((1, 3)), 1.0, rtol=1e-3)
    np.testing.assert_allclose(layer.apply(variables, X[:1], False), out[:1], rtol=1e-5, atol=1e-6)
    assert "batch_stats" not in variables
