"""An NVIDIA GPU computes what a CPU computes; run with `pytest -m gpu -n 0` on a machine that has one."""

import jax
import numpy as np
import pytest
import tiny

from smallbatch_jax.data import random
from smallbatch_jax.models import conv, create_model
from smallbatch_jax.program.device_data import to_device
from smallbatch_jax.program.lanes import Segment, compile_lanes, initialiser, lane_mesh
from smallbatch_jax.program.train import Program, Setting

pytestmark = pytest.mark.gpu
STEPS, BATCH_SIZE = 5, 8


def first_losses(platform, base_lrs, precision="float32"):
    """Returns, by lane, the mean loss of the first steps of ResNet-8 with batch norm and augmentation, and `alive`."""
    dataset = random("cifar10", None, None)
    mesh = lane_mesh(jax.devices(platform)[:1])
    model = create_model("resnet8", 10, "batch", platform=platform)
    program = Program(BATCH_SIZE, 100, augment=True)
    lanes, data = len(base_lrs), to_device(dataset, mesh)
    compiled = compile_lanes(model, program, data, mesh, lanes, STEPS, precision)
    fresh = initialiser(create_model("resnet8", 10, "batch", platform="gpu"), dataset.example)(0)
    state = compiled.start(compiled.empty(), dict.fromkeys(range(lanes), fresh))
    constants = [np.zeros(lanes, dtype) for dtype in (np.int32, np.float32, np.float32)]
    indices = tiny.batch_indices(0, 0, STEPS, BATCH_SIZE, dataset.num_train)
    steps = np.full(lanes, STEPS, np.int32)
    segment = Segment(np.repeat(indices[None], lanes, 0), steps, np.zeros(lanes, bool))
    _, report = compiled.run(state, Setting(np.array(base_lrs, np.float32), *constants), segment)
    return np.asarray(report.loss_sum) / STEPS, np.asarray(report.alive)


@pytest.fixture(scope="module")
def on_gpu():
    return first_losses("gpu", [2**-8, 2**-10, 2**-12])[0]


def test_the_first_losses_are_those_of_a_cpu(on_gpu):
    on_cpu, _ = first_losses("cpu", [2**-8, 2**-10, 2**-12])
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4)


def test_a_lane_that_diverges_leaves_the_others_as_they_were(on_gpu):
    losses, alive = first_losses("gpu", [2**-8, np.inf, 2**-12])
    assert list(alive) == [True, False, True]
    np.testing.assert_allclose(losses[[0, 2]], on_gpu[[0, 2]], rtol=1e-5)


@pytest.mark.parametrize(("channels", "side", "small"), [(16, 32, 0), (16, 32, 10**9), (64, 8, 0), (64, 8, 10**9)])
def test_float32_convolutions_of_lanes_do_not_round_to_tf32(channels, side, small, monkeypatch):
    monkeypatch.setattr(conv, "SMALL_COPIES", small)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 4, side, side, channels))
    kernel = rng.normal(size=(3, 3, 3, channels, channels))

    def outputs(platform, *arrays):
        def both(x, kernel, dy):
            y, gradients = jax.vjp(jax.vmap(lambda x, kernel: conv.conv(x, kernel, platform=platform)), x, kernel)
            return y, *gradients(dy)

        return jax.jit(both)(*arrays)

    with jax.default_matmul_precision("highest"):
        found = outputs("gpu", *(a.astype(np.float32) for a in (x, kernel, dy)))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        expected = outputs("tpu", x, kernel, dy)  # the plain convolution, on the CPU
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(b)
