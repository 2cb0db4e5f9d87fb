"""The program of lanes side by side, for GPUs and TPUs: its results and its operations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from smallbatch_jax.data import Dataset
from smallbatch_jax.data.augment import crop_and_flip
from smallbatch_jax.models import create_model
from smallbatch_jax.models.layers import relu
from smallbatch_jax.models.resnet import CifarResNet
from smallbatch_jax.program import device_data, lanes, segment
from smallbatch_jax.program.side_by_side import Packing, summed_value_and_grad
from smallbatch_jax.program.train import Metrics, Program, Setting, TrainState

LANES, STEPS, BATCH_SIZE, EXAMPLES = 3, 4, 6, 24
CONVOLUTIONS = 7  # in ResNet-8


def one_device():
    return lanes.lane_mesh(jax.devices()[:1])


@functools.cache
def data():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (2 * EXAMPLES, 8, 8, 3), np.uint8), rng.integers(0, 10, 2 * EXAMPLES)
    dataset = Dataset(images[:EXAMPLES], labels[:EXAMPLES], images[EXAMPLES:], labels[EXAMPLES:], 10)
    return device_data.to_device(dataset, one_device())


class OneBlock(CifarResNet):
    """A ResNet of three convolutions with few channels, one of which halves the image."""

    @nn.compact
    def __call__(self, images, train=False):
        x = relu(self.conv(images, 4, 3, 1, train, "stem", self.norm))
        return self.logits(self.block(x, 8, 2, train, "block").mean((1, 2)))


def resnet8(*options, platform):
    return create_model("resnet8", *options, platform=platform)


def arguments(platform, mapping, bn_batch_size=None, make=resnet8, **options):
    model = make(10, "batch", bn_batch_size, platform=platform)
    program = Program(BATCH_SIZE, 2 * STEPS, augment=True, **options)
    return model, program, data(), one_device(), LANES, STEPS, "float32", mapping


@functools.cache
def lowered(platform):
    """Returns the text of the program as it is given to XLA."""
    traced, _ = lanes.trace_lanes(*arguments(platform, "vmap"))
    return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()


def train(platform, mapping, bn_batch_size, make, **options):
    """Returns the states after one segment and the reports; the last lane trains two steps fewer."""
    args = arguments(platform, mapping, bn_batch_size, make, **options)
    program = lanes.compile_lanes(*args)
    init = lanes.initialiser(args[0], jax.ShapeDtypeStruct((8, 8, 3), np.float32))
    state = program.start(program.empty(), {lane: init(lane) for lane in range(LANES)})
    indices = np.stack([tiny.batch_indices(lane, 0, STEPS, BATCH_SIZE, EXAMPLES) for lane in range(LANES)])
    segments = lanes.Segment(indices, np.array([STEPS, STEPS, STEPS - 2], np.int32), np.ones(LANES, bool))
    rates = np.array([2**-13, 2**-11, 2**-12], np.float32)  # so low that rounding flips no ReLU
    setting = Setting(rates, np.arange(LANES, dtype=np.int32), np.full(LANES, 1e-3, np.float32), np.zeros(LANES, np.float32))
    return jax.tree.map(np.asarray, program.run(state, setting, segments))


@pytest.mark.parametrize(
    ("bn_batch_size", "options"), [(None, {}), pytest.param(2, {"micro_batch_size": 2}, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("make", [OneBlock, pytest.param(resnet8, marks=pytest.mark.slow)])
@pytest.mark.long
def test_side_by_side_for_a_gpu_trains_as_one_after_the_other_for_a_cpu(make, bn_batch_size, options):
    """Crops, batch norm in one pass, the gradient of the sum, packed vectors and masks change rounding only."""
    ours, theirs = (train(*where, bn_batch_size, make, **options) for where in (("gpu", "vmap"), ("cpu", "map")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_padding_of_a_crop_is_zero_after_normalisation():
    """Lin et al. pad the normalised image; here images are cropped before normalisation, where zeros are black."""
    seen = []

    def train_step(state, setting, batch):
        seen.append(batch.images)
        return state, Metrics(jnp.float32(0), jnp.int32(0))

    crops = jnp.array([0, 81 + 8], jnp.uint32)  # padding above and on the left; below and, flipped, on the right
    stored = np.full((2, 8, 8, 3), 200, np.uint8)
    examples = segment.Examples(crop_and_flip(stored, crops), jnp.zeros(2, jnp.int32), crops)
    images = data()._replace(mean=jnp.full(3, 100.0), deviation=jnp.full(3, 10.0))
    train = TrainState(jnp.int32(0), {}, {}, ())
    segment._make_advance(train_step)(segment.LaneState(train, 0.0, 0, True), None, examples, images)
    expected = np.zeros((2, 8, 8, 3))
    expected[0, 4:, 4:], expected[1, :4, :4] = 10, 10
    np.testing.assert_array_equal(seen[0], expected)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_step_contains_no_loop(platform):
    """The program's two loops are over the steps and over the batches of the test set."""
    assert lowered(platform).count("stablehlo.while") == 2


