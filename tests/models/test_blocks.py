"""Sums over a batch are the same to the last bit however many devices hold it, and are sums."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from smallbatch_jax import optim
from smallbatch_jax.models import blocks, blocks_of, create_model, micro_batch_size
from smallbatch_jax.models.blocks import Blocks
from smallbatch_jax.models.fusion import computed_once
from smallbatch_jax.models.pool import mean_pool
from smallbatch_jax.models.product import product
from smallbatch_jax.program.train import Batch, Program, Setting, TrainState, make_train_step

EIGHT = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32) * 10.0 ** np.arange(-4, 4)[:, None].astype(np.float32)
SETTING = Setting(jnp.float32(2**-10), jnp.int32(0), jnp.float32(1e-4), jnp.float32(0.2))


@pytest.mark.parametrize(
    ("m", "b", "size"),
    [(1, 1, 1), (2, 2, 2), (4, 4, 2), (6, 6, 3), (8, 8, 2), (8, 1, 2), (8, 4, 2), (24, 3, 3), (24, 2, 6), (48, 4, 12),
     (64, 8, 8), (96, 96, 12), (2048, 2048, 256), (7, 7, 7)],
)  # fmt: skip
def test_blocks_are_at_most_eight_of_two_examples_or_more_and_nest_with_bn_batches(m, b, size):
    assert blocks.block_size(m, b) == size
    assert m % size == 0
    assert (m // size).bit_count() == 1
    assert size % b == 0 or b % size == 0


@pytest.mark.parametrize(
    ("norm", "m", "b", "together"), [("none", 128, 128, 32), ("batch", 128, 128, 128), ("batch", 128, 8, 32)]
)
def test_what_one_device_takes_together_depends_on_the_whole_batch(norm, m, b, together):
    assert blocks_of(norm, m, b).together == together


@pytest.mark.parametrize(
    ("examples", "block", "parts"), [(128, 16, 32), (96, 12, 24), (512, 64, 32), (96, 24, 24), (36, 9, 18)]
)
def test_parts_are_of_a_block_or_of_a_power_of_two_of_them(examples, block, parts):
    """The largest up to 32 such: 96 in parts of 24, two blocks of 12, though 32 would divide it too."""
    assert micro_batch_size("none", examples, examples, block=block) == parts


def test_a_tree_adds_in_pairs():
    x = EIGHT
    pairs = [x[0] + x[1], x[2] + x[3], x[4] + x[5], x[6] + x[7]]
    np.testing.assert_array_equal(blocks.tree(jnp.asarray(x)), (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]))
    assert not np.array_equal(blocks.tree(jnp.asarray(x)), np.cumsum(x, 0, dtype=np.float32)[-1])  # as one order is told apart
    np.testing.assert_array_equal(blocks.tree(jnp.asarray(x[:5])), ((x[0] + x[1]) + (x[2] + x[3])) + x[4])


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_total_is_that_of_one_device(devices):
    """Of four blocks of two: two devices hold branches of the tree, four its leaves."""

    def share(x):
        with blocks.of(Blocks(2, 8)):
            return blocks.over_devices(blocks.total(x, len(x)), "data")

    shares = EIGHT.reshape(devices, -1, 3)
    pairs = [EIGHT[i] + EIGHT[i + 1] for i in range(0, 8, 2)]
    for found in jax.jit(jax.vmap(share, axis_name="data"))(shares):
        np.testing.assert_array_equal(found, (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]))


LANES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from smallbatch_jax.models import blocks
mesh = jax.make_mesh((LANES, DATA), ("lane", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def steps(x, count):
    with blocks.of(blocks.Blocks(2, 16)):
        return jax.lax.fori_loop(0, count[0], lambda _, x: blocks.over_devices(x, "data"), x)
spread = jax.shard_map(steps, mesh=mesh, in_specs=(P("lane", "data"), P("lane")), out_specs=P("lane"), check_vma=False)
found = jax.jit(spread)(np.ones((LANES, DATA, 5), np.float32), np.arange(LANES))
np.testing.assert_array_equal(found, np.array([[[DATA**i] * 5] for i in range(LANES)]))
"""


