"""Convolution, pooling, batch norm and the reduced AlexNet against their definitions."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from smallbatch_jax.experiment import InputError
from smallbatch_jax.models import conv as conv_module
from smallbatch_jax.models import create_model
from smallbatch_jax.models import layers as layers_module
from smallbatch_jax.models.conv import NHWC, conv
from smallbatch_jax.models.layers import Conv, Dense
from smallbatch_jax.models.norm import BatchNorm
from smallbatch_jax.models.pool import max_pool

# Image, kernel, strides, padding.
CONVOLUTIONS = [
    ((8, 8), (3, 3), (1, 1), "SAME"),
    ((7, 5), (5, 5), (1, 1), "SAME"),
    ((6, 9), (1, 1), (1, 1), "SAME"),
    ((8, 7), (2, 3), (1, 1), "VALID"),
    ((8, 8), (3, 3), (2, 2), "SAME"),
    ((7, 9), (3, 4), (2, 2), "VALID"),
    ((8, 7), (1, 1), (2, 2), "SAME"),
    ((9, 8), (3, 3), (3, 2), "SAME"),
    ((11, 10), (2, 2), (3, 3), "VALID"),
    ((8, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((5, 6), (3, 2), (3, 1), ((0, 4), (3, 0))),
    ((16, 13), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((3, 2), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((7, 7), (1, 1), (2, 2), ((0, 0), (0, 0))),
]


@pytest.fixture(params=["direct", "winograd", "patches"])
def implementation(request):
    with conv_module.forced(request.param):
        yield request.param


def lax_conv(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(function, *primals):
    """Output, and gradients of a random weighting of it."""

    @jax.jit
    def both(*primals):
        y, pullback = jax.vjp(function, *primals)
        return y, *pullback(normal(*y.shape, seed=9, dtype=y.dtype))

    return both(*primals)


def assert_all_close(ours, theirs, rtol=1e-5, atol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol, atol)


def assert_errors_within_three_times(ours, theirs, exact):
    for a, b, true in zip(ours, theirs, exact, strict=True):
        error, of_theirs = (np.abs(np.asarray(found) - np.asarray(true)).max() for found in (a, b))
        assert error <= 3 * of_theirs + 1e-6


@pytest.mark.parametrize(("image", "window", "strides", "padding"), CONVOLUTIONS)
def test_conv_and_its_gradients_are_those_of_lax(implementation, image, window, strides, padding):
    """Output, gradient of the image, gradient of the kernel, to rounding."""
    x, kernel = normal(2, *image, 3), normal(*window, 3, 4, seed=1)
    ours = with_gradients(lambda x, k: conv(x, k, strides, padding), x, kernel)
    theirs = with_gradients(lambda x, k: lax_conv(x, k, strides, padding), x, kernel)
    assert_all_close(ours, theirs)


@pytest.mark.parametrize("examples", [8, 16, 19])
@pytest.mark.parametrize(("channels", "features"), [(3, 4), (8, 4), (4, 20), (20, 20)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_conv_however_many_images_channels_and_features(examples, channels, features, strides):
    """Few features are computed several columns at once, the kernel's gradient a few images at a time."""
    x, kernel = normal(examples, 8, 8, channels), normal(3, 3, channels, features, seed=1)
    ours = with_gradients(lambda x, k: conv(x, k, strides, ((1, 1), (1, 1))), x, kernel)
    theirs = with_gradients(lambda x, k: lax_conv(x, k, strides, ((1, 1), (1, 1))), x, kernel)
    assert_all_close(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("image", "window", "strides", "channels", "features"), [
    ((16, 16), 7, 2, 3, 64), ((8, 8), 3, 1, 64, 64), ((8, 8), 1, 1, 64, 256), ((8, 8), 1, 1, 256, 64),
    ((14, 14), 1, 2, 256, 128), ((11, 13), 1, 2, 64, 128),
])  # fmt: skip
def test_conv_of_the_shapes_of_resnet50(image, window, strides, channels, features):
    """By whatever is chosen for them, 8 images; errors, measured in float64, within three times those of lax."""
    pads = ((window // 2,) * 2,) * 2
    x, kernel = normal(8, *image, channels), normal(window, window, channels, features, seed=1)
    ours = with_gradients(lambda x, k: conv(x, k, (strides,) * 2, pads), x, kernel)
    theirs = with_gradients(lambda x, k: lax_conv(x, k, (strides,) * 2, pads), x, kernel)
    with jax.enable_x64(True):
        exact = with_gradients(lambda x, k: lax_conv(x, k, (strides,) * 2, pads), *(np.float64(a) for a in (x, kernel)))
    assert_errors_within_three_times(ours, theirs, exact)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 6), (5, 9)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 0)), ((0, 0), (3, 1))])
