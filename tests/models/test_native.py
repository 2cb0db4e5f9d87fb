"""Convolution in machine code, compared with its definition for each vector unit, and its compilation."""

import itertools
import platform
import re
from functools import cache

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest
from arrays import assert_all_close, normal
from jax import lax

from smallbatch_jax.models import native
from smallbatch_jax.models.native import ffi, loops
from smallbatch_jax.models.native.processor import AVX2, AVX512, NEON, processor
from smallbatch_jax.models.native.routine import optimised

# Image, window, strides, padding. The first is as in the networks, with more columns than fit in registers as sums.
SAME = ((1, 1), (1, 1))
SHAPES = [
    ((32, 33), (3, 3), (1, 1), SAME),
    ((8, 8), (3, 3), (1, 1), SAME),
    ((7, 5), (5, 5), (1, 1), ((2, 2), (2, 2))),
    ((8, 7), (2, 3), (1, 1), ((0, 0), (0, 0))),
    ((8, 8), (3, 3), (2, 2), ((0, 1), (0, 1))),
    ((7, 9), (3, 4), (2, 2), ((0, 0), (0, 0))),
    ((8, 7), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((9, 8), (3, 3), (3, 2), ((0, 0), (0, 1))),
    ((11, 10), (2, 2), (3, 3), ((0, 0), (0, 0))),
    ((5, 6), (3, 2), (3, 1), ((0, 4), (3, 0))),
    ((16, 13), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((3, 2), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((2, 2), (3, 3), (1, 1), SAME),
    ((1, 1), (5, 5), (1, 1), ((2, 2), (2, 2))),
]
CHANNELS = [(3, 16), (16, 16), (32, 48), (16, 64), (5, 96)]


@pytest.fixture(params=[NEON, AVX2, AVX512], ids=["NEON", "AVX2", "AVX-512"])
def unit(request, monkeypatch):
    """Selects each vector unit's code; LLVM splits vectors that are too wide for this machine and leaves registers unused."""
    monkeypatch.setattr(native, "_processor", lambda: request.param)
    return request.param


def shape_of(x, kernel, strides, pads):
    (kh, kw, channels, features), sizes = kernel.shape, x.shape[-3:-1]
    outputs = tuple((s + sum(p) - k) // d + 1 for s, p, k, d in zip(sizes, pads, (kh, kw), strides, strict=True))
    return native.Correlation(sizes, channels, features, (kh, kw), outputs, (pads[0][0], pads[1][0]), strides)


def by_lax(x, kernel, strides, pads):
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def ours(x, kernel, dy, strides, pads):
    """Returns the output, the kernel's gradient and, if its channels fill vectors, the image's gradient."""
    shape = shape_of(x, kernel, strides, pads)
    found = [native.correlate(shape, x, kernel), native.kernel_gradient(shape, x, dy)]
    if native.possible(shape.channels):
        flipped = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
        found.append(native.correlate(shape.of_image_gradient(), dy, flipped))
    return found


def theirs(x, kernel, dy, strides, pads):
    y, pullback = jax.vjp(lambda x, kernel: by_lax(x, kernel, strides, pads), x, kernel)
    dx, dw = pullback(dy)
    return [y, dw, dx][: 2 + native.possible(kernel.shape[2])]


def operands(image, window, strides, pads, channels, features, images=3):
    x, kernel = normal(images, *image, channels), normal(*window, channels, features, seed=1)
    return x, kernel, normal(images, *shape_of(x, kernel, strides, pads).outputs, features, seed=2)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize(
    ("shape", "channels"), [*zip(SHAPES, itertools.cycle(CHANNELS), strict=False), *((SHAPES[0], pair) for pair in CHANNELS)]
)
@pytest.mark.long
def test_it_and_its_gradients_are_those_of_lax(shape, channels):
    """Output and the gradients of kernel and image agree to rounding."""
    arrays = operands(*shape, *channels)
    assert_all_close(ours(*arrays, *shape[2:]), theirs(*arrays, *shape[2:]), rtol=1e-4, atol=5e-4)


@pytest.mark.usefixtures("unit")
def test_the_gradient_of_the_kernel_over_more_images_than_the_cache_holds():
    x, kernel, dy = operands((32, 32), (3, 3), (1, 1), SAME, 16, 16, images=24)
    dw = native.kernel_gradient(shape_of(x, kernel, (1, 1), SAME), x, dy)
    np.testing.assert_allclose(dw, theirs(x, kernel, dy, (1, 1), SAME)[1], rtol=1e-4, atol=2e-3)


@pytest.mark.usefixtures("unit")
def test_the_gradient_of_the_kernel_over_many_images_is_as_exact_as_over_few():
    """With 262,144 positive products added one by one to a single sum, each addition would round off more."""
    shape = native.Correlation((32, 32), 1, 16, (1, 1), (32, 32), (0, 0))
    x, dy = (np.random.default_rng(seed).uniform(1, 2, (256, 32, 32, c)).astype(np.float32) for seed, c in ((0, 1), (1, 16)))
    dw = native.kernel_gradient(shape, jnp.asarray(x), jnp.asarray(dy))[0, 0, 0]
    np.testing.assert_allclose(dw, (x.astype(float) * dy).sum((0, 1, 2)), rtol=5e-6)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("transform", [jax.vmap, lambda f: lambda *xs: lax.map(lambda x: f(*x), xs)], ids=["vmap", "map"])
def test_under_vmap_and_in_a_loop_each_lane_is_computed_by_itself(transform):
    strides, pads = (2, 1), ((0, 1), (1, 1))
    arrays = [
        jnp.stack(lanes) for lanes in zip(*(operands((6, 5), (3, 3), strides, pads, 3, 16) for _ in range(3)), strict=True)
    ]
    found = transform(lambda *lane: ours(*lane, strides, pads))(*arrays)
    expected = [theirs(*(a[i] for a in arrays), strides, pads) for i in range(3)]
    assert_all_close(found, [jnp.stack(lanes) for lanes in zip(*expected, strict=True)], atol=1e-4)


@pytest.mark.usefixtures("unit")
def test_values_that_are_not_finite_stay_where_they_belong():
    """A NaN reaches the outputs whose windows contain it and no others; infinite weights are never multiplied by padding."""
    x = jnp.zeros((2, 8, 8, 16)).at[1, 0, 0, 3].set(jnp.nan)
    kernel = jnp.ones((3, 3, 16, 16))
    shape = shape_of(x, kernel, (1, 1), SAME)
    expected = np.zeros((2, 8, 8, 16), bool)
    expected[1, :2, :2] = True
    np.testing.assert_array_equal(jnp.isnan(native.correlate(shape, x, kernel)), expected)
    assert (native.correlate(shape, jnp.ones(x.shape), jnp.inf * kernel) == jnp.inf).all()


def test_it_is_possible_for_features_that_fill_whole_vectors(unit, monkeypatch):
    assert [native.possible(features) for features in (4, 24, 48, 6)] == [
        features % unit.lanes == 0 for features in (4, 24, 48, 6)
    ]
    monkeypatch.setattr(native, "_processor", lambda: None)
    assert not native.possible(16)


@pytest.mark.parametrize(("machine", "flags", "found"), [
    ("x86_64", ["avx2", "fma", "avx512f", "avx512vl"], AVX512), ("AMD64", ["avx2", "fma", "avx512f"], AVX2),
    ("x86_64", ["avx2"], None), ("aarch64", [], NEON), ("arm64", [], NEON), ("ppc64le", [], None),
])  # fmt: skip
def test_the_vector_unit_follows_from_the_machine_and_its_features(monkeypatch, machine, flags, found):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(flags, True))
    assert processor() == found


def test_where_xla_refuses_the_code_there_is_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(ffi, "VERSION", (1, 0))  # an interface that this package is not written for
    monkeypatch.setattr(ffi, "_names", set())
    monkeypatch.setattr(native, "_processor", cache(native._processor.__wrapped__))
    assert not any(native.possible(16) for _ in range(2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "version" in caplog.text


def innermost_loops(assembly):
    """Returns the instructions of each loop of AArch64 assembly that contains no other loop."""
    lines = [line.strip() for line in assembly.splitlines()]
    labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    spans = [(labels[name], i) for i, line in enumerate(lines) for name in re.findall(r"\.LBB\w+", line) if labels[name] <= i]
    spans = [span for span in spans if span[0] < span[1]]
    inner = [(a, b) for a, b in spans if not any(a <= c and d < b for c, d in spans)]
    return [[line.partition("//")[0].split(None, 1) for line in lines[a + 1 : b + 1]] for a, b in inner]


@pytest.mark.parametrize("write", [loops.correlation, loops.kernel_gradient])
@pytest.mark.parametrize(("channels", "features", "strides"), [(3, 16, (1, 1)), (16, 16, (1, 1)), (32, 64, (2, 2))])
def test_for_64_bit_arm_the_loops_are_vector_products_without_spills(write, channels, features, strides):
    """Cross-compiled innermost loops with products have more `fmla` of 4 floats than loads, and no access to the stack."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu="neoverse-n1", opt=3, jit=True)
    shape = shape_of(jnp.zeros((1, 32, 32, channels)), jnp.zeros((3, 3, channels, features)), strides, SAME)
    code = write("routine", shape, NEON)
    ffi.write_handler(code, "handler")
    assembly = target.emit_assembly(optimised(code, target))
    busy = [body for body in innermost_loops(assembly) if any(line[0] == "fmla" for line in body)]
    assert busy
    for body in busy:
        products = [operands for name, *operands in body if name == "fmla"]
        loads = [operands for name, *operands in body if name.startswith("ld")]
        assert all(re.match(r"v\d+\.4s", operands[0]) for operands in products)
        assert not any(name in ("fmadd", "fmul") for name, *_ in body)
        assert not any("sp" in operands[0] for _, *operands in body if operands)
        assert len(products) > len(loads)
