"""Commands under conditions outside their flags: signals, full disks, other processes, the environment."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import compiled
import pandas as pd
import pytest
import shell
from shell import QUICKSTART, ROOT

from smallbatch_jax.runner import signals
from smallbatch_jax.store import results

RUN_SWEEP = "import runpy, sys; sys.path.insert(0, 'experiments'); runpy.run_path('experiments/sweep.py', run_name='__main__')"
SMALL = ("--config.epochs=2", "--config.grid.batch_sizes=(256,)", "--config.grid.base_lrs=(0.001,)")


def start(script, *arguments, environment=None, **options):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | (environment or {})
    line = [sys.executable, *([f"experiments/{script}"] if script else []), *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    )


def run(script, *arguments, **options):
    process = start(script, *arguments, **options)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def refused(done, says):
    status, out, errors = done
    assert status == 2, errors
    assert out == ""
    assert says in errors
    assert errors.count("\n") == 1


# These run in a new process, which imports JAX: JAX reads its variables then.
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_PLATFORMS": "abacus"}, "JAX_PLATFORMS=abacus: cannot be used: "),
        (
            {"XLA_FLAGS": "--xla_abacus=1"},
            "XLA_FLAGS=--xla_abacus=1: cannot be used: Unknown flag in XLA_FLAGS: --xla_abacus=1",
        ),
        ({"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=maybe"}, "Couldn't interpret value maybe"),
        ({"JAX_ENABLE_X64": "maybe"}, "JAX cannot be imported: "),
        ({"FLAX_FIX_RNG_SEPARATOR": "maybe"}, "JAX cannot be imported: "),
        ({"JAX_PLATFORMS": "rocm"}, 'install its plugin with pip install -U "jax[rocm7-local]", or unset JAX_PLATFORMS'),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, "lets the compiler assume that there are no NaNs"),
    ],
)
@pytest.mark.long
def test_an_environment_that_cannot_be_had_is_refused_in_one_line(tmp_path, environment, says):
    refused(run("sweep.py", QUICKSTART, f"--workdir={tmp_path / 'w'}", *SMALL, environment=environment), says)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_users_devices_and_flags_are_respected_and_no_locale_stands_in_the_way(tmp_path):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {compiled.QUICKLY}",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }
    folder = tmp_path / "Läufe é 数"
    done = run("sweep.py", QUICKSTART, f"--workdir={folder}", *SMALL, environment=environment)
    assert done[0] == 0, done[2]
    assert list(results.load(folder).status) == ["finished"] * 2
    assert '"count": 1' in (folder / "provenance.jsonl").read_text()


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        status, _, errors = run("plan.py", QUICKSTART, "--probe_seconds=0", stdout=full)
    assert status == 1
    assert errors == "output cannot be written: No space left on device\n"


@pytest.fixture
def small_disk(tmp_path):
    """Yields a file system of one MiB and a function that changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size, *options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", *options, "tmpfs", folder], capture_output=True)

    if shutil.which("mount") is None or resize("1m").returncode:
        pytest.skip("no file system can be mounted here; test_grid.py limits the size of files instead")
    yield folder, lambda size: resize(f"{size},remount")
    subprocess.run(["umount", folder], check=True)


TWO_RATES = ("--config.epochs=3", "--config.grid.batch_sizes=(64,)", "--config.grid.base_lrs=(0.001,0.002)")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the workdir of a sweep of two rates."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "w"
    assert run("sweep.py", QUICKSTART, *TWO_RATES, f"--workdir={workdir}")[0] == 0
    return workdir