def test_winograd_is_the_direct_sum_at_the_widths_that_it_is_chosen_for(height, width, padding):
    """48 to 64 channels, odd and even images; errors, measured in float64, within three times those of lax."""
    x, kernel = normal(3, height, width, 48), normal(3, 3, 48, 64, seed=1)
    with conv_module.forced("winograd"):
        ours = with_gradients(lambda x, k: conv(x, k, (1, 1), padding), x, kernel)
    theirs = with_gradients(lambda x, k: lax_conv(x, k, (1, 1), padding), x, kernel)
    with jax.enable_x64(True):
        exact = with_gradients(lambda x, k: lax_conv(x, k, (1, 1), padding), *(np.float64(a) for a in (x, kernel)))
    assert_errors_within_three_times(ours, theirs, exact)


@pytest.mark.parametrize(("examples", "channels", "strides", "dtype", "chosen"), [
    (32, 48, (1, 1), jnp.float32, "winograd"), (31, 48, (1, 1), jnp.float32, "direct"),
    (32, 47, (1, 1), jnp.float32, "direct"), (128, 48, (2, 2), jnp.float32, "direct"), (32, 48, (1, 1), jnp.bfloat16, "direct"),
])  # fmt: skip
def test_winograd_is_chosen_by_width_tiles_stride_and_dtype(monkeypatch, examples, channels, strides, dtype, chosen):
    """From 128 tiles of 2×2 pixels and 48 channels in and out; 6×6 images here, 3×3 of them with stride 2."""
    monkeypatch.setattr(conv_module, "PATCHES_UP_TO_PIXELS", {jax.default_backend(): 0})
    monkeypatch.setattr(conv_module, "WINOGRAD_FROM_TILES", 32 * 9)
    called = []
    for name in ("direct", "winograd"):
        monkeypatch.setitem(conv_module.IMPLEMENTATIONS, name, lambda *a, name=name: called.append(name))
    conv(jnp.zeros((examples, 6, 6, channels), dtype), jnp.zeros((3, 3, channels, 48), dtype), strides)
    assert called == [chosen]


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_convolution_of_one_pixel_is_a_matrix_product(monkeypatch, strides):
    """However large the image."""
    monkeypatch.setattr(conv_module, "PATCHES_UP_TO_PIXELS", {jax.default_backend(): 0})
    text = str(jax.make_jaxpr(lambda x, k: conv(x, k, strides))(jnp.zeros((2, 56, 56, 64)), jnp.zeros((1, 1, 64, 256))))
    assert "dot_general" in text
    assert "conv_general_dilated" not in text


def test_conv_under_vmap_over_kernels_is_each_lane_by_itself(implementation):
    """Lanes with kernels and images of their own: output and both gradients as lax gives them one by one."""
    x, kernels = normal(3, 2, 6, 5, 3), normal(3, 3, 3, 3, 4, seed=1)
    ours = with_gradients(jax.vmap(lambda x, k: conv(x, k, (2, 1))), x, kernels)
    theirs = with_gradients(lambda x, k: jnp.stack([lax_conv(x[i], k[i], (2, 1), "SAME") for i in range(3)]), x, kernels)
    assert_all_close(ours, theirs)


