"""Models of flax.nnx, Equinox and pairs of functions train as the linen module does; any others are refused."""

import functools
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny
from flax import linen as nn
from flax import nnx
from pictures import error_line

import smallbatch_jax as sbj
from smallbatch_jax.models.adapters import adapted
from smallbatch_jax.program import lanes
from smallbatch_jax.program.train import Batch, Program, Setting, init_state, make_train_step
from smallbatch_jax.runner import scheduler
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import workdir

pytestmark = pytest.mark.usefixtures("optimized")

FEATURES, HIDDEN, CLASSES = 4, 8, 3
ROWS = jax.ShapeDtypeStruct((FEATURES,), jnp.float32)


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="out")(nn.tanh(nn.Dense(HIDDEN, name="hidden")(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(FEATURES, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def make_mlp(key):
    return eqx.nn.MLP(FEATURES, CLASSES, HIDDEN, 1, jnp.tanh, key=key)


def init_mlp(key, x):
    keys = jax.random.split(key)
    sizes = [(x.shape[-1], HIDDEN), (HIDDEN, CLASSES)]
    return [(jax.random.normal(k, size), jnp.zeros(size[1])) for k, size in zip(keys, sizes, strict=True)]


def apply_mlp(params, x):
    (kernel, bias), (out_kernel, out_bias) = params
    return jnp.tanh(x @ kernel + bias[None]) @ out_kernel + out_bias[None]


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


class Noisy(nnx.Module):
    """A module with batch norm and dropout, which are state of a run."""

    def __init__(self, rngs, rate=0.5):
        self.hidden, self.norm = nnx.Linear(FEATURES, HIDDEN, rngs=rngs), nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(rate, rngs=rngs), nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1))))))


class EquinoxNoisy(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear
    order: jax.Array  # integers, hence not parameters

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden, self.out = eqx.nn.Linear(FEATURES, HIDDEN, key=keys[0]), eqx.nn.Linear(HIDDEN, CLASSES, key=keys[1])
        self.norm, self.dropout = eqx.nn.BatchNorm(HIDDEN, "batch", momentum=0.9, mode="ema"), eqx.nn.Dropout(0.5)
        self.order = jax.random.permutation(key, HIDDEN)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.hidden(x.ravel()), state)
        return self.out(self.dropout(jax.nn.relu(x[self.order]), key=key)), state


def noisy_apply(params, rng, x, is_training):
    """Takes its arguments in Haiku's order and adds noise in training."""
    (kernel, bias), (), out = params
    x = jnp.tanh(x.reshape(len(x), -1) @ kernel + bias[None])
    return (x * jax.random.bernoulli(rng, 0.5, x.shape) if is_training else x) @ out


def noisy_init(key, x):
    return [(0.1 * jax.random.normal(key, (x[0].size, HIDDEN)), jnp.zeros(HIDDEN)), (), jnp.ones((HIDDEN, CLASSES))]


make_noisy = eqx.nn.make_with_state(EquinoxNoisy)
NOISY = {"nnx": Noisy, "equinox": make_noisy, "functions": (noisy_init, noisy_apply)}
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


class Stuck(Noisy):
    def __init__(self, kind, rngs):
        super().__init__(rngs)
        self.kind = kind

    def __call__(self, x):
        x = self.norm(self.hidden(x), use_running_average={"never": True, "always": False}.get(self.kind))
        return self.out(self.dropout(x, deterministic=False if self.kind == "dropout" else None))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("never", "Stuck has batch_stats that training never changes"),
        ("always", "Stuck changes its batch_stats at evaluation, where it must not train"),
        ("dropout", "Stuck draws random numbers, as dropout does, at evaluation, where it must not train"),
    ],
)
def test_an_nnx_module_that_is_stuck_is_refused(kind, says):
    assert error_line(adapted(functools.partial(Stuck, kind)).settled, ROWS).startswith(f"model: {says}")


