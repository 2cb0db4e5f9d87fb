"""A search trains the rounds of its policy into an ordinary workdir, with the same results however often it is killed."""

import json
import os
import random
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from forks import Fork

from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.runner import planning, policy, scheduler
from smallbatch_jax.runner.grid import Interrupted, train_grid
from smallbatch_jax.runner.policy import Round
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results
from smallbatch_jax.study import claims, study
from smallbatch_jax.study.answer import answer

RUN = ["batch_size", "base_lr", "seed"]
RATES = tuple(2.0**k for k in range(-13, 2))
SEARCH = {"batch_sizes": (2, 4, 16), "base_lrs": RATES, "seeds": (0, 1), "epochs": 8, "search": {"budget": 72 * 50.0}}


def train(workdir, progress=None, **fields):
    train_grid(tiny.grid(**fields), workdir, tiny.dataset(), progress or NoProgress(), lambda b: tiny.TinyModel(b))
    return results.load(workdir)


def rows_of(frame, run, epochs):
    found = frame[(frame.base_lr == run.base_lr) & (frame.seed == run.seed) & (frame.epoch <= epochs)]
    return found.drop(columns=["status"]).reset_index(drop=True)


@pytest.fixture
def begun(monkeypatch):
    """Returns a list that collects the seed of each run that starts from its initial state."""
    seeds, lanes = [], scheduler.Lanes
    monkeypatch.setattr(scheduler, "Lanes", lambda *given: lanes(*given[:3], lambda seed: seeds.append(seed) or given[3](seed)))
    return seeds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("search") / "w", **SEARCH)


def test_a_run_that_waited_goes_on_bit_for_bit_and_one_given_up_is_stopped(tmp_path, monkeypatch, begun):
    low, middle, high, late = (Run(4, 4, base_lr, 0) for base_lr in (2**-9, 2**-7, 2**-5, 2**-6))

    def rounds(space):
        curves = yield Round((4, 4), {low: 1, middle: 1, high: 1})
        assert all(len(curve) == 1 for curve in curves.values())
        yield Round((4, 4), {low: 1, middle: 2, late: 2})  # low waits
        yield Round((4, 4), {low: 3, late: 3})

    fields = {"base_lrs": (2**-9, 2**-7, 2**-6, 2**-5), "search": {"budget": 1e6, "confirm": 0}}
    whole = train(tmp_path / "grid", **{**fields, "search": {}})
    begun.clear()
    monkeypatch.setattr(policy, "search", rounds)
    found = train(tmp_path / "w", **fields)
    for run, epochs in ((low, 3), (middle, 2), (high, 1), (late, 3)):
        pd.testing.assert_frame_equal(rows_of(found, run, 9), rows_of(whole, run, epochs), check_exact=True)
    status = found.groupby("base_lr")["status"].last()
    assert dict(status) == {
        low.base_lr: "finished",
        middle.base_lr: "stopped",
        late.base_lr: "finished",
        high.base_lr: "stopped",
    }
    assert len(begun) == 4  # no run began twice


def test_a_search_keeps_to_its_budget_and_confirms_with_fresh_seeds(undisturbed):
    epochs = undisturbed.groupby(RUN).size()
    assert 0.7 * 72 <= epochs.sum() <= 72
    assert set(undisturbed.batch_size) == {2, 4, 16}
    fresh = undisturbed[~undisturbed.seed.isin((0, 1))]
    assert set(fresh.seed) == {2, 3}
    assert len(fresh.drop_duplicates(["batch_size", "base_lr"])) == 1
    planned = {(run.batch_size, run.base_lr, run.seed) for run in tiny.grid(**SEARCH).runs()}
    assert set(map(tuple, undisturbed[RUN].to_numpy())) <= planned
    assert set(undisturbed.status) <= {"finished", "stopped", "diverged"}


def test_a_search_is_an_ordinary_study(undisturbed, tmp_path):
    train(tmp_path / "w", **SEARCH)
    found = study.load(tmp_path / "w")
    assert found.runs[0] == found.runs[1]  # none is pending
    assert not found.unfinished
    assert not answer(found).sentence.startswith("So far")
    claimed = claims.judge({"fig08": found})
    lacks = [finding.text for verdict in claimed for finding in verdict.findings if "fig08 is a search" in finding.text]
    assert lacks
    runs = len(undisturbed.drop_duplicates(RUN))
    assert f"a search within 3,600 training images, {runs} runs begun" in study.describe(found)