def test_conv_keeps_bfloat16(implementation):
    """Output and gradients of bfloat16 are bfloat16, near those of float32."""
    x, kernel = normal(2, 6, 6, 3), normal(3, 3, 3, 4, seed=1)
    exact = with_gradients(conv, x, kernel)
    rounded = with_gradients(conv, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert {found.dtype for found in rounded} == {jnp.dtype(jnp.bfloat16)}
    assert_all_close([r.astype(jnp.float32) for r in rounded], exact, rtol=0.05, atol=0.3)


def test_patches_leave_no_convolution_and_the_table_chooses_them(monkeypatch):
    """Up to so many output pixels per image, 4×3 here, `conv` is one matrix product; beyond, a convolution."""

    def convolves(height):
        text = str(jax.make_jaxpr(jax.grad(lambda x, k: conv(x, k).sum(), (0, 1)))(normal(1, height, 3, 2), normal(3, 3, 2, 2)))
        return "conv_general_dilated" in text

    monkeypatch.setattr(conv_module, "PATCHES_UP_TO_PIXELS", {jax.default_backend(): 12})
    assert [convolves(height) for height in (3, 4, 5)] == [False, False, True]


@pytest.mark.parametrize(("height", "width"), [(1, 9), (8, 2), (3, 7), (6, 4), (5, 5)])
def test_max_pool_and_its_gradient_are_those_of_reduce_window(height, width):
    """3×3 windows of stride 2, SAME, at every size from 1 to 9."""

    def reduce_window(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    x = normal(2, height, width, 3)
    assert_all_close(with_gradients(max_pool, x), with_gradients(reduce_window, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 9), (8, 2), (3, 7), (6, 4), (5, 5)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 0))])
def test_max_pool_pads_as_it_is_told(height, width, padding):
    """Output and gradient are those of reduce_window with these pads; -∞ in them, never the maximum."""

    def reduce_window(x):
        pads = ((0, 0), *padding, (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)

    x = normal(2, height, width, 3) - 5
    ours = with_gradients(partial(max_pool, padding=padding), x)
    assert_all_close(ours, with_gradients(reduce_window, x), rtol=0, atol=1e-6)


def test_max_pool_hands_on_every_nan():
    """A window is NaN wherever in it the NaN stands, and other windows are not: 25 images with one NaN each."""
    where_nan = jnp.eye(25, dtype=bool).reshape(25, 5, 5, 1)
    found = max_pool(jnp.where(where_nan, jnp.nan, normal(25, 5, 5, 1)))
    np.testing.assert_array_equal(jnp.isnan(found), max_pool(where_nan.astype(jnp.float32)) == 1)


def test_gradient_of_equal_maxima_goes_to_the_first():
    """Of a constant 4×4 image, the top left pixel of each of the four windows, the whole gradient."""
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 4, 4, 1)))
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


def batch_norm(batch_size=None, **options):
    """(x, scale, bias) → the output in training."""
    module = BatchNorm(batch_size, **options)
    return lambda x, scale, bias: module.apply(norm_variables(scale, bias), x, True, mutable=["batch_stats"])[0]


def train(module, variables, x) -> Any:
    """(output, new batch_stats) of one call in training."""
    y, state = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]))(variables, x)
    return y, state["batch_stats"]


