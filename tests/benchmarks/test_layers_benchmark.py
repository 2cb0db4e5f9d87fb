"""The table of every convolution of a model by every way to compute it: which layers, which ways, which mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import compiled
import numpy as np
import pytest

from smallbatch_jax.models import create_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def layers():
    """The script as a module; its flags exist in this process from then on. How fast its programs are is no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import layers

        patch.setattr(layers.jax, "jit", compiled.quickly)
        yield layers


def run(*arguments):
    line = [sys.executable, "benchmarks/layers.py", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def one_layer(layers, channels=5, padding="SAME"):
    return layers.Layer((4, 4, channels), (3, 3, channels, 6), (1, 1), padding)


def test_resnet8_is_six_distinct_convolutions_of_seven(layers):
    found = layers.find_layers(create_model("resnet8", 10), (32, 32, 3))
    pads = ((1, 1), (1, 1))
    assert list(found.items()) == [
        (layers.Layer((32, 32, 3), (3, 3, 3, 16), (1, 1), pads), 1),
        (layers.Layer((32, 32, 16), (3, 3, 16, 16), (1, 1), pads), 2),
        (layers.Layer((32, 32, 16), (3, 3, 16, 32), (2, 2), pads), 1),
        (layers.Layer((16, 16, 32), (3, 3, 32, 32), (1, 1), pads), 1),
        (layers.Layer((16, 16, 32), (3, 3, 32, 64), (2, 2), pads), 1),
        (layers.Layer((8, 8, 64), (3, 3, 64, 64), (1, 1), pads), 1),
    ]


@pytest.mark.slow
def test_every_way_of_every_layer_is_timed_and_summed(layers, capsys):
    rows = layers.report({one_layer(layers): 3}, (2,), (1, 2), seconds=1e-4, precision="float32")
    rows = json.loads(json.dumps(rows))
    ways = [" ".join(way) for way in layers.WAYS]
    assert [[way for way in ways if row.get(way, 0) > 0] for row in rows] == [ways[::3], ways]
    assert [(row["count"], row["m"], row["lanes"], row["failed"]) for row in rows] == [(3, 2, 1, {}), (3, 2, 2, {})]
    assert rows[0]["flops"] == 3 * 2 * 4 * 4 * 3 * 3 * 5 * 6
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    header, _, *measured, one_lane, two_lanes = lines
    assert header[4:-1] == ways
    assert all(sum(cell.endswith("*") for cell in line) == 1 for line in measured)
    for row, sums in zip(rows, (one_lane, two_lanes), strict=True):
        assert sums[:4] == ["all", "3", "2", str(row["lanes"])]
        expected = [f"{3 * row[way]:.2f}" if way in row else "–" for way in ways]
        assert [cell.rstrip("*") for cell in sums[4:-1]] == expected


@pytest.mark.parametrize("channels", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_every_way_takes_the_same_steps(layers, channels, monkeypatch):
    """Steps long enough to be seen: the ways differ in how, not in what, and the loops in nothing but length."""
    monkeypatch.setattr(layers, "STEP_SIZE", 1e-3)
    layer, rng = one_layer(layers, channels), np.random.default_rng(0)
    shapes = ((2, *layer.kernel), (2, 3, *layer.image), (2, 3, 4, 4, 6))
    kernels, images, weights = (rng.standard_normal(shape, np.float32) / 4 for shape in shapes)
    one_by_one, by_twos = (
        layers.make_program(layer, "ours", "map", block)(4 // block, kernels, images, weights) for block in (1, 2)
    )
    np.testing.assert_allclose(one_by_one, by_twos, rtol=1e-6)
    plain = layers.make_program(layer, "lax", "map", 1)(4, kernels, images, weights)
    np.testing.assert_allclose(one_by_one, plain, rtol=1e-4, atol=1e-6)
    assert np.abs(one_by_one - kernels).max() > 1e-4
    if channels > layers.IMAGE_CHANNELS:  # where the images move by the loss, theirs alone or all lanes', it is not the same
        for mapping in ("vmap∘grad", "grad∘vmap"):
            other = layers.make_program(layer, "ours", mapping, 1)(4, kernels, images, weights)
            np.testing.assert_allclose(one_by_one, other, rtol=1e-4, atol=1e-6)


def test_a_way_that_fails_is_named_and_the_others_are_timed(layers, monkeypatch):
    def fails(x, kernel, strides, padding):
        raise layers.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setitem(layers.CONVOLUTIONS, "ours", fails)
    row = layers.time_layer(one_layer(layers), 3, 1, 1e-4, "bfloat16")
    assert row["failed"] == {"ours map": "RESOURCE_EXHAUSTED: out of memory"}
    assert row["lax map"] > 0


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--batch_sizes=4,many", "--batch_sizes: got 'many', accepts an integer"),
        ("--batch_sizes=", "--batch_sizes: got []"),
        ("--lanes=0", "--lanes: got 0"),
        ("--lanes=2,2", "--lanes: 2 stands twice"),
        ("--seconds=nan", "--seconds: got nan"),
        ("--config.dataset.name=cifar11", "dataset.name: unknown dataset 'cifar11'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(argument, says):
    done = run("--config=configs/quickstart.py", argument)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_the_command_prints_the_device_the_table_and_json():
    done = run("--config=configs/quickstart.py", "--batch_sizes=2", "--lanes=1", "--seconds=0.0001", "--json")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    found = json.loads(last)
    assert first == f"{found['device']}, jax {found['jax']}, float32, {found['date']}"
    assert [row["layer"].split()[0] for row in found["rows"]] == [
        "8×8×1→16",
        "4×4×16→48",
        "2×2×48→96",
        "2×2×96→64",
        "2×2×64→64",
    ]
