"""The user's own module: its training mode, its fingerprint in a workdir, and what is refused."""

import functools
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from pictures import error_line

from smallbatch_jax.models import identity, norm
from smallbatch_jax.models.own import MODES, LinenModel
from smallbatch_jax.store import workdir

ROWS = jax.ShapeDtypeStruct((5,), jnp.float32)


def settled(module, shape=ROWS):
    return LinenModel(module).settled(shape)


def called(argument, default="", inverted=False, body="nn.Dropout(0.5)(nn.BatchNorm()(x, use_running_average=off), off)"):
    """Returns a module whose mode argument has the given name."""
    scope: dict[str, Any] = {"nn": nn}
    lines = [
        "class Own(nn.Module):",
        "    @nn.compact",
        f"    def __call__(self, x, {argument}{default}):",
        f"        off = {argument if inverted else f'not {argument}'}",
        f"        return nn.Dense(3)({body})",
    ]
    exec("\n".join(lines), scope)
    return scope["Own"]()


ON = ["train", "training", "is_training", "is_train", "train_mode"]
OFF = ["deterministic", "use_running_average", "inference", "inference_mode", "eval", "is_eval", "eval_mode", "test", "is_test"]


@pytest.mark.parametrize("default", ["", "=None", "=False", "=True"])
@pytest.mark.parametrize("name", ON + OFF)
def test_a_mode_is_known_by_its_usual_names(name, default):
    """Its value while training is the one that makes the module train, or `settled` would refuse it."""
    assert settled(called(name, default, inverted=name in OFF))._modes == (name,)


@pytest.mark.parametrize(("default", "inverted"), [("=False", False), ("=True", True)])
@pytest.mark.parametrize("body", ["nn.Dropout(0.5)(x, off)", "nn.BatchNorm()(x, use_running_average=off)"])
def test_a_mode_of_another_name_is_refused_by_what_it_does(default, inverted, body):
    line = error_line(settled, called("phase", default, inverted, body))
    assert "that training never" in line
    assert "train, training, is_training" in line


def test_a_mode_of_another_name_without_a_default_is_refused():
    line = error_line(settled, called("phase"))
    assert line.startswith("model: Own raised TypeError")
    assert "'phase'" in line


class Stuck(nn.Module):
    """A module whose mode is a field."""

    kind: str
    training: bool

    @nn.compact
    def __call__(self, x):
        if self.kind == "dropout":
            x = nn.Dropout(0.5, deterministic=not self.training)(x)
        elif self.kind == "remat":
            x = nn.remat(nn.Dropout)(0.5, deterministic=not self.training)(x)
        elif self.kind == "attention":
            options: Any = {"dropout_rate": 0.2, "deterministic": not self.training}
            x = nn.MultiHeadDotProductAttention(2, qkv_features=4, **options)(x[..., None]).mean(-1)
        elif self.kind == "own batch norm":
            x = norm.BatchNorm()(x, self.training)
        elif self.kind == "batch norm":
            x = nn.BatchNorm(use_running_average=not self.training)(x)
        return nn.Dense(3)(x)


@pytest.mark.parametrize("kind", ["dropout", "remat", "attention"])
def test_dropout_that_is_stuck_is_refused(kind):
    assert "that training never uses" in error_line(settled, Stuck(kind, False))
    assert "draws random numbers, as dropout does, at evaluation" in error_line(settled, Stuck(kind, True))


@pytest.mark.parametrize("kind", ["batch norm", "own batch norm"])
def test_a_batch_norm_that_is_stuck_is_refused(kind):
    assert "batch_stats that training never changes" in error_line(settled, Stuck(kind, False))
    assert "changes its batch_stats at evaluation" in error_line(settled, Stuck(kind, True))


def test_layers_of_several_that_are_stuck_are_warned_of(capsys):
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=True)(nn.Dropout(0.5, deterministic=True)(x))
            x = nn.BatchNorm(use_running_average=not train)(nn.Dropout(0.5, deterministic=not train)(x))
            return nn.Dense(3)(x)

    settled(Frozen())
    warnings = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: model: Frozen has ") for line in warnings] == [True, True]