def norm_variables(scale, bias, mean=None, var=None):
    mean = jnp.zeros(scale.shape) if mean is None else mean
    var = jnp.ones(scale.shape) if var is None else var
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 5), (2, 5)])
def test_norm_over_the_whole_batch_is_that_of_flax(shape):
    """b = N: output and gradients of image, scale and bias equal flax.linen.BatchNorm's, two-pass variance."""
    flax_norm = nn.BatchNorm(use_running_average=False, epsilon=1e-5, use_fast_variance=False)

    def theirs(x, scale, bias):
        return flax_norm.apply(norm_variables(scale, bias), x, mutable=["batch_stats"])[0]

    x, scale, bias = normal(*shape), normal(5, seed=1), normal(5, seed=2)
    assert_all_close(
        with_gradients(batch_norm(shape[0]), x, scale, bias), with_gradients(theirs, x, scale, bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("shape", "batch_size"), [((6, 4, 3, 5), 2), ((6, 5), 3), ((4, 2, 1, 5), 1)])
def test_sub_batches_are_normalised_each_by_itself(shape, batch_size):
    """b < N equals the norm of b = N applied to consecutive chunks of b, and so do its gradients."""

    def by_chunks(x, scale, bias):
        chunks = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
        return jnp.concatenate([batch_norm()(chunk, scale, bias) for chunk in chunks])

    arrays = normal(*shape), normal(5, seed=1), normal(5, seed=2)
    assert_all_close(with_gradients(batch_norm(batch_size), *arrays), with_gradients(by_chunks, *arrays))


def test_variance_is_two_pass():
    """Mean 10⁴, deviation 1, in float32: the output is right to 0.005, and the running variance to 1 %.

    E[x²] - μ² would be lost in rounding: 10⁸ is held to ±4.
    """
    x = 1e4 + np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype(np.float32)
    exact = x.astype(np.float64)
    deviation = exact.std((0, 1, 2))
    variables = norm_variables(jnp.ones(2), jnp.zeros(2))
    found, batch_stats = train(BatchNorm(), variables, x)
    np.testing.assert_allclose(found, (exact - exact.mean((0, 1, 2))) / deviation, atol=5e-3)
    moved = (np.asarray(batch_stats["var"]) - 0.99) / 0.01
    np.testing.assert_allclose(moved, exact.var((0, 1, 2), ddof=1), rtol=0.01)


@pytest.mark.parametrize(("shape", "batch_size"), [((6, 4, 3, 5), 2), ((6, 5), 3), ((6, 5), None), ((4, 5), 1)])
def test_running_averages_move_once_per_call_towards_the_mean_over_sub_batches(shape, batch_size):
    """0.99 of the old, 0.01 of the mean of the sub-batches' means and unbiased variances (0 of a single value)."""
    x, old_mean, old_var = normal(*shape), normal(5, seed=1), jnp.abs(normal(5, seed=2))
    variables = norm_variables(jnp.ones(5), jnp.zeros(5), old_mean, old_var)
    _, batch_stats = train(BatchNorm(batch_size), variables, x)
    groups = np.asarray(x, np.float64).reshape(shape[0] // (batch_size or shape[0]), -1, 5)
    n = groups.shape[1]
    variances = groups.var(1) * n / max(n - 1, 1)
    expected = {"mean": 0.99 * old_mean + 0.01 * groups.mean(1).mean(0), "var": 0.99 * old_var + 0.01 * variances.mean(0)}
    for name, values in expected.items():
        np.testing.assert_allclose(batch_stats[name], values, rtol=1e-5, atol=1e-7)


def test_evaluation_uses_running_averages_with_epsilon_1e_5():
    """(x - mean) / √(var + 10⁻⁵)·scale + bias, whatever b, and nothing moves; with var = 0 only ε is left."""
    x, scale, bias, mean, var = normal(3, 2, 4), *(normal(4, seed=s) for s in (1, 2, 3)), jnp.array([0.0, 1e-5, 1.0, 4.0])
    found, state = jax.jit(lambda v: BatchNorm(2).apply(v, x, False, mutable=["batch_stats"]))(
        norm_variables(scale, bias, mean, var)
    )
    divisor = jnp.sqrt(jnp.array([1e-5, 2e-5, 1.00001, 4.00001]))
    expected = (np.asarray(x) - np.asarray(mean)[None, None]) / divisor[None, None] * scale[None, None] + bias[None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(state["batch_stats"]["mean"], mean)
    np.testing.assert_array_equal(state["batch_stats"]["var"], var)


def test_statistics_of_bfloat16_are_float32():
    """Means are taken in float32 (257 has no bfloat16), and the output is bfloat16 again."""
    x = jnp.repeat(jnp.array([256.0, 258.0], jnp.bfloat16), 32).reshape(64, 1)
    variables = norm_variables(jnp.ones(1), jnp.zeros(1))
    found, batch_stats = train(BatchNorm(), variables, x)
    assert (found.dtype, batch_stats["mean"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), [[-1.0]] * 32 + [[1.0]] * 32, rtol=1e-4)


def test_norm_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="bn_batch_size: 4 does not divide the batch of 6"):
        batch_norm(4)(normal(6, 5), jnp.ones(5), jnp.zeros(5))


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [(Conv(64, (3, 3)), (1, 8, 8, 16), 144), (Dense(256), (1, 100), 100)],
    ids=["Conv", "Dense"],
)
def test_kernels_start_as_he_gaussians_and_biases_at_zero(layer, shape, fan_in):
    """Deviation √(2/fan-in); a Gaussian not cut off: 1.24 % of it lies beyond 2.5 deviations."""
    params = layer.init(jax.random.key(0), jnp.zeros(shape))["params"]
    kernel = np.asarray(params["kernel"]) / math.sqrt(2 / fan_in)
    assert abs(kernel.mean()) < 0.03
    assert kernel.std() == pytest.approx(1, abs=0.03)
    assert np.mean(np.abs(kernel) > 2.5) == pytest.approx(0.0124, abs=0.004)
    assert not params["bias"].any()


def shapes_of(model, height=32, width=32, channels=3):
    """Variables of a model by shape, and the shapes its layers put out; nothing is computed."""
    images = jax.ShapeDtypeStruct((4, height, width, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    apply = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    logits, state = jax.eval_shape(apply, variables, images)
    layers = {name: layer for name, layer in state["intermediates"].items() if "__call__" in layer}
    outputs = {name: layer["__call__"][0].shape for name, layer in layers.items()}
    return variables, outputs | {"": logits.shape}


def test_alexnet_has_472_794_parameters_and_halves_the_image_three_times(monkeypatch):
    """At 32×32×3 with 10 classes, without norm (§3.1): 32 → 16 → 8 → 4 pixels, then 256, 256, 10 units."""
    convolved = []
    monkeypatch.setattr(layers_module, "conv", lambda *args: convolved.append(y := conv(*args)) or y)
    variables, outputs = shapes_of(create_model("alexnet", 10, norm="none"))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == 472_794
    pixels_and_channels = [(32, 32, 16), (16, 16, 48), (8, 8, 96), (8, 8, 64), (8, 8, 64)]
    assert [y.shape[1:] for y in convolved[-5:]] == pixels_and_channels
    assert outputs == {"dense1": (4, 256), "dense2": (4, 256), "logits": (4, 10), "": (4, 10)}
    assert variables["params"]["dense1"]["kernel"].shape == (4 * 4 * 64, 256)
    assert [variables["params"][f"conv{i}"]["kernel"].shape[0] for i in range(1, 6)] == [5, 3, 3, 3, 3]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (11, 8), (8, 13), (33, 31)])
def test_alexnet_takes_images_from_8_by_8(height, width):
    """Odd sizes and other channel counts too."""
    assert shapes_of(create_model("alexnet", 7, norm="none"), height, width, channels=1)[1][""] == (4, 7)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7), (1, 1)])