@pytest.mark.parametrize("segments", [20, 60, 120])
@pytest.mark.long
def test_a_stopped_search_goes_on_from_its_checkpoint_bit_for_bit(undisturbed, tmp_path, monkeypatch, begun, segments):
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    with pytest.raises(Interrupted):
        train(tmp_path / "w", tiny.StopAfter(segments), **SEARCH, segment_seconds=1e-9)
    assert "running" in set(results.load(tmp_path / "w").status)
    assert study.load(tmp_path / "w").unfinished
    assert answer(study.load(tmp_path / "w")).sentence.startswith("So far (")
    pd.testing.assert_frame_equal(train(tmp_path / "w", **SEARCH), undisturbed, check_exact=True)
    assert len(begun) == len(undisturbed.drop_duplicates(RUN))  # those that waited were saved too


class Fails(tiny.StopAfter):
    """Ends the search with an exception after a number of segments, as a kill would; the last sixty are not saved."""

    def show(self, status, doing):
        self.left -= 1
        if self.left == 60:
            scheduler.CHECKPOINT_SHARE = 0.0
        if self.left == 0:
            raise ZeroDivisionError


@pytest.mark.long
def test_a_search_that_ended_without_saving_goes_on_from_what_it_had_saved(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    monkeypatch.setattr(scheduler, "CHECKPOINT_SHARE", 1e9)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "w", Fails(120), **SEARCH, segment_seconds=1e-9, checkpoint_seconds=0.0)
    assert 0 < _stored(tmp_path) < len(undisturbed)
    pd.testing.assert_frame_equal(train(tmp_path / "w", **SEARCH), undisturbed, check_exact=True)
    assert _stored(tmp_path) == len(undisturbed)  # nothing was written twice


KILLED = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # as in the process that tests
    import tiny
    from smallbatch_jax.program import jax_flags
    jax_flags.HELD["jax_disable_most_optimizations"] = True
    from smallbatch_jax.runner import scheduler
    from smallbatch_jax.runner.grid import train_grid
    from smallbatch_jax.runner.progress import NoProgress
    scheduler.Pace.FIRST_IMAGES = 8
    scheduler.CHECKPOINT_SHARE = 1e9
    fields = dict({fields!r}, segment_seconds=1e-9, checkpoint_seconds=0.0)
    train_grid(tiny.grid(**fields), Path({workdir!r}), tiny.dataset(), NoProgress(), lambda b: tiny.TinyModel(b))
