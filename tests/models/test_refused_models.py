"""Models of flax.nnx, Equinox and pairs of functions that cannot be trained as meant are refused in one line."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from networks import (
    CLASSES,
    FEATURES,
    NOISY,
    ROWS,
    EquinoxNoisy,
    LinenMlp,
    NnxMlp,
    Noisy,
    apply_mlp,
    init_mlp,
    make_mlp,
    make_noisy,
)
from pictures import error_line

from smallbatch_jax.models.adapters import adapted


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
