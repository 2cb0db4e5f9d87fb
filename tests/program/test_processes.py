"""Several real processes on this machine that run one command together."""

import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import compiled
import jax
import numpy as np
import pandas as pd
import pictures
import pytest
import shell
import tiny
from PIL import Image

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.program import processes
from smallbatch_jax.store import results
from smallbatch_jax.store.files import WriteError
from smallbatch_jax.store.workdir import open_workdir

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import distributed  # noqa: E402

SMALL = ("--config=configs/quickstart.py", "--config.epochs=1", "--config.grid.batch_sizes=(512,)")
RATES = "--config.grid.base_lrs=(0.0001,0.0005,8.0)"
# One run whose batch four devices share, with BN groups that span two; checkpoints are as frequent as possible.
SHARED = (
    "--config=configs/quickstart.py",
    "--config.model.name=resnet8",
    "--config.model.norm=batch",
    "--config.batch_size=64",
    "--config.bn_batch_size=32",
    "--config.base_lr=0.0009765625",
    "--config.data_devices=4",
    "--config.epochs=50",
    "--config.checkpoint_seconds=0",
    "--config.segment_seconds=0.5",
)


def start(script, *arguments, devices=2, flags="", **environment):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}"}
    return shell.start(script, *arguments, environment=flags | environment)


def start_two(script, *arguments, others=(), flags="", homes=(os.environ["HOME"],) * 2):
    """Starts two processes of two devices each; the second may have other arguments."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{probe.getsockname()[1]}"
    each = enumerate(zip((arguments, others or arguments), homes, strict=True))
    return [
        start(script, *given, address, "--num_processes=2", f"--process_id={number}", flags=flags, HOME=home)
        for number, (given, home) in each
    ]


def ended(processes, seconds=240):
    """Returns (exit status, output, errors) of each process."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_sweep_of_two_processes_is_that_of_one(tmp_path):
    """Files, rows and parameters are the same; only the first process prints results, and native code prints nothing.

    The rows agree to rounding: XLA:CPU splits some sums by the total number of devices.
    """
    flags, asked = compiled.QUICKLY, (*SMALL, RATES, "--config.keep_parameters=all")
    alone = ended([start("sweep.py", *asked, f"--workdir={tmp_path / 'alone'}", flags=flags)])[0]
    first, second = ended(start_two("sweep.py", *asked, f"--workdir={tmp_path / 'two'}", flags=flags))
    assert (alone[0], first[0], second) == (0, 0, (0, "", "")), first[2]
    untimed = partial(re.sub, r"in [\d.]+ s", "in … s")
    assert untimed(first[1]) == untimed(alone[1].replace("/alone", "/two"))
    assert "Gloo" not in first[2]
    pd.testing.assert_frame_equal(*(results.load(tmp_path / name) for name in ("alone", "two")), rtol=1e-4)
    kept = [sbj.load_parameters(tmp_path / name, base_lr=0.0005) for name in ("alone", "two")]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *kept)
    for name in ("alone", "two"):  # Orbax names some files at random
        for folder in (tmp_path / name / "parameters").glob("m*"):
            shutil.rmtree(folder)
            folder.touch()
    assert files(tmp_path / "alone") == files(tmp_path / "two")


@pytest.mark.long
def test_processes_that_were_not_started_alike_are_refused(tmp_path):
    """Both are refused in one line each, and nothing is written."""
    given = (*SMALL, f"--workdir={tmp_path / 'w'}")
    for status, output, errors in ended(start_two("sweep.py", *given, RATES, others=given)):
        assert (status, output) == (2, "")
        assert errors == "config.grid: process 1 has another value than process 0; start all of them alike.\n"
    assert not (tmp_path / "w").exists()


