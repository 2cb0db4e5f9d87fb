"""Models of flax.nnx, Equinox and pairs of functions train as the linen module does."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny
from flax import nnx
from networks import (
    CLASSES,
    FEATURES,
    HIDDEN,
    NOISY,
    ROWS,
    LinenMlp,
    NnxMlp,
    Noisy,
    apply_mlp,
    init_mlp,
    make_mlp,
    make_noisy,
)

import smallbatch_jax as sbj
from smallbatch_jax.models.adapters import adapted
from smallbatch_jax.program import lanes
from smallbatch_jax.program.train import Batch, Program, Setting, init_state, make_train_step
from smallbatch_jax.runner import scheduler
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import workdir

pytestmark = pytest.mark.usefixtures("optimized")


def linen_params(hidden, out):
    return {name: {"kernel": k, "bias": b} for name, (k, b) in (("hidden", hidden), ("out", out))}


def nnx_params(hidden, out):
    layers = linen_params(hidden, out)
    return {f"{layer}.{name}.value": x for layer, params in layers.items() for name, x in params.items()}


def equinox_params(*layers):
    return {f"layers.{i}.{name}": x for i, (k, b) in enumerate(layers) for name, x in (("weight", k.T), ("bias", b))}


NETWORKS = {  # the model as given, and its parameters from the (kernel, bias) of each layer
    "linen": (LinenMlp(), linen_params),
    "nnx": (NnxMlp, nnx_params),
    "equinox": (make_mlp, equinox_params),
    "functions": ((init_mlp, apply_mlp), lambda *layers: {"params": list(layers)}),
}


@functools.cache
def losses(library):
    """Returns the losses of 50 steps from the same parameters on the same batches."""
    given, place = NETWORKS[library]
    model, rng = adapted(given).settled(ROWS), np.random.default_rng(0)
    x = rng.normal(size=(50, 8, FEATURES)).astype(np.float32)
    sizes = (FEATURES, HIDDEN), (HIDDEN, CLASSES)
    layers = [tuple(jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for shape in (size, size[1:])) for size in sizes]
    fresh = init_state(model, x[0], jnp.int32(0))
    state = fresh._replace(params=place(*layers))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)
    setting = Setting(jnp.float32(2**-5), jnp.int32(0), jnp.float32(1e-3), jnp.float32(0))
    step = make_train_step(model, Program(8, 50))
    batches = Batch(x, np.argmax(x[..., :CLASSES], -1).astype(np.int32))
    train = jax.jit(lambda state, batches: jax.lax.scan(lambda s, batch: step(s, setting, batch), state, batches))
    return np.asarray(train(state, batches)[1].loss)


@pytest.mark.parametrize("library", ["nnx", "equinox", "functions"])
def test_equal_networks_have_equal_losses_in_every_library(library):
    expected = losses("linen")
    assert expected[-5:].mean() < 0.7 * expected[:5].mean()
    np.testing.assert_allclose(losses(library), expected, rtol=1e-6)


RATES = 2**-9, 2**-7, 2**-6


def sweep(model, progress=None, **options):
    given: Any = {"batch_sizes": (4,), "base_lrs": RATES, "epochs": 3, "lanes": 4} | options
    return sbj.sweep(model, tiny.dataset(), progress=progress or NoProgress(), **given)


@functools.cache
def undisturbed(library):
    return sweep(NOISY[library])


@pytest.mark.parametrize("library", ["nnx", pytest.param("equinox", marks=pytest.mark.slow)])
def test_a_lane_of_several_equals_the_run_alone_bit_for_bit(library):
    frame = undisturbed(library)
    of_several = frame[frame.base_lr == RATES[-1]].reset_index(drop=True)
    assert of_several.test_accuracy.iloc[-1] > 0.8
    alone = sweep(NOISY[library], base_lrs=RATES[-1:])
    pd.testing.assert_frame_equal(of_several, alone, check_exact=True)


@pytest.mark.parametrize("library", ["nnx", "equinox"])
@pytest.mark.long
def test_side_by_side_as_one_after_the_other(library, monkeypatch):
    monkeypatch.setattr(lanes, "lane_mapping", lambda platform: "vmap")
    pd.testing.assert_frame_equal(sweep(NOISY[library]), undisturbed(library), rtol=1e-4)


class Killed(NoProgress):
    """Ends the work a segment after the second checkpoint, as a SIGKILL would: nothing more is saved."""

    def __init__(self, saved):
        self.saved = saved

    def show(self, *_):
        if len(self.saved) > 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("library", ["nnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("functions", "equinox"))])
@pytest.mark.long
def test_killed_and_resumed_a_run_draws_the_next_random_numbers(library, tmp_path, monkeypatch):
    expected = undisturbed(library)
    monkeypatch.setattr(scheduler, "CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    saved, restored, save, restore = [], [], scheduler.Checkpoints.save, scheduler.Checkpoints.restore
    monkeypatch.setattr(scheduler.Checkpoints, "save", lambda *a: saved.append(save(*a)))
    monkeypatch.setattr(scheduler.Checkpoints, "restore", lambda *a: restored.append(restore(*a)) or restored[-1])
    options = {"workdir": tmp_path / "w", "segment_seconds": 1e-9, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        sweep(NOISY[library], Killed(saved), **options)
    pd.testing.assert_frame_equal(sweep(NOISY[library], **options), expected, check_exact=True)
    assert 0 < restored[-1][0].train.step.max() < 38, "not from a checkpoint in the midst of a run"


def test_random_streams_are_raw_state_that_follows_from_the_seed_and_advances():
    model, x = adapted(Noisy).settled(ROWS), jax.random.normal(jax.random.key(2), (8, FEATURES))
    key, count = "others.dropout.rngs.key.value", "others.dropout.rngs.count.value"
    variables, other = model.init(jax.random.key(0), x), model.init(jax.random.key(1), x)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32), np.dtype(np.uint32)}
    assert not np.array_equal(variables["batch_stats"][key], other["batch_stats"][key])
    first, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert changed["batch_stats"][count] == variables["batch_stats"][count] + 1
    second = model.apply({"params": variables["params"]} | changed, x, train=True)
    assert not np.array_equal(first, second)


@pytest.mark.long
def test_an_equinox_batch_norm_uses_the_batch_in_training_and_its_state_at_evaluation():
    """The outputs are those of the module called directly."""
    model, x = adapted(make_noisy).settled(ROWS), np.random.default_rng(0).normal(size=(6, FEATURES)).astype(np.float32)
    variables, key = model.init(jax.random.key(0), x[:1]), jax.random.key(1)
    outputs, changed = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    evaluated = model.apply({"params": variables["params"]} | changed, x)
    module, state = make_noisy(key=jax.random.key(0))
    keyed = lambda x, key, state: module(x, state, key=key)  # noqa: E731
    expected, state = jax.vmap(keyed, (0, 0, None), (0, None), axis_name="batch")(x, jax.random.split(key, 6), state)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    one_by_one = [eqx.nn.inference_mode(module)(row, state)[0] for row in x]
    np.testing.assert_allclose(evaluated, one_by_one, rtol=1e-5)
    assert not np.allclose(evaluated, outputs)


def test_a_mode_argument_of_an_nnx_module_is_told():
    class Told(nnx.Module):
        def __init__(self, rngs):
            self.out, self.norm = nnx.Linear(FEATURES, CLASSES, rngs=rngs), nnx.BatchNorm(CLASSES, rngs=rngs)

        def __call__(self, x, is_training):
            return self.norm(self.out(x), use_running_average=not is_training)

    adapted(Told).settled(ROWS)


@pytest.mark.long
def test_a_factory_has_one_fingerprint_and_other_code_another():
    same = [adapted(Noisy), adapted(lambda rngs: Noisy(rngs)), adapted(functools.partial(Noisy, rate=0.5)).settled(ROWS)]
    found = [model.fingerprint(ROWS) for model in [*same, adapted(functools.partial(Noisy, rate=0.4))]]
    assert {model.name for model in same} == {"own:Noisy"}
    assert [workdir._model_difference(found[0], other) is None for other in found] == [True, True, True, False]


class EquinoxLinear(eqx.Module):
    out: eqx.nn.Linear

    def __init__(self, key):
        self.out = eqx.nn.Linear(FEATURES, CLASSES, key=key)

    def __call__(self, x):
        return self.out(x)


def test_an_equinox_class_is_a_factory():
    adapted(EquinoxLinear).settled(ROWS)