@pytest.mark.slow
def test_a_sweep_on_a_full_disk_says_so_and_goes_on_once_there_is_room(small_disk, undisturbed):
    """A checkpoint of an AlexNet's lanes does not fit on it."""
    folder, resize = small_disk
    often = ("--config.checkpoint_seconds=0", "--config.segment_seconds=0.05")
    limit = "from smallbatch_jax.runner import scheduler; scheduler.CHECKPOINT_SHARE = 1e9; "
    unlimited = limit + RUN_SWEEP
    asked = (QUICKSTART, *TWO_RATES, f"--workdir={folder / 'w'}")
    status, _, errors = run(None, "-c", unlimited, *asked, *often)
    assert status == 1, errors
    said = errors.splitlines()[-1]
    assert said.startswith(f"{folder}/w/checkpoints/m00064_b00064 cannot be written: No space left on device; ")
    assert "Traceback" not in errors
    resize("64m")
    assert run("sweep.py", *asked)[0] == 0
    pd.testing.assert_frame_equal(results.load(folder / "w"), results.load(undisturbed), check_exact=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_the_first_program_compiles_ends_the_command_soon(tmp_path, signum):
    """ResNet-32 takes longer to compile than the 15 s allowed here."""
    slow = ("--config.model.name=resnet32", "--config.model.norm=batch", *SMALL)
    with shell.start("sweep.py", QUICKSTART, *slow, f"--workdir={tmp_path / 'w'}") as process:
        while not (tmp_path / "w/provenance.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 128 + signum
    assert errors.splitlines()[-1].endswith("the same command resumes")
    assert "Traceback" not in errors


FLAGS = {
    **dict.fromkeys(("JAX_DEBUG_NANS", "JAX_DEBUG_INFS", "JAX_DISABLE_JIT", "JAX_ENABLE_X64", "JAX_NO_TRACING"), "1"),
    **{"JAX_TRANSFER_GUARD": "disallow", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_RANDOM_SEED_OFFSET": "3"},
    **{"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_LOG_COMPILES": "1"},
    **{"FLAX_RETURN_FROZENDICT": "1", "FLAX_FIX_RNG_SEPARATOR": "1"},
}


@pytest.mark.slow
def test_flags_of_jax_change_no_bit_of_a_sweep_and_home_is_the_users(undisturbed, tmp_path):
    environment = {**FLAGS, "HOME": str(tmp_path)}
    status, _, errors = run("sweep.py", QUICKSTART, *TWO_RATES, "--workdir=~/w", environment=environment)
    assert status == 0, errors
    assert "jax_debug_nans=True" in errors
    pd.testing.assert_frame_equal(results.load(tmp_path / "w"), results.load(undisturbed), check_exact=True)


@pytest.mark.slow
def test_a_terminal_that_closes_saves_what_was_trained(tmp_path):
    """The sweep gets SIGHUP and has nowhere to write to; under `nohup` the signal stays ignored."""
    terminal, inner = pty.openpty()
    line = ["experiments/sweep.py", QUICKSTART, *SMALL, "--config.epochs=4000", f"--workdir={tmp_path / 'w'}"]
    line = ["setsid", "--ctty", sys.executable, *line]
    sweep = subprocess.Popen(line, cwd=ROOT, stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    rows = tmp_path / "w/results/m00256_b00256.csv"
    while not (rows.exists() and rows.read_bytes().count(b"\n") > 3):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 10_000)
    os.close(terminal)
    assert sweep.wait(timeout=60) == 128 + signal.SIGHUP
    assert list((tmp_path / "w/checkpoints/m00256_b00256").iterdir())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in signals.handled()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_workdir_that_may_only_be_read_is_read_and_what_cannot_be_drawn_is_one_line(tmp_path):
    """A file takes the place of its figures folder: not even root, who may run the tests, can write into that."""
    workdir = shutil.copytree(ROOT / "notebooks/results/digits/fig08", tmp_path / "w")
    (workdir / "figures").write_text("")
    done = shell.run("figures.py", f"--workdir={workdir}")
    assert done.returncode == 2
    assert "512" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "cannot be written: " in done.stderr


@pytest.mark.slow
def test_the_owner_of_a_workdir_is_named_and_a_dead_one_is_not(tmp_path):
    asked = (QUICKSTART, *SMALL, "--config.epochs=400", f"--workdir={tmp_path / 'w'}")
    first = start("sweep.py", *asked)
    while not (tmp_path / "w/provenance.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    refused(run("sweep.py", *asked), f"belongs to process {first.pid} on {os.uname().nodename}")
    first.kill()
    first.communicate()
    second = start("sweep.py", *asked)
    while (tmp_path / "w/provenance.jsonl").read_text().count("start") < 2:
        assert second.poll() is None
        time.sleep(0.05)
    second.kill()
    second.communicate()


ASK = "import jax; from smallbatch_jax.program import devices; print(devices.memory_bytes(devices.lane_mesh()))"


def memory_under(limit):
    """Returns the bytes that programs may use in a process that a shell command limits before it starts."""
    line = ["sh", "-c", f'{limit}; exec "$@"', "sh", sys.executable, "-c", ASK]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def test_the_memory_there_is_ends_where_the_user_said():
    assert memory_under("ulimit -v 6000000") == int(0.9 * 6_000_000 * 1024)


@pytest.fixture
def control_group():
    """Yields a control group, such as a container or Slurm job runs in; skips the test without the right to create one."""
    for root, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, f"smallbatch_jax_{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(3 << 30))
            (group / "cgroup.procs").read_text()
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group can be made here")


def test_the_memory_there_is_ends_where_the_control_group_does(control_group):
    assert memory_under(f"echo $$ > {control_group}/cgroup.procs") == int(0.9 * (3 << 30))