@pytest.mark.long
def test_what_one_process_refuses_ends_the_other_too(tmp_path):
    """The pictures are missing where process 1 runs."""
    for name in ("train/a", "train/b", "test/a", "test/b"):
        pictures.save(tmp_path / "data" / name / "0.png", Image.new("RGB", (8, 8)))
    given = (*SMALL, "--config.dataset.name=folder", "--config.dataset.data_dir=~/data", f"--workdir={tmp_path / 'w'}")
    for status, output, errors in ended(start_two("sweep.py", *given, homes=(str(tmp_path), str(tmp_path / "elsewhere")))):
        assert (status, output) == (2, "")
        assert errors.startswith("dataset.data_dir: ")
        assert errors.endswith(" (process 1)\n")
        assert errors.count("\n") == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("error", [InputError("data_dir: missing"), WriteError(Path("cache"), "No space left on device")])
def test_an_error_in_one_process_is_known_to_all_before_it_is_raised(monkeypatch, error):
    """The mistake to detect: a process that raised at once would leave the others waiting for it."""
    told = []

    def raises():
        raise error

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "_first_where", lambda condition: told.append(condition) or (0 if condition else None))
    monkeypatch.setattr(processes, "_broadcast", lambda value, source=0: pickle.loads(pickle.dumps(value)))
    with pytest.raises(type(error), match=str(error)):
        processes.on_every(raises)
    assert processes.on_every(lambda: 5) == 5
    assert told == [True, False]
    with pytest.raises(type(error), match=str(error)):
        processes.on_first(raises)
    assert processes.on_first(lambda: 5) == 5


