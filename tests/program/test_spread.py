"""A run of a whole network on images is the same on one device, on several and on several processes.

It is bit-equal on the same number of devices. On another number, sums over a batch round differently: float64 agrees to 1e-8
after twenty steps, and in float32 rounding flips a ReLU sooner or later, so that only the first losses are compared.
"""

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


ARRAYS = 37  # ResNet-8 has 7 kernels, each with a batch norm's scale, bias, mean and variance; and its logits


def start(out, cases, devices, *distributed, double=True):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_ENABLE_X64": str(int(double))}
    line = [sys.executable, str(SPREAD), str(out), json.dumps(cases), *map(str, distributed)]
    return subprocess.Popen(line, env=os.environ | flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*processes, seconds=500):
    for process in processes:
        _, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, errors


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def on_devices(out, cases, devices, **options):
    finish(start(out, cases, devices, **options))
    return np.load(out)


def on_processes(out, cases, devices_each, count=2):
    address = f"localhost:{free_port()}"
    finish(*(start(out, cases, devices_each, address, count, number) for number in range(count)))
    return np.load(out)


def largest_difference(one, other, name, other_name=None, count=ARRAYS):
    """Returns the largest difference of any array from its namesake, relative to the larger of 1 and its largest element."""
    arrays = [key.removeprefix(name) for key in one.files if key.startswith(f"{name}[")]
    assert len(arrays) == count
    pairs = [(one[name + key], other[(other_name or name) + key]) for key in arrays]
    assert all(a.dtype == b.dtype for a, b in pairs)
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs)


def assert_same(one, other, name, other_name=None, count=ARRAYS, within=1e-8):
    assert largest_difference(one, other, name, other_name, count) <= within, name
    assert one[f"{name} correct"] == other[f"{other_name or name} correct"]


def share_cases(devices):
    """Returns cases of BN groups below, at and above a shard of four devices and of a whole batch; then larger images."""
    digits = {f"{m}-{b}": {"m": m, "b": b, "devices": devices} for m, b in
              [(8, 1), (8, 2), (8, 4), (8, 8), (64, 8), (64, 16), (64, 32), (64, 64)]}  # fmt: skip
    large = {f"large {m}-{b}": {"m": m, "b": b, "devices": devices, "random_images": True} for m, b in [(8, 4), (20, 20)]}
    return digits | large


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return on_devices(tmp_path_factory.mktemp("one") / "one.npz", share_cases(1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_every_shard_and_bn_group_is_the_same_run_on_several_devices(tmp_path, on_one_device, devices):
    found = on_devices(tmp_path / "found.npz", share_cases(devices), devices)
    for name in share_cases(devices):
        assert on_one_device[f"{name} loss"].dtype == np.float64
        assert_same(on_one_device, found, name)
    assert largest_difference(on_one_device, found, "8-2", "8-4") > 1e-3  # BN groups split at devices would be detected


@pytest.mark.slow
def test_every_shard_and_bn_group_is_the_same_run_on_two_processes_of_two_devices(tmp_path, on_one_device):
    found = on_processes(tmp_path / "found.npz", share_cases(4), 2)
    for name in share_cases(4):
        assert_same(on_one_device, found, name)


@pytest.mark.slow
def test_the_first_five_losses_in_float32_agree_to_1e_5(tmp_path):
    one, four = (
        on_devices(tmp_path / f"{n}.npz", {str(m): {"m": m, "b": m, "devices": n, "last": 5} for m in (8, 64)}, n, double=False)
        for n in (1, 4)
    )
    for m in ("8", "64"):
        assert one[f"{m} loss"].dtype == np.float32
        np.testing.assert_allclose(one[f"{m} loss"], four[f"{m} loss"], rtol=1e-5)


def other_cases(devices):
    """Returns cases of the other norms and the other network, with and without micro-batches, of five steps."""
    case = {"m": 16, "devices": devices, "last": 5, "random_images": True, "base_lr": 2**-20}
    networks = [("alexnet", norm) for norm in ("none", "batch")]
    networks += [("resnet8", norm) for norm in ("none", "group", "batch_renorm")]
    small = {f"{model} {norm}": {**case, "b": 16, "model": model, "norm": norm} for model, norm in networks}
    return small | {"micro": {**case, "b": 2, "parts": 2}, "whole": {**case, "b": 2}}


@pytest.mark.slow
def test_every_norm_and_network_is_the_same_run_on_two_devices(tmp_path):
    one, two = (on_devices(tmp_path / f"{n}.npz", other_cases(n), n) for n in (1, 2))
    for name in other_cases(1):
        assert_same(one, two, name, count=len([key for key in one.files if key.startswith(f"{name}[")]))
    assert_same(one, one, "micro", "whole")


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_goes_on_on_one_and_on_four(tmp_path):
    """After ten steps on four devices, ten more equal twenty: bit for bit on four devices, to rounding on one."""
    size, saved = {"m": 16, "b": 8}, str(tmp_path / "saved")
    whole = {str(d): {**size, "devices": d} for d in (1, 4)}
    half = {"half": {**size, "devices": 4, "last": 10, "save": saved}}
    rest = {f"rest {d}": {**size, "devices": d, "first": 10, "restore": saved} for d in (1, 4)}
    found = on_devices(tmp_path / "found.npz", whole | half | rest, 4)
    assert_same(found, found, "4", "rest 4", within=0)
    assert_same(found, found, "1", "rest 1")
    assert largest_difference(found, found, "4", "half") > 1e-3


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Returns a folder of ten classes of smooth noise, 400 × 300 pixels."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for i in range(count):
            coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
            image = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
            save(root / split / f"{i % 10}" / f"{i:02}.jpg", image, quality=90)
    return root


@pytest.mark.slow
def test_a_network_streamed_to_two_processes_is_the_same_run(tmp_path, photographs):
    """Twenty steps of m = 4 agree for BN groups of one process's shard and of both."""
    size = {"m": 4, "model": "resnet20", "base_lr": 2**-12, "photographs": str(photographs), "image_size": 32}
    cases = {f"b{b}": {**size, "b": b} for b in (2, 4)}
    one = on_devices(tmp_path / "one.npz", {name: {**case, "devices": 1} for name, case in cases.items()}, 1)
    two = on_processes(tmp_path / "two.npz", {name: {**case, "devices": 2} for name, case in cases.items()}, 1)
    for name in cases:
        assert_same(one, two, name, count=97)
