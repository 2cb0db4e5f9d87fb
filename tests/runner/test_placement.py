"""How many devices share a batch, and what is refused."""

import dataclasses

import jax
import pytest
import tiny

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.program import lanes
from smallbatch_jax.runner import jobs, planning
from smallbatch_jax.runner import placement as scaling
from smallbatch_jax.runner.input import Resident

NETWORK = scaling.Network(flops_per_image=4e8, parameter_bytes=2_000_000, batch_norms=32)
FAST = scaling.Machine(1e13, 1e-5, 1e11)


def chosen(devices, runs, m, b=None, machine=FAST, **fields):
    config = {"model": {"name": "resnet32", "norm": "batch"}, "grid": {"batch_sizes": (m,), "bn_batch_sizes": b and (b,)}}
    asked = experiment.from_config(config | fields)
    return scaling.asked_devices(asked, devices) or scaling.data_devices(asked, (m, b or m), runs, devices, machine, NETWORK)


def test_runs_enough_for_all_devices_share_no_batch():
    assert chosen(devices=8, runs=8, m=2048) == 1


def test_one_large_run_is_shared_by_all_devices_and_a_small_one_by_none():
    assert chosen(devices=8, runs=1, m=2048) == 8
    assert chosen(devices=8, runs=1, m=4) == 1


def test_two_runs_share_the_devices_out():
    assert chosen(devices=8, runs=2, m=2048) == 4


@pytest.mark.parametrize(("m", "b", "devices"), [(1000, None, 8), (1002, None, 2), (1005, None, 1), (192, 48, 8), (24, 4, 2)])
def test_only_numbers_of_devices_that_cut_evenly_are_taken(m, b, devices):
    """1,002 is even and no more; 24 of 192 are half a BN batch of 48; but 6 of 24 are neither a part of 4 nor several."""
    assert chosen(8, 1, m, b, machine=dataclasses.replace(FAST, exchange_seconds=0)) == devices


def test_a_network_that_is_slower_than_the_devices_is_not_used():
    assert chosen(8, 1, 2048, machine=dataclasses.replace(FAST, bytes_per_second=1e6)) == 1


def test_bn_batches_over_devices_cost_exchanges():
    within, across = (scaling.step_seconds(FAST, NETWORK, 64, b, 4) for b in (16, 32))
    assert across - within == pytest.approx(2 * 32 * FAST.exchange_seconds)
    assert scaling.step_seconds(FAST, NETWORK, 64, 64, 1) == pytest.approx(64 * 4e8 / 1e13)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"m": 6, "data_devices": 4},
            "4 devices cannot share a batch of 6 evenly. Use batch size 4 or 8, or data_devices 1, 2",
        ),
        ({"m": 12, "b": 2, "data_devices": 4}, "a batch of 12 in BN batches of 2 evenly. Use batch size 8 or 16"),
        ({"m": 2, "data_devices": 4}, "Use batch size 4, or data_devices 1 or 2"),
        ({"m": 6, "data_devices": 3}, "3 does not divide the 8 devices there are; use 1, 2, 4, 8"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_could(fields, said):
    with pytest.raises(InputError, match=said):
        chosen(8, 1, **fields)


def test_one_run_shares_its_batch_whatever_the_grid_holds():
    config = {"grid": {"batch_sizes": (2,)}, "data_devices": 4, "base_lr": 0.1}
    assert experiment.single_run(config | {"batch_size": 8}).data_devices == 4
    with pytest.raises(InputError, match="cannot share a batch of 6"):
        experiment.single_run(config | {"batch_size": 6})


def test_a_batch_without_batch_norm_may_be_cut_anywhere():
    config = {"grid": {"batch_sizes": (12,), "bn_batch_sizes": (2,)}, "data_devices": 4}
    assert experiment.from_config(config | {"model": {"norm": "none"}}).data_devices == 4


def test_an_own_model_is_not_spread():
    own = tiny.grid(model={"name": "own:Model"}, dataset={"name": "own:data"})
    assert scaling.data_devices(own, (4, 4), 1, 2, FAST, NETWORK) == 1
    with pytest.raises(InputError, match="own model"):
        scaling.asked_devices(dataclasses.replace(own, data_devices=2), 2)


def job(m=4, b=4, **fields):
    data = tiny.dataset()
    asked = tiny.grid(base_lrs=(2**-7,), **fields)
    return jobs.Job(asked, data, lambda b, axis_name=None: tiny.TinyModel(b), m, b, asked.runs(), None)  # pyright: ignore


def test_one_run_of_much_work_is_shared_by_idle_cores_and_one_of_little_is_not(monkeypatch):
    assert len(job().runs) < jax.device_count()
    assert planning.spread(job()).data_devices == 1
    assert planning.spread(job(data_devices=2)).data_devices == 2
    monkeypatch.setattr(planning, "flops_per_image", lambda *_: 1e9)
    assert planning.spread(job()).data_devices == 2
    assert planning.spread(job(data_devices=1)).data_devices == 1
    assert planning.spread(job(precision="bfloat16")).data_devices == 1  # which is rounded otherwise in a share


@pytest.mark.parametrize(("m", "b", "devices"), [(64, 64, 8), (8, 8, 4), (64, 16, 8), (36, 36, 4), (6, 6, 2), (2, 2, 1)])
def test_on_cpu_only_whole_blocks_are_shared_so_that_no_bit_depends_on_the_cores(monkeypatch, m, b, devices):
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    monkeypatch.setattr(scaling, "step_seconds", lambda *shape: 1 / shape[-1])
    assert planning.spread(job(m, b)).data_devices == devices


def test_a_share_that_does_not_fit_is_taken_in_parts(monkeypatch):
    """Half as many examples at a time until it fits; with the BN batch for the smallest part."""
    asked = tiny.grid(base_lrs=(2**-7,), batch_sizes=(32,), bn_batch_sizes=(4,), model={"name": "alexnet", "norm": "batch"})
    tried = []

    class Fitting:
        def __init__(self, parts):
            self.peak_bytes, self.mesh = 10 if parts == 8 else 100, lanes.lane_mesh()

    def compiled(self, supply, lanes, parts):
        tried.append((lanes, parts))
        return Fitting(parts)

    monkeypatch.setattr(jobs.Job, "_compile", compiled)
    large = jobs.Job(asked, tiny.dataset(), None, 32, 4, asked.runs(), None, memory_bytes=50)  # pyright: ignore
    large.compile(Resident(tiny.dataset()))
    assert tried == [(2, None), (2, 16), (2, 8)]
    with pytest.raises(InputError, match="m = 32: one lane per device needs"):
        dataclasses.replace(large, memory_bytes=5).compile(None)  # pyright: ignore
    assert tried[-1] == (2, 4)
