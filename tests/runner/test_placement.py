"""Placement: the number of devices that share a batch, what is refused, and the layout that fits the memory."""

import dataclasses

import jax
import pytest
import tiny

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.program import lanes
from smallbatch_jax.runner import jobs
from smallbatch_jax.runner.input import Resident


def shared(chosen):
    """Returns the number of devices that share each batch."""
    return jobs.Setup(chosen, tiny.dataset()).mesh.shape["data"]


def asked(m, b=None, **fields):
    config = {"model": {"name": "resnet32", "norm": "batch"}, "grid": {"batch_sizes": (m,), "bn_batch_sizes": b and (b,)}}
    return shared(experiment.from_config(config | fields))


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "devices", lambda: list(range(8)))


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
def test_what_cannot_be_shared_is_refused_with_what_could(eight_devices, fields, said):
    with pytest.raises(InputError, match=said):
        asked(**fields)


def test_idle_cores_share_large_batches_unasked(eight_devices, monkeypatch):
    grid = {"batch_sizes": (64,), "base_lrs": (0.1, 0.2), "seeds": (0,)}
    runs = {"model": {"name": "resnet32", "norm": "batch"}, "grid": grid}
    assert asked(2048) == 8
    assert asked(2048, data_devices=2) == 2
    assert asked(66) == 2  # 4 does not divide 66
    assert asked(32) == 1  # exchanges would cost too much
    assert shared(experiment.from_config(runs)) == 4  # two runs, four devices each
    assert shared(experiment.from_config(runs | {"grid": grid | {"seeds": range(3)}})) == 1
    assert shared(experiment.from_config(runs | {"grid": grid | {"batch_sizes": (2, 64)}})) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert asked(2048) == 1
    assert asked(2048, data_devices=8) == 8


@pytest.mark.parametrize(("m", "b", "devices"), [(1000, None, 8), (192, 48, 8), (24, 4, 2), (36, None, 4)])
def test_a_batch_must_only_divide_evenly(eight_devices, m, b, devices):
    """A shard of 24 is half a BN group of 48; a shard of 12 holds three BN groups of 4."""
    assert asked(m, b, data_devices=devices) == devices


def test_one_run_shares_its_batch_whatever_the_grid_holds():
    config = {"grid": {"batch_sizes": (2,)}, "data_devices": 4, "base_lr": 0.1}
    assert experiment.single_run(config | {"batch_size": 8}).data_devices == 4
    with pytest.raises(InputError, match="cannot share a batch of 6"):
        experiment.single_run(config | {"batch_size": 6})


def test_a_batch_without_batch_norm_may_be_cut_anywhere():
    config = {"grid": {"batch_sizes": (12,), "bn_batch_sizes": (2,)}, "data_devices": 4}
    assert experiment.from_config(config | {"model": {"norm": "none"}}).data_devices == 4


def test_an_own_model_is_not_sharded():
    own = tiny.grid(model={"name": "own:Model"}, dataset={"name": "own:data"})
    assert shared(own) == 1
    with pytest.raises(InputError, match="own model"):
        shared(dataclasses.replace(own, data_devices=2))


def job(m=4, b=4, model_of=lambda b, axis_name=None: tiny.TinyModel(b), memory_bytes=None, **fields):
    chosen = tiny.grid(base_lrs=(2**-7,), batch_sizes=(m,), bn_batch_sizes=(b,), **fields)
    return jobs.Job(jobs.Setup(chosen, tiny.dataset(), model_of), m, b, memory_bytes=memory_bytes)


def test_a_job_has_a_lane_for_each_row_of_devices():
    assert jax.device_count() == 2
    assert [job(data_devices=d).layout.lanes for d in (None, 1, 2)] == [2, 2, 1]


def test_a_shard_that_does_not_fit_is_computed_in_micro_batches(monkeypatch):
    """The micro-batch is halved until the program fits; the smallest one is a BN group."""
    tried = []

    class Fitting:
        def __init__(self, layout):
            self.rows, self.lanes, self.mesh = 2, layout.lanes, lanes.lane_mesh()
            self.peak_bytes = 10 if layout.micro_batch_size == 8 else 100

    def compiled(lanes, program, **_):
        tried.append((lanes, program.micro_batch_size))
        return Fitting(jobs.Layout(*tried[-1]))

    monkeypatch.setattr(jobs.lane_programs, "compile_lanes", compiled)
    model = {"model": {"name": "alexnet", "norm": "batch"}}
    job(32, 4, memory_bytes=50, **model).compile(Resident(tiny.dataset()))
    assert tried == [(2, None), (2, 16), (2, 8)]
    with pytest.raises(InputError, match="m = 32: out of memory: one lane per device needs"):
        job(32, 4, memory_bytes=5, **model).compile(Resident(tiny.dataset()))
    assert tried[-1] == (2, 4)
