"""The PyTorch check of stored studies prints a table of existing trainings."""

import pandas as pd
import pytest
import tiny
from shell import ROOT, refused, run

from smallbatch_jax.store import results
from smallbatch_jax.store.workdir import open_workdir

STORED = ROOT / "notebooks" / "results" / "pytorch"


@pytest.mark.long
def test_a_stored_check_is_printed_without_images_and_pytorch():
    """Each of six cells agrees within two standard errors, and the means of one are those of its rows."""
    done = run("../benchmarks/torch_check.py", *(f"--workdir={STORED / name}" for name in ("fig02", "fig05", "fig08")))
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[:4] for row in table] == [
        ["fig02", "8", "2^-7", "3"],
        ["fig02", "32", "2^-9", "3"],
        ["fig05", "32", "2^-7", "3"],
        ["fig05", "128", "2^-9", "3"],
        ["fig08", "8", "2^-7", "3"],
        ["fig08", "128", "2^-9", "3"],
    ]
    assert all(abs(float(row[-1])) < 2 for row in table)
    ours = results.load(STORED / "fig08").query("batch_size == 128").groupby("seed")["test_accuracy"].median().mean()
    theirs = pd.read_csv(STORED / "fig08" / "torch.csv").query("batch_size == 128")["torch"].mean()
    assert table[-1][4:7] == [f"{100 * ours:.2f} %", f"{100 * theirs:.2f} %", f"{100 * (ours - theirs):+.2f}"]


def test_a_study_without_a_finished_run_is_refused(tmp_path):
    with open_workdir(tmp_path / "w", tiny.grid(), {"num_classes": 3, "examples": [50, 20]}):
        pass
    refused(run("../benchmarks/torch_check.py", f"--workdir={tmp_path / 'w'}"), "has no finished run to train again")
