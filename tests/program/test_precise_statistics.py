"""Precise statistics replace the running averages of batch norm at evaluation, and nothing else."""

import functools

import jax
import numpy as np
import pytest
import tiny

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import order
from smallbatch_jax.program import device_data, lanes
from smallbatch_jax.program.train import Program, Setting

pytestmark = pytest.mark.usefixtures("optimized")

M, STEPS = 8, 6
DATA = tiny.dataset()


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Splits the 50 images into three batches of 16, with two left over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_data, "LARGEST_EVAL_BATCH", 16)
        yield


@functools.cache
def trained(b, precise):
    """Trains a lane for an epoch of m = 8 with BN batches of b; returns (state, report) in NumPy, without the lane axis."""
    data, mesh = device_data.to_device(DATA, lanes.lane_mesh()), lanes.lane_mesh()
    statistics_model = tiny.TinyModel(b, bn_decay=0.0) if precise else None
    model = tiny.TinyModel(None if b == M else b)
    compiled = lanes.compile_lanes(model, Program(M, 6), data, mesh, mesh.size, STEPS, statistics_model=statistics_model)
    state = compiled.start(compiled.empty(), {0: lanes.initialiser(model, DATA.example)(0)})
    segment = lanes.Segment(
        *(np.zeros((mesh.size, *shape), dtype) for shape, dtype in (((STEPS, M), "i4"), ((), "i4"), ((), "?")))
    )
    segment.indices[0], segment.steps[0], segment.evaluate[0] = tiny.batch_indices(0, 0, STEPS, M, 50), STEPS, True
    settings = Setting(*(np.full(mesh.size, v, d) for v, d in ((2**-7, "f4"), (0, "i4"), (0, "f4"), (0, "f4"))))
    return jax.tree.map(lambda x: np.asarray(x)[0], compiled.run(state, settings, segment))


def by_hand(params, b):
    """Returns test loss and number correct by statistics over BN batches of b of shuffled training images, in float64."""
    mean, deviation = (np.asarray(x, np.float64) for x in DATA.channel_statistics())

    def hidden(images):
        rows = ((images - mean) / deviation).reshape(len(images), -1)
        return rows @ params["Dense_0"]["kernel"].astype(np.float64) + params["Dense_0"]["bias"]

    batches = hidden(DATA.train_images[order.epoch_permutation(0, 0, 50)[:48]]).reshape(-1, b, 8)
    norm = params["BatchNorm_0"]
    x = hidden(DATA.test_images) - batches.mean(1).mean(0)
    x = x / np.sqrt(batches.var(1, ddof=min(1, b - 1)).mean(0) + 1e-5) * norm["scale"] + norm["bias"]
    logits = np.maximum(x, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(20), DATA.test_labels]
    return losses.mean(), (logits.argmax(1) == DATA.test_labels).sum()


@pytest.mark.parametrize("b", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_test_set_is_normalised_by_the_mean_over_bn_batches_of_training_images(b):
    state, report = trained(b, True)
    loss, correct = by_hand(state.train.params, b)
    sums = report.tested["test"].sums
    assert sums["loss"] / 20 == pytest.approx(loss, rel=1e-5)
    assert sums["accuracy"] == correct


@pytest.mark.parametrize("b", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_training_is_bit_for_bit_what_it_is_with_running_averages(b):
    precise, running = trained(b, True), trained(b, False)
    jax.tree.map(np.testing.assert_array_equal, precise[0], running[0])
    assert precise[1].tested["test"].sums["loss"] != running[1].tested["test"].sums["loss"]


def config(**fields):
    chosen = experiment.default_config()
    chosen.model.update(fields)
    return experiment.from_config(chosen)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_a_model_without_batch_norm_has_no_statistics_to_recompute(norm):
    with pytest.raises(InputError, match=r"model\.bn_statistics: 'precise' .* norm '" + norm):
        config(norm=norm, bn_statistics="precise")


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, "0.9", float("nan")])
def test_a_decay_is_from_0_to_below_1(decay):
    with pytest.raises(InputError, match=r"model\.bn_decay: got .*, accepts a number from 0 to below 1"):
        experiment.from_config({"model": {"bn_decay": decay}})
    assert config(norm="batch", bn_decay=0.9).model.bn_decay == 0.9
