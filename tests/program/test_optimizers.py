"""Momentum, Adam and the others in lanes: each trains as a plain Optax loop does, whatever the rule of its learning rate."""

import functools
import itertools
import math
import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from smallbatch_jax.config import catalog, experiment
from smallbatch_jax.program import device_data, lanes, train
from smallbatch_jax.runner.grid import Interrupted, train_grid
from smallbatch_jax.runner.jobs import Own, Setup
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results

BATCH_SIZE, STEPS, LANES, DECAY = 4, 50, 5, 1e-2
BASE_LRS = np.array([2.0**-k for k in range(7, 7 + LANES)], np.float32)
SCALARS = {"momentum": 0.8, "beta1": 0.85, "beta2": 0.97, "epsilon": 1e-4}  # none equals its default
PLAIN = {  # by the formulas of the papers, from optax's own optimizers
    "sgd": lambda lr, mask: optax.chain(optax.add_decayed_weights(DECAY, mask), optax.sgd(lr)),
    "momentum": lambda lr, mask: optax.chain(optax.add_decayed_weights(DECAY, mask), optax.sgd(lr, 0.8)),
    "nesterov": lambda lr, mask: optax.chain(optax.add_decayed_weights(DECAY, mask), optax.sgd(lr, 0.8, nesterov=True)),
    "adam": lambda lr, mask: optax.chain(optax.add_decayed_weights(DECAY, mask), optax.adam(lr, 0.85, 0.97, 1e-4)),
    "adamw": lambda lr, mask: optax.adamw(lr, 0.85, 0.97, 1e-4, weight_decay=DECAY, mask=mask),
    "lion": lambda lr, mask: optax.lion(lr, 0.85, 0.97, weight_decay=DECAY, mask=mask),
}
MASKS = {"all": None, "kernels": partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")}
RATES = {"linear": BATCH_SIZE, "sqrt": math.sqrt(BATCH_SIZE), "constant": 1}


def chosen(name, rule="linear", mask="all"):
    known = {scalar: SCALARS[scalar] for scalar in catalog.OPTIMIZERS[name].scalars}
    optimizer = {"name": name, "rule": rule, **known}
    return tiny.grid(optimizer=optimizer, weight_decay=DECAY, weight_decay_mask=mask, epochs=4)


@functools.cache
def dataset():
    return tiny.dataset()


def trained(name, rule, mapping, values=None, mask="all"):
    """Returns every lane's parameters after 50 steps, the fresh state, and the example indices of each step."""
    return trained_by(Setup(chosen(name, rule, mask), dataset(), lambda b: tiny.PlainModel()), mapping, values)


def trained_by(setup, mapping, values=None):
    optimizer = setup.optimizer(BATCH_SIZE)
    mesh = lanes.lane_mesh(jax.devices()[:1])
    program = train.Program(BATCH_SIZE, STEPS, optimizer=optimizer)
    data = device_data.to_device(dataset(), mesh)
    running = lanes.compile_lanes(tiny.PlainModel(), program, data, mesh, LANES, STEPS, mapping=mapping)
    fresh = lanes.initialiser(tiny.PlainModel(), dataset().example, optimizer)(0)
    state = running.start(running.empty(), dict.fromkeys(range(LANES), fresh))
    indices = np.repeat(tiny.batch_indices(0, 0, STEPS, BATCH_SIZE, 50)[None], LANES, 0)
    segment = lanes.Segment(indices, np.full(LANES, STEPS, np.int32), np.zeros(LANES, bool))
    full = [np.full(LANES, v, d) for v, d in ((0, np.int32), (DECAY, np.float32), (0.1, np.float32))]
    scalars = values or setup.experiment.optimizer.scalars(BATCH_SIZE)
    setting = train.Setting(BASE_LRS, *full, {k: np.full(LANES, v, np.float32) for k, v in scalars.items()} or None)
    state, _ = running.run(state, setting, segment)
    return jax.tree.map(np.asarray, state.train.params), fresh, indices[0]


def by_name(learning_rate):
    """Returns a user's own optimizer: by name, LAMB for kernels, which uses the norm of each, and SGD for biases."""
    rules = {"kernel": optax.lamb(learning_rate), "bias": optax.sgd(learning_rate)}
    return optax.multi_transform(rules, partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key))


