"""The launch command on real clusters, of one machine and of two, whose workers and machines die; and its mistakes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import pandas as pd
import pytest
import shell
from shell import QUICKSTART, ROOT, refused

from smallbatch_jax.cluster.launcher import connected
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.store import results
from smallbatch_jax.study.figures import COST_FIGURES as COST_STEMS

SECONDS = 300  # for a single command

# What workers do here instead of training. m = 2: sees no workdir; 4: dies once; 8: has no data; 16: a bug; 32: always dies;
# 64: is interrupted after one of three runs.
STANDS_IN = """
import os, runpy, signal, sys
import jax
from smallbatch_jax.cluster import launcher

def train(task, cpu_devices, reports):
    from smallbatch_jax.store.files import append_line
    from smallbatch_jax.store.results import ProgramResults, Row
    from smallbatch_jax.cluster.worker import Outcome
    from smallbatch_jax.runner.progress import Status
    m, b = task.shape
    append_line(task.workdir.parent / "tries", f"{m} {os.getpid()}")
    tries = (task.workdir.parent / "tries").read_text().split("\\n")
    if m == 32 or (m == 4 and sum(line.startswith("4 ") for line in tries) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if m == 16:
        raise ZeroDivisionError("two\\nlines")
    if m == 8:
        return Outcome(None, "dataset.data_dir: cannot list '/data'")
    rows = [Row(m, b, run.base_lr, run.seed, 1, 1, 0.5, 0.5, 0.5, 0.5) for run in task.experiment.runs() if run.batch_size == m]
    if m == 2:
        return Outcome(Status(3, 3, finished=3), "", rows)
    with ProgramResults(task.workdir, m, b) as stored:
        stored.append(rows[: 1 if m == 64 else 3])
    return Outcome(Status(3, 3, finished=1 if m == 64 else 3))

launcher._train, launcher.RETRIES = train, 1
launcher._facts = lambda experiment: jax.devices() and {"num_classes": 3, "examples": [50, 20]}  # JAX has its threads then
sys.path.insert(0, "experiments")
sys.argv[0] = "experiments/launch.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment(**variables):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "RAY_ADDRESS")}
    return kept | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))} | variables


def run(*line, **options):
    return subprocess.run(
        [sys.executable, *line], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS, **options
    )


@pytest.mark.long
def test_a_worker_that_dies_has_a_successor_and_one_that_fails_keeps_nobody_from_going_on(tmp_path):
    fields = ("epochs=1", "grid.batch_sizes=(2,4,8,16,32,64)", "grid.base_lrs=(0.001,0.002,0.004)")
    done = run("-c", STANDS_IN, QUICKSTART, f"--workdir={tmp_path / 'w'}", *(f"--config.{field}" for field in fields))
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    no_data, bug, dead, interrupted, summary, last = [
        line for line in done.stderr.splitlines() if "programs at work" not in line
    ]
    assert no_data == "quickstart, m = 8: dataset.data_dir: cannot list '/data'"
    assert bug == "quickstart, m = 16: ZeroDivisionError: two lines"
    assert re.match(r"quickstart, m = 32: its worker died 2 times, at last with \w+: ", dead)
    assert interrupted == "quickstart, m = 64: its worker was interrupted; the same command resumes"
    assert summary.startswith("7/18 runs done")
    assert last == "some programs failed; the same command tries them again"
    assert results.load(tmp_path / "w").batch_size.tolist() == [2] * 3 + [4] * 3 + [64]
    tries = [line.split() for line in (tmp_path / "tries").read_text().splitlines()]
    first_tries = list(dict.fromkeys(int(m) for m, _ in tries))
    assert first_tries == [2, 4, 8, 16, 32, 64]  # the most updates first
    assert sorted(int(m) for m, _ in tries) == [2, 4, 4, 8, 16, 32, 32, 64]
    assert len({process for _, process in tries}) == len(tries)  # one process each
    assert not [path for path in (tmp_path / "w").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--also=x"], "--also: got 'x', accepts CONFIG.py:WORKDIR"),
        (["--also=configs/none.py:w"], "--also=configs/none.py:w: FileNotFoundError"),
        (["--also=configs/quickstart.py:configs"], "--workdir: configs holds"),
        (["--also=configs/quickstart.py:{w}/../w"], "is given twice"),
        (["--also=configs/fig15_best.py:{w}2"], "drawn_from: fig15 is drawn from other results"),
        (["--config.grid.batch_sizes=(2,5000)"], "5000 is larger than the training set of 1437"),
    ],
)
def test_a_mistake_is_one_line_exit_status_2_and_nothing_written(tmp_path, arguments, says):
    given = [argument.format(w=tmp_path / "w") for argument in arguments]
    refused(shell.run("launch.py", QUICKSTART, f"--workdir={tmp_path / 'w'}", *given), says)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("XLA_FLAGS", "--xla_foo=1", "XLA_FLAGS=--xla_foo=1: cannot be used: Unknown flag in XLA_FLAGS: --xla_foo=1"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "no diverged run could be detected"),
        ("JAX_PLATFORMS", "foo", "JAX_PLATFORMS=foo: cannot be used"),
    ],
)
def test_what_the_environment_asks_for_is_tried_before_anything_is_written(tmp_path, variable, value, says):
    refused(shell.run("launch.py", QUICKSTART, f"--workdir={tmp_path / 'w'}", environment={variable: value}), says)
    assert not (tmp_path / "w").exists()


