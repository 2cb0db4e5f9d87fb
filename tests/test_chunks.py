"""A layer a few images at a time is the layer of the whole batch: output, statistics, and every gradient."""

import functools
from typing import Any

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallbatch_jax.models import blocks, create_model, layers, micro_batch_size
from smallbatch_jax.models.blocks import Blocks
from smallbatch_jax.models.chunks import with_statistics
from smallbatch_jax.models.layers import Dense
from smallbatch_jax.models.resnet50 import BottleneckResNet

N, C = 12, 3
X = np.random.default_rng(0).normal(size=(N, 4, 5, 2)).astype(np.float32)
SHARED = {"w": np.random.default_rng(1).normal(size=(2, C)).astype(np.float32), "b": np.float32(0.7)}


def layer(shared, of_block, images):
    """Not linear, with an array kept beside the output and one that the images of a block share."""
    x, y = images
    made = jnp.tanh(x) * shared["b"]
    return made @ shared["w"] + y * of_block.reshape(-1, 1, 1, 1), {"made": made}


def of_all(count, shared, of_blocks, images):
    """By the definition, all images at once and in one pass through NumPy's formulas."""
    y, others = layer(shared, of_blocks.repeat(N // count), images)
    cut = y.reshape(count, -1, C)
    return (y, others), (cut.mean(1), cut.var(1))


def objective(function):
    """A scalar in which every output counts, each with weights of its own."""

    def value(shared, of_blocks, images):
        outputs: Any = function(shared, of_blocks, images)
        leaves = jax.tree.leaves(outputs)
        weights = [np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32) for i, leaf in enumerate(leaves)]
        return sum((w * leaf**2).sum() for w, leaf in zip(weights, leaves, strict=True))

    return compiled.quickly(jax.value_and_grad(value, (0, 1, 2)))


@pytest.mark.parametrize(("count", "at_once"), [(1, 1), (1, 4), (1, 12), (2, 3), (4, 3), (4, 1)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_chunks_are_the_whole_batch(count, at_once, offset):
    """Value and gradients to rounding; far from zero too, where E[x²] - μ² would have no digit of the variance left."""
    images = (X, np.float32(offset) + np.random.default_rng(2).normal(size=(N, 4, 5, C)).astype(np.float32))
    of_blocks = np.linspace(0.5, 2.0, count, dtype=np.float32)
    with blocks.of(Blocks(N // count, N)):
        ours = functools.partial(with_statistics, layer, at_once)
        found: Any = compiled.quickly(lambda *args: ours(*args))(SHARED, of_blocks, images)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(of_all(count, SHARED, of_blocks, images)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
        if offset == 0:
            value, gradients = objective(ours)(SHARED, of_blocks, images)
            expected, theirs = objective(functools.partial(of_all, count))(SHARED, of_blocks, images)
            np.testing.assert_allclose(value, expected, rtol=1e-4)
            for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "size"), [(64, 8), (63, None), (70, 7), (71, None), (72, 8), (68, 4), (512, 8)])
def test_a_large_batch_goes_in_even_chunks_or_not_at_all(n, size):
    """From 64 images, by the largest divisor up to 8 if that is at least 4."""
    assert layers._images_at_once(n) == size


def drawn(model, images) -> Any:
    """Variables as after initialisation, by NumPy: to compile `init` takes longer than to compile a step."""
    rng = np.random.default_rng(5)

    def leaf(path, like):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, (2 / np.prod(like.shape[:-1])) ** 0.5, like.shape).astype(like.dtype)
        return np.full(like.shape, name in ("scale", "var"), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0), images[:1]))


@pytest.mark.parametrize(
    ("model", "convolutions"),
    [
        (create_model("resnet8", 3, "batch"), 7),
        (create_model("alexnet", 3, "batch"), 5),
        pytest.param(create_model("resnet8", 3, "batch_renorm"), 7, marks=pytest.mark.slow),
        pytest.param(BottleneckResNet((1, 1, 1, 1), 3), 17, marks=pytest.mark.slow),
    ],
    ids=["resnet8-batch", "alexnet-batch", "resnet8-batch_renorm", "bottlenecks-batch"],
)
def test_a_network_in_chunks_is_the_network(monkeypatch, model, convolutions):
    """Logits, running statistics and gradients of two blocks of two chunks of 2 images, against those of all at once."""
    images = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8, 8, 3)), jnp.float32)
    variables = drawn(model, images)
    weights = np.random.default_rng(4).normal(size=(8, 3)).astype(np.float32)

    def run() -> Any:
        def value(params, batch_stats):
            logits, state = model.apply({"params": params, "batch_stats": batch_stats}, images, True, mutable=["batch_stats"])
            return (weights * logits).sum(), (logits, state["batch_stats"])

        return compiled.quickly(jax.value_and_grad(value, has_aux=True))(variables["params"], variables["batch_stats"])

    whole = run()
    monkeypatch.setattr(layers, "MANY_IMAGES", 2)
    monkeypatch.setattr(layers, "IMAGES_AT_ONCE", 2)
    called = []
    monkeypatch.setattr(layers, "with_statistics", lambda *args: called.append(args[1]) or with_statistics(*args))
    with blocks.of(Blocks(4, 8)):
        chunked = run()
    assert len(called) == convolutions
    assert set(called) == {2}
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * float(np.abs(b).max()) + 1e-6)


def test_bn_batches_smaller_than_the_batch_are_not_chunked(monkeypatch):
    """Their statistics are not the whole batch's: a batch of 8 with b = 2 is the same whatever is large."""
    model = create_model("resnet8", 3, "batch", 2)
    images = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8, 8, 3)), jnp.float32)
    variables = drawn(model, images)
    monkeypatch.setattr(layers, "IMAGES_AT_ONCE", 4)
    logits = []
    for many in (100, 2):
        monkeypatch.setattr(layers, "MANY_IMAGES", many)
        apply = compiled.quickly(lambda v: model.apply(v, images, True, mutable=["batch_stats"])[0])
        logits.append(apply(variables))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("examples", [1, 2, 3, 40])
def test_dense_gradients_of_few_examples_are_those_of_a_product(examples):
    """Up to 32 examples the kernel's gradient is a sum of outer products."""
    module = Dense(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(examples, 4)), jnp.float32)
    params: Any = jax.tree.map(jnp.asarray, module.init(jax.random.key(0), x))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(examples, 3)), jnp.float32)
    y, pullback = jax.vjp(lambda p, x: module.apply(p, x), params, x)
    dparams, dx = pullback(dy)
    kernel = params["params"]["kernel"]
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dparams["params"]["kernel"], np.asarray(x).T @ np.asarray(dy), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dparams["params"]["bias"], dy.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "m", "b", "parts"),
    [
        ("none", 128, 128, 32), ("none", 32, 32, None), ("none", 31, 31, None), ("none", 48, 48, 24),
        ("none", 62, 62, 31), ("none", 127, 127, None), ("group", 64, 64, 32),
        ("batch", 128, 128, None), ("batch", 128, 8, 32), ("batch", 128, 64, 64), ("batch", 96, 12, 24),
        ("batch_renorm", 64, 2, 32), ("batch_conv_only", 64, 16, 32), ("batch", 256, 4, 32),
    ],
)  # fmt: skip
def test_parts_hold_whole_bn_batches_and_divide_the_batch(norm, m, b, parts):
    """About 32 examples; none where the batch norm takes the whole batch, or no size would do."""
    assert micro_batch_size(norm, m, b) == parts


def test_off_cpu_the_batch_is_whole(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert micro_batch_size("none", 128, 128) is None
    assert layers._images_at_once(512) is None
