"""Tests the update by summed gradients (Eq. 2-8) and the unitless schedules."""

import math
from pkgutil import resolve_name
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smallbatch_jax.config.catalog import OPTIMIZERS
from smallbatch_jax.optim import in_float32, step_schedule, summed_sgd

IMAGENET = (30 / 90, 60 / 90, 80 / 90)
PARAMS = {"kernel": np.array([[0.5, -2.0], [1.5, 0.25]], np.float32), "bias": np.array([3.0, -1.0], np.float32)}
GRADS = {"kernel": np.array([[1.0, 2.0], [-0.5, 0.125]], np.float32), "bias": np.array([-0.75, 4.0], np.float32)}
ZEROS = jax.tree.map(np.zeros_like, PARAMS)


def updates(transform, grads, params=None) -> Any:
    return transform.update(grads, transform.init(PARAMS), params)[0]


def multipliers(steps, total_steps, *arguments, **options) -> Any:
    """Returns s(k) at each of `steps`."""
    return step_schedule(total_steps, *arguments, **options)(steps)


def scaled(factor, tree):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def assert_close(ours, theirs, rtol=1e-6, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), ours, theirs)


def examples(number, seed=0):
    """Returns inputs float32[number, 3] and targets float32[number] for regression or, by sign, classification."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, 3)).astype(np.float32), rng.normal(size=number).astype(np.float32)


def squared_error(theta, x, y):
    return 0.5 * (x @ theta - y) ** 2


def logistic(theta, x, y):
    return jax.nn.softplus(-jnp.sign(y) * (x @ theta))


def mean_gradient(loss, theta, x, y):
    return jax.grad(lambda t: jax.vmap(loss, (None, 0, 0))(t, x, y).mean())(theta)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_summed_update_equals_linear_scaling(batch_size):
    """Eq. 5 with η̃ equals Eq. 2-3 with η = η̃·m (Eq. 6)."""
    assert_close(updates(summed_sgd(0.01, batch_size), GRADS), updates(optax.sgd(0.01 * batch_size), GRADS))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_update_is_base_lr_times_sum_of_per_example_gradients(batch_size):
    """The update is Eq. 5, -η̃ Σ∇L_i, with each ∇L_i computed by itself, on least squares."""
    theta, (x, y) = jnp.array([0.3, -1.0, 2.0]), examples(batch_size)
    each = jax.vmap(jax.grad(squared_error), (None, 0, 0))(theta, x, y)
    ours = updates(summed_sgd(0.05, batch_size), mean_gradient(squared_error, theta, x, y))
    np.testing.assert_allclose(ours, -0.05 * np.sum(each, 0), rtol=1e-5, atol=1e-6)


def test_base_lr_is_traced_and_mapped_without_compiling_again():
    """One trace under jit(vmap) serves every η̃, and each lane gets its own."""
    traces = []

    @jax.jit
    @jax.vmap
    def update(base_lr):
        traces.append(base_lr)
        return updates(summed_sgd(base_lr, 8), GRADS)

    for base_lrs in ([0.5, 2.0**-8], [0.1, 3.0]):
        mapped = update(jnp.array(base_lrs))
        for lane, base_lr in enumerate(base_lrs):
            ours = jax.tree.map(lambda leaf, lane=lane: leaf[lane], mapped)
            assert_close(ours, updates(optax.sgd(base_lr * 8), GRADS))
    assert len(traces) == 1


@pytest.mark.parametrize("decay", [0.01, np.float32(0.01)], ids=["number", "array"])
def test_weight_decay_is_the_gradient_of_a_penalty_on_the_mean_loss(decay):
    """With (λ/2)‖θ‖² added to the mean loss, the summed update contains m·λ·θ."""
    batch_size, theta = 16, jnp.array([0.3, -1.0, 2.0])
    x, y = examples(batch_size)
    plain = mean_gradient(squared_error, theta, x, y)
    penalised = jax.grad(lambda t: jax.vmap(squared_error, (None, 0, 0))(t, x, y).mean() + float(decay) / 2 * jnp.sum(t**2))(
        theta
    )
    ours = updates(summed_sgd(0.05, batch_size, weight_decay=decay), plain, theta)
    assert_close(ours, updates(summed_sgd(0.05, batch_size), penalised), rtol=1e-5)
    assert_close(ours - updates(summed_sgd(0.05, batch_size), plain), -0.05 * batch_size * 0.01 * theta, atol=1e-6)


def test_every_leaf_is_decayed():
    """With no gradient the update of kernels and biases alike is -η̃·m·λ·θ."""
    ours = updates(summed_sgd(0.5, 4, weight_decay=0.25), ZEROS, PARAMS)
    assert_close(ours, scaled(-0.5 * 4 * 0.25, PARAMS))


def test_schedule_multiplies_both_gradient_and_decay_at_its_own_count():
    """Update k is s(k) times the update without a schedule, and the step count rises by one each time."""
    scheduled = summed_sgd(0.5, 4, lambda count: 1 / (1 + count), weight_decay=0.25)
    plain = updates(summed_sgd(0.5, 4, weight_decay=0.25), GRADS, PARAMS)
    state: Any = scheduled.init(PARAMS)
    for k in range(3):
        assert int(state.count) == k
        found, state = scheduled.update(GRADS, state, PARAMS)
        assert_close(found, scaled(1 / (1 + k), plain))


def test_composes_in_a_chain():
    """Transforms before it in optax.chain change the gradients it scales; parameters and state pass through."""
    chained = optax.chain(optax.clip(0.5), summed_sgd(0.5, 4, weight_decay=0.25))
    expected = jax.tree.map(lambda g, p: -0.5 * 4 * (np.clip(g, -0.5, 0.5) + 0.25 * p), GRADS, PARAMS)
    assert_close(updates(chained, GRADS, PARAMS), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_named_optimizer_keeps_a_float32_state_for_bfloat16_parameters(name):
    entry = OPTIMIZERS[name]
    scalars = {scalar: jnp.float32(value) for scalar, value in entry.scalars.items()}
    narrow, grads = (jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree) for tree in (PARAMS, GRADS))
    wide, wide_grads = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (narrow, grads))
    ours, theirs = (
        make(jnp.float32(0.5), jnp.float32(0.25), **scalars)
        for make in (in_float32(resolve_name(entry.make)), resolve_name(entry.make))
    )
    state, expected = ours.init(narrow), theirs.init(wide)
    for _ in range(2):
        update, state = ours.update(grads, state, narrow)
        expected_update, expected = theirs.update(wide_grads, expected, wide)
        assert_close(update, expected_update)
        assert_close(state, expected)
    assert jnp.bfloat16 not in {leaf.dtype for leaf in jax.tree.leaves(state)}


def test_updates_keep_the_dtype_of_the_gradients():
    """A float32 η̃, as a lane's setting is, does not widen bfloat16 parameters."""
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADS)
    found = updates(summed_sgd(jnp.float32(0.5), 4, lambda k: jnp.float32(1.0)), grads)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"base_lr": 0.0}, "base_lr"),
        ({"base_lr": -1}, "base_lr"),
        ({"base_lr": math.nan}, "base_lr"),
        ({"base_lr": math.inf}, "base_lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 0.5}, "batch_size"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"base_lr": optax.constant_schedule(0.1)}, "base_lr"),
        ({"base_lr": None}, "base_lr"),
        ({"base_lr": "0.1"}, "base_lr"),
        ({"schedule": jnp.float32(1.0)}, "schedule"),
    ],
)
def test_number_out_of_range_or_no_number_is_refused_by_name(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        summed_sgd(**{"base_lr": 0.1, "batch_size": 2, **arguments})


def test_decay_without_parameters_is_refused():
    """Weight decay needs θ; without weight decay no parameters are needed."""
    with pytest.raises(ValueError, match="params"):
        updates(summed_sgd(0.1, 2, weight_decay=0.1), GRADS)
    updates(summed_sgd(0.1, 2), GRADS)
    updates(summed_sgd(0.1, 2, weight_decay=np.float32(0)), GRADS)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 7, 20, 39, 82 * 25, 10_001, 2_050_000, 41_000_003])
