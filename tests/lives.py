"""Starts the sweep's command as a process, watches it until a given moment, kills it, finishes and compares the sweep.

One such process is called a life. `doing` infers what a killed process was doing from the files it left in the workdir.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from PIL import Image

from smallbatch_jax.store import results
from smallbatch_jax.store.timings import TIMING_COLUMNS
from smallbatch_jax.study.figures import COST_FIGURES as COST_STEMS

ROOT = Path(__file__).parent.parent
SOAK_SECONDS = 350  # time limit of one soak
LIFE_SECONDS = 120  # time limit of one process outside a soak

# Saves a checkpoint after every segment; by default checkpoints may take a fiftieth of the time.
OFTEN = "from smallbatch_jax.runner import scheduler; scheduler.CHECKPOINT_SHARE = 1e9"
# Kills the process before it renames its nth temporary file.
DIES = """
import os, signal
real, left = os.replace, [{n}]
def replace(*names):
    left[0] -= 1
    return real(*names) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""
# Makes every segment seconds longer, in C, where Python handles no signal, as a large model does. The first one makes `marker`.
LONG = """
import hashlib, pathlib
from smallbatch_jax.program.lanes import LaneProgram
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
        "--config.epochs=16",
        "--config.grid.batch_sizes=(16,64,256)",
        "--config.grid.base_lrs=(0.0005,0.001,0.002,0.004,0.03,8.0)",
        "--config.grid.seeds=(0,1)",
        *FREQUENT,
    ),
    "resnet8 with batch norm": (
        "--config.model.name=resnet8",
        "--config.model.norm=batch",
        "--config.epochs=12",
        "--config.grid.batch_sizes=(16,64,256)",
        "--config.grid.base_lrs=(0.0005,0.002,0.008,0.03,0.5,8.0)",
        "--config.grid.seeds=(0,1)",
        *FREQUENT,
    ),
}


@contextmanager
def life(workdir: Path, overrides: tuple[str, ...], prelude: str | None = OFTEN) -> Iterator[subprocess.Popen]:
    """Runs `prelude`, then the sweep's command, in a process group of its own that is killed when the block ends."""
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
    """Kills the process group, unless it has ended, and returns its stderr."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return "" if process.stderr.closed else process.communicate()[1]


def finish(workdir: Path, overrides: tuple[str, ...], seconds: float = LIFE_SECONDS) -> None:
    """Runs the same command to completion."""
    with life(workdir, overrides) as process:
        _, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, errors


def comes(process: subprocess.Popen, happened: Callable[[], bool], stop: float | None = None) -> bool:
    """Waits until `happened`; returns False if the process ends first. Fails the test at `stop`, a time.monotonic()."""
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
    """Contents of a workdir at one moment."""

    starts: int  # lines of provenance.jsonl
    trained: tuple[str, ...]  # batch size of every segment so far
    row_bytes: int
    temporaries: set[tuple[str, int]]  # names and inodes of files not renamed yet
    figures: set[tuple[str, int]]  # names and times
    saved: set[str]  # programs with a complete checkpoint


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
    """Returns the lines of all results files, without headers."""
    found = []
    for path in sorted(workdir.glob("results/*.csv")):
        _, *lines, torn = path.read_text().split("\n")
        assert torn == "", path
        found += lines
    return sorted(found)


# Moments to kill at: a condition that must hold in this life, and the maximum number of seconds to wait after it.
# Each condition takes the workdir and what `look` saw before the life began.


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
    """An old checkpoint, or every checkpoint of a completed program, is being deleted."""
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
    """Returns what a killed process did last, inferred from its files."""
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


def files(workdir: Path) -> list[str]:
    """Returns all files but temporary ones, which a later process removes once they are old."""
    return sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.suffix != ".tmp")


def assert_as_if_undisturbed(workdir: Path, reference: Reference) -> None:
    """Asserts equal rows, figures and files, bit for bit, and whole lines in provenance.jsonl and timings.csv."""
    pd.testing.assert_frame_equal(results.load(workdir), results.load(reference.workdir), check_exact=True)
    assert rows(workdir) == rows(reference.workdir)
    assert files(workdir) == files(reference.workdir)
    for figure in reference.workdir.glob("figures/*"):
        if figure.stem not in COST_STEMS:  # these show wall-clock times
            assert (workdir / "figures" / figure.name).read_bytes() == figure.read_bytes()
    for figure in workdir.glob("figures/*.png"):
        with Image.open(figure) as image:
            image.load()
    for line in (workdir / "provenance.jsonl").read_text().splitlines():
        assert json.loads(line)["event"] in ("start", "finish")
    lines = (workdir / "timings.csv").read_text().splitlines()
    assert len(results.load_timings(workdir)) == len(lines) - 1
    assert {line.count(",") for line in lines} == {len(TIMING_COLUMNS) - 1}