@pytest.mark.parametrize(("lanes", "data"), [(4, 2), (2, 4)])
def test_devices_wait_for_none_that_holds_another_lane(lanes, data):
    """Lanes take 0, 1, … steps, each on devices of its own."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = LANES.replace("LANES", str(lanes)).replace("DATA", str(data))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=100)


def test_devices_that_are_no_power_of_two_sum_too():
    def share(x):
        with blocks.of(Blocks(2, 6)):
            return blocks.over_devices(blocks.total(x, len(x)), "data")

    found = jax.jit(jax.vmap(share, axis_name="data"))(EIGHT[:6].reshape(3, 2, 3))
    np.testing.assert_allclose(found[2], EIGHT[:6].sum(0), rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 4, 8])
def test_pieces_are_summed_in_their_order_within_blocks_of_four(at_once):
    def of_few(x):
        return {"sum": x.sum(0), "count": jnp.int32(len(x))}

    with blocks.of(Blocks(4, 8)):
        found = jax.jit(lambda x: blocks.summed(of_few, at_once, x))(EIGHT)
    np.testing.assert_allclose(found["sum"], EIGHT.sum(0), rtol=1e-6)
    assert int(found["count"]) == 8
    if at_once == 1:
        left, right = (np.cumsum(half, 0, dtype=np.float32)[-1] for half in (EIGHT[:4], EIGHT[4:]))
        np.testing.assert_array_equal(found["sum"], left + right)


@pytest.mark.parametrize("shape", [(8, 5, 5, 3), (8, 64, 64, 16), (16, 2, 2, 8), (8, 7, 9, 24)])
def test_channel_sums_are_those_of_any_number_of_pieces(shape):
    """Eight pieces at once and one by one, in a loop as in training; fewer numbers than are summed at a time, and more."""
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def sums(pieces):
        def of_share(_, x):
            runs = blocks.in_runs(x, pieces)
            assert runs[0].size <= 40_000  # above which XLA:CPU cuts a sum as its threads are
            return None, blocks.channel_sums(jnp.square(runs - 0.1), pieces)

        with blocks.of(Blocks(shape[0] // 8, shape[0])):
            found = jax.jit(lambda x: jax.lax.scan(of_share, None, x)[1])(x.reshape(8 // pieces, -1, *shape[1:]))
        return np.asarray(found).reshape(8, -1)

    np.testing.assert_allclose(sums(8), np.square(x - 0.1).reshape(8, -1, shape[-1]).sum(1), rtol=1e-5)
    for pieces in (4, 2, 1):
        np.testing.assert_array_equal(sums(pieces), sums(8))


def test_a_batch_of_a_single_run_is_summed_as_two():
    """XLA:CPU sums the products of one run a number at a time; a share of a batch is cut as the whole is."""
    x = jnp.zeros((2, 32, 32, 16))
    for cut, runs in ((Blocks(2, 2), 2), (Blocks(2, 4), 1), (None, 2)):
        with blocks.of(cut):
            assert blocks.in_runs(x, 1).shape == (runs, 2048 // runs, 16)
    assert blocks.in_runs(jnp.zeros((1, 5, 5, 3)), 1).shape == (1, 25, 3)


@pytest.mark.parametrize("n", [2, 3, 8, 40])
@pytest.mark.parametrize("rows", [(), (4,)])
def test_a_product_and_its_gradients_are_those_of_a_matrix_product(n, rows):
    rng = np.random.default_rng(2)
    x, kernel, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((n, *rows, 6), (6, 5), (n, *rows, 5)))
    with blocks.of(Blocks(3 if n == 3 else 2, n)):
        y, pullback = jax.vjp(product, x, kernel)
        dx, dkernel = pullback(dy)
    for found, expected in [(y, x @ kernel), (dx, dy @ kernel.T), (dkernel, x.reshape(-1, 6).T @ dy.reshape(-1, 5))]:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 7, 7, 2048), (4, 8, 8, 64), (4, 1, 3, 5)])
def test_the_mean_of_an_image_is_the_same_whatever_others_there_are(shape):
    """After work whose result is kept for the backward pass, in a loop as in training; its gradient is spread evenly."""
    x = np.random.default_rng(4).normal(size=shape).astype(np.float32)

    def means(shares):
        def of_share(x):
            y = computed_once(jnp.maximum(x * 1.5, 0))
            return mean_pool(y), y

        with blocks.of(Blocks(1, 4)):
            return jax.jit(lambda x: jax.lax.map(of_share, x))(x.reshape(shares, -1, *shape[1:]))[0].reshape(4, -1)

    np.testing.assert_allclose(means(1), np.maximum(x * 1.5, 0).mean((1, 2)), rtol=1e-5)
    for shares in (2, 4):
        np.testing.assert_array_equal(means(shares), means(1))
    dy = x[:, 0, 0]
    (dx,) = jax.vjp(mean_pool, x)[1](dy)
    np.testing.assert_allclose(dx, np.broadcast_to(dy[:, None, None] / (shape[1] * shape[2]), shape), rtol=1e-5)


def test_how_a_share_is_computed_depends_on_what_one_device_takes_together():
    """A dense kernel's gradient by outer products or by one product."""
    x = jnp.ones((4, 6))
    for together in (4, 64):
        with blocks.of(Blocks(2, together)):
            gradient = jax.make_jaxpr(lambda x: jax.vjp(lambda kernel: product(x, kernel), jnp.ones((6, 5)))[1](x[:, :5]))(x)
            assert (" mul " in str(gradient)) == (together == 4)