def test_weight_gradients_keep_the_window_of_their_kernel():
    """cuDNN has a routine for a gradient with batch groups; with feature groups its window is as large as the image."""
    grouped = re.findall(r"stablehlo.convolution.*?batch_group_count = (\d+)", lowered("tpu"), re.DOTALL)
    assert grouped.count(str(LANES)) == CONVOLUTIONS


@pytest.mark.parametrize(
    ("sharing", "bn_batch_size", "gathered"), [(1, None, 0), (2, BATCH_SIZE // 2, 0), (2, None, 2 * CONVOLUTIONS)]
)
@pytest.mark.long
def test_devices_exchange_gradients_and_statistics_of_a_bn_group_that_spans_them(sharing, bn_batch_size, gathered):
    """A norm gathers both statistics of its input at once, as it does both sums of its gradient; images are not exchanged."""
    axis = "data" if sharing > 1 else None
    mesh = lanes.lane_mesh(jax.devices()[:2], sharing)
    model = create_model("resnet8", 10, "batch", bn_batch_size, axis_name=axis, platform="tpu")
    program = Program(BATCH_SIZE, 2 * STEPS, axis_name=axis, augment=True)
    traced, _ = lanes.trace_lanes(model, program, data(), mesh, 2, STEPS, "float32", "vmap")
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.all_gather") == gathered
    assert bool(text.count("stablehlo.all_reduce")) == (sharing > 1)


def test_the_host_is_not_called_and_every_state_is_donated():
    text = lowered("gpu")
    _, template = lanes.trace_lanes(*arguments("gpu", "vmap"))
    assert "callback" not in text
    assert text.count("jax.buffer_donor") + text.count("tf.aliasing_output") == len(jax.tree.leaves(template))


def test_a_packed_tree_is_one_array_for_each_dtype_and_kernel_and_unpacks_to_itself():
    tree = {
        "a": jnp.arange(3.0),
        "b": {"kernel": jnp.ones((2, 2)), "scale": jnp.float32(7)},
        "count": jnp.int32(4),
        "empty": {},
    }
    packing = Packing.of(tree)
    packed = packing.pack(tree)
    assert sorted(x.shape for x in packed.values()) == [(), (2, 2), (4,)]
    found = packing.unpack(packed)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_the_gradient_of_the_sum_is_that_of_each_lane():
    def loss(w, x, scale):
        return jnp.sum(jnp.sin(w * x) * scale), {"x": x}

    w, x = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2)) * jnp.arange(1.0, 4)[:, None]
    ours = jax.vmap(summed_value_and_grad(loss, has_aux=True), (0, 0, None))(w, x, 0.5)
    theirs = jax.vmap(jax.value_and_grad(loss, has_aux=True), (0, 0, None))(w, x, 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
