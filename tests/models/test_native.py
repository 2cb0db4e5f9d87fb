"""Convolution in machine code against its definition, for each kind of processor, and how it is chosen."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import assert_all_close, normal, with_gradients
from jax import lax
from test_conv import CONVOLUTIONS, lax_conv

from smallbatch_jax.models import blocks, conv, native
from smallbatch_jax.models.native.processor import NARROW, WIDE

# Image, window, strides, padding: the first as in the networks, with more columns than a processor holds sums of.
SHAPES = [((32, 33), (3, 3), (1, 1), ((1, 1), (1, 1))), *CONVOLUTIONS]
CHANNELS = [(3, 16), (16, 16), (32, 48), (16, 64), (5, 96)]


@pytest.fixture(autouse=True, params=[NARROW, WIDE], ids=["AVX2", "AVX-512"])
def kind(request, monkeypatch):
    """Each kind of processor: LLVM makes several vectors of one that is too wide for that at hand."""
    monkeypatch.setattr(native, "processor", lambda: request.param)


def by_native(x, kernel, strides, padding):
    with conv.forced("native"):
        return conv.conv(x, kernel, strides, padding)


@pytest.mark.parametrize(
    ("shape", "channels"), [*zip(SHAPES, itertools.cycle(CHANNELS), strict=False), *((SHAPES[0], pair) for pair in CHANNELS)]
)
def test_it_and_its_gradients_are_those_of_lax(shape, channels):
    """Output, gradient of the image, gradient of the kernel, to rounding."""
    image, window, strides, padding = shape
    x, kernel = normal(3, *image, channels[0]), normal(*window, *channels, seed=1)
    ours = with_gradients(lambda x, k: by_native(x, k, strides, padding), x, kernel)
    theirs = with_gradients(lambda x, k: lax_conv(x, k, strides, padding), x, kernel)
    assert_all_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("of_blocks", [1, 2, 8])
def test_a_kernels_gradient_of_a_block_is_the_same_whatever_others_there_are(of_blocks):
    """To the last bit, where a block is more images than are taken at a time; and it is their sum."""
    of = native.Correlation((32, 32), 16, 16, (3, 3), (32, 32), (1, 1))
    x, dy = normal(24, 32, 32, 16), normal(24, 32, 32, 16, seed=1)
    found = native.kernel_gradient(of, of_blocks, x, dy)
    size = 24 // of_blocks
    for block, (images, cotangents) in enumerate(
        zip(x.reshape(-1, size, 32, 32, 16), dy.reshape(-1, size, 32, 32, 16), strict=True)
    ):
        np.testing.assert_array_equal(found[block], native.kernel_gradient(of, 1, images, cotangents)[0])
    (expected,) = jax.vjp(lambda k: lax_conv(x, k, (1, 1), "SAME"), jnp.zeros((3, 3, 16, 16)))[1](dy)
    np.testing.assert_allclose(found.sum(0), expected, rtol=1e-4, atol=2e-3)


def test_a_kernels_gradient_of_many_images_has_the_digits_of_few():
    """Sums of a quarter of a million numbers of one sign, of which each addition to one sum would round off more."""
    of = native.Correlation((32, 32), 1, 16, (1, 1), (32, 32), (0, 0))
    x, dy = (np.random.default_rng(seed).uniform(1, 2, (256, 32, 32, c)).astype(np.float32) for seed, c in ((0, 1), (1, 16)))
    found = native.kernel_gradient(of, 1, jnp.asarray(x), jnp.asarray(dy))[0, 0, 0, 0]
    np.testing.assert_allclose(found, (x.astype(float) * dy).sum((0, 1, 2)), rtol=5e-6)


def test_a_gradient_is_summed_by_blocks():
    """As `blocks.tree` adds what each block gives."""
    x, kernel, dy = normal(8, 8, 8, 16), normal(3, 3, 16, 16, seed=1), normal(8, 8, 8, 16, seed=2)

    def gradient(x, dy):
        return jax.vjp(lambda k: by_native(x, k, (1, 1), "SAME"), kernel)[1](dy)[0]

    with blocks.of(blocks.Blocks(2, 8)):
        found = gradient(x, dy)
    parts = jnp.stack([gradient(x[i : i + 2], dy[i : i + 2]) for i in range(0, 8, 2)])
    np.testing.assert_array_equal(found, blocks.tree(parts))


def test_under_vmap_each_lane_is_by_itself_and_in_a_loop_too():
    x, kernels = normal(3, 2, 6, 5, 3), normal(3, 3, 3, 3, 16, seed=1)
    ours = with_gradients(jax.vmap(lambda x, k: by_native(x, k, (2, 1), "SAME")), x, kernels)
    looped = with_gradients(lambda x, k: lax.map(lambda xk: by_native(*xk, (2, 1), "SAME"), (x, k)), x, kernels)
    theirs = with_gradients(lambda x, k: jnp.stack([lax_conv(x[i], k[i], (2, 1), "SAME") for i in range(3)]), x, kernels)
    assert_all_close(ours, theirs)
    assert_all_close(looped, theirs)


def test_what_is_not_finite_stays_so_and_where_it_belongs():
    """A NaN of one image is in the outputs whose windows hold it and in no other; infinite weights meet no padded zero."""
    x = jnp.zeros((2, 8, 8, 16)).at[1, 0, 0, 3].set(jnp.nan)
    y = by_native(x, jnp.ones((3, 3, 16, 16)), (1, 1), "SAME")
    expected = np.zeros((2, 8, 8, 16), bool)
    expected[1, :2, :2] = True
    np.testing.assert_array_equal(jnp.isnan(y), expected)
    assert (by_native(jnp.ones((1, 3, 3, 16)), jnp.full((3, 3, 16, 16), jnp.inf), (1, 1), "SAME") == jnp.inf).all()


@pytest.mark.parametrize(("features", "dtype", "there", "chosen"), [
    (16, jnp.float32, WIDE, "native"), (24, jnp.float32, WIDE, "direct"), (24, jnp.float32, NARROW, "native"),
    (16, jnp.bfloat16, WIDE, "direct"), (16, jnp.float32, None, "direct"),
])  # fmt: skip
def test_it_is_chosen_for_whole_vectors_of_float32(monkeypatch, features, dtype, there, chosen):
    monkeypatch.setattr(native, "processor", lambda: there)
    x, kernel = jnp.zeros((2, 8, 8, 3), dtype), jnp.zeros((3, 3, 3, features), dtype)
    assert conv._choose(x, kernel, (1, 1), ((1, 1), (1, 1))) == chosen


def test_where_xla_takes_no_machine_code_its_own_convolution_runs(monkeypatch, caplog):
    """As one of an interface that this is not written for, which refuses the handler; it is said once."""
    from smallbatch_jax.models.native import call

    monkeypatch.setattr(call, "VERSION", (1, 0))
    monkeypatch.setattr(call, "_made", call._made.__wrapped__)
    monkeypatch.setattr(native, "_works", cache(native._works.__wrapped__))
    x, kernel = normal(2, 8, 8, 3), normal(3, 3, 3, 16, seed=1)
    for _ in range(2):
        np.testing.assert_allclose(
            by_native(x, kernel, (1, 1), "SAME"), lax_conv(x, kernel, (1, 1), "SAME"), rtol=1e-4, atol=1e-5
        )
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "version" in caplog.text


def test_off_cpu_it_is_not(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(conv, "PATCHES_UP_TO_PIXELS", {"gpu": 0})
    assert conv._choose(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16)), (1, 1), ((1, 1), (1, 1))) == "direct"