def test_alexnet_refuses_smaller_images(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} pixels, needs at least 8x8"):
        shapes_of(create_model("alexnet", 10, norm="none"), height, width)


@pytest.mark.parametrize(
    ("norm", "normalised"),
    [
        ("none", []),
        ("batch", ["conv1", "conv2", "conv3", "conv4", "conv5", "dense1", "dense2"]),
        ("batch_conv_only", ["conv1", "conv2", "conv3", "conv4", "conv5"]),
    ],
)
def test_alexnet_normalises_the_layers_that_its_norm_names(norm, normalised):
    """Those have no bias of their own; the others and always the logits have one, and no norm."""
    variables, _ = shapes_of(create_model("alexnet", 10, norm=norm))
    layers = ["conv1", "conv2", "conv3", "conv4", "conv5", "dense1", "dense2", "logits"]
    expected = {layer: {"kernel"} if layer in normalised else {"kernel", "bias"} for layer in layers}
    expected |= {f"{layer}_norm": {"scale", "bias"} for layer in normalised}
    assert {name: set(leaves) for name, leaves in variables["params"].items()} == expected
    assert set(variables.get("batch_stats", {})) == {f"{layer}_norm" for layer in normalised}
    assert set(variables) == ({"params", "batch_stats"} if normalised else {"params"})


