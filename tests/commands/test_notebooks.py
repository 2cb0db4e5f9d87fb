"""Notebooks of stored results never train and have no outputs; the others train, as .ci/run tests, and some keep outputs."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

from smallbatch_jax.store import results, workdir
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.study import study

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WITH_OUTPUTS = ("language_model", "your_model")
TRAINS = ("tour", "search", *WITH_OUTPUTS)
OF_FIGURES = [path for path in NOTEBOOKS if path.stem not in ("results", *TRAINS)]
TABLES = sorted(path.parent for path in (FOLDER / "results").glob("*/*/experiment.json"))


def cells(notebook):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def stored(tmp_path):
    """Returns the workdir of a finished grid of 2 × 3 runs, one of them diverged, as the writer leaves it."""
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


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def execute(notebook, monkeypatch):
    """Runs a notebook top to bottom in its folder and returns the names that it defines."""
    monkeypatch.chdir(notebook.parent)
    names: dict = {}
    for cell in cells(notebook):
        exec(compile("".join(cell["source"]), f"{notebook.name}:{cell['id']}", "exec"), names)
    return names


def test_the_notebook_of_one_sweep_runs_on_its_stored_results(stored, monkeypatch):
    monkeypatch.setenv("WORKDIR", str(stored))
    before = content(stored)
    names = execute(FOLDER / "results.ipynb", monkeypatch)
    assert len(names["cells"]) == 6
    assert np.isnan(names["cells"]["test_accuracy"]).sum() == 1
    assert before == content(stored)


def test_the_notebook_of_one_sweep_reads_a_regression_with_a_further_axis(tmp_path, monkeypatch, capsys):
    experiment = tiny.grid(task="regression", base_lrs=(2**-9,), weight_decays=(0.0, 0.1))
    facts = {"guess": {"loss": 1.5}}
    with (
        workdir.open_workdir(tmp_path / "w", experiment, facts),
        ProgramResults(tmp_path / "w", 4, 4, 0, experiment) as program,
    ):
        for decay, epoch in itertools.product((0.0, 0.1), (1, 2, 3)):
            axis = (("weight_decay", decay),)
            program.append([Row(4, 4, 2**-9, 0, epoch, 10 * epoch, 1.0, None, (0.3 + decay) / epoch, None, axis)])
    monkeypatch.setenv("WORKDIR", str(tmp_path / "w"))
    names = execute(FOLDER / "results.ipynb", monkeypatch)
    assert names["table"].to_numpy().tolist() == [[pytest.approx(0.15)]]
    assert "best test loss" in capsys.readouterr().out


def test_the_notebook_of_one_sweep_falls_back_on_a_stored_table_and_says_so(monkeypatch, capsys):
    monkeypatch.delenv("WORKDIR", raising=False)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    names = execute(FOLDER / "results.ipynb", monkeypatch)
    assert "reading results/cifar10_subset/fig02: fig02, 117 of 117 runs ended" in capsys.readouterr().out
    assert len(names["cells"]) == 117


@pytest.mark.parametrize("notebook", OF_FIGURES, ids=lambda path: path.stem)
@pytest.mark.long
def test_a_notebook_of_figures_runs_on_the_tables_beside_it(notebook, monkeypatch, capsys):
    monkeypatch.delenv("RESULTS", raising=False)
    before = content(FOLDER)
    names = execute(notebook, monkeypatch)
    assert names["studies"]
    assert " hold, " in capsys.readouterr().out  # the claims are judged
    assert before == content(FOLDER)


@pytest.mark.parametrize("workdir", TABLES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_table_is_complete_small_and_says_where_it_comes_from(workdir):
    found = study.load(workdir)
    assert found.name == workdir.name
    assert found.runs[0] == found.runs[1] > 0
    began, *_, ended = map(json.loads, (workdir / "provenance.jsonl").read_text().splitlines())
    assert began["command"][0] == "experiments/sweep.py"
    uncommitted = "+" * (workdir.parent.name == "cifar10")  # its README says which commit the changes became
    assert len(began["commit"].removesuffix(uncommitted)) == 40
    assert ended["event"] == "finish"
    assert ended["finished"] + ended["diverged"] == found.runs[0]


def test_the_tables_take_less_than_a_megabyte_and_name_no_folder_of_a_machine():
    stored = content(FOLDER / "results")
    assert TABLES
    assert sum(map(len, stored.values())) < 1_000_000
    assert not [path for path, data in stored.items() if b'"/' in data or b"=/" in data]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_trains_nothing_or_is_known_to_and_no_cell_has_a_number(notebook):
    for cell in cells(notebook):
        assert cell["execution_count"] is None
        assert "sweep(" not in "".join(cell["source"]) or notebook.stem in TRAINS
        assert cell["outputs"] == [] or notebook.stem in WITH_OUTPUTS
    assert json.loads(notebook.read_text())["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_stored_outputs_are_small_and_name_no_machine_and_no_speed(name):
    outputs = [output for cell in cells(FOLDER / f"{name}.ipynb") for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.get("name") != "stderr"  # has paths and progress of this machine
        assert len(json.dumps(output)) < 80_000  # 60 KB of picture
        assert not re.search(r"/(tmp|home|root|work)/|images/s", json.dumps(output.get("text", "")))


def test_there_are_notebooks_some_of_which_train():
    assert {*TRAINS, "results"} < {path.stem for path in NOTEBOOKS}
    assert OF_FIGURES
