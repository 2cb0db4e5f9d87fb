"""The gradient noise scale: its value, its error, and the sub-batches that it is estimated from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config import catalog
from smallbatch_jax.program import device_data, diagnostics, lanes
from smallbatch_jax.program.noise_scale import noise_scale
from smallbatch_jax.program.train import Batch, Program, Setting, init_state, make_train_step

M = 8
DATA = tiny.dataset()


def on_device():
    return device_data.to_device(DATA, lanes.lane_mesh(jax.devices()[:1]))


def fresh(model):
    return jax.tree.map(np.asarray, init_state(model, jnp.zeros((1, 2, 2, 1)), jnp.int32(0)))


@pytest.fixture
def whole(monkeypatch):
    """Makes the sample the whole training set, in sub-batches as small as batch norm allows."""
    entry = dataclasses.replace(catalog.DIAGNOSTICS["noise_scale"], share=1, sub_batches=1000)
    monkeypatch.setitem(catalog.DIAGNOSTICS, "noise_scale", entry)


def estimates(gradients, size):
    """Returns B and its jackknife error from the gradients of sub-batches, float64[k, P]."""

    def value(gradients):
        trace = size * gradients.var(0, ddof=1).sum()
        return trace / (np.square(gradients.mean(0)).sum() - trace / (len(gradients) * size))

    k = len(gradients)
    without = np.array([value(np.delete(gradients, i, 0)) for i in range(k)])
    return value(gradients), np.sqrt((k - 1) * without.var())


def gradients_of_training(model, size):
    """Returns the gradients of consecutive batches of the sample, from training steps of η = 1; float64[k, P]."""
    data, state = on_device(), fresh(model)
    step = jax.jit(make_train_step(model, Program(size, 10**6)))
    setting = Setting(np.float32(1 / size), np.int32(0), np.float32(0), np.float32(0))
    before = np.asarray(ravel_pytree(state.params)[0], np.float64)
    found = []
    for indices in np.asarray(data.shuffled)[: 50 // size * size].reshape(-1, size):
        batch = Batch(data.normalise(data.train_images[indices]), data.train_labels[indices])
        found.append(before - np.asarray(ravel_pytree(step(state, setting, batch)[0].params)[0], np.float64))
    return np.stack(found)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("model", "size"),
    [(tiny.PlainModel(), 1), (tiny.TinyModel(), M), (tiny.TinyModel(2), 2)],
    ids=["examples", "batches", "BN groups"],
)
@pytest.mark.long
def test_noise_scale_is_that_of_the_training_gradients_of_its_sub_batches(model, size):
    program = Program(M, 6, diagnostics=("noise_scale",))
    found = jax.jit(diagnostics.make_diagnose(model, program))(fresh(model), on_device())
    value, error = estimates(gradients_of_training(model, size), size)
    assert found["train_noise_scale"] == pytest.approx(value, rel=1e-4)
    assert found["train_noise_scale_error"] == pytest.approx(error, rel=1e-3)


@jax.jit
def samples(ratio):
    """Returns the estimates of 1,000 samples; the i-th eigenvalue of Σ is proportional to 1/√i."""
    size, parameters = 24, 200
    eigenvalues = 1 / jnp.sqrt(jnp.arange(1, parameters + 1))
    deviations = jnp.sqrt(eigenvalues / eigenvalues.sum() * ratio / size)[None]

    def sample(key):
        noise = jax.random.normal(key, (32, parameters)) * deviations
        params = jnp.full(parameters, parameters**-0.5)
        return noise_scale(diagnostics.Sample(lambda one: params + one, jnp.add, params, noise, len(noise), size))

    return jax.lax.map(sample, jax.random.split(jax.random.key(0), 1000))


@pytest.mark.parametrize("ratio", [0.1, 1, 10, 100, 1000])
@pytest.mark.long
def test_it_is_within_two_errors_of_that_of_a_noisy_quadratic(ratio):
    """The gradient of an example is G + ε with |G| = 1 and tr(Σ) = ratio; 1,000 samples of 32 sub-batches of 24 examples."""
    values, errors = samples(np.float32(ratio))
    assert 0.92 <= np.mean(np.abs(values - ratio) <= 2 * errors) <= 0.98
    assert np.median(values) == pytest.approx(ratio, rel=0.1)


def test_it_is_nan_where_the_training_set_has_no_three_sub_batches():
    program = Program(20, 6, diagnostics=("noise_scale",))
    found = diagnostics.make_diagnose(tiny.TinyModel(), program)(fresh(tiny.TinyModel()), on_device())
    assert all(np.isnan(value) for value in found.values())


def shape(name, examples, m, model, batch_stats, **options):
    data = on_device()._replace(shuffled=np.arange(examples))
    return diagnostics.sample_shape(catalog.DIAGNOSTICS[name], model, Program(m, 1, **options), batch_stats, data)


@pytest.mark.parametrize("examples", [1_000, 1_437, 50_000])
@pytest.mark.parametrize("group", [1, 2, 5, 6])
def test_it_takes_a_twentieth_of_the_gradients_of_an_epoch_at_most(examples, group):
    """Each sampled example takes two; this holds as long as 160 BN groups are no more than the training set."""
    k, size = shape("noise_scale", examples, 6, tiny.TinyModel(group), {"mean": 0} if group > 1 else {})
    assert size % group == 0
    assert k >= 4
    assert 2 * k * size <= examples / 20


def test_at_large_batch_sizes_of_batch_norm_it_takes_four_sub_batches():
    assert shape("noise_scale", 50_000, 256, tiny.TinyModel(), {"mean": 0}) == (4, 256)
    assert shape("sharpness", 50_000, 256, tiny.TinyModel(), {"mean": 0}) == (1, 256)
    assert shape("sharpness", 50_000, 128, tiny.TinyModel(), {"mean": 0}, axis_name="data") == (3, 128)


class SharedModel(tiny.TinyModel):
    axis_name: str | None = None


@pytest.mark.usefixtures("whole")
@pytest.mark.long
@pytest.mark.parametrize("examples", [48, 46, 2])
def test_devices_that_share_a_batch_share_the_sub_batches(examples):
    """The examples form BN groups of 2: 12 on each of two devices, 12 and 11, or a single one."""
    mesh, names = lanes.lane_mesh(jax.devices()[:2], 2), ("noise_scale", "sharpness")
    model = SharedModel(2, axis_name="data")
    data = device_data.to_device(DATA, mesh)._replace(shuffled=np.asarray(on_device().shuffled)[:examples])
    together = diagnostics.make_diagnose(model, Program(M, 6, axis_name="data", diagnostics=names))
    shared = jax.jit(jax.shard_map(together, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False))
    alone = jax.jit(diagnostics.make_diagnose(model, Program(M, 6, diagnostics=names)))
    one = on_device()._replace(shuffled=on_device().shuffled[:examples])
    for name, value in alone(fresh(model), one).items():
        assert shared(fresh(model), data)[name] == pytest.approx(float(value), rel=1e-4, nan_ok=True)
