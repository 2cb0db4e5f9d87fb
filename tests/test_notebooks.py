"""The notebooks read stored results and never train."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from smallbatch_jax import results, workdir
from smallbatch_jax.results import ProgramResults, Row

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(notebook):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def stored(tmp_path):
    """A finished grid of 2 × 3 runs, one of them diverged, as the writer leaves it."""
    experiment = tiny.grid(batch_sizes=(2, 8), base_lrs=(2**-9, 2**-7, 2**-5))
    with workdir.open_workdir(tmp_path / "w", experiment, {"num_classes": 10}) as folder:
        for m in (2, 8):
            with ProgramResults(folder, m, m) as program:
                for lr in (2**-9, 2**-7, 2**-5):
                    lost = (m, lr) == (8, 2**-5)
                    for epoch in (1,) if lost else (1, 2, 3):
                        accuracy = float("nan") if lost else 0.3 * epoch - m / 100
                        program.append([Row(m, m, lr, 0, epoch, 10 * epoch, 1.0 / epoch, accuracy, 1.1 / epoch, accuracy)])
        results.Timings(folder).add("segment", 1.5, 2, 2, 4, 30, 60)
    return folder


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_top_to_bottom_on_stored_results(notebook, stored, monkeypatch):
    monkeypatch.setenv("WORKDIR", str(stored))
    monkeypatch.chdir(notebook.parent)
    before = {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()}
    names: dict = {}
    for cell in cells(notebook):
        exec(compile("".join(cell["source"]), f"{notebook.name}:{cell['id']}", "exec"), names)
    assert len(names["cells"]) == 6
    assert np.isnan(names["cells"]["test_accuracy"]).sum() == 1
    assert before == {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_trains_nothing(notebook):
    for cell in cells(notebook):
        assert cell["outputs"] == []
        assert "sweep(" not in "".join(cell["source"])
    assert "smallbatch_jax" in sys.modules


def test_there_are_notebooks():
    assert NOTEBOOKS