class Averaging(nnx.Module):
    """Divides by a running mean, which is a plain variable, and counts its calls."""

    def __init__(self, rngs, always):
        self.out, self.mean = nnx.Linear(FEATURES, CLASSES, rngs=rngs), nnx.Variable(jnp.ones((1, FEATURES)))
        self.calls, self.always = nnx.Variable(jnp.int32(0)), always

    def __call__(self, x, train):
        self.calls[...] += 1
        if train or self.always:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jnp.abs(x).mean(0, keepdims=True)
        return self.out(x / self.mean[...])


def test_a_variable_that_learns_from_the_test_examples_is_refused_and_a_counter_is_not():
    adapted(lambda rngs: Averaging(rngs, False)).settled(ROWS)
    line = error_line(adapted(lambda rngs: Averaging(rngs, True)).settled, ROWS)
    assert line.startswith("model: Averaging changes its batch_stats at evaluation, where it must not train")


def test_an_equinox_class_is_a_factory():
    adapted(EquinoxLinear).settled(ROWS)


class EquinoxLinear(eqx.Module):
    out: eqx.nn.Linear

    def __init__(self, key):
        self.out = eqx.nn.Linear(FEATURES, CLASSES, key=key)

    def __call__(self, x):
        return self.out(x)


def test_an_array_that_nnx_does_not_find_is_refused():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.found, self.offset = nnx.data(jnp.arange(3.0)), jax.random.normal(rngs.params(), (1, CLASSES))

    class Outer(NnxMlp):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.inner = Inner(rngs)

    assert error_line(adapted, Outer).startswith("model: Outer.inner.offset is an array outside nnx's variables; make it an")


def made_of(result):
    return lambda key: result


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            NnxMlp(nnx.Rngs(0)),
            "got an instance of NnxMlp, whose parameters would ignore the seed; give a factory, e.g. lambda rngs: NnxMlp(",
        ),
        (
            make_mlp(jax.random.key(0)),
            "got an instance of MLP, whose parameters would ignore the seed; give a factory, e.g. lambda key: MLP(",
        ),
        (make_noisy(jax.random.key(0)), "got an instance of EquinoxNoisy, whose parameters"),
        (3, "got int, accepts a model's name, a flax.linen.Module, a function or class"),
        ((init_mlp, 3), "got tuple, accepts"),
        (LinenMlp, "LinenMlp takes (parent, name), neither rngs nor key; accepts"),
        (made_of({"a": 1}), "<lambda> returns a dict; accepts"),
        (lambda key: NnxMlp(key), "<lambda> raised AttributeError: "),
        (
            lambda rngs: {}["no such layer"],
            "<lambda> raised KeyError: 'no such layer' (called with a key; a factory of flax.nnx",
        ),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(given, says):
    assert error_line(adapted, given).startswith(f"model: {says}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda key: eqx.nn.MLP(5, 3, 8, 1, key=key), "MLP raised "),
        (lambda key: EquinoxNoisy(key), "EquinoxNoisy raised TypeError: "),
        (
            (lambda key, x: {"n": jnp.int32(3)}, apply_mlp),
            "init of apply_mlp gives parameters of int32, accepts floating point.",
        ),
        ((lambda key, x: {}, apply_mlp), "apply_mlp raised ValueError: "),
        ((init_mlp, lambda params, x, key: key.nothing), "lambda raised AttributeError: "),
    ],
)
def test_a_model_that_cannot_take_the_data_is_refused_in_one_line(given, says):
    assert error_line(adapted(given).settled, ROWS).startswith(f"model: {says}")


@pytest.mark.parametrize("library", NOISY)
def test_bn_batch_sizes_need_a_field(library):
    model = adapted(NOISY[library])
    assert model.with_bn_batch_size(None, axis_name="data") is model
    assert error_line(model.with_bn_batch_size, 2).startswith("bn_batch_sizes: ")


def test_equinox_is_asked_for_where_it_is_not_installed(monkeypatch):
    module = make_mlp(jax.random.key(0))
    monkeypatch.setitem(sys.modules, "equinox", None)
    line = 'model: needs equinox, which is not installed; run pip install -e ".[equinox]".'
    assert error_line(adapted, made_of(module)) == line
