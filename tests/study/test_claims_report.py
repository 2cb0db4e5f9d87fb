"""Tests the report of studies and verdicts, and the command that prints it."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from claimed import CLAIMS, fig13, studies, study

from smallbatch_jax.config.experiment import Dataset, Model, Schedule
from smallbatch_jax.store import workdir
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.study import claims

ROOT = Path(__file__).parents[2]


def test_the_report_names_the_studies_and_counts_the_verdicts():
    fields = {"schedule": Schedule(warmup_fraction=0.05), "dataset": Dataset("cifar10", augment=True)}
    fields["model"] = Model("alexnet", "batch", bn_statistics="precise")
    warm = study("fig10", {4: 0.9, 128: 0.88}, epochs=2)
    warm = dataclasses.replace(warm, experiment=dataclasses.replace(warm.experiment, **fields))
    given = studies({"fig01": {2: 0.4, 16: 0.5}, "fig10": warm, "mine": {2: 0.5}, "fig13_cifar10": fig13("cifar10", {16: {}})})
    verdicts = claims.judge(given)
    lines = claims.format_report(given, verdicts).splitlines()
    assert lines[:5] == [
        "fig01: alexnet, norm none, digits (50,000 + 1,000,000 images), 1 epoch, m = 2 … 16, base_lr 2^-9 … 2^-7, 1 seed: "
        "6 of 6 runs ended",
        "fig10: alexnet, norm batch, precise statistics, cifar10 (5,000 + 1,000 images), augmented, 2 epochs, warm-up 5 %, "
        "m = 4 … 128, base_lr 2^-9 … 2^-7, 1 seed: 6 of 6 runs ended",
        "mine: is not a figure that a claim is about",
        "fig13_cifar10: alexnet, norm none, digits (50,000 + 1,000,000 images), 1 epoch, m = 16, BN batch 2 … 16, "
        "base_lr 2^-9, 1 seed: 4 of 4 runs ended",
        "",
    ]
    assert lines[5:9] == [
        "C1   does not hold, -142.8 standard errors   (§3.2, Fig. 1)",
        "  “… for the reduced AlexNet model, the best test accuracy is obtained for batch sizes m = 8 or smaller …”",
        "  - fig01: m up to 8 (tried: 2) reach 40.00 % at m = 2 (base_lr 2^-8, m the smallest tried); "
        "the others 50.00 % at m = 16 (base_lr 2^-8, m the largest tried): does not hold, -142.8 standard errors",
        "",
    ]
    assert "C2   lacks data   (§3.2, Figs. 2–3)" in lines
    assert "  - fig02 and fig03 are not among the workdirs: lacks data" in lines
    assert lines[-1] == "0 hold, 1 does not hold, 2 cannot be told, 10 lack data"
    assert max(map(len, (line for line in lines if line.startswith("  ") and not line.startswith("  - ")))) <= 120


def test_no_line_of_a_report_ends_within_an_equation():
    report = claims.format_report({}, claims.judge({}))
    assert not [line for line in report.splitlines() if line.endswith((" m", " =")) or line.startswith("  = ")]
    assert "\xa0" not in report


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ((0, 1, 2, 3), "1 holds, 1 does not hold, 1 cannot be told, 1 lacks data"),
        ((0, 0, 3, 3), "2 hold, 0 do not hold, 0 cannot be told, 2 lack data"),
    ],
)
def test_the_last_line_counts_in_words(answers, words):
    given = [claims.VERDICTS[answer] for answer in answers]
    verdicts = [claims.Verdict(CLAIMS["C1"], answer, (claims.Finding(answer, "found"),)) for answer in given]
    assert claims.format_report({}, verdicts).splitlines()[-1] == words


def test_judging_needs_no_jax():
    code = "import sys, smallbatch_jax.study.claims; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def store(path, name, accuracies, ended=True):
    """Writes a workdir of two-epoch runs and returns its path; without `ended` the last run has one epoch to go.

    `accuracies` are those at the second of three base learning rates; at the others a tenth of them is reached.
    """
    lrs = (2**-9, 2**-8, 2**-7)
    experiment = tiny.grid(name=name, batch_sizes=tuple(accuracies), base_lrs=lrs, epochs=2)
    last = experiment.runs()[-1]
    with workdir.open_workdir(path, experiment, {"num_classes": 10, "examples": [50, 10_000]}) as folder:
        for (m, accuracy), lr in itertools.product(accuracies.items(), lrs):
            epochs = (1, 2) if ended or (m, lr) != (last.batch_size, last.base_lr) else (1,)
            reached = accuracy if lr == lrs[1] else accuracy / 10
            with ProgramResults(folder, m, m) as program:
                program.append([Row(m, m, lr, 0, e, 10 * e, 1.0, reached, 1.1, reached) for e in epochs])
    return path


def command(*arguments):
    line = [sys.executable, "experiments/claims.py", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_prints_the_verdicts_and_exits_0_unless_a_claim_fails(tmp_path):
    """It also exits 0 where a claim cannot be decided or lacks data."""
    good = store(tmp_path / "a", "fig01", {2: 0.5, 2048: 0.4})
    open_ = store(tmp_path / "b", "fig02", {2: 0.5, 8: 0.4}, False)
    done = command(f"--workdir={good}", f"--workdir={open_}")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("base_lr 2^-9 … 2^-7, 1 seed: 6 of 6 runs ended")
    assert lines[1].endswith(": 5 of 6 runs ended")
    assert "C1   holds, +14.2 standard errors   (§3.2, Fig. 1)" in lines
    assert "  - fig02: 1 of 6 runs have not ended: lacks data" in lines
    assert lines[-1] == "1 holds, 0 do not hold, 0 cannot be told, 12 lack data"
    noisy = command(f"--workdir={store(tmp_path / 'c', 'fig01', {2: 0.5, 2048: 0.505})}")
    assert noisy.returncode == 0
    assert "C1   cannot tell, -0.7 standard errors   (§3.2, Fig. 1)" in noisy.stdout


def test_the_command_exits_1_if_a_claim_does_not_hold(tmp_path):
    bad, good = store(tmp_path / "a", "fig01", {2: 0.4, 16: 0.5}), store(tmp_path / "b", "fig02", {2: 0.5, 8: 0.4})
    done = command(f"--workdir={bad}", f"--workdir={good}")
    assert (done.returncode, done.stderr) == (1, "")
    assert "C1   does not hold, -14.2 standard errors   (§3.2, Fig. 1)" in done.stdout
    assert "C2   lacks data   (§3.2, Figs. 2–3)" in done.stdout


def test_the_command_refuses_what_it_cannot_judge_in_one_line(tmp_path):
    first, second = (store(tmp_path / name, "fig01", {2: 0.5}) for name in "ab")
    wrong = {
        (): "--workdir: not given; for example --workdir=runs/fig01",
        ("--workdir=",): "--workdir: empty; give a path.",
        (f"--workdir={tmp_path}/none",): f"--workdir: {tmp_path}/none is not a workdir, it has no experiment.json.",
        (f"--workdir={first}", f"--workdir={second}"): f"--workdir: {first} and {second} both hold 'fig01'; ",
    }
    for arguments, line in wrong.items():
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == 1


def test_the_command_explains_itself():
    done = command("--help")
    assert done.returncode == 0
    assert "python experiments/claims.py --workdir=" in done.stdout
