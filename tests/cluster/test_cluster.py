"""Grids on a Ray cluster: what a program asks for, what a worker does, what becomes of one that dies; then real clusters."""

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
import tiny

from smallbatch_jax.cluster import launcher as cluster
from smallbatch_jax.cluster import ray as tasks
from smallbatch_jax.cluster import worker
from smallbatch_jax.cluster.ray import Board, Program, resources, summed
from smallbatch_jax.cluster.worker import Outcome, Part
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.runner import driver
from smallbatch_jax.runner.progress import NoProgress, Status
from smallbatch_jax.store import results
from smallbatch_jax.store.files import AppendOnly
from smallbatch_jax.store.results import Owned, ProgramResults
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
        ([{"memory": 1e9}], 13, None, {"num_cpus": 1}),  # a head that does no work, alone so far
        ([], 13, None, {"num_cpus": 1}),
    ],
)
def test_a_program_asks_for_a_gpu_or_for_the_cpus_that_its_lanes_can_use(nodes, runs, lanes, asked):
    assert resources(nodes, runs, lanes) == asked


@pytest.fixture
def folder(tmp_path):
    """A workdir that this process owns, without rows."""
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as path:
        yield path


def found(folder, **fields):
    """The programs of a tiny grid, as the launcher finds them."""
    return cluster._programs(tiny.grid(**fields), folder, "token", 50)


def test_programs_of_the_most_updates_start_first(folder):
    """Of all configs together; of equals those with more runs left."""
    mixed = found(folder, batch_sizes=(8, 2, 4)) + found(folder, batch_sizes=(16,), epochs=30)
    names = [(program.experiment.epochs, program.shape[0]) for program in sorted(mixed, key=lambda program: program.urgency)]
    assert names == [(30, 16), (3, 2), (3, 4), (3, 8)]
    fewer, more = found(folder, batch_sizes=(4,), bn_batch_sizes=(2, 4))
    del fewer.pending[:1]
    assert fewer.urgency > more.urgency


def test_the_launcher_finds_what_earlier_workers_completed_and_makes_every_results_file(folder):
    with ProgramResults(folder, 4, 4) as stored:
        stored.append([results.Row(4, 4, 2**-9, 0, epoch, 1, 1.0, 0.5, 1.0, 0.5) for epoch in (1, 2, 3)])
        stored.append([results.Row(4, 4, 2**-5, 0, 1, 1, math.nan, math.nan, math.nan, math.nan)])
    four, eight = found(folder, batch_sizes=(4, 8))
    assert [run.base_lr for run in four.pending] == [2**-7]
    assert (four.status.runs, four.status.finished, four.status.diverged, four.status.images) == (3, 1, 1, 150)
    assert len(eight.pending) == 3
    assert sorted(path.name for path in (folder / "results").iterdir()) == ["m00004_b00004.csv", "m00008_b00008.csv"]


def program(working, **status):
    return Program(tiny.grid(), Path("w"), (4, 4), "", [], 1, Status(3, 450, started=0.0, **status), working)


def test_the_status_of_all_is_the_sum_and_the_speed_that_of_those_at_work():
    members = [
        program(True, finished=1, diverged=1, running=1, trained=300, best=0.5, images_per_second=10.0),
        program(True, running=2, trained=30, images_per_second=5.0),
        program(False, finished=3, running=3, trained=450, best=0.75, images_per_second=100.0),
    ]
    assert summed(members, 7.0) == Status(
        9, 1350, started=7.0, finished=4, diverged=1, running=3, trained=780, best=0.75, images_per_second=15.0
    )
    assert math.isnan(summed([], 0.0).best)


def test_the_board_hands_on_what_it_heard_and_asks_to_stop():
    board = Board()
    assert board.report(3, None) == 0
    assert board.report(3, Status(1, 1, started=0.0)) == 0
    ((number, (silent, status)),) = board.heard(signal.SIGTERM).items()
    assert board.report(3, None) == signal.SIGTERM
    assert (number, status) == (3, Status(1, 1, started=0.0))
    assert 0 <= silent < 5


def test_the_token_of_a_killed_launcher_is_removed_by_the_next_that_opens_the_workdir(tmp_path):
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder:
        with worker.token(folder) as name:
            assert name in os.listdir(folder)
        assert name not in os.listdir(folder)
        ended = subprocess.Popen(["true"])
        ended.wait()
        left = folder / name.replace(str(os.getpid()), str(ended.pid))
        left.touch()
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS):
        assert not left.exists()


def test_the_rows_of_a_program_have_one_writer(tmp_path):
    with ProgramResults(tmp_path, 4, 4), pytest.raises(Owned, match=r"m00004_b00004.csv belongs to another process"):
        ProgramResults(tmp_path, 4, 4)
    with ProgramResults(tmp_path, 4, 4) as stored:
        stored.append([results.Row(4, 4, 2**-9, 0, 1, 1, 1.0, 0.5, 1.0, 0.5)])
    with open(stored.path, "a") as torn:
        torn.write("4,4,")
    with ProgramResults(tmp_path, 4, 4), pytest.raises(Owned):  # mended: it is another file now
        ProgramResults(tmp_path, 4, 4)