@pytest.mark.long
def test_devices_that_no_machine_has_are_refused(tmp_path):
    done = shell.run("launch.py", QUICKSTART, f"--workdir={tmp_path / 'w'}", "--config.data_devices=4096")
    refused(done, "data_devices")


def launch(workdir, *arguments, **options):
    line = [sys.executable, "experiments/launch.py", QUICKSTART, f"--workdir={workdir}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment(), start_new_session=True, **pipes, **options)


def finished(process):
    """Returns a process's lines on stderr once it has exited with status 0."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert output.startswith("quickstart\n")
    lines = errors.splitlines()
    assert [line for line in lines if "programs at work" not in line] == lines[-1:]  # Ray logs nothing
    return lines


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    stop = time.monotonic() + SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < stop
        time.sleep(0.02)


def files(workdir):
    return sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*"))


def saved(workdir):
    """Returns the programs that have a complete checkpoint."""
    return {path.parent.parent.name for path in workdir.glob("checkpoints/*/*[0-9]/commit_success.txt")}


def begun(workdir):
    """Returns the programs that have at least five rows."""
    return {path.stem for path in workdir.glob("results/*.csv") if path.read_bytes().count(b"\n") > 5}


def starts(workdir):
    path = workdir / "provenance.jsonl"
    return path.read_text().count('"start"') if path.exists() else 0


def assert_as_if_swept(workdir, swept):
    """Requires the same rows and figures bit for bit, and the same files."""
    pd.testing.assert_frame_equal(results.load(workdir), results.load(swept), check_exact=True)
    assert files(workdir) == files(swept)
    for figure in swept.glob("figures/*"):
        if figure.stem not in COST_STEMS:  # which show measured times
            assert (workdir / "figures" / figure.name).read_bytes() == figure.read_bytes()


LONG = (
    "--config.epochs=30",
    "--config.grid.batch_sizes=(16,32,64)",
    "--config.grid.base_lrs=(0.001,0.002,8.0)",
    "--config.segment_seconds=0.5",
    "--config.checkpoint_seconds=0",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Returns the workdir of the same grid, trained by sweep.py."""
    workdir = tmp_path_factory.mktemp("swept") / "w"
    done = run("experiments/sweep.py", QUICKSTART, f"--workdir={workdir}", *LONG)
    assert done.returncode == 0, done.stderr
    return workdir


NODES = """
import sys
from ray.cluster_utils import Cluster
head, other = map(int, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False})
node = cluster.add_node(num_cpus=other)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(node, allow_graceful=False)
    print("killed", flush=True)
cluster.shutdown()
"""


@contextmanager
def two_nodes(head, other):
    """Yields the address of a cluster of two machines with these CPU counts, and a function that kills the second."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    nodes = subprocess.Popen([sys.executable, "-c", NODES, str(head), str(other)], cwd=ROOT, env=environment(), **pipes)

    def said(pattern):
        return next(line.strip() for line in nodes.stdout if re.fullmatch(pattern, line.strip()))

    def kill():
        nodes.stdin.write("kill\n")
        nodes.stdin.flush()
        assert said("killed")

    try:
        yield said(r"[\d.]+:\d+"), kill
    finally:
        nodes.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "other"), [(1, 1), (1, 2)])
def test_a_grid_outlives_a_machine_that_dies_while_it_trains(tmp_path, swept, head, other):
    """Equal machines train a program each; a larger one trains all, until it dies and the smaller one takes over."""
    workdir = tmp_path / "w"
    with two_nodes(head, other) as (address, kill):
        process = launch(workdir, f"--address={address}", *LONG)
        wait_until(lambda: len(begun(workdir)) == (2 if head == other else 1), process)
        before = starts(workdir)
        kill()
        wait_until(lambda: starts(workdir) > before, process)
        finished(process)
    assert starts(workdir) >= 4  # three programs, one of them twice
    assert_as_if_swept(workdir, swept)


@pytest.mark.slow
def test_the_whole_quickstart_outlives_a_machine_that_dies(tmp_path):
    """65 runs in 5 programs; the machine dies while it trains m = 2 or m = 8."""
    done = run("experiments/sweep.py", QUICKSTART, f"--workdir={tmp_path / 'swept'}")
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "w"
    with two_nodes(1, 1) as (address, kill):
        process = launch(workdir, f"--address={address}")
        wait_until(lambda: len(begun(workdir)) == 2, process)
        kill()
        finished(process)
    assert starts(workdir) == 6
    assert_as_if_swept(workdir, tmp_path / "swept")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workers_which_save_and_the_same_command_goes_on(tmp_path, swept, signum):
    workdir = tmp_path / "w"
    process = launch(workdir, *LONG)
    wait_until(lambda: begun(workdir), process)
    os.killpg(process.pid, signum)  # as a terminal does
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signum, errors
    assert errors.splitlines()[-1] == f"stopped; everything is saved in {workdir}, the same command resumes"
    rows = len(results.load(workdir))
    assert 0 < rows < len(results.load(swept))
    assert saved(workdir) == {"m00016_b00016"}
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]
    finished(launch(workdir, *LONG))
    assert_as_if_swept(workdir, swept)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_so_does_sigkill_and_a_sweep_beside_it_is_refused(tmp_path, swept):
    workdir = tmp_path / "w"
    for signums in ((signal.SIGINT, signal.SIGINT), (signal.SIGKILL,)):
        began = starts(workdir)
        process = launch(workdir, *LONG)
        wait_until(lambda began=began: starts(workdir) > began, process)
        refused(run("experiments/sweep.py", QUICKSTART, f"--workdir={workdir}", *LONG), f"belongs to process {process.pid} on")
        for signum in signums:
            process.send_signal(signum)
            time.sleep(0.3)
        ended = time.monotonic()
        process.communicate(timeout=SECONDS)
        assert time.monotonic() - ended < 3
    finished(launch(workdir, *LONG))
    assert_as_if_swept(workdir, swept)


BLIND = """
import runpy, sys
from dataclasses import replace
from smallbatch_jax.cluster import launcher
task = launcher.ProgramTask
launcher.ProgramTask = lambda *fields: replace(task(*fields), owner="another machine")
sys.path.insert(0, "experiments")
sys.argv[0] = "experiments/launch.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_several_configs_and_workers_that_do_not_see_the_workdirs(tmp_path, swept):
    """No worker recognises the workdir: all results come back through the cluster."""
    config = tmp_path / "other.py"
    text = (ROOT / "configs/quickstart.py").read_text().replace("(2, 8, 32, 128, 512)", "(512,)")
    config.write_text(text.replace('"quickstart"', '"other"').replace("epochs = 8", "epochs = 1"))
    done = run("-c", BLIND, QUICKSTART, f"--workdir={tmp_path / 'w'}", f"--also={config}:{tmp_path / 'v'}", *LONG)
    assert done.returncode == 0, done.stderr
    assert_as_if_swept(tmp_path / "w", swept)
    assert done.stderr.splitlines()[-1].startswith("22/22 runs done")
    assert (results.load(tmp_path / "v").groupby("base_lr").epoch.max() == 1).all()
    assert re.findall("^(quickstart|other)$", done.stdout, re.M) == ["quickstart", "other"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_address_without_a_cluster_is_named_at_once(address):
    with (
        pytest.raises(InputError, match=f"^--address={address}: no Ray cluster can be reached: "),
        connected(address),
    ):
        pass
