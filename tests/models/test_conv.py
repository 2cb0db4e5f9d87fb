"""Convolution and pooling compared with their definitions."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import assert_all_close, normal, with_gradients
from jax import lax
from pictures import error_line

from smallbatch_jax.models.conv import conv
from smallbatch_jax.models.layers import Conv
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


@pytest.fixture(params=[None, "cpu", "gpu"])
def platform(request):
    """Returns a platform; off CPU `conv` is lax's, and None has both and decides at compilation."""
    return request.param


def lax_conv(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@cache
def images_and_kernel(images, image, channels, window, features):
    return normal(images, *image, channels), normal(*window, channels, features, seed=1)


@cache
def of_lax(shapes, strides, padding):
    """Returns lax's output and gradients for images and kernel of these shapes, to compare implementations with."""
    return with_gradients(lambda x, k: lax_conv(x, k, strides, padding), *images_and_kernel(*shapes))


def assert_errors_within_three_times(ours, theirs, exact):
    for a, b, true in zip(ours, theirs, exact, strict=True):
        error, of_theirs = (np.abs(np.asarray(found) - np.asarray(true)).max() for found in (a, b))
        assert error <= 3 * of_theirs + 1e-6


@pytest.mark.parametrize(("image", "window", "strides", "padding"), CONVOLUTIONS)
def test_conv_and_its_gradients_are_those_of_lax(platform, image, window, strides, padding):
    """Output and the gradients of image and kernel agree to rounding."""
    shapes = (2, image, 3, window, 4)
    ours = with_gradients(lambda x, k: conv(x, k, strides, padding, platform), *images_and_kernel(*shapes))
    assert_all_close(ours, of_lax(shapes, strides, padding))


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((3, 3), (2, 2), "SAME"),
        ((1, 1), (2, 1), ((0, 0), (0, 0))),
        ((5, 3), (1, 1), ((2, 2), (0, 1))),
    ],
)
def test_rows_of_images_are_convolved_as_the_images_are(window, strides, padding):
    def by_rows(x, kernel):
        y = conv(x.reshape(-1, *x.shape[2:]), kernel, strides, padding, images=len(x))
        return y.reshape(len(x), -1, *y.shape[1:])

    shapes = (3, (8, 6), 2, window, 4)
    assert_all_close(with_gradients(by_rows, *images_and_kernel(*shapes)), of_lax(shapes, strides, padding))


def test_a_layer_takes_one_number_for_strides_and_padding_as_that_of_flax():
    x, layer = normal(2, 8, 8, 3), partial(Conv, 16, (5, 5))
    one, each = layer(strides=2, padding=1), layer(strides=(2, 2), padding=((1, 1), (1, 1)))
    of_one, of_each = (conv.init_with_output(jax.random.key(0), x)[0] for conv in (one, each))
    assert of_one.shape == (2, 3, 3, 16)
    assert jnp.array_equal(of_one, of_each)


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((8, 8, 3), {}, "an input of shape [8, 8, 3], accepts images [N, H, W, C]."),
        ((2, 5, 8, 8, 3), {}, "an input of shape [2, 5, 8, 8, 3], accepts images [N, H, W, C]."),
        ((2, 8, 3, 3), {"padding": "VALID"}, "a kernel of [3, 5] pixels, accepts at most the padded image, [8, 3]."),
        (
            (2, 8, 2, 3),
            {"padding": ((0, 0), (1, 1))},
            "a kernel of [3, 5] pixels, accepts at most the padded image, [8, 4].",
        ),
    ],
)
def test_what_is_no_image_or_smaller_than_the_kernel_is_refused_in_one_line(shape, options, says):
    assert error_line(Conv(16, (3, 5), **options).init, jax.random.key(0), jnp.ones(shape)) == f"Conv: got {says}"