def test_resnet50_has_25_557_032_parameters(monkeypatch):
    """At 1000 classes, with batch norm: 23,454,912 of 53 convolutions, 53,120 of their norms, 2,049,000 of the logits."""
    convolved = []
    monkeypatch.setattr(layers_module, "conv", lambda *args: convolved.append(y := conv(*args)) or y)
    variables, outputs = shapes_of(create_model("resnet50", 1000), 224, 224)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == 25_557_032
    assert outputs[""] == (4, 1000)
    sides = [y.shape[1] for y in convolved[-53:]]
    assert sides == [112, *[56] * 10, *[28] * 13, *[14] * 19, *[7] * 10]  # the first convolution of a stage has the stride
    kernels = {name: layer["kernel"].shape for name, layer in variables["params"].items() if "kernel" in layer}
    assert len(kernels) == 53 + 1
    assert kernels["stem"] == (7, 7, 3, 64)
    assert [kernels[f"stage3_block1_{name}"] for name in ("conv1", "conv2", "conv3", "shortcut")] == [
        *((1, 1, 512, 256), (3, 3, 256, 256), (1, 1, 256, 1024), (1, 1, 512, 1024)),
    ]
    assert [name for name in kernels if name.endswith("shortcut")] == [
        f"stage{stage}_block1_shortcut" for stage in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize(("norm", "leaves"), [("none", {"bias"}), ("batch", set()), ("group", set()), ("batch_renorm", set())])
def test_resnet50_has_a_norm_or_a_bias_after_each_convolution(norm, leaves):
    """53 of either; the logits have a bias and no norm. In bfloat16 too all variables and the logits are float32."""
    model = create_model("resnet50", 10, norm, dtype=jnp.bfloat16)
    variables, _ = shapes_of(model)
    params = variables["params"]
    convolutions = [name for name, layer in params.items() if layer.get("kernel", jnp.zeros(())).ndim == 4]
    assert len(convolutions) == 53
    assert all(set(params[name]) == {"kernel"} | leaves for name in convolutions)
    norms = set() if norm == "none" else {f"{name}_norm" for name in convolutions}
    assert set(params) == {*convolutions, *norms, "logits"}
    assert set(variables.get("batch_stats", {})) == (norms if norm.startswith("batch") else set())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 33, 47, 3), jnp.float32))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_train_defaults_to_false(norm):
    """`apply(variables, images)` is what it is with train=False: nothing is mutable, and any number of images will do."""
    model = create_model("alexnet", 10, norm=norm, bn_batch_size=2)
    variables, _ = shapes_of(model, 8, 8)
    images = jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.float32)  # b = 2 does not divide it: only training cares
    by_default = jax.make_jaxpr(model.apply)(variables, images)
    evaluation = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert str(by_default) == str(evaluation)
    if norm == "batch":
        with pytest.raises(ValueError, match="does not divide the batch of 3"):
            jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)


def test_bfloat16_model_has_float32_variables_and_logits():
    model = create_model("alexnet", 10, norm="batch", dtype=jnp.bfloat16)
    variables, _ = shapes_of(model, 8, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "alxnet"}, r"^model\.name: unknown model 'alxnet'; did you mean 'alexnet'\? Known: alexnet"),
        ({"name": None}, r"^model\.name: unknown model None\. Known: alexnet"),
        ({"norm": "bach"}, r"^model\.norm: unknown norm 'bach'; did you mean 'batch'\? Known: none, batch, "),
        ({"num_classes": 0}, r"^num_classes: got 0, accepts an integer from 1"),
        ({"bn_batch_size": 0}, r"^bn_batch_size: got 0, accepts an integer from 1"),
        ({"bn_batch_size": 2.0}, r"^bn_batch_size: got 2\.0, accepts an integer from 1"),
    ],
)
def test_create_model_refuses_what_there_is_not(arguments, message):
    """The message names the field and, where a name is near, suggests it."""
    with pytest.raises(InputError, match=message):
        create_model(**{"name": "alexnet", "num_classes": 10, **arguments})