def test_an_own_optimizer_gets_the_parameters_as_the_model_has_them():
    """This holds side by side too, where vectors are packed into one for an elementwise optimizer."""
    chosen = tiny.grid(optimizer={"name": "own:by_name"}, weight_decay=0.0)
    setup = Setup(chosen, dataset(), lambda b: tiny.PlainModel(), Own(by_name))
    ours, theirs = (trained_by(setup, mapping)[0] for mapping in ("vmap", "map"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def plain_loop(name, rule, fresh, indices, mask):
    """Returns base_lr → parameters after a run by Optax alone, whose schedule is a function of its own count."""
    model, stored, labelled = tiny.PlainModel(), dataset().train_images, jnp.asarray(dataset().train_labels)
    images = jnp.asarray((stored - stored.mean((0, 1, 2))) / stored.std((0, 1, 2)), jnp.float32)

    def schedule(base_lr, count):  # a warm-up over a tenth, then a tenth of the rate at 50 % and 75 %
        warm = jnp.where(count < 5, 1 / 32 + (1 - 1 / 32) * count / 5, 1.0)
        return base_lr * RATES[rule] * warm * 0.1 ** ((count >= 25).astype(int) + (count >= 38).astype(int))

    def loss(params, batch, labels):
        logits = model.apply({"params": params}, batch, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def run(params, base_lr):
        transform = PLAIN[name](partial(schedule, base_lr), MASKS[mask])

        def step(carry, chosen):
            params, state = carry
            grads = jax.grad(loss)(params, images[chosen], labelled[chosen])
            updates, state = transform.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, transform.init(params)), indices)[0][0]

    return lambda base_lr: run(fresh.params, base_lr)


LOOPS = [
    ("map", "all"),
    ("vmap", "kernels"),
    *(pytest.param(*both, marks=pytest.mark.slow) for both in (("vmap", "all"), ("map", "kernels"))),
]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("mapping", "mask"), LOOPS)
@pytest.mark.long
def test_a_lane_trains_as_a_plain_optax_loop(name, mapping, mask):
    """The 50 steps have warm-up, two reductions and weight decay; each case has one of the three rules."""
    rule = list(RATES)[(list(PLAIN).index(name) + (mapping == "vmap")) % 3]
    require_the_plain_loop(name, rule, mapping, mask)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), list(itertools.product(PLAIN, RATES)))
def test_each_optimizer_trains_as_a_plain_optax_loop_by_each_rule(name, rule):
    require_the_plain_loop(name, rule, "map")


def require_the_plain_loop(name, rule, mapping, mask="all"):
    found, fresh, indices = trained(name, rule, mapping, mask=mask)
    plain = plain_loop(name, rule, fresh, indices, mask)
    for lane in (0, LANES - 1):
        expected = plain(BASE_LRS[lane])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.abs(a[lane] - b).max() <= 1e-5 * max(1.0, np.abs(b).max())


def test_no_scalar_of_an_optimizer_is_compiled_in():
    args = "adamw", "sqrt", "map"
    first, *_ = trained(*args)
    changed, *_ = trained(*args, values={"beta1": 0.5, "beta2": 0.9, "epsilon": 1e-3})
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(changed), strict=True))


