"""A run is the same run on one device, on several, and on several processes, to the last bit: whole networks, on images."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import save
from PIL import Image

SPREAD = Path(__file__).parents[1] / "spread.py"


def start(out, cases, devices, *distributed):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    line = [sys.executable, str(SPREAD), str(out), json.dumps(cases), *map(str, distributed)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*processes, seconds=500):
    for process in processes:
        _, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, errors


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def on_devices(out, cases, devices):
    finish(start(out, cases, devices))
    return np.load(out)


def on_processes(out, cases, devices_each, count=2):
    address = f"localhost:{free_port()}"
    finish(*(start(out, cases, devices_each, address, count, number) for number in range(count)))
    return np.load(out)


def differing(one, other, name, other_name, count=37):
    """Names of the arrays that are not bit for bit their namesakes, and whether as many test images are right."""
    arrays = [key.removeprefix(name) for key in one.files if key.startswith(f"{name}[")]
    assert len(arrays) == count  # ResNet-8: 7 kernels, each with a batch norm's gain, bias and averages; and of the logits two
    assert all(np.isfinite(one[name + key]).all() for key in arrays)
    differ = [key for key in arrays if not np.array_equal(one[name + key], other[other_name + key])]
    return differ, int(one[f"{name} correct"]) == int(other[f"{other_name} correct"])


def assert_same(one, other, name, other_name, count=37):
    assert differing(one, other, name, other_name, count) == ([], True), (name, other_name)


@pytest.mark.slow
def test_a_batch_spread_over_devices_is_the_same_run(tmp_path):
    """m = 8, two on each of four devices, and BN batches of two devices' shares."""
    cases = {"one": {"m": 8, "b": 4, "devices": 1}, "four": {"m": 8, "b": 4, "devices": 4}}
    found = on_devices(tmp_path / "found.npz", cases | {"cut": {"m": 8, "b": 2, "devices": 4}}, 4)
    assert_same(found, found, "one", "four")
    assert len(differing(found, found, "one", "cut")[0]) == 37  # what BN batches cut at devices would give is told apart


def share_cases(devices):
    """BN batches smaller than, equal to and larger than a device's share of four, and the whole batch; then larger images."""
    digits = {f"{m}-{b}": {"m": m, "b": b, "devices": devices} for m, b in
              [(8, 1), (8, 2), (8, 4), (8, 8), (64, 8), (64, 16), (64, 32), (64, 64)]}  # fmt: skip
    large = [(8, 2), (8, 8), (64, 8), (64, 64), (100, 100)]
    return digits | {f"large {m}-{b}": {"m": m, "b": b, "devices": devices, "random_images": True} for m, b in large}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return on_devices(tmp_path_factory.mktemp("one") / "one.npz", share_cases(1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_every_share_and_bn_batch_is_the_same_run_on_several_devices(tmp_path, on_one_device, devices):
    found = on_devices(tmp_path / "found.npz", share_cases(devices), devices)
    for name in share_cases(devices):
        assert_same(on_one_device, found, name, name)


@pytest.mark.slow
def test_every_share_and_bn_batch_is_the_same_run_on_two_processes_of_two_devices(tmp_path, on_one_device):
    found = on_processes(tmp_path / "found.npz", share_cases(4), 2)
    for name in share_cases(4):
        assert_same(on_one_device, found, name, name)


def other_cases(devices):
    """Every other norm and the other network, batches in parts and not; few and short updates."""
    case = {"m": 16, "devices": devices, "random_images": True, "base_lr": 2**-20, "last": 5}
    networks = [
        ("alexnet", "none"),
        ("alexnet", "batch"),
        ("resnet8", "none"),
        ("resnet8", "group"),
        ("resnet8", "batch_renorm"),
    ]
    small = {f"{model} {norm}": {**case, "b": 16, "model": model, "norm": norm} for model, norm in networks}
    many = {"alexnet in parts": {**case, "m": 128, "b": 128, "model": "alexnet", "norm": "none"}}
    return small | many | {"fewer at a time": {**case, "m": 16, "b": 4, "parts": 4}}


@pytest.mark.slow
def test_every_norm_and_network_is_the_same_run_on_several_devices(tmp_path):
    one, two, four = (on_devices(tmp_path / f"{n}.npz", other_cases(n), n) for n in (1, 2, 4))
    whole = on_devices(tmp_path / "whole.npz", {"fewer at a time": {**other_cases(1)["fewer at a time"], "parts": None}}, 1)
    for name in other_cases(1):
        count = len([key for key in one.files if key.startswith(f"{name}[")])
        for found in (two, four):
            assert_same(one, found, name, name, count)
    assert_same(one, whole, "fewer at a time", "fewer at a time")


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_goes_on_on_one_and_on_two(tmp_path):
    """Ten steps on four devices, ten more on four, two and one: as twenty on one."""
    size = {"m": 16, "b": 8}
    saved = str(tmp_path / "saved")
    half = {"half": {**size, "devices": 4, "last": 10, "save": saved}}
    rest = {str(d): {**size, "devices": d, "first": 10, "restore": saved} for d in (1, 2, 4)}
    found = on_devices(tmp_path / "found.npz", {"whole": {**size, "devices": 1}, **half, **rest}, 4)
    for devices in "124":
        assert_same(found, found, "whole", devices)
    assert len(differing(found, found, "whole", "half")[0]) == 37


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten classes of smooth noise, 400 × 300 pixels."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for i in range(count):
            coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
            image = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
            save(root / split / f"{i % 10}" / f"{i:02}.jpg", image, quality=90)
    return root


@pytest.mark.slow
def test_resnet50_streamed_to_two_processes_is_the_same_run(tmp_path, photographs):
    """Twenty steps on 224×224 pixels, m = 4, BN batches of one process's share and of both; and one process, two at a time."""
    size = {"m": 4, "model": "resnet50", "base_lr": 2**-26, "photographs": str(photographs), "image_size": 224}
    cases = {"b2": {**size, "b": 2}, "b4": {**size, "b": 4}}
    alone = {name: {**case, "devices": 1} for name, case in cases.items()}
    one = on_devices(tmp_path / "one.npz", alone | {"parts": {**alone["b2"], "parts": 2}}, 1)
    two = on_processes(tmp_path / "two.npz", {name: {**case, "devices": 2} for name, case in cases.items()}, 1)
    for name in cases:
        assert_same(one, two, name, name, 267)
    assert_same(one, one, "b2", "parts", 267)