@pytest.mark.parametrize("examples", [19, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
@pytest.mark.parametrize(("channels", "features"), [(3, 4), (8, 4), (4, 20), (20, 20)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.long
def test_conv_however_many_images_channels_and_features(examples, channels, features, strides):
    """Features that do not fill whole vectors use im2col, a few images at a time."""
    shapes, padding = (examples, (8, 8), channels, (3, 3), features), ((1, 1), (1, 1))
    ours = with_gradients(lambda x, k: conv(x, k, strides, padding, "cpu"), *images_and_kernel(*shapes))
    assert_all_close(ours, of_lax(shapes, strides, padding), atol=1e-4)


@pytest.mark.parametrize(("image", "window", "strides", "channels", "features"), [
    ((16, 16), 7, 2, 3, 64), ((8, 8), 3, 1, 64, 64), ((8, 8), 1, 1, 64, 256), ((8, 8), 1, 1, 256, 64),
    ((14, 14), 1, 2, 256, 128), ((11, 13), 1, 2, 64, 128),
])  # fmt: skip
@pytest.mark.long
def test_conv_of_the_shapes_of_resnet50(image, window, strides, channels, features):
    """For 8 images, errors measured in float64 are within three times those of lax, whichever kernel is chosen."""
    pads = ((window // 2,) * 2,) * 2
    x, kernel = normal(8, *image, channels), normal(window, window, channels, features, seed=1)
    ours = with_gradients(lambda x, k: conv(x, k, (strides,) * 2, pads, "cpu"), x, kernel)
    theirs = with_gradients(lambda x, k: lax_conv(x, k, (strides,) * 2, pads), x, kernel)
    with jax.enable_x64(True):
        exact = with_gradients(lambda x, k: lax_conv(x, k, (strides,) * 2, pads), *(np.float64(a) for a in (x, kernel)))
    assert_errors_within_three_times(ours, theirs, exact)


@pytest.mark.parametrize(("window", "image", "products"), [((1, 1), (56, 56), 1), ((3, 3), (2, 2), 0), ((3, 3), (56, 56), 0)])
def test_a_window_of_one_pixel_is_one_matrix_product_on_cpu_and_all_others_machine_code(window, image, products):
    x, kernel = jnp.zeros((2, *image, 64)), jnp.zeros((*window, 64, 256))
    text = str(jax.make_jaxpr(lambda x, k: conv(x, k, platform="cpu"))(x, kernel))
    assert (text.count("dot_general["), text.count("ffi_call[")) == (products, 1 - products)
    assert "conv_general_dilated" not in text


@pytest.mark.parametrize(
    ("platform", "precision", "batch_size", "product"),
    [
        ("gpu", "highest", 32, True),
        ("gpu", "highest", 64, False),
        ("gpu", "tensorfloat32", 2, True),
        ("gpu", "tensorfloat32", 32, False),
        ("tpu", "highest", 2, False),
    ],
)
def test_small_batches_on_gpu_are_a_matrix_product_and_all_else_off_cpu_is_one_convolution(
    platform, precision, batch_size, product
):
    with jax.default_matmul_precision(precision):
        made = jax.make_jaxpr(lambda x, k: conv(x, k, platform=platform))
        text = str(made(jnp.zeros((batch_size, 32, 32, 16)), jnp.zeros((3, 3, 16, 16))))
    assert (text.count("dot_general["), text.count("conv_general_dilated[")) == ((1, 0) if product else (0, 1))
    assert "ffi_call" not in text


@pytest.mark.parametrize(("height", "width"), [(1, 9), (8, 2), (3, 7), (6, 4), (5, 5)])
def test_max_pool_and_its_gradient_are_those_of_reduce_window(height, width):
    """They agree for 3×3 windows of stride 2, SAME, at every size from 1 to 9."""

    def reduce_window(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    x = normal(2, height, width, 3)
    assert_all_close(with_gradients(max_pool, x), with_gradients(reduce_window, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 9), (8, 2), (3, 7), (6, 4), (5, 5)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 0))])
@pytest.mark.long
def test_max_pool_pads_as_it_is_told(height, width, padding):
    """Output and gradient are those of reduce_window with these pads, whose -∞ is never the maximum."""

    def reduce_window(x):
        pads = ((0, 0), *padding, (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)

    x = normal(2, height, width, 3) - 5
    ours = with_gradients(partial(max_pool, padding=padding), x)
    assert_all_close(ours, with_gradients(reduce_window, x), rtol=0, atol=1e-6)


def test_max_pool_hands_on_every_nan():
    """In 25 images with one NaN each, a window is NaN exactly if it contains the NaN, wherever in it."""
    where_nan = jnp.eye(25, dtype=bool).reshape(25, 5, 5, 1)
    pool = jax.jit(max_pool)
    found = pool(jnp.where(where_nan, jnp.nan, normal(25, 5, 5, 1)))
    np.testing.assert_array_equal(jnp.isnan(found), pool(where_nan.astype(jnp.float32)) == 1)


def test_gradient_of_equal_maxima_goes_to_the_first():
    """In a constant 4×4 image, the top left pixel of each of the four windows gets the whole gradient."""
    gradient = jax.jit(jax.grad(lambda x: max_pool(x).sum()))(jnp.ones((1, 4, 4, 1)))
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)
