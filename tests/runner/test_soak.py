"""Sweeps in real processes that are killed, stopped, doubled and copied end with the undisturbed results.

pytest -m slow -s tests/runner/test_soak.py
"""

import random
import signal
import socket
import subprocess
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from lives import (
    DIES,
    LIFE_SECONDS,
    LONG,
    MOMENTS,
    OFTEN,
    SMALL,
    SOAK_SECONDS,
    SOAKS,
    after,
    appending,
    assert_as_if_undisturbed,
    comes,
    computing,
    doing,
    drawing,
    finish,
    kill,
    life,
    look,
    opening,
    recorded,
    rows,
    saving,
    training,
    undisturbed,
)

from smallbatch_jax.store import results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("small"), SMALL)


@pytest.mark.parametrize("name", SOAKS)
def test_a_sweep_killed_anywhere_again_and_again_ends_with_the_undisturbed_results(name, tmp_path, capsys):
    """After each of at least 13 kills no row is lost and all are undisturbed ones; the next process then finishes."""
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
    """The kill hits the first file of a new workdir and then, in a finished one, the same file and figures."""
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
        assert errors.endswith("the same command resumes\n"), said
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
    """Copies with `cp -a`, which continues if a file vanishes meanwhile."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], capture_output=True)


def test_a_workdir_copied_while_the_sweep_runs_loads_and_is_finished_by_the_same_command(tmp_path, small):
    """Three copies are made whole and two in parts, rows long before checkpoints or long after them."""
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
            warnings.simplefilter("ignore")  # a copied row may be cut off
            loaded = results.load(copied)
        assert len(loaded) <= len(rows(small.workdir))
        finish(copied, SMALL)
        assert_as_if_undisturbed(copied, small)