@pytest.mark.long
def test_a_state_packed_for_lanes_side_by_side_gives_the_same_updates():
    (one_by_one, *_), (together, *_) = (trained("adamw", "linear", mapping) for mapping in ("map", "vmap"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one_by_one, together)


@pytest.mark.parametrize("name", ["momentum", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_sweep_with_state_is_killed_and_resumed_bit_for_bit(tmp_path, name, monkeypatch):
    fields = {"optimizer": {"name": name}, "checkpoint_seconds": 0.0, "segment_seconds": 0.001, "base_lrs": (2**-9, 2**-7)}

    class Stops(NoProgress):
        def __init__(self, after):
            self.left = after

        def show(self, status, doing):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGTERM)

    make = lambda b: tiny.TinyModel(b)  # noqa: E731
    train_grid(tiny.grid(**fields), tmp_path / "whole", dataset(), NoProgress(), make)
    with pytest.raises(Interrupted):
        train_grid(tiny.grid(**fields), tmp_path / "killed", dataset(), Stops(3), make)
    assert len(results.load(tmp_path / "killed")) < 6
    train_grid(tiny.grid(**fields), tmp_path / "killed", dataset(), NoProgress(), make)
    assert results.load(tmp_path / "killed").equals(results.load(tmp_path / "whole"))


def refused(**fields):
    with pytest.raises(experiment.InputError) as error:
        experiment.Optimizer(**fields).scalars(64)
    return str(error.value)


def test_betas_keep_their_half_life_in_examples_or_follow_the_square_root_rule():
    half_life = experiment.Optimizer("adamw", beta1=0.9, beta2=0.99, beta_rule="half_life", beta_batch_size=32)
    assert half_life.scalars(32) == {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8}
    at_128 = half_life.scalars(128)
    assert math.log(0.5) / math.log(at_128["beta2"]) * 128 == pytest.approx(math.log(0.5) / math.log(0.99) * 32)
    sde = experiment.Optimizer("adam", rule="sqrt", beta2=0.99, beta_rule="sde", beta_batch_size=32)
    assert sde.scalars(128) == pytest.approx({"beta1": 0.6, "beta2": 0.96, "epsilon": 5e-9})
    assert sde.learning_rate(2**-8, 64) == 2**-5


@pytest.mark.parametrize("rule", ["half_life", "sde"])
def test_a_new_scalar_that_is_no_decay_rate_needs_one_entry_and_keeps_its_value(rule, monkeypatch):
    entry = catalog.OptimizerEntry("clipped", "smallbatch_jax.optim:sgd", {"clip": 2.0, "momentum": 0.9})
    monkeypatch.setitem(catalog.OPTIMIZERS, "clipped", entry)
    found = experiment.Optimizer("clipped", beta_rule=rule, beta_batch_size=4).scalars(8)
    assert found == {"clip": 2.0, "momentum": pytest.approx({"half_life": 0.81, "sde": 0.8}[rule])}


def test_a_beta_that_is_1_in_float32_is_refused():
    assert refused(name="adam", beta2=0.99999998).startswith("optimizer.beta2: is 0.99999998 at batch size 64, which is 1")
    with pytest.raises(experiment.InputError, match=r"beta2: is 0\.9999999931 at batch size 1, .* shorter half-life"):
        experiment.Optimizer("adam").scalars(1, {"beta2_half_life": 1e8})
    assert np.float32(experiment.Optimizer("momentum", momentum=1 - 2**-24).scalars(1)["momentum"]) < 1


def test_what_does_not_go_with_an_optimizer_is_refused():
    assert refused(momentum=0.9).startswith("optimizer.momentum: sgd has none, it has no scalars;")
    assert refused(name="lion", epsilon=1e-8).startswith("optimizer.epsilon: lion has none, it has beta1 and beta2;")
    assert refused(name="adam", beta_rule="half_life").startswith(
        "optimizer.beta_rule: 'half_life' needs optimizer.beta_batch_size"
    )
    assert refused(beta_rule="sde", beta_batch_size=2).startswith("optimizer.beta_rule: sgd has neither momentum nor betas;")
    assert refused(name="adam", beta_batch_size=8).startswith("optimizer.beta_batch_size: belongs to")
    assert refused(name="adam", beta_rule="sde", beta_batch_size=2).startswith("optimizer.beta_rule: 'sde' makes beta1 -2.2 at")