def test_a_module_without_a_mode_needs_none(capsys):
    assert settled(nn.Dense(3))._modes == ()
    assert settled(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]))._modes == ()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("inside", ["train", "training", "deterministic", None])
def test_what_takes_any_argument_is_given_the_one_that_makes_it_train(inside):
    class Any_(nn.Module):
        @nn.compact
        def __call__(self, x, **given):
            train = given.get(inside, not MODES[inside]) == MODES[inside] if inside else None
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x) if inside else x)

    assert settled(Any_())._modes == (inside or "train",)


def test_a_first_layer_is_given_what_sequential_hands_on():
    assert settled(nn.Sequential([nn.Dropout(0.5), nn.Dense(3)]))._modes == ("deterministic",)
    assert error_line(settled, nn.Sequential([nn.Dense(3), nn.Dropout(0.5)])).startswith("model: Sequential raised ValueError")


class Nnx(nnx.Module):
    def __init__(self, width, rngs):
        self.layer = nnx.Linear(width, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, train=False):
        return self.norm(self.layer(x), use_running_average=not train)


class NnxStuck(Nnx):
    def __call__(self, x):
        return self.norm(self.layer(x))


def test_modules_of_nnx_are_taken_and_refused_alike():
    assert settled(bridge.to_linen(nnx.Linear, 5, 3))._modes == ()
    assert settled(bridge.to_linen(Nnx, 5))._modes == ("train",)
    assert "changes its batch_stats at evaluation" in error_line(settled, bridge.to_linen(NnxStuck, 5))


def test_what_a_module_raises_is_said_to_be_its_own():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {}["no such layer"]

    line = error_line(settled, Broken())
    assert line == "model: Broken raised KeyError: 'no such layer' (called with float32[2, 5])"


@pytest.mark.parametrize(
    ("axis", "shape", "batch_size", "refused"),
    [
        (-1, (5,), 1, True),
        (-1, (5,), 2, False),
        (-1, (2, 1, 5), 1, False),
        (-1, (1, 1, 5), 1, True),
        ((1, 2), (3, 5), 1, True),
    ],
)
def test_batch_norm_over_a_single_value_is_refused(axis, shape, batch_size, refused):
    example = jax.ShapeDtypeStruct(shape, np.float32)

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.BatchNorm(not train, axis=axis)(x).reshape(len(x), -1))

    if refused:
        assert "mean and variance over a single value" in error_line(LinenModel(Normed()).require_batch, example, batch_size)
    else:
        LinenModel(Normed()).require_batch(example, batch_size)


def waves(key, shape, dtype=jnp.float32):
    """Returns initial parameters that compile quickly, unlike random numbers."""
    return jnp.sin(jnp.arange(math.prod(shape), dtype=dtype)).reshape(shape)


Dense = functools.partial(nn.Dense, kernel_init=waves)


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by


def closed(value):
    return lambda x: x * value


class Made(nn.Module):
    """Applies a layer or a function from its field, to activations of 8 features."""

    layer: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        x = Dense(8)(x)
        if isinstance(self.layer, nn.BatchNorm):
            x = self.layer(x, use_running_average=not train)
        elif isinstance(self.layer, nn.Dropout):
            x = self.layer(x, deterministic=not train)
        else:
            x = self.layer(x)
        return Dense(3)(x.astype(jnp.float32))


DIFFERENT = [
    *(nn.Dense(8, kernel_init=nn.initializers.normal(scale)) for scale in (0.01, 10.0)),
    *(functools.partial(nn.leaky_relu, negative_slope=slope) for slope in (0.1, 0.2)),
    *(closed(2), closed(3), Scale(4), lambda x: x @ np.eye(8, k=1)),
    *(nn.BatchNorm(), nn.BatchNorm(momentum=0.9), nn.BatchNorm(epsilon=0.01), nn.Dropout(0.1)),
    *(Dense(8, dtype=jnp.bfloat16), nn.relu, nn.tanh),
]