""")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_a_search_killed_at_random_ends_with_the_same_rows(undisturbed, tmp_path, kills):
    code = KILLED.format(tests=str(Path(__file__).parents[1]), workdir=str(tmp_path / "w"), fields=SEARCH)
    draw, killed = random.Random(kills), 0
    while killed < kills:
        target = _stored(tmp_path) + draw.randint(1, max(1, 2 * len(undisturbed) // (3 * kills)))
        with Fork(["-c", code], os.environ) as process:
            while process.poll() is None and _stored(tmp_path) < target:
                time.sleep(0.002)
            assert process.poll() is None
        killed += 1
    with Fork(["-c", code], os.environ) as process:
        assert process.wait() == 0
    pd.testing.assert_frame_equal(results.load(tmp_path / "w"), undisturbed, check_exact=True)
    assert _stored(tmp_path) == len(undisturbed)  # nothing was written twice


def _stored(tmp_path):
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in tmp_path.glob("w/results/m*.csv"))


@pytest.mark.long
def test_batches_may_grow_in_a_search(tmp_path):
    fields = {"schedule": {"batch_growth": 2}, "base_lrs": (2**-9, 2**-7, 2**-5), "epochs": 4}
    found = train(tmp_path / "w", **fields, search={"budget": 9 * 50.0, "confirm": 0})
    whole = train(tmp_path / "grid", **fields)
    assert {"finished", "stopped"} <= set(found.status)
    on = [*RUN, "epoch", "step", "train_loss", "test_loss"]
    assert len(found.merge(whole, on=on)) == len(found)
    assert found.step.max() < 4 * 50 / 4


def test_a_larger_budget_goes_on_with_what_is_there(undisturbed, tmp_path):
    train(tmp_path / "w", **SEARCH)
    more = train(tmp_path / "w", **{**SEARCH, "search": {"budget": 110 * 50.0}})
    assert len(more) > len(undisturbed)
    assert len(more.merge(undisturbed, on=[*RUN, "epoch", "test_loss"])) == len(undisturbed)


def test_a_smaller_budget_trains_nothing(undisturbed, tmp_path):
    train(tmp_path / "w", **SEARCH)
    less = train(tmp_path / "w", **{**SEARCH, "search": {"budget": 20 * 50.0}})
    assert len(less) == len(undisturbed)


def test_a_search_may_confirm_less_and_then_become_the_whole_grid(tmp_path, monkeypatch):
    """A checkpoint may then hold runs that are no longer requested."""
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    fields = {"batch_sizes": (4,), "base_lrs": (2**-9, 2**-8, 2**-7), "epochs": 4, "segment_seconds": 1e-9}
    with pytest.raises(Interrupted):
        train(tmp_path / "w", tiny.StopAfter(80), **fields, search={"budget": 24 * 50.0, "confirm": 3})
    stopped = results.load(tmp_path / "w")
    assert set(stopped.seed) == {0, 1, 2, 3}
    fewer = train(tmp_path / "w", **fields, search={"budget": 24 * 50.0, "confirm": 1})
    assert (fewer[fewer.seed == 1].epoch.max(), fewer[fewer.seed > 1].epoch.max()) == (4, stopped[stopped.seed > 1].epoch.max())
    whole = train(tmp_path / "w", **fields)
    pd.testing.assert_frame_equal(whole.drop(columns="status"), fewer.drop(columns="status"))


def test_a_budget_in_seconds_is_measured_once(tmp_path, monkeypatch):
    fields = {**SEARCH, "search": {"seconds": 5.0}}
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(policy, "search", lambda space: iter(()))
    train(tmp_path / "w", **fields)
    budget = json.loads((tmp_path / "w/experiment.json").read_text())["experiment"]["search"]["budget"]
    assert 50 < budget < 1e9
    monkeypatch.setattr(planning, "examples_in", lambda *_: pytest.fail("measured again"))
    train(tmp_path / "w", **fields)
    assert study.load(tmp_path / "w").experiment.search.budget == budget
    with pytest.raises(InputError, match=r"^search\.seconds: a search has one budget; "):
        train(tmp_path / "w", **{**SEARCH, "search": {"seconds": 5.0, "budget": budget}})


def test_examples_in_a_time_are_the_mean_over_batch_sizes(monkeypatch):
    class Trial:
        def __init__(self, m):
            self.job = type("Job", (), {"batch_size": m})

    rates = {2: 100.0, 16: 400.0}
    plan = lambda trial, *_: planning.ProgramPlan(0, 0, 0, rates[trial.job.batch_size], 0.0, 0, 0)  # noqa: E731
    monkeypatch.setattr(planning, "measure", lambda setup: map(Trial, setup.experiment.grid.batch_sizes))
    monkeypatch.setattr(planning, "plan_program", plan)
    images = planning.examples_in(60.0, planning.Setup(tiny.grid(batch_sizes=(4, 2, 16)), tiny.dataset()))
    expected = [100.0, 100.0 * 2 ** (2 / 3), 400.0]  # m = 4 is interpolated on log axes
    assert images == pytest.approx(60 / np.mean([1 / rate for rate in expected]))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"weight_decays": (0.0, 1e-4)}, r"search: tries one value of weight_decay, got \(0.0, 0.0001\); give one of them."),
        ({"base_lr_by_batch_size": {4: 0.1}}, "grid.base_lr_by_batch_size: a search chooses the base learning rates itself;"),
        ({"base_lrs_from": ("runs/x",)}, "grid.base_lrs_from: a search chooses the base learning rates itself;"),
        ({"seeds": (2**31 - 2,)}, "search.confirm: 2 seeds above 2147483646 are too large; use smaller seeds."),
        ({"search": {"budget": 1e9, "confirm": 1000}, "base_lrs": tuple(range(1, 101))}, "grid: got 100100 comb"),
        ({"search": {"budget": 0}}, "search.budget: got 0, accepts a number above 0"),
        ({"search": {"seconds": -1.0}}, "search.seconds: got -1.0, accepts a number above 0"),
        ({"search": {"budget": 10, "confirm": -1}}, "search.confirm: got -1, accepts an integer from 0 to 1000."),
    ],
)
def test_what_a_search_cannot_do_is_refused_in_one_line(fields, line):
    with pytest.raises(InputError, match=line):
        tiny.grid(**{"search": {"budget": 1e4}, **fields})