def test_a_small_share_is_filled_up_and_cut_again():
    """To as many images as one device takes together, if that makes fewer rows than are enough."""
    seen = []

    def double(x):
        seen.append(len(x))
        return 2 * x

    with blocks.of(Blocks(2, 8)):
        np.testing.assert_array_equal(blocks.filled(double, 1, jnp.asarray(EIGHT[:2])), 2 * EIGHT[:2])
        blocks.filled(double, 16, jnp.asarray(EIGHT[:2]))
        blocks.filled(double, 64, jnp.asarray(EIGHT[:2]))
    blocks.filled(double, 1, jnp.asarray(EIGHT[:2]))
    assert seen == [8, 4, 2, 2]


def drawn(model, images) -> Any:
    """Variables as after initialisation, by NumPy: to compile `init` takes longer than to compile a step."""
    rng = np.random.default_rng(5)

    def leaf(path, like):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, (2 / np.prod(like.shape[:-1])) ** 0.5, like.shape).astype(like.dtype)
        return np.full(like.shape, name in ("scale", "var"), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0), images[:1]))


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "b"), [("batch", 8), ("batch", 4), ("none", 8)])
def test_steps_of_a_network_on_two_devices_are_bit_for_bit_those_on_one(norm, b):
    """Three steps of eight images in four blocks: parameters, running averages, losses."""
    rng = np.random.default_rng(3)
    batch = Batch(rng.normal(size=(8, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 8).astype(np.int32))
    cut = blocks_of(norm, 8, b)

    def trained(devices):
        axis = "data" if devices > 1 else None
        model = create_model("alexnet", 10, norm, b, axis_name=axis)
        step = make_train_step(model, Program(8, 10, axis_name=axis, blocks=cut))

        def steps(state, batch):
            return jax.lax.scan(lambda state, _: step(state, SETTING, batch), state, None, 3)

        variables = drawn(model, batch.images)
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        spread = jax.shard_map(steps, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
        return jax.tree.map(np.asarray, jax.jit(spread)(step_state(variables), batch))

    one, two = trained(1), trained(2)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one[1].loss[0], one[1].loss[2])  # it moved


def step_state(variables):
    opt_state = optim.summed_sgd(1.0, 1).init(variables["params"])
    return TrainState(jnp.int32(0), variables["params"], variables.get("batch_stats", {}), opt_state)