@pytest.mark.long
def test_a_workdir_of_another_experiment_is_read_by_the_first_process_alone_and_refused_by_both(tmp_path):
    with open_workdir(tmp_path / "w", tiny.grid(), {"num_classes": 3}):
        pass
    started = start_two("sweep.py", *SMALL, "--workdir=~/w", homes=(str(tmp_path), str(tmp_path / "elsewhere")))
    for status, output, errors in ended(started):
        assert (status, output) == (2, "")
        assert errors.startswith(f"--workdir: {tmp_path / 'w'} holds ")
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("--num_processes=2",), {}, "--coordinator_address: not given"),
        (("--coordinator_address=here",), {}, "--coordinator_address: got 'here', accepts HOST:PORT"),
        (("--coordinator_address=here:99999",), {}, "--coordinator_address: got 'here:99999', accepts HOST:PORT"),
        (("--coordinator_address=here:1",), {}, "--num_processes: not given"),
        (("--coordinator_address=here:1", "--num_processes=2"), {}, "--process_id: not given"),
        (("--process_id=0",), {}, "--coordinator_address: not given"),
        (("--coordinator_address=here:1", "--num_processes=2", "--process_id=2"), {}, "--process_id: got 2 of 2 processes"),
        ((), {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: got 'two'"),
        pytest.param(
            ("--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=1", "--join_seconds=1"),
            {},
            "--coordinator_address: not all processes joined within --join_seconds=1",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_process_that_cannot_join_says_what_is_missing(tmp_path, arguments, environment, said):
    process = start("sweep.py", *SMALL, f"--workdir={tmp_path / 'w'}", *arguments, **environment)
    (status, output, errors) = ended([process])[0]
    assert (status, output) == (2, "")
    assert errors.startswith(said)
    assert errors.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_that_waits_for_the_others(tmp_path, signum):
    waiting = ("--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=1", "--join_seconds=100")
    process = start("sweep.py", *SMALL, f"--workdir={tmp_path / 'w'}", *waiting)
    time.sleep(10)
    process.send_signal(signum)
    assert ended([process], 10) == [(128 + signum, "", "stopped; the same command resumes\n")]


def test_what_processes_log_of_each_other_is_left_out():
    said = [
        "[Gloo] Rank 1 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3\n",
        "W1123 06:35:35.826467 226 preemption_sync_manager.cc:147] Failed to retrieve\n",
        "Additional GRPC error information\n",
        "W1123 06:35:35.826467 226 convolution.cc:7] slow kernel\n",
        "of 7 by 7\n",
        "F1123 06:35:35.826646 226 client.h:80] Terminating as the JAX distributed service detected errors.\n",
        "*** Check failure stack trace: ***\n",
    ]
    assert list(distributed.without_noise(said)) == said[3:5]


# ---- killed, stopped and started again; minutes


def rows(workdir):
    file = workdir / "results" / "m00064_b00032.csv"
    return file.read_bytes() if file.exists() else b""


def wait_for(condition, processes, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


def has_checkpoint(workdir):
    return any((workdir / "checkpoints").glob("m*_b*/[0-9]*/commit_success.txt"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "w"
    processes = start_two("train.py", *SHARED, f"--workdir={workdir}")
    assert [status for status, *_ in ended(processes)] == [0, 0]
    return rows(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_both_go_on_later(tmp_path, undisturbed, lost):
    """The other ends within a minute, with one line; both then resume from a checkpoint and end with the same bytes."""
    arguments = ("train.py", *SHARED, f"--workdir={tmp_path / 'w'}")
    processes = start_two(*arguments)
    wait_for(lambda: has_checkpoint(tmp_path / "w"), processes)
    processes[lost].kill()
    processes[lost].communicate()
    then = time.monotonic()
    status, output, errors = ended([processes[1 - lost]])[0]
    assert time.monotonic() - then < 60
    assert (status, output) == (1, "")
    last = errors.splitlines()[-1]
    assert last.startswith(f"process {1 - lost} stopped: another process was lost")
    assert last.count("the same command resumes") == errors.count("stopped") == 1
    before = rows(tmp_path / "w")
    assert 0 < before.count(b"\n") < 51
    assert [status for status, *_ in ended(start_two(*arguments))] == [0, 0]
    assert rows(tmp_path / "w") == undisturbed
    assert undisturbed.startswith(before)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_both_and_both_go_on_later(tmp_path, undisturbed, signum):
    arguments = ("train.py", *SHARED, f"--workdir={tmp_path / 'w'}")
    processes = start_two(*arguments)
    wait_for(lambda: rows(tmp_path / "w").count(b"\n") > 5, processes)
    processes[1].send_signal(signum)
    for status, output, errors in ended(processes):
        assert (status, output) == (128 + signum, "")
        assert errors.splitlines()[-1].startswith("stopped; everything is saved")
    assert has_checkpoint(tmp_path / "w")
    assert [status for status, *_ in ended(start_two(*arguments))] == [0, 0]
    assert rows(tmp_path / "w") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_of_two_processes_goes_on_in_one(tmp_path, undisturbed, devices):
    """It resumes on fewer devices from its checkpoint; the next losses agree to rounding."""
    arguments = ["train.py", *SHARED, f"--workdir={tmp_path / 'w'}"]
    processes = start_two(*arguments)
    wait_for(lambda: rows(tmp_path / "w").count(b"\n") > 3, processes)
    processes[0].send_signal(signal.SIGTERM)
    ended(processes)
    shutil.copytree(tmp_path / "w", tmp_path / "before")
    stored = results.load(tmp_path / "w")
    fewer = start(*arguments, f"--config.data_devices={devices}", devices=devices)
    wait_for(lambda: rows(tmp_path / "w").count(b"\n") > len(stored) + 2, [fewer])
    fewer.kill()
    fewer.communicate()
    (tmp_path / "undisturbed.csv").write_bytes(undisturbed)
    expected, found = pd.read_csv(tmp_path / "undisturbed.csv"), results.load(tmp_path / "w")
    difference, after = abs(found.train_loss / expected.train_loss - 1), len(stored)
    # An epoch has 23 updates, in any of which rounding may flip a ReLU: up to 7e-5 was seen.
    assert difference[after] < 1e-3
    assert difference[after + 1] < 1e-2
