"""Tests the command figures.py with one workdir, several, or the workdirs that a config names."""

from functools import partial

import pytest
import shell
import tiny
from shell import refused

from smallbatch_jax.store import workdir
from smallbatch_jax.store.results import ProgramResults, Row

run = partial(shell.run, "figures.py")


def store(path, name):
    """Writes a workdir of two batch sizes, the second of which has no rows, and returns its path."""
    experiment = tiny.grid(name=name, batch_sizes=(2, 4), base_lrs=(2**-6,))
    facts = {"num_classes": 3, "examples": [50, 20]}
    with (
        workdir.open_workdir(path, experiment, facts) as folder,
        ProgramResults(folder, 2, 2) as program,
        ProgramResults(folder, 4, 4),
    ):
        program.append(Row(2, 2, 2**-6, 0, epoch, 25 * epoch, 0.5, 0.8, 0.5, 0.9) for epoch in (1, 2, 3))
    return folder


def config(path, *workdirs, name="fig15"):
    path.write_text(
        "from smallbatch_jax.config.experiment import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        f"    config.name, config.drawn_from = {name!r}, {tuple(map(str, workdirs))!r}\n    return config\n"
    )
    return f"--config={path}"


@pytest.mark.long
def test_several_workdirs_are_drawn_into_their_own_figures_and_compared_in_the_first(tmp_path):
    a, b = store(tmp_path / "a", "one"), store(tmp_path / "b", "two")
    done = run(f"--workdir={a}", f"--workdir={b}")
    assert done.returncode == 0, done.stderr
    own = {"accuracy_vs_batch_size.png", "convergence.png"}
    assert {path.name for path in (b / "figures").glob("*.png")} == own
    assert {path.name for path in (a / "figures").glob("*.png")} == own | {"best_accuracy.png", "convergent_base_lrs.png"}
    lines = done.stdout.splitlines()
    assert "one" in lines
    assert "two" in lines
    assert [line.split()[-1] for line in lines[-2:]] == [str(a / "figures"), str(b / "figures")]


def test_a_config_draws_the_comparison_of_the_workdirs_that_are_there(tmp_path):
    a = store(tmp_path / "a", "one")
    done = run(config(tmp_path / "fig15.py", a, "runs/no-such", "runs/nor-this"), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "not there yet: runs/no-such, runs/nor-this" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].endswith(f"in {tmp_path / 'out'}")
    stems = {"best_accuracy", "convergent_base_lrs"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{s}.{kind}" for s in stems for kind in ("png", "pdf")}
    assert not (a / "figures").exists()


def test_what_cannot_be_drawn_is_one_line_and_exit_status_2(tmp_path):
    a, again = store(tmp_path / "a", "one"), store(tmp_path / "b", "one")
    fig15 = config(tmp_path / "fig15.py", tmp_path / "none", tmp_path / "nor")
    refused(run(fig15), f"not there yet: {tmp_path / 'none'}, {tmp_path / 'nor'}; train one first")
    refused(run(fig15, f"--workdir={a}"), "--config, --workdir: give one of them")
    refused(run(config(tmp_path / "fig01.py", name="fig01")), "fig01 has no drawn_from")
    refused(run(f"--workdir={a}", f"--workdir={again}"), "both hold 'one'")
    refused(run(f"--workdir={a}", f"--workdir={tmp_path / 'none'}"), "none is not a workdir")
    refused(run(), "--workdir: not given")
    assert not (a / "figures").exists()