def test_a_worker_waits_for_the_rows_until_its_predecessor_is_dead(tmp_path):
    with ProgramResults(tmp_path, 4, 4) as stored:
        pass
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(0.5)"
    with subprocess.Popen([sys.executable, "-c", hold, stored.path], stdout=subprocess.PIPE) as predecessor:
        predecessor.stdout.readline()
        with pytest.raises(Owned):
            worker.open_results(tmp_path, (4, 4), seconds=0)
        with worker.open_results(tmp_path, (4, 4)):
            assert predecessor.wait() == 0


def test_who_adds_a_line_to_a_shared_file_waits_for_its_turn(tmp_path):
    """Or else two that begin the file at once would both give it a header."""
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
    """Workers in this process train the tiny model on its data."""
    monkeypatch.setattr(driver, "named_model", lambda *_: tiny.TinyModel)
    monkeypatch.setattr("smallbatch_jax.data.load", lambda *_: tiny.dataset())
    monkeypatch.setattr(sys, "argv", sys.argv)


def part(folder, token, **fields):
    rows = results.path_of(folder, 4, 4).read_text() if results.path_of(folder, 4, 4).exists() else ""
    return Part(tiny.grid(**fields), folder, (4, 4), token, rows, ["experiments/launch.py"], None)


def locally(workdir, **fields):
    driver.train_grid(tiny.grid(**fields), workdir, tiny.dataset(), NoProgress(), tiny.TinyModel)
    return results.load(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return locally(tmp_path_factory.mktemp("undisturbed") / "w")


def test_a_worker_that_sees_the_workdir_writes_there(tmp_path, tiny_worker, undisturbed):
    heard = []
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder, worker.token(folder) as token:
        outcome = worker.train(part(folder, token), lambda status: heard.append(status) or 0)
    assert outcome.failure == ""
    assert (outcome.rows, outcome.timings, outcome.provenance) == (None, "", "")
    assert (outcome.status.finished, heard[0]) == (3, None)
    pd.testing.assert_frame_equal(results.load(folder), undisturbed, check_exact=True)
    assert json.loads((folder / "provenance.jsonl").read_text())["command"] == ["experiments/launch.py"]


def test_a_worker_that_does_not_goes_on_from_the_rows_that_came_along_and_hands_back_what_it_wrote(
    tmp_path, tiny_worker, undisturbed
):
    before = locally(tmp_path / "w", base_lrs=(2**-7,))
    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder:
        listed, stored = sorted(os.listdir(folder)), results.load_timings(folder)
        outcome = worker.train(part(folder, "no such file"), lambda status: 0)
        assert sorted(os.listdir(folder)) == listed
        assert len(results.load(folder)) == len(before)
        assert outcome.status.trained == 2 * 38 * 4  # two of the three runs
        tasks._store(found(folder)[0], outcome)
    pd.testing.assert_frame_equal(results.load(folder), undisturbed, check_exact=True)
    timings = results.load_timings(folder)
    assert {"compile", "segment"} <= set(timings.phase[len(stored) :])
    assert len((folder / "timings.csv").read_text().splitlines()) == len(timings) + 1
    events = [json.loads(line)["event"] for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert events == ["start", "finish", "start"]


def test_a_worker_that_is_asked_to_stop_saves(tmp_path, tiny_worker, monkeypatch):
    monkeypatch.setattr(worker, "REPORT_SECONDS", 0.1)
    asked = {"segment_seconds": 1e-9, "epochs": 5000}
    with open_workdir(tmp_path / "w", tiny.grid(**asked), FACTS) as folder, worker.token(folder) as token:
        outcome = worker.train(part(folder, token, **asked), lambda status: signal.SIGINT if status and status.trained else 0)
        assert outcome.failure == ""
        assert (outcome.status.done, outcome.status.trained > 0) == (0, True)
        assert list((folder / "checkpoints/m00004_b00004").iterdir())
        begun = results.load(folder)
        at_once = worker.train(part(folder, token, **asked), lambda status: signal.SIGTERM)
        assert (at_once, len(results.load(folder))) == (Outcome(None), len(begun))


def test_a_worker_without_the_data_says_so_and_one_with_a_bug_too(tmp_path, tiny_worker, monkeypatch, capsys):
    def missing(*_):
        raise InputError("dataset.data_dir: cannot list '/data'")

    with open_workdir(tmp_path / "w", tiny.grid(), FACTS) as folder, worker.token(folder) as token:
        monkeypatch.setattr("smallbatch_jax.data.load", missing)
        assert worker.train(part(folder, token), lambda status: 0) == Outcome(None, "dataset.data_dir: cannot list '/data'")
        monkeypatch.setattr("smallbatch_jax.data.load", lambda *_: 1 / 0)
        outcome = worker.train(part(folder, token), lambda status: 0)
    assert outcome.failure == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err


def test_a_relative_folder_of_data_is_the_same_for_a_worker_that_runs_elsewhere():
    for given, sent in (("data", os.path.abspath("data")), ("/data", "/data"), ("~/data", "~/data"), (None, None)):
        chosen = tiny.grid(dataset={"name": "folder", "data_dir": given})
        assert tasks._seen_from_anywhere(chosen).dataset.data_dir == sent
