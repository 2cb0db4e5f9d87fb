"""Kill it anywhere: sweeps killed, stopped, doubled and copied as real processes end with the undisturbed results.

    pytest -m slow -s tests/test_soak.py

A life is one process of the sweep's command. What a killed one was doing is judged from what it left in the workdir.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from PIL import Image

from smallbatch_jax import results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOAK_SECONDS = 350  # for one soak; then it stops, and fails
LIFE_SECONDS = 120  # for a single process, wherever no soak bounds it

# A checkpoint is saved whenever a segment ends: by default a fiftieth of the time may go into them.
OFTEN = "from smallbatch_jax import feeder; feeder.CHECKPOINT_SHARE = 1e9"
# Death at the nth file that is whole under a temporary name, and would now get its own.
DIES = """
import os, signal
real, left = os.replace, [{n}]
def replace(*names):
    left[0] -= 1
    return real(*names) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""
# Every segment takes seconds more, in C, where Python sees no signal; as a large model's does. A file says that it began.
LONG = """
import hashlib, pathlib
from smallbatch_jax.lanes import LaneProgram
real = LaneProgram.run
def run(*values):
    pathlib.Path("{marker}").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)
    return real(*values)
LaneProgram.run = run
"""
RUN = """
import runpy, sys
sys.path.insert(0, "experiments")
sys.argv[0] = "experiments/sweep.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""

FREQUENT = ("--config.segment_seconds=0.2", "--config.checkpoint_seconds=0")
SMALL = (
    "--config.epochs=3",
    "--config.grid.batch_sizes=(16,64)",
    "--config.grid.base_lrs=(0.001,0.002,8.0)",
    *FREQUENT,
)
SOAKS = {
    "alexnet": (
        "--config.epochs=4",
        "--config.grid.batch_sizes=(16,64,256)",
        "--config.grid.base_lrs=(0.0005,0.001,0.002,0.004,0.03,8.0)",
        "--config.grid.seeds=(0,1)",
        *FREQUENT,
    ),
    "resnet8 with batch norm": (
        "--config.model.name=resnet8",
        "--config.model.norm=batch",
        "--config.epochs=3",
        "--config.grid.batch_sizes=(16,64,256)",
        "--config.grid.base_lrs=(0.0005,0.002,0.008,0.03,0.5,8.0)",
        "--config.grid.seeds=(0,1)",
        *FREQUENT,
    ),
}


@contextmanager
def life(workdir: Path, overrides: tuple[str, ...], prelude: str | None = OFTEN) -> Iterator[subprocess.Popen]:
    """The sweep's command in a process group of its own, which does not outlive the block; `prelude` is run before it."""
    begin = ["experiments/sweep.py"] if prelude is None else ["-c", prelude + RUN]
    line = [sys.executable, *begin, "--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen) -> str:
    """SIGKILL for the whole group, unless it has ended; what it said on stderr."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return "" if process.stderr.closed else process.communicate()[1]


def finish(workdir: Path, overrides: tuple[str, ...], seconds: float = LIFE_SECONDS) -> None:
    """The same command, undisturbed to its end."""
    with life(workdir, overrides) as process:
        _, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, errors


def comes(process: subprocess.Popen, happened: Callable[[], bool], stop: float | None = None) -> bool:
    """Waits until it has happened; False if the process ends before. At `stop`, a time.monotonic(), the test fails."""
    stop = time.monotonic() + LIFE_SECONDS if stop is None else stop
    while not happened():
        if process.poll() is not None:
            return False
        if time.monotonic() > stop:
            pytest.fail("the time for this test is over")
        time.sleep(0.001)
    return True


def after(seconds: float) -> Callable[[], bool]:
    then = time.monotonic() + seconds
    return lambda: time.monotonic() > then


class Seen(NamedTuple):
    """What lies in a workdir at one moment."""

    starts: int  # lines of provenance.jsonl
    trained: tuple[str, ...]  # batch sizes, one for each segment there ever was
    row_bytes: int
    temporaries: set[tuple[str, int]]  # names and inodes of what is not yet in its place
    figures: set[tuple[str, int]]  # names and times
    saved: set[str]  # programs with a whole checkpoint


def look(workdir: Path) -> Seen:
    timings = [line.split(",") for line in read(workdir / "timings.csv").split("\n")]
    hidden = [*workdir.glob(".*"), *workdir.glob("results/.*"), *workdir.glob("figures/.*")]
    return Seen(
        read(workdir / "provenance.jsonl").count("\n"),
        tuple(line[1] for line in timings if line[0] == "segment"),
        sum(stat(path, "st_size") for path in workdir.glob("results/m*.csv")),
        {(str(path), stat(path, "st_ino")) for path in [*hidden, *workdir.glob("checkpoints/*/*tmp*")]},
        {(path.name, stat(path, "st_mtime_ns")) for path in workdir.glob("figures/[!.]*")},
        {
            path.parent.parent.name
            for path in workdir.glob("checkpoints/*/*/commit_success.txt")
            if "checkpoint-tmp" not in str(path.parent)
        },
    )


def read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def stat(path: Path, field: str) -> int:
    try:
        return getattr(path.stat(), field)
    except FileNotFoundError:
        return 0


def rows(workdir: Path) -> list[str]:
    """The lines of all result files, without headers, as they stand there."""
    found = []
    for path in sorted(workdir.glob("results/*.csv")):
        _, *lines, torn = path.read_text().split("\n")
        assert torn == "", path
        found += lines
    return sorted(found)


# The moments to kill at: what must have come to pass in this life, and the most seconds to wait on from there.
# Each is a condition on what was seen before the life began.


def starting(workdir, before):
    return lambda: True


def opening(workdir, before):
    return lambda: any(workdir.glob(".experiment.json.*"))


def recorded(workdir, before):
    return lambda: look(workdir).starts > before.starts


def training(workdir, before):
    return lambda: len(look(workdir).trained) > len(before.trained)


def saving(workdir, before):
    return lambda: any("checkpoints" in path for path, _ in look(workdir).temporaries - before.temporaries)


def appending(workdir, before):
    return lambda: look(workdir).row_bytes > before.row_bytes


def deleting(workdir, before):
    """An old checkpoint is going, or all of a program that is done."""
    there = set()

    def happened():
        now = {path for path in workdir.glob("checkpoints/*/*/*") if "checkpoint-tmp" not in str(path)}
        gone = there - now
        there.update(now)
        return bool(gone)

    return happened


def drawing(workdir, before):
    return lambda: look(workdir).figures != before.figures


def computing(workdir, before):
    return (workdir.parent / "computing").exists


MOMENTS = [
    (starting, 3.0),
    *[(recorded, 5.0)] * 2,
    *[(training, 0.5)] * 2,
    (training, 4.0),
    *[(saving, 0.15)] * 3,
    *[(appending, 0.0)] * 2,
    (deleting, 0.0),
]


def doing(workdir: Path, before: Seen, killed_at: float, all_rows: int) -> str:
    """What a process that was killed did last, judged from what it left."""
    now = look(workdir)
    if unfinished := now.temporaries - before.temporaries:
        return "saving a checkpoint" if any("checkpoints" in path for path, _ in unfinished) else "replacing a file"
    if now.starts == before.starts:
        return "starting: imports, data"
    if now.figures != before.figures:
        return "drawing"
    if len(rows(workdir)) == all_rows:
        return "between the last row and the first figure"
    if killed_at - max(path.stat().st_mtime for path in workdir.glob("results/*.csv")) < 0.02:
        return "appending rows"
    return "compiling" if now.trained == before.trained else "in a segment"


class Reference(NamedTuple):
    """An undisturbed sweep."""

    workdir: Path
    overrides: tuple[str, ...]
    seconds: float


def undisturbed(folder: Path, overrides: tuple[str, ...]) -> Reference:
    began = time.monotonic()
    finish(folder / "undisturbed", overrides)
    return Reference(folder / "undisturbed", overrides, time.monotonic() - began)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("small"), SMALL)


def files(workdir: Path) -> list[str]:
    return sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*"))


def assert_as_if_undisturbed(workdir: Path, reference: Reference) -> None:
    """The same rows, figures and files, bit for bit; what tells of the lives is whole."""
    pd.testing.assert_frame_equal(results.load(workdir), results.load(reference.workdir), check_exact=True)
    assert rows(workdir) == rows(reference.workdir)
    assert files(workdir) == files(reference.workdir)
    for figure in reference.workdir.glob("figures/*"):
        assert (workdir / "figures" / figure.name).read_bytes() == figure.read_bytes()
    for figure in workdir.glob("figures/*.png"):
        with Image.open(figure) as image:
            image.load()
    for line in (workdir / "provenance.jsonl").read_text().splitlines():
        assert json.loads(line)["event"] in ("start", "finish")
    lines = (workdir / "timings.csv").read_text().splitlines()
    assert len(results.load_timings(workdir)) == len(lines) - 1
    assert {line.count(",") for line in lines} == {len(results.TIMING_COLUMNS) - 1}


@pytest.mark.parametrize("name", SOAKS)
def test_a_sweep_killed_anywhere_again_and_again_ends_with_the_undisturbed_results(name, tmp_path, capsys):
    """At least 13 kills, then one life to the end; after each kill the rows are some of the undisturbed, none lost."""
    stop = time.monotonic() + SOAK_SECONDS
    reference = undisturbed(tmp_path, SOAKS[name])
    wanted, workdir, draw = rows(reference.workdir), tmp_path / "killed", random.Random(name)
    assert len(wanted) == len(set(wanted))

    def last_row(workdir, before):
        return lambda: len(rows(workdir)) == len(wanted)

    moments = draw.sample(MOMENTS, len(MOMENTS))
    killed, lives = Counter(), Counter()
    for condition, longest in [(opening, 0.0), *moments, (last_row, 0.0), (drawing, 0.0), (drawing, 2.5)]:
        before, had = look(workdir), rows(workdir)
        with life(workdir, SOAKS[name]) as process:
            reached = comes(process, condition(workdir, before), stop) and comes(process, after(draw.uniform(0, longest)), stop)
            killed_at = time.time()
            errors = kill(process)
        assert "Traceback" not in errors, errors
        if reached and process.returncode == -signal.SIGKILL:
            killed[doing(workdir, before, killed_at, len(wanted))] += 1
        else:
            assert process.returncode == 0, errors
        now = look(workdir)
        assert now.starts - before.starts <= 2
        new = {f"m{int(m):05d}" for m in now.trained[len(before.trained) :]}
        resumed = any(program.split("_")[0] in new for program in before.saved)
        lives[
            "went on from a checkpoint" if resumed else "trained from the start of a program" if new else "did not train"
        ] += 1
        assert set(had) <= set(rows(workdir)) <= set(wanted)
        assert len(rows(workdir)) == len(set(rows(workdir)))
    finish(workdir, SOAKS[name], stop - time.monotonic())
    seconds = time.monotonic() - stop + SOAK_SECONDS - reference.seconds
    with capsys.disabled():
        kills = killed.total()
        print(f"\n{name}: {kills} kills, {lives.total()} restarts, {seconds:.0f} s (undisturbed {reference.seconds:.0f} s),")
        print(f"  {len(results.load(workdir))} rows of {len(wanted)}; of the lives that were killed:")
        for counted in (killed, lives):
            print("".join(f"  {number:3d}  {what}\n" for what, number in counted.most_common()))
    assert killed.total() >= 13
    assert {"compiling", "in a segment", "saving a checkpoint", "appending rows", "drawing"} <= killed.keys()
    assert lives["went on from a checkpoint"] >= 3
    assert_as_if_undisturbed(workdir, reference)


def test_a_process_killed_before_a_file_gets_its_name_leaves_nothing_in_the_way(tmp_path, small):
    """The first file of a new workdir; then, of one that is done, the same file again and figures."""
    workdir = tmp_path / "w"
    for n in (1, 1, None, 1, 2, 5, 9):
        with life(workdir, SMALL, OFTEN if n is None else DIES.format(n=n)) as process:
            _, errors = process.communicate(timeout=LIFE_SECONDS)
        assert process.returncode == (-signal.SIGKILL if n else 0), errors
    finish(workdir, SMALL)
    assert_as_if_undisturbed(workdir, small)


def imports_jax(process):
    maps = Path(f"/proc/{process.pid}/maps")
    return lambda: "jaxlib" in maps.read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_ends_in_one_line_and_the_same_command_goes_on(tmp_path, small, signum):
    workdir = tmp_path / "w"
    for moment in (imports_jax, recorded, training, saving, drawing):
        before = look(workdir)
        with life(workdir, SMALL, None if moment is imports_jax else OFTEN) as process:
            assert comes(process, imports_jax(process) if moment is imports_jax else moment(workdir, before)), moment
            process.send_signal(signum)
            _, errors = process.communicate(timeout=LIFE_SECONDS)
        said = f"{moment.__name__}: {errors}"
        assert "Traceback" not in errors, said
        assert process.returncode == 128 + signum, said
        assert errors.endswith("the same command goes on\n"), said
    finish(workdir, SMALL)
    assert_as_if_undisturbed(workdir, small)


@pytest.mark.parametrize(("moment", "prelude"), [(recorded, OFTEN), (computing, LONG), (saving, OFTEN), (drawing, OFTEN)])
def test_a_second_sigint_ends_it_within_a_second_and_does_no_harm(tmp_path, small, moment, prelude):
    workdir = tmp_path / "w"
    with life(workdir, SMALL, prelude.format(marker=tmp_path / "computing")) as process:
        assert comes(process, moment(workdir, look(workdir)))
        process.send_signal(signal.SIGINT)
        comes(process, after(0.3))  # as fast as a person does it
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        second = time.monotonic()
        _, errors = process.communicate(timeout=LIFE_SECONDS)
        assert time.monotonic() - second < 1, errors
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT), errors
    finish(workdir, SMALL)
    assert_as_if_undisturbed(workdir, small)


def test_a_workdir_has_one_owner_until_that_dies(tmp_path, small):
    workdir = tmp_path / "w"
    with life(workdir, SMALL) as first:
        assert comes(first, recorded(workdir, look(workdir)))
        with life(workdir, SMALL) as second:
            _, errors = second.communicate(timeout=LIFE_SECONDS)
        assert second.returncode == 2
        assert errors.count("\n") == 1
        assert f"process {first.pid} on {socket.gethostname()}" in errors
        assert look(workdir).starts == 1
        assert comes(first, training(workdir, look(workdir)))
        assert first.poll() is None
        kill(first)
    finish(workdir, SMALL)
    assert_as_if_undisturbed(workdir, small)


def copy(source: Path, target: Path) -> None:
    """As `cp -a`, which goes on where a file vanishes before its eyes."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], capture_output=True)


def test_a_workdir_copied_while_the_sweep_runs_loads_and_is_finished_by_the_same_command(tmp_path, small):
    """At once, at three moments; and in parts, rows long before checkpoints and long after them."""
    workdir, draw, copies = tmp_path / "w", random.Random(0), []
    with life(workdir, SMALL) as process:
        assert comes(process, saving(workdir, look(workdir)))
        before = look(workdir)
        for part in ("results", "checkpoints"):
            copy(workdir / part, tmp_path / f"{part} first" / part)
        assert comes(process, appending(workdir, before))
        assert comes(process, saving(workdir, look(workdir)))
        for part in ("results", "checkpoints"):
            rest = tmp_path / "rest"
            copy(workdir, rest)
            for path in rest.iterdir():
                if path.name != part:
                    path.rename(tmp_path / f"{part} first" / path.name)
            copies.append(tmp_path / f"{part} first")
        for i in range(3):
            assert comes(process, after(draw.uniform(0, 2)))
            copies.append(tmp_path / f"copy {i}")
            copy(workdir, copies[-1])
        _, errors = process.communicate(timeout=LIFE_SECONDS)
        assert process.returncode == 0, errors
    assert_as_if_undisturbed(workdir, small)
    for copied in copies:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a row may have been copied by half
            loaded = results.load(copied)
        assert len(loaded) <= len(rows(small.workdir))
        finish(copied, SMALL)
        assert_as_if_undisturbed(copied, small)
