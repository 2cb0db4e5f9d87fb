"""Packing of a program's last runs: evenly over the devices, into a smaller program, or into one that fits the memory."""

import dataclasses
import threading
from types import SimpleNamespace

import jax
import pandas as pd
import pytest
import tiny

from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.program import devices, lanes
from smallbatch_jax.runner import policy, scheduler
from smallbatch_jax.runner.compiler import Compiler
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.policy import Round
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.runner.segments import Lanes
from smallbatch_jax.store import results

pytestmark = pytest.mark.usefixtures("optimized")

FIELDS = {"base_lrs": (2**-7, 2e30, 2**-8, 3e30), "seeds": (0,), "segment_seconds": 1e-9}


def train(workdir, **fields):
    train_grid(tiny.grid(**{**FIELDS, **fields}), workdir, tiny.dataset(), NoProgress(), lambda b: tiny.PlainModel())
    return results.load(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("packing") / "w")


@pytest.fixture
def packed(monkeypatch):
    """Returns a list of (runs on each device before, after) of each packing of lanes; segments are short, so there are many."""
    seen, move = [], Lanes.move

    def spy(self, program):
        before = self.loads() if any(self.runs) else None
        move(self, program)
        seen.append((before, self.loads()))

    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    monkeypatch.setattr(Lanes, "move", spy)
    return seen


def test_runs_left_on_one_device_are_spread_over_both_and_no_bit_changes(packed, tmp_path):
    """A run alone on its device goes twice as fast as two that share one; when it ends, one of those moves there."""
    rates = (2**-9, 2**-8, 2**-7)
    alone = pd.concat([train(tmp_path / str(rate), base_lrs=(rate,)) for rate in rates], ignore_index=True)
    packed.clear()
    frame = train(tmp_path / "w", base_lrs=rates)
    assert packed == [([2, 0], [1, 1])]
    pd.testing.assert_frame_equal(frame, alone, check_exact=True)


def test_the_device_with_fewer_lanes_takes_more_steps_of_each():
    mesh = SimpleNamespace(shape={"lane": 2})
    program = lanes.LaneProgram(6, 40, True, mesh, 0.0, 0, None, None, None)  # pyright: ignore
    running = [True, True, True, True, False, False]
    assert program.even_steps(running, 10) == [10, 10, 10, 30, 0, 0]
    assert program.even_steps(running, 20) == [20, 20, 20, 40, 0, 0]  # at most the compiled segment length
    assert program.even_steps([*running[:4], True, False], 1) == [1, 1, 1, 2, 1, 0]
    assert program.even_steps([False] * 6, 10) == [0] * 6
    side_by_side = dataclasses.replace(program, any_length=False)
    assert side_by_side.even_steps(running, 10) == [10, 10, 10, 10, 0, 0]


@pytest.fixture
def shrinking(packed, monkeypatch):
    """Trains lanes side by side and makes compiling free, so that half of the lanes are enough reason for a smaller program.

    Returns the lanes of each compiled program.
    """
    compiled, compile_lanes = [], lanes.compile_lanes

    def at_once(*args, **kwargs):
        program = dataclasses.replace(compile_lanes(*args, **kwargs), compile_seconds=0.0)
        compiled.append(program.lanes)
        return program

    monkeypatch.setattr(lanes, "lane_mapping", lambda platform: "vmap")
    monkeypatch.setattr("smallbatch_jax.runner.input.FIXED_SEGMENT_IMAGES", 8)
    monkeypatch.setattr(lanes, "compile_lanes", at_once)
    return compiled


RATES_OF_8 = (2**-7, 2e30, 2**-8, 3e30, 4e30, 5e30, 6e30, 7e30)  # two of which converge


