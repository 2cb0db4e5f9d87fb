"""Grids on a Ray cluster, tested without one: what a program requests, what a worker does, and what follows its death."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
import tiny

from smallbatch_jax.cluster import launcher, worker
from smallbatch_jax.cluster.launcher import Launch, LaunchedProgram, Reports, _store, resources, summed
from smallbatch_jax.cluster.worker import Outcome, ProgramTask
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.progress import NoProgress, Status
from smallbatch_jax.runner.signals import Stop
from smallbatch_jax.store import results
from smallbatch_jax.store.files import AppendOnly
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.timings import TIMING_COLUMNS
from smallbatch_jax.store.workdir import open_workdir

ROOT = Path(__file__).parents[2]
FACTS = {"num_classes": 3, "examples": [50, 20]}


@pytest.mark.parametrize(
    ("nodes", "runs", "lanes", "asked"),
    [
        ([{"CPU": 8.0}], 13, None, {"num_cpus": 8}),
        ([{"CPU": 4.0}, {"CPU": 32.0}], 13, None, {"num_cpus": 13}),
        ([{"CPU": 64.0}], 143, None, {"num_cpus": 16}),  # the driver's limit of lanes
        ([{"CPU": 64.0}], 143, 40, {"num_cpus": 40}),
        ([{"CPU": 8.0}], 13, 2, {"num_cpus": 2}),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}], 13, None, {"num_gpus": 1}),
        ([{"memory": 1e9}], 13, None, {"num_cpus": 1}),  # only a head node that does no work so far
        ([], 13, None, {"num_cpus": 1}),
    ],
)
def test_a_program_asks_for_a_gpu_or_for_the_cpus_that_its_lanes_can_use(nodes, runs, lanes, asked):
    assert resources(nodes, runs, lanes) == asked


@pytest.mark.parametrize(
    ("nodes", "runs", "asked"),
    [
        ([{"CPU": 2.0}], 1, {"num_cpus": 2}),
        ([{"CPU": 4.0}, {"CPU": 9.0}], 13, {"num_cpus": 8}),
        ([{"CPU": 8.0}], 3, {"num_cpus": 6}),
        ([{"CPU": 8.0, "GPU": 2.0}], 13, {"num_gpus": 2}),
    ],
)
def test_devices_that_share_a_batch_are_asked_for_together(nodes, runs, asked):
    assert resources(nodes, runs, None, 2) == asked


@pytest.fixture
def folder(tmp_path):
    """Yields a workdir that this process owns, without rows."""
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as path:
        yield path


def found(folder, **fields):
    """Returns the programs of a tiny grid, as the launcher finds them."""
    return launcher._programs(tiny.grid(**fields), folder, 50)


def test_programs_of_the_most_updates_start_first(folder, monkeypatch):
    """All configs are ordered together; ties go to programs with more runs left."""
    programs = found(folder, batch_sizes=(8, 2, 4)) + found(folder, batch_sizes=(16,), epochs=30)
    fewer, more = found(folder, batch_sizes=(6,), bn_batch_sizes=(2, 3))
    done, *_ = found(folder, batch_sizes=(10,))
    fewer.pending, done.pending = 1, 0
    submitted, launch = [], object.__new__(Launch)
    launch._programs, launch._running, launch._started = [*programs, fewer, done, more], {}, 0.0
    monkeypatch.setattr(Launch, "_submit", lambda self, program: submitted.append(program.task))
    launch.train(NoProgress())
    assert [(task.experiment.epochs, *task.shape) for task in submitted] == [
        (30, 16, 16), (3, 2, 2), (3, 4, 4), (3, 6, 3), (3, 6, 2), (3, 8, 8)
    ]  # fmt: skip


def test_the_launcher_finds_what_earlier_workers_completed_and_makes_every_results_file(folder):
    with ProgramResults(folder, 4, 4) as stored:
        stored.append([results.Row(4, 4, 2**-9, 0, epoch, 1, 1.0, 0.5, 1.0, 0.5) for epoch in (1, 2, 3)])
        stored.append([results.Row(4, 4, 2**-5, 0, 1, 1, math.nan, math.nan, math.nan, math.nan)])
    four, eight = found(folder, batch_sizes=(4, 8))
    assert four.pending == 1
    assert [row.epoch for row in four.task.rows] == [1, 1, 2, 3]
    assert (four.status.runs, four.status.finished, four.status.diverged, four.status.images) == (3, 1, 1, 150)
    assert eight.pending == 3
    assert sorted(path.name for path in (folder / "results").iterdir()) == ["m00004_b00004.csv", "m00008_b00008.csv"]


def program(**status):
    task = ProgramTask(tiny.grid(), Path("w"), (4, 4), "", [], [])
    return LaunchedProgram("experiment, m = 4", task, 3, 1, Status(3, 450, started=0.0, **status))


def test_the_status_of_all_programs_is_the_sum():
    members = [
        program(finished=1, diverged=1, running=1, trained=300, best=0.5, images_per_second=10.0),
        program(running=2, trained=30, images_per_second=5.0),
        program(finished=3, trained=450, best=0.75),
    ]
    assert summed(members, 7.0) == Status(
        9, 1350, started=7.0, finished=4, diverged=1, running=3, trained=780, best=0.75, images_per_second=15.0
    )
    assert math.isnan(summed([], 0.0).best)


class EndedTask:
    """A stand-in for Ray in which one task has ended."""

    exceptions = ray.exceptions

    def __init__(self, outcome):
        self.get = lambda task: outcome


def test_a_program_that_ended_adds_no_speed():
    ended = program(running=3, trained=450, images_per_second=100.0)
    launch = object.__new__(Launch)
    launch._ray = EndedTask(Outcome(ended.status))
    launch._end(ended, None)
    assert (ended.status.running, ended.status.images_per_second, ended.status.trained) == (0, 0.0, 450)


def test_reports_keep_the_last_status_of_each_task():
    reports = Reports()
    reports.add("a", None)
    reports.add("b", None)
    reports.add("a", Status(1, 1, best=0.5, started=0.0))
    assert reports.last() == {"a": Status(1, 1, best=0.5, started=0.0), "b": None}


def test_the_rows_of_a_program_have_one_writer(tmp_path):
    with ProgramResults(tmp_path, 4, 4), pytest.raises(InputError, match=r"m00004_b00004.csv belongs to another process"):
        ProgramResults(tmp_path, 4, 4)
    with ProgramResults(tmp_path, 4, 4) as stored:
        stored.append([results.Row(4, 4, 2**-9, 0, 1, 1, 1.0, 0.5, 1.0, 0.5)])
    with open(stored.path, "a") as torn:
        torn.write("4,4,")
    with ProgramResults(tmp_path, 4, 4), pytest.raises(InputError, match="belongs to"):  # repaired, which made it another file
        ProgramResults(tmp_path, 4, 4)


def test_a_worker_waits_for_the_rows_until_its_predecessor_is_dead(tmp_path):
    with ProgramResults(tmp_path, 4, 4) as stored:
        pass
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(0.5)"
    with subprocess.Popen([sys.executable, "-c", hold, stored.path], stdout=subprocess.PIPE) as predecessor:
        predecessor.stdout.readline()
        with pytest.raises(InputError, match="belongs to"):
            ProgramResults(tmp_path, 4, 4)
        with ProgramResults(tmp_path, 4, 4, worker.OWNER_SECONDS):
            assert predecessor.wait() == 0


def test_appending_to_a_shared_file_waits_for_its_lock(tmp_path):
    """Otherwise two that begin the file at once would both write a header."""
    path = tmp_path / "timings.csv"
    add = "import sys; from pathlib import Path; from smallbatch_jax.store.results import Timings;"
    add += "timings = Timings(Path(sys.argv[1])); print(flush=True); timings.add('compile', 1.0)"
    with subprocess.Popen([sys.executable, "-c", add, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        with AppendOnly(path) as file:
            assert file.lock(wait=True)
            other.stdout.readline()
            time.sleep(0.3)
            assert path.stat().st_size == 0
            file.append(",".join(TIMING_COLUMNS) + "\n")
        assert other.wait() == 0
    assert path.read_text().splitlines() == [",".join(TIMING_COLUMNS), "compile,0,0,0,1.0,0,0,0"]


@pytest.fixture
def tiny_worker(monkeypatch):
    """Makes workers in this process train the tiny model on its data."""
    monkeypatch.setattr(
        "smallbatch_jax.runner.jobs.Setup.named_model", lambda setup, bn_decay, *rest, **_: tiny.TinyModel(*rest)
    )
    monkeypatch.setattr("smallbatch_jax.data.load", lambda *_: tiny.dataset())
    monkeypatch.setattr(sys, "argv", sys.argv)


def task(folder, owner, **fields):
    with ProgramResults(folder, 4, 4) as stored:
        return ProgramTask(tiny.grid(**fields), folder, (4, 4), owner, stored.rows(), ["experiments/launch.py"])


def train(task, report=lambda status: None, stop=None):
    return worker.train(task, None, stop or Stop(), report)


def owner(folder):
    return (folder / "lock").read_text()


def locally(workdir, **fields):
    train_grid(tiny.grid(**fields), workdir, tiny.dataset(), NoProgress(), tiny.TinyModel)
    return results.load(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return locally(tmp_path_factory.mktemp("undisturbed") / "w")


def test_a_worker_that_sees_the_workdir_writes_there(tmp_path, tiny_worker, undisturbed):
    heard = []
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder:
        outcome = train(task(folder, owner(folder)), heard.append)
    assert (outcome.failure, outcome.rows, outcome.logs) == ("", [], {})
    assert (outcome.status.finished, heard[0], heard[-1]) == (3, None, outcome.status)
    pd.testing.assert_frame_equal(results.load(folder), undisturbed, check_exact=True)
    assert json.loads((folder / "provenance.jsonl").read_text())["command"] == ["experiments/launch.py"]


def test_a_worker_without_the_workdir_resumes_from_the_tasks_rows_and_returns_new_rows(tmp_path, tiny_worker, undisturbed):
    before = locally(tmp_path / "w", base_lrs=(2**-7,))
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder:
        listed, stored = sorted(os.listdir(folder)), results.load_timings(folder)
        given = task(folder, "process 1 on another machine\n")
        outcome = train(given)
        assert sorted(os.listdir(folder)) == listed
        assert len(results.load(folder)) == len(before)
        assert outcome.status.trained == 2 * 38 * 4  # two of the three runs
        _store(given, outcome)
    pd.testing.assert_frame_equal(results.load(folder), undisturbed, check_exact=True)
    timings = results.load_timings(folder)
    assert {"compile", "segment"} <= set(timings.phase[len(stored) :])
    assert len((folder / "timings.csv").read_text().splitlines()) == len(timings) + 1
    events = [json.loads(line)["event"] for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert events == ["start", "finish", "start"]


def test_a_worker_that_is_asked_to_stop_saves(tmp_path, tiny_worker):
    asked, stop = {"segment_seconds": 1e-9, "epochs": 5000}, Stop()

    def stop_once_trained(status):
        stop.signum = signal.SIGINT if status and status.trained else 0

    with open_workdir(tmp_path / "w", tiny.grid(**asked), FACTS) as folder:
        given = task(folder, owner(folder), **asked)
        outcome = train(given, stop_once_trained, stop)
        assert outcome.failure == ""
        assert (outcome.status.done, outcome.status.trained > 0) == (0, True)
        assert list((folder / "checkpoints/m00004_b00004").iterdir())
        begun = results.load(folder)
        stop.signum = signal.SIGTERM
        at_once = train(given, stop=stop)  # in which at most one segment is trained, if it compiled within an instant
        assert (at_once.failure, at_once.status.done) == ("", 0)
        assert len(results.load(folder)) >= len(begun)


def test_a_worker_without_the_data_says_so(tmp_path, tiny_worker, monkeypatch):
    def missing(*_):
        raise InputError("dataset.data_dir: cannot list '/data'")

    monkeypatch.setattr("smallbatch_jax.data.load", missing)
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder:
        assert train(task(folder, owner(folder))) == Outcome(None, "dataset.data_dir: cannot list '/data'")


def test_a_relative_folder_of_data_is_the_same_for_a_worker_that_runs_elsewhere(folder):
    for given, sent in (("data", os.path.abspath("data")), ("/data", "/data"), ("~/data", "~/data"), (None, None)):
        (program,) = found(folder, dataset={"name": "folder", "data_dir": given})
        assert program.task.experiment.dataset.data_dir == sent
