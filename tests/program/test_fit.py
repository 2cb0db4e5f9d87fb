"""Own optimizers that are refused before anything is compiled, and how another function of the same name is recognised."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from pictures import error_line

from smallbatch_jax.optim import Optimizer
from smallbatch_jax.program import fit
from smallbatch_jax.program.tasks import CLASSIFICATION, Task, correct
from smallbatch_jax.store.workdir import _model_difference

PARAMS = {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32), "bias": jax.ShapeDtypeStruct((2,), np.float32)}


def own(make):
    return Optimizer(lambda learning_rate, weight_decay, /, **scalars: make(learning_rate, **scalars), elementwise=False)


def bare(init, update):
    return own(lambda learning_rate: optax.GradientTransformation(init, lambda g, s, p=None: update(learning_rate, g, s)))


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (
            own(lambda lr: optax.inject_hyperparams(optax.sgd)(learning_rate=lr)),
            "keeps its learning rate or another scalar in its",
        ),
        (own(lambda lr: optax.add_noise(0.1, 0.5, jax.random.key(0))), "keeps a typed random key in its state"),
        (bare(lambda p: jnp.int32(0), lambda lr, g, s: (g, s * 1.5)), "changes the tree, a shape or a dtype of its state"),
        (bare(lambda p: (), lambda lr, g, s: (jax.tree.map(jnp.sum, g), s)), "do not have the tree structure and shapes of"),
        (own(lambda lr: optax.adam(1e-3)), "mine does not use its learning rate"),
        (own(lambda lr: optax.contrib.reduce_on_plateau()), "(called with learning_rate; its update with gradients, state and"),
    ],
)
def test_an_own_optimizer_that_would_not_train_as_meant_is_refused(optimizer, says):
    assert says in error_line(fit.require_optimizer, optimizer, PARAMS, "mine")


class WithParameter(nn.Module):
    initial: Any

    @nn.compact
    def __call__(self, images, train=False):
        self.param("n", lambda key: self.initial)
        return nn.Dense(3)(images.reshape(len(images), -1))


@pytest.mark.parametrize(("initial", "got"), [(jnp.int32(3), "int32[]"), (jnp.zeros((0, 3)), "float32[0, 3]")])
def test_parameters_that_cannot_be_trained_are_refused(initial, got):
    says = error_line(fit.require_model, WithParameter(initial=initial), CLASSIFICATION, tiny.dataset())
    assert says == f"model: its parameter n is {got}, accepts floating point, not empty."


@pytest.mark.parametrize(
    "make", [optax.adamw, optax.lion, lambda lr: optax.MultiSteps(optax.sgd(lr), 2).gradient_transformation()]
)
def test_optimizers_of_optax_are_accepted(make):
    fit.require_optimizer(own(make), PARAMS, "optax")


def summaries(weights=(1.0, 1.0, 1.0), decay=0.1):
    def loss(outputs, batch):
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.labels)
        return cross_entropy * jnp.array(weights)[batch.labels]

    def kernels(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    optimizer = own(lambda learning_rate: optax.adamw(learning_rate, weight_decay=decay, mask=kernels))
    return fit.fingerprint(tiny.PlainModel(), Task(loss, {"accuracy": correct}), tiny.dataset(), optimizer)


def test_another_loss_or_optimizer_of_the_name_is_recognised():
    """It is recognised by the weight of a rare class, and by a decay of two-dimensional arrays only."""
    ours = summaries()
    assert _model_difference(ours, summaries()) is None
    assert _model_difference(ours, summaries(weights=(1.0, 1.0, 30.0))) == "classes loss"
    assert _model_difference(ours, summaries(decay=50.0)) == "arrays optimizer"
    earlier = {**ours, "values": {name: ours["values"][name] for name in ("loss", "accuracy", "optimizer")}}
    assert _model_difference(earlier, summaries()) is None
