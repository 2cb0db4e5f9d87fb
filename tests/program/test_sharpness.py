"""The sharpness is the largest eigenvalue of the Hessian of the training loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from pictures import error_line

import smallbatch_jax as sbj
from smallbatch_jax.config import catalog
from smallbatch_jax.program import device_data, diagnostics, lanes
from smallbatch_jax.program.sharpness import ITERATIONS, sharpness
from smallbatch_jax.program.tasks import Batch, cross_entropy
from smallbatch_jax.program.train import Program, init_state
from smallbatch_jax.runner.progress import NoProgress

PROGRAM = Program(10, 6, diagnostics=("sharpness",))


def plain(params, images):
    """Returns the logits of `tiny.PlainModel`, or of `tiny.TinyModel` with BN groups of 10, by matrix products."""
    x = images.reshape(len(images), -1)
    names = [name for name in params if name.startswith("Dense")]
    *hidden, last = sorted(names, key=lambda name: params[name]["kernel"].shape[1] == 3)
    for name in hidden:
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        if norm := params.get("BatchNorm_0"):
            groups = x.reshape(-1, 10, 8)
            groups = (groups - groups.mean(1, keepdims=True)) / jnp.sqrt(groups.var(1, keepdims=True) + 1e-5)
            x = groups.reshape(-1, 8) * norm["scale"][None] + norm["bias"][None]
        x = jax.nn.relu(x)
    return x @ params[last]["kernel"] + params[last]["bias"][None]


@pytest.mark.parametrize("model", [tiny.PlainModel(), tiny.TinyModel()], ids=["plain", "batch norm"])
@pytest.mark.long
def test_it_is_the_largest_eigenvalue_of_the_whole_hessian(model):
    data = device_data.to_device(tiny.dataset(), lanes.lane_mesh(jax.devices()[:1]))
    state = init_state(model, jnp.zeros((1, 2, 2, 1)), jnp.int32(0))
    params, unravel = ravel_pytree(state.params)
    batch = Batch(data.normalise(data.train_images[data.shuffled]), data.train_labels[data.shuffled])
    hessian = jax.jit(jax.hessian(lambda params: cross_entropy(plain(unravel(params), batch.images), batch).mean()))(params)
    found = jax.jit(diagnostics.make_diagnose(model, PROGRAM))(state, data)
    assert found["train_sharpness"] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-3)


def sharpness_of(product, params, sub_batches):
    return sharpness(diagnostics.Sample(jnp.negative, product, params, sub_batches, len(sub_batches), 1))[0]


def test_it_is_the_largest_eigenvalue_and_not_the_largest_magnitude():
    values = jnp.array([-10.0, 0.5, 1.0, 3.0])
    found = sharpness_of(lambda vector, one: one * values * vector, jnp.ones(4), jnp.array([0.5, 1.5]))
    assert found == pytest.approx(3, rel=1e-5)


def test_it_may_be_negative():
    """One step finds the only eigenvalue, and no vector is left for the others."""
    assert sharpness_of(lambda vector, one: -2.0 * vector, jnp.ones(4), jnp.ones(2)) == pytest.approx(-2)
    assert sharpness_of(lambda vector, one: -2.0 * vector, jnp.ones(1), jnp.ones(2)) == -2


def test_it_is_zero_where_the_loss_has_no_curvature():
    assert sharpness_of(lambda vector, one: 0 * vector, jnp.ones(3), jnp.ones(2)) == 0


def test_it_takes_about_an_eighth_of_the_work_of_an_epoch():
    """It takes 8 Hessian-vector products of a sample, each worth two gradients."""
    data = device_data.DeviceData(None, None, np.arange(50_000), None, None, {})
    k, size = diagnostics.sample_shape(catalog.DIAGNOSTICS["sharpness"], tiny.PlainModel(), Program(8, 1), {}, data)
    assert 2 * ITERATIONS * k * size <= 0.13 * 50_000


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (cube(x), x), lambda x, dy: (3 * jnp.square(x) * dy,))


def test_a_model_that_cannot_be_differentiated_twice_is_refused():
    def apply(params, x):
        return cube(x.reshape(len(x), -1) @ params)

    model = (lambda key, x: jax.random.normal(key, (4, 3))), apply
    asked = tiny.dataset(), (4,), (2**-9,), 1
    line = error_line(sbj.sweep, model, *asked, diagnostics=("sharpness",), progress=NoProgress())
    assert line.startswith("diagnostics: ('sharpness',) cannot be computed for this model: ")
