"""The training and evaluation steps of one run, alone and spread over devices."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config.catalog import MODELS
from smallbatch_jax.models import create_model
from smallbatch_jax.models.layers import Conv, Dense
from smallbatch_jax.models.norm import BatchNorm
from smallbatch_jax.program.train import (
    Batch,
    Program,
    Setting,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
)

SETTING = Setting(jnp.float32(0.02), jnp.int32(0), jnp.float32(0.1), jnp.float32(0.2))
CLASSES, EXAMPLES = 3, 8


class Tiny(nn.Module):
    """One convolution, with batch norm where b is given, and logits."""

    bn_batch_size: int | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train=False):
        x = Conv(4, (3, 3), strides=(2, 2), use_bias=self.bn_batch_size is None)(images)
        if self.bn_batch_size is not None:
            x = BatchNorm(self.bn_batch_size, axis_name=self.axis_name)(x, train)
        return Dense(CLASSES)(nn.relu(x).mean((1, 2)))


STEP_WITHOUT_NORM = jax.jit(make_train_step(Tiny(), Program(EXAMPLES, 20)))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(EXAMPLES, 8, 8, 2)).astype(np.float32)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, EXAMPLES), jnp.int32))


@functools.cache
def fresh_state(model: Any) -> Any:
    return jax.jit(lambda: init_state(model, jnp.zeros((1, 8, 8, 2)), jnp.int32(1)))()


def state_at(model: Any, step=0) -> Any:
    """Returns a fresh state whose counts say that `step` updates were taken."""
    state = fresh_state(model)
    return state._replace(step=jnp.int32(step), opt_state=state.opt_state._replace(count=jnp.int32(step)))


@pytest.fixture(scope="module")
def example_gradients(batch):
    """Returns the gradient of each example by itself, float32[n, …], at the fresh parameters without norm."""
    model = Tiny()

    def loss(params, image, label):
        return -jax.nn.log_softmax(model.apply({"params": params}, image[None])[0])[label]

    return jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(state_at(model).params, *batch)


def assert_trees_close(ours, theirs, rtol=1e-6, atol=1e-7):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), ours, theirs)


@pytest.mark.parametrize(("step", "multiplier"), [(0, 1 / 32), (2, 1 / 32 + 31 / 32 * 2 / 4), (4, 1), (10, 0.1), (15, 0.01)])
def test_update_is_eq_5_by_hand(batch, example_gradients, step, multiplier):
    """The new θ is θ - s(k)·η̃·Σ∇(L_i + λ/2‖θ‖²), summed over single examples; T = 20, warm-up over 4 updates."""
    state = state_at(Tiny(), step)
    expected = jax.tree.map(
        lambda p, g: p - multiplier * 0.02 * (np.sum(g, 0) + EXAMPLES * 0.1 * np.asarray(p)), state.params, example_gradients
    )
    after, _ = STEP_WITHOUT_NORM(state, SETTING, batch)
    assert_trees_close(after.params, expected, rtol=1e-5, atol=1e-6)
    assert (int(after.step), int(after.opt_state.count)) == (step + 1, step + 1)
    assert after.batch_stats == {}


def test_metrics_are_of_the_batch_before_the_update_without_the_penalty(batch):
    """Mean cross-entropy and number correct are those before the step; weight decay is not included."""
    state = state_at(Tiny())
    logits = np.asarray(jax.jit(Tiny().apply)({"params": state.params}, batch.images))
    labels = logits.argmax(-1)
    labels[:3] = (labels[:3] + 1) % CLASSES  # three of eight are wrong
    _, metrics = STEP_WITHOUT_NORM(state, SETTING, Batch(batch.images, jnp.asarray(labels, jnp.int32)))
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(EXAMPLES), labels]
    np.testing.assert_allclose(metrics.loss, losses.mean(), rtol=1e-6)
    assert metrics.sums == {"accuracy": EXAMPLES - 3}
    assert (metrics.loss.dtype, metrics.sums["accuracy"].dtype) == (jnp.float32, jnp.float32)


@pytest.fixture(scope="module")
def on_one_device(batch):
    """Returns state and metrics after a step of the whole batch with BN groups of half of it."""
    model = Tiny(EXAMPLES // 2)
    return jax.jit(make_train_step(model, Program(EXAMPLES, 20)))(state_at(model), SETTING, batch)


def test_running_averages_move_with_the_step(batch, on_one_device):
    """They become 0.99 of the old plus 0.01 of the batch's statistics, as a call of the model computes them."""
    model = Tiny(EXAMPLES // 2)
    state = state_at(model)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, found = jax.jit(apply)(variables, batch.images)
    after, _ = on_one_device
    assert_trees_close(after.batch_stats, found["batch_stats"])
    assert not np.allclose(after.batch_stats["BatchNorm_0"]["mean"], state.batch_stats["BatchNorm_0"]["mean"], atol=1e-5)


@pytest.mark.parametrize("parts", [2, 1])
def test_micro_batches_are_the_same_step(batch, on_one_device, parts):
    """With BN groups of half the batch, parameters, statistics, loss and count are the same in two micro-batches or one."""
    model = Tiny(EXAMPLES // 2)
    step = jax.jit(make_train_step(model, Program(EXAMPLES, 20, micro_batch_size=EXAMPLES // parts)))
    assert_trees_close(step(state_at(model), SETTING, batch), on_one_device)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused(batch):
    step = make_train_step(Tiny(1), Program(EXAMPLES, 20, micro_batch_size=EXAMPLES - 1))
    with pytest.raises(ValueError, match=f"micro_batch_size: {EXAMPLES - 1} does not divide the {EXAMPLES} examples"):
        jax.eval_shape(step, state_at(Tiny(1)), SETTING, batch)


def test_micro_batches_drop_other_units_each():
    """Each micro-batch has its own dropout key, so that equal images in two of them do not lose the same units."""

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            flat = images.reshape(len(images), -1)
            scale = self.param("scale", nn.initializers.ones, flat.shape[1:])
            return nn.Dropout(0.5, deterministic=not train)(flat * scale[None])

    model, images = Dropped(), jnp.ones((4, 8))
    state = jax.jit(lambda: init_state(model, images, jnp.int32(0)))()
    step = make_train_step(model, Program(4, 20, micro_batch_size=2))
    half = make_train_step(model, Program(2, 20))

    def losses(step, n):
        batch = Batch(images[:n], jnp.zeros(n, jnp.int32))
        of_seed = jax.jit(jax.vmap(lambda seed: step(state, SETTING._replace(seed=seed), batch)[1].loss))
        return of_seed(jnp.arange(3))

    assert not np.allclose(losses(step, 4), losses(half, 2))


def by_shard_map(step, state, batch, devices=2):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    shared = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False)
    return jax.tree.map(lambda leaf: leaf[None], jax.jit(shared)(state, SETTING, batch))


def in_shares(batch, devices):
    return jax.tree.map(lambda leaf: leaf.reshape(devices, EXAMPLES // devices, *leaf.shape[1:]), batch)


def by_vmap(step, state, batch, devices=2):
    return jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name="data"))(state, SETTING, in_shares(batch, devices))


def by_pmap(step, state, batch, devices=2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.pmap(step, in_axes=(None, None, 0), axis_name="data")(state, SETTING, in_shares(batch, devices))


@functools.cache
def whole_step(bn_batch_size):
    """Returns the step of the whole batch on one device."""
    return jax.jit(make_train_step(Tiny(bn_batch_size), Program(EXAMPLES, 20)))


@pytest.mark.parametrize(
    ("spread", "bn_batch_size"),
    [
        *((by_shard_map, b) for b in (2, EXAMPLES // 2, EXAMPLES)),
        *((spread, EXAMPLES) for spread in (by_vmap, by_pmap)),
        *(pytest.param(spread, b, marks=pytest.mark.slow) for spread in (by_vmap, by_pmap) for b in (2, EXAMPLES // 2)),
    ],
)
@pytest.mark.long
def test_a_batch_spread_over_devices_is_the_same_step(batch, spread, bn_batch_size):
    """With half the batch on each of two devices, parameters, statistics, loss and count are those of one device.

    The BN group is half a shard, a shard, or the shards of both devices.
    """
    step = make_train_step(Tiny(bn_batch_size, axis_name="data"), Program(EXAMPLES, 20, axis_name="data"))
    state = state_at(Tiny(bn_batch_size))
    found = spread(step, state, batch)
    for copy in range(len(found[1].loss)):
        one = jax.tree.map(lambda leaf, copy=copy: leaf[copy], found)
        assert_trees_close(one, whole_step(bn_batch_size)(state, SETTING, batch))


@pytest.mark.parametrize(("bn_batch_size", "parts"), [(1, 1), (2, None), (4, None), (8, None)])
@pytest.mark.long
def test_four_devices_are_the_same_step(batch, bn_batch_size, parts):
    """Each has two examples, in micro-batches of one or both; a BN group is half a shard, or one, two or all shards."""
    program = Program(EXAMPLES, 20, axis_name="data", micro_batch_size=parts)
    step = make_train_step(Tiny(bn_batch_size, axis_name="data"), program)
    state = state_at(Tiny(bn_batch_size))
    found = jax.tree.map(lambda leaf: leaf[3], by_vmap(step, state, batch, 4))
    assert_trees_close(found, whole_step(bn_batch_size)(state, SETTING, batch))


def test_a_bn_batch_that_devices_cannot_make_is_refused(batch):
    step = make_train_step(Tiny(3, axis_name="data"), Program(EXAMPLES, 20, axis_name="data"))
    with pytest.raises(ValueError, match="3 does not divide the batch of 4 examples it is applied to, on each of 2 devices"):
        by_vmap(step, state_at(Tiny(3)), batch)


def test_devices_drop_other_units_each():
    """Equal images on two devices do not lose the same units."""

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            scale = self.param("scale", nn.initializers.ones, images.shape[1:])
            return nn.Dropout(0.5, deterministic=not train)(images * scale[None])

    state = jax.jit(lambda: init_state(Dropped(), jnp.ones((1, 8)), jnp.int32(0)))()
    step = make_train_step(Dropped(), Program(2, 20, axis_name="data"))
    shares = Batch(jnp.ones((2, 1, 8)), jnp.zeros((2, 1), jnp.int32))
    spread = jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name="data"))
    found = spread(state, SETTING, shares)[0].params["scale"][0]
    step_alone = jax.jit(make_train_step(Dropped(), Program(2, 20)))
    alone = step_alone(state, SETTING, jax.tree.map(lambda x: x[0], shares))[0]
    changed, changed_alone = (np.unique(np.round(x, 6)) for x in (found, alone.params["scale"]))
    assert len(changed) > len(changed_alone)  # a unit is dropped on none, on one or on both, not only on none or on both


class Fixed(nn.Module):
    """A model whose logits are the image's own values, so that a test chooses every output."""

    @nn.compact
    def __call__(self, images, train=False):
        return images


evaluation = jax.jit(make_eval_step(Fixed()))


def evaluate(logits, labels, counts):
    state = TrainState(jnp.int32(0), {}, {}, ())
    return evaluation(state, Batch(jnp.array(logits), jnp.array(labels)), jnp.array(counts))


def test_evaluation_is_of_what_counts():
    """The cross-entropies are ln 4 and nearly 0; a masked image adds none and does not count as correct."""
    logits = [[jnp.log(2.0), 0.0, 0.0], [9.0, 0.0, 0.0]]
    masked = evaluate(logits, [1, 0], [True, False])
    np.testing.assert_allclose(masked["loss"], np.log(4), rtol=1e-6)
    assert masked["accuracy"] == 0
    counted = evaluate(logits, [1, 0], [True, True])
    np.testing.assert_allclose(counted["loss"], np.log(4) + np.log(1 + 2 * np.exp(-9)), rtol=1e-6)
    assert counted["accuracy"] == 1


def test_masked_padding_may_hold_anything():
    """NaN logits in padding, under any label, change nothing."""
    found = evaluate([[2.0, 0.0], [jnp.nan, jnp.nan], [jnp.nan, 0.0]], [0, -1, 0], [True, False, False])
    np.testing.assert_allclose(found["loss"], np.log(1 + np.exp(-2)), rtol=1e-6)
    assert found["accuracy"] == 1


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_nan_logit_is_never_right(label):
    """This holds for every label, although argmax of NaNs is class 0 or the NaN itself."""
    for logits in ([jnp.nan] * 3, [jnp.nan, 1.0, 2.0], [0.0, jnp.nan, 2.0], [0.0, 1.0, jnp.nan]):
        assert evaluate([logits], [label], [True])["accuracy"] == 0


# The deeper ResNets are slow to trace; the CIFAR ones repeat the blocks of ResNet-8.
MODELS_AND_NORMS = [
    pytest.param(name, norm, marks=[pytest.mark.slow] if name in ("resnet20", "resnet32", "resnet50") else [])
    for name, model in MODELS.items()
    for norm in model.norms
]


@pytest.mark.parametrize(("name", "norm"), MODELS_AND_NORMS)
@pytest.mark.long
def test_every_model_and_norm_keeps_its_variables_when_it_trains(name, norm):
    """A program carries the state through a loop, which needs the same tree, shapes and dtypes out as in."""
    model = create_model(name, 10, norm)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    state = jax.eval_shape(lambda x: init_state(model, x, 0), images)
    setting = Setting(*(jax.ShapeDtypeStruct((), d) for d in (jnp.float32, jnp.int32, jnp.float32, jnp.float32)))
    batch = Batch(images, jax.ShapeDtypeStruct((2,), jnp.int32))
    after, _ = jax.eval_shape(make_train_step(model, Program(2, 10)), state, setting, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.slow
def test_a_step_of_resnet50_lowers_the_loss_by_what_its_length_says():
    """θ moves by -η̃·m·ḡ, so that a short step lowers the mean loss by |Δθ|²/(η̃·m): ḡ is checked by the loss alone."""
    model, m, base_lr = create_model("resnet50", 10, "batch", 2), 4, jnp.float32(2**-14)
    rng = np.random.default_rng(0)
    batch = Batch(jnp.asarray(rng.normal(size=(m, 64, 64, 3)), jnp.float32), jnp.asarray(rng.integers(0, 10, m), jnp.int32))
    state = jax.jit(lambda: init_state(model, batch.images, jnp.int32(0)))()
    # Residual branches are scaled by 1/10; else the loss is not linear over any length that float32 resolves.
    params = {name: jax.tree.map(lambda x: x / 10, p) if "_conv3_norm" in name else p for name, p in state.params.items()}
    state = state._replace(params=params)
    step = jax.jit(make_train_step(model, Program(m, 10)))
    setting = Setting(base_lr, jnp.int32(0), jnp.float32(0), jnp.float32(0))
    after, before_it = step(state, setting, batch)
    _, after_it = step(after, setting, batch)
    squares = jax.tree.map(lambda a, b: np.square(np.float64(a) - np.float64(b)).sum(), after.params, state.params)
    expected = sum(jax.tree.leaves(squares)) / (float(base_lr) * m)
    assert expected > 0.05
    assert float(before_it.loss - after_it.loss) == pytest.approx(expected, rel=0.02)