@pytest.mark.long
def test_side_by_side_the_program_shrinks_once_half_of_it_is_empty(packed, shrinking, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", lanes=2, base_lrs=(2**-7, 2**-8))
    assert (shrinking, packed) == ([2], [])
    monkeypatch.setattr(Compiler, "submit", submit_and_wait(Compiler.submit))
    shrunk = train(tmp_path / "shrunk", lanes=8, base_lrs=RATES_OF_8)
    assert shrinking == [2, 8, 2]
    assert packed == [([1, 1], [1, 1])]
    kept = shrunk[shrunk.base_lr < 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, whole, rtol=1e-5)


@pytest.mark.long
def test_a_smaller_program_is_used_only_while_all_runs_fit_into_it(packed, shrinking, tmp_path, monkeypatch):
    """Two runs of the first round ask for it; it is ready in the second, which has four runs, and fits the last two of them."""
    second, ready, compiling = threading.Event(), threading.Event(), Compiler._compile

    def compile_until_the_second_round(self, job):
        if not shrinking:
            return compiling(self, job)
        second.wait()
        program = compiling(self, job)
        ready.set()
        return program

    def three_rounds(space):
        (shape,) = space.shapes
        runs = [Run(*shape, base_lr, seed) for base_lr in RATES_OF_8 if base_lr < 1 for seed in (0, 1)]
        yield Round(shape, {Run(*shape, base_lr, 0): 2 for base_lr in space.base_lrs})
        second.set()
        ready.wait()
        yield Round(shape, {run: 4 + 2 * run.seed for run in runs})
        yield Round(shape, dict.fromkeys(runs, 8))

    monkeypatch.setattr(Compiler, "_compile", compile_until_the_second_round)
    monkeypatch.setattr(policy, "search", three_rounds)
    searched = {"lanes": 8, "base_lrs": RATES_OF_8, "seeds": (0, 1), "epochs": 8, "search": {"budget": 1e9, "confirm": 0}}
    frame = train(tmp_path / "w", **searched)
    assert shrinking[:2] == [8, 2]
    assert packed[:2] == [([1, 1], [1, 1]), (None, [0, 0])]  # the third round has eight lanes again
    ended = frame[frame.base_lr < 1].groupby(["base_lr", "seed"])["epoch"]
    assert ended.max().tolist() == ended.count().tolist() == [8] * 4


@pytest.mark.long
def test_memory_that_runs_out_while_a_smaller_program_compiles_costs_half_the_lanes(shrinking, tmp_path, monkeypatch):
    compiles, over, run, compiling = threading.Event(), threading.Event(), lanes.LaneProgram.run, Compiler._compile

    def compile_for_ever(self, job):
        if job.layout.lanes == 2:
            compiles.set()
            over.wait(60)
        return compiling(self, job)

    def short_of_memory(self, *args):
        if self.lanes == 8 and compiles.is_set():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes")
        return run(self, *args)

    monkeypatch.setattr(Compiler, "_compile", compile_for_ever)
    monkeypatch.setattr(lanes.LaneProgram, "run", short_of_memory)
    try:
        frame = train(tmp_path / "w", lanes=8, base_lrs=RATES_OF_8)
    finally:
        over.set()
    assert shrinking[:2] == [8, 4]
    assert (frame.status != "running").all()


REFUSAL = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, temporaries (32.11G) exceed available HBM (15.75G)."  # as on a TPU


def submit_and_wait(submit):
    def submitted(self, job):
        future = submit(self, job)
        future.result()
        return future

    return submitted


def test_half_the_lanes_go_on_when_memory_runs_out(undisturbed, tmp_path, monkeypatch):
    tried, run = [], lanes.LaneProgram.run

    def short_of_memory(self, *args):
        tried.append(self.lanes)
        if self.lanes > 2 and len(tried) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes")
        return run(self, *args)

    monkeypatch.setattr(lanes.LaneProgram, "run", short_of_memory)
    frame = train(tmp_path / "w")
    assert tried[:3] == [4, 4, 4]
    assert set(tried[3:]) == {2}
    pd.testing.assert_frame_equal(frame, undisturbed, check_exact=True)


@pytest.mark.long
def test_out_of_memory_with_one_lane_per_device_is_one_line(tmp_path, monkeypatch):
    def no_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(lanes.LaneProgram, "run", no_memory)
    with pytest.raises(InputError, match=r"m = 4: out of memory: one lane per device needs 0\.0 GiB of \d"):
        train(tmp_path / "w")


def test_other_failures_of_the_device_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(lanes.LaneProgram, "run", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(tmp_path / "w")


def test_a_program_that_the_compiler_refuses_is_compiled_with_half_the_lanes(undisturbed, tmp_path, monkeypatch):
    """TPU compilers refuse in this way when memory is short; any other compiler error is raised."""
    tried, compile_lanes = [], lanes.compile_lanes

    def refusing(*args, **kwargs):
        tried.append(kwargs["lanes"])
        if kwargs["lanes"] > 2:
            raise jax.errors.JaxRuntimeError(REFUSAL)
        return compile_lanes(*args, **kwargs)

    monkeypatch.setattr(lanes, "compile_lanes", refusing)
    frame = train(tmp_path / "w")
    assert tried == [4, 2]
    pd.testing.assert_frame_equal(frame, undisturbed, check_exact=True)

    def broken(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(lanes, "compile_lanes", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(tmp_path / "broken")


def test_a_program_that_the_compiler_refuses_with_one_lane_is_one_line(tmp_path, monkeypatch):
    def refusing(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(REFUSAL)

    monkeypatch.setattr(lanes, "compile_lanes", refusing)
    with pytest.raises(InputError, match=r"m = 4: out of memory: one lane per device needs more than [1-9]\d*\.\d GiB; use"):
        train(tmp_path / "w")


def test_a_program_that_would_not_fit_is_compiled_with_half_the_lanes(undisturbed, tmp_path, monkeypatch):
    sizes, compile_lanes = [], lanes.compile_lanes

    def spy(*args, **kwargs):
        program = compile_lanes(*args, **kwargs)
        sizes.append((program.lanes, program.peak_bytes))
        return program

    monkeypatch.setattr(lanes, "compile_lanes", spy)
    train(tmp_path / "whole")
    ((four, needed),) = sizes
    assert four == 4
    monkeypatch.setattr(devices, "memory_bytes", lambda mesh: needed - 1)
    frame = train(tmp_path / "w")
    assert [count for count, _ in sizes] == [4, 4, 2]
    assert sizes[2][1] < needed
    pd.testing.assert_frame_equal(frame, undisturbed, check_exact=True)
    monkeypatch.setattr(devices, "memory_bytes", lambda mesh: 0)
    with pytest.raises(InputError, match="m = 4: out of memory: one lane per device needs"):
        train(tmp_path / "none")


@pytest.mark.slow
def test_more_rates_and_more_seeds_compile_nothing_more(tmp_path):
    """Each batch size compiles one program, however many runs it has."""
    few = train(tmp_path / "few", batch_sizes=(4, 8), base_lrs=(2**-7,))
    many = train(tmp_path / "many", batch_sizes=(4, 8), base_lrs=tuple(2.0**-k for k in range(5, 15)), seeds=(0, 1))
    assert len(many) == 20 * len(few)
    for name in ("few", "many"):
        timings = results.load_timings(tmp_path / name)
        assert list(timings[timings.phase == "compile"].batch_size) == [4, 8]