@functools.cache
def fingerprint(i):
    return LinenModel(Made(DIFFERENT[i])).fingerprint(ROWS)


@pytest.mark.long
def test_fields_that_change_what_is_computed_change_the_fingerprint():
    found = [fingerprint(i) for i in range(len(DIFFERENT))]
    for i, one in enumerate(found):
        assert [workdir._model_difference(one, other) is None for other in found] == [i == j for j in range(len(found))]


@pytest.mark.long
def test_a_fingerprint_is_the_same_in_another_process():
    """Addresses and the order of sets differ in the other process."""
    code = """
        import json
        from test_own import *
        print(json.dumps([fingerprint(i) for i in range(0, len(DIFFERENT), 5)]))
    """
    env = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout) == [fingerprint(i) for i in range(0, len(DIFFERENT), 5)], done.stderr


def test_a_fingerprint_of_an_earlier_version_is_compared_without_the_updated_statistics():
    found = LinenModel(Made(nn.BatchNorm())).fingerprint(ROWS)
    earlier = {name: pair for name, pair in found["values"].items() if not name.startswith("updated")}
    assert len(earlier) < len(found["values"])
    assert workdir._model_difference(found | {"values": earlier}, found) is None


def written(text):
    """Returns a module named Own whose `__call__` has these lines."""
    scope: dict[str, Any] = {"nn": nn, "jnp": jnp, "Dense": Dense}
    lines = ["class Own(nn.Module):", "    @nn.compact", "    def __call__(self, x, train=False):", *text]
    exec(compile("\n".join(lines), "<string>", "exec"), scope)
    return LinenModel(scope["Own"]())


def body(line, output="Dense(3)(x)"):
    return written(["        x = Dense(8)(x)", f"        {line}", f"        return {output}"])


CODE = ["x = x", "x = nn.leaky_relu(x, 0.01)", "x = nn.leaky_relu(x, 0.012)", "x = 1.001 * x", "x = Dense(8)(x)"]
CODE += [f"x = nn.Dropout({rate})(x, not train)" for rate in (0.1, 0.2)]


@pytest.mark.long
def test_other_code_of_the_same_name_has_another_fingerprint():
    found = [body(line).fingerprint(ROWS) for line in CODE]
    for i, one in enumerate(found):
        assert [workdir._model_difference(one, other) is None for other in found] == [i == j for j in range(len(found))]


def test_gradients_tell_code_apart_whose_logits_begin_at_zero():
    output = "nn.Dense(3, kernel_init=nn.initializers.zeros)(x)"
    one, other = (body(line, output).fingerprint(ROWS) for line in ("x = nn.relu(x)", "x = nn.tanh(x)"))
    assert workdir._model_difference(one, other).startswith("gradient ")


def test_a_fingerprint_allows_for_another_processors_rounding():
    one = body("x = nn.BatchNorm(not train)(x)").fingerprint(ROWS)
    rng = np.random.default_rng(0)
    values = {name: [v * (1 + 1e-5 * rng.normal()) for v in pair] for name, pair in one["values"].items()}
    assert workdir._model_difference(one, one | {"values": values}) is None
    values["evaluation"] = [2 * v for v in values["evaluation"]]
    assert workdir._model_difference(one, one | {"values": values}) == "evaluation"
    nothing = {"tolerance": 1e-4, "values": {"evaluation": [float("nan"), float("inf")]}}
    assert workdir._model_difference(nothing, nothing) is None


def test_16_bits_are_compared_with_more_tolerance():
    assert body("x = x").fingerprint(ROWS)["tolerance"] == identity.TOLERANCE
    assert body("x = x.astype(jnp.bfloat16)").fingerprint(ROWS)["tolerance"] == identity.TOLERANCE_16_BITS