def test_reductions_begin_at_half_and_three_quarters_to_the_step(total_steps):
    """The multiplier is 1, then 0.1 from the first k ≥ T/2, then 0.01 from the first k ≥ 3T/4."""
    half, three_quarters = -(-total_steps // 2), -(-3 * total_steps // 4)
    steps = sorted({0, half - 1, half, three_quarters - 1, three_quarters, total_steps - 1})
    expected = [0.1 ** ((k >= half) + (k >= three_quarters)) for k in steps]
    np.testing.assert_allclose(multipliers(jnp.array(steps), total_steps), expected, rtol=1e-6)


def test_reductions_at_inexact_decimal_fractions_begin_to_the_step():
    """The first reduced step is k = 55 although 0.55·100 is 55.00000000000001 in binary."""
    boundaries = (0.07, 0.14, 0.28, 0.55, 0.56, 0.57)
    found = multipliers(jnp.arange(100), 100, boundaries, factor=0.5)
    np.testing.assert_array_equal(found, 0.5 ** np.searchsorted([7, 14, 28, 55, 56, 57], np.arange(100), side="right"))


# Updates per epoch: small numbers, and those of 1,281,167 images at m = 256, 32, 16 and 2.
PER_EPOCH = (*range(1, 200), 999, 1000, 5005, 40_036, 80_073, 640_584)


def boundary_steps(per_epoch):
    return np.array([[30 * n, 60 * n, 80 * n] for n in per_epoch], np.int32)


def around(steps):
    return jnp.stack([steps - 1, steps], -1).reshape(-1)


def test_imagenet_boundaries_fall_on_whole_epochs():
    """Of 90 epochs of n updates, those from exactly k = 30n, 60n and 80n on are reduced, although 80/90 is inexact."""
    for n, steps in zip(PER_EPOCH, boundary_steps(PER_EPOCH), strict=True):
        found = multipliers(around(steps), 90 * n, IMAGENET)
        np.testing.assert_allclose(found, [1, 0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-6, err_msg=f"n={n}")


def test_imagenet_boundaries_fall_on_whole_epochs_when_total_steps_is_traced():
    """The steps are the same with T an argument of the compiled program, while k is exact in float32 (up to 2²⁴)."""
    per_epoch = np.array([n for n in PER_EPOCH if 90 * n <= 2**24], np.int32)
    values = jax.jit(jax.vmap(lambda total, steps: multipliers(around(steps), total, IMAGENET)))
    for n, found in zip(per_epoch, values(90 * per_epoch, boundary_steps(per_epoch)), strict=True):
        np.testing.assert_allclose(found, [1, 0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-6, err_msg=f"n={n}")


@pytest.mark.parametrize(
    ("total_steps", "boundary", "first_reduced"),
    [(411_570, 0.3, 123_471), (205_790, 0.6, 123_474), (1_530_929, 0.9, 1_377_837), (41_000_003, 0.5, 20_500_002)],
)
def test_traced_total_steps_reduce_at_the_same_step_as_a_number(total_steps, boundary, first_reduced):
    """Both reduce at the first k ≥ boundary·T, even where float32 cannot represent boundary·T to the step."""
    expected, steps = [1, 0.1], around(np.int32(first_reduced))
    np.testing.assert_allclose(multipliers(steps, total_steps, (boundary,)), expected, rtol=1e-6)
    traced = jax.jit(lambda total: multipliers(steps, total, (boundary,)))
    np.testing.assert_allclose(traced(total_steps), expected, rtol=1e-6)


def test_warmup_rises_linearly_from_a_32nd_and_then_the_standard_schedule_goes_on():
    """With T = 200 (§3.4), s rises from 1/32 over ten steps, is 1 from k = 10, then follows the schedule without warm-up."""
    steps = jnp.arange(200)
    found = multipliers(steps, 200, warmup_fraction=0.05)
    np.testing.assert_allclose(found[:10], 1 / 32 + (31 / 32) * np.arange(10) / 10, rtol=1e-6)
    np.testing.assert_array_equal(found[10:], multipliers(steps, 200)[10:])


@pytest.mark.parametrize("total_steps", [19, 20, 21, 99, 1000, 46_875, 2_050_000, 7_206_570])
def test_warmup_first_reaches_its_peak_of_one_at_five_percent(total_steps):
    """s(k) is below 1 for every k < T/20, exactly 1 from the first k ≥ T/20, and never above."""
    first = -(-total_steps // 20)
    before, at, after = multipliers(jnp.array([first - 1, first, first + 1]), total_steps, warmup_fraction=0.05)
    assert before < 1
    assert at == after == 1


def test_traced_warmup_fraction_gives_the_same_values_without_compiling_again():
    """A lane's warm-up fraction, 0 included, is an argument of the program and not a constant."""
    traces, steps = [], jnp.arange(300)

    @jax.jit
    def values(warmup_fraction):
        traces.append(warmup_fraction)
        return multipliers(steps, 300, warmup_fraction=warmup_fraction)

    for fraction in (0.0, 0.05, 0.11, 1.0):
        np.testing.assert_allclose(values(fraction), multipliers(steps, 300, warmup_fraction=fraction), rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"boundaries": (0.5, 1.5)}, "boundaries"),
        ({"boundaries": (-0.1,)}, "boundaries"),
        ({"factor": 0.0}, "factor"),
        ({"warmup_fraction": 1.1}, "warmup_fraction"),
        ({"warmup_fraction": math.nan}, "warmup_fraction"),
        ({"warmup_start": 0.0}, "warmup_start"),
    ],
)
def test_schedule_refuses_a_number_out_of_range_by_name(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        step_schedule(**{"total_steps": 100, **arguments})


def test_small_steps_and_one_large_step_differ_in_second_order_of_base_lr():
    """On logistic regression, n steps of m (Eq. 7) and one of n·m (Eq. 8) differ, by ¼ as much for half the η̃."""
    n, m, theta = 8, 4, jnp.array([0.5, -1.0, 0.2])
    x, y = examples(n * m)

    @jax.jit
    def distance(base_lr):
        small, small_steps = summed_sgd(base_lr, m), theta
        for k in range(n):
            batch = slice(k * m, (k + 1) * m)
            gradient = mean_gradient(logistic, small_steps, x[batch], y[batch])
            small_steps = small_steps + updates(small, gradient)
        large_step = updates(summed_sgd(base_lr, n * m), mean_gradient(logistic, theta, x, y))
        apart = jnp.linalg.norm(small_steps - (theta + large_step))
        return apart, apart / jnp.linalg.norm(large_step)

    found = np.array([distance(base_lr) for base_lr in (0.02, 0.01, 0.005)])
    assert found[0, 1] > 0.02
    np.testing.assert_allclose(found[:-1] / found[1:], [[4, 2], [4, 2]], rtol=0.15)
