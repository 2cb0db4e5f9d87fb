"""Tests `search`, the public function that takes data and a budget and returns a recommendation."""

import os

import numpy as np
import pytest
import tiny

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import Dataset
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results

RATES = [2.0**k for k in range(-12, 2)]
OPTIONS = {"base_lrs": RATES, "confirm": 1, "seeds": (0, 1), "progress": NoProgress()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("search") / "w"
    return workdir, sbj.search(tiny.TinyModel(), tiny.dataset(60), 4, workdir=workdir, **OPTIONS)


def test_what_is_not_said_is_chosen(found):
    """By default a tenth of the examples is held out, m gives 4 or more updates an epoch, and 3 runs per m and 1 more fit."""
    experiment = found[1].study.experiment
    assert found[1].study.examples == (54, 20)
    assert experiment.metric.column == "validation_accuracy"
    assert experiment.grid.batch_sizes == (2, 8)
    assert experiment.search.budget == (3 * 2 + 1) * 4 * 60
    epochs = found[1].study.rows.groupby(["batch_size", "base_lr", "seed"]).size()
    assert epochs.sum() * 54 <= experiment.search.budget


def test_the_recommendation_is_said_and_confirmed_by_a_fresh_seed(found):
    _, result = found
    best = result.recommendation.best
    text = str(result)
    assert text.startswith(
        f"Best at m = {best.batch_size}, η̃ = {sbj.analysis.format_base_lr(best.base_lr)}: validation accuracy"
    )
    assert "1 fresh seed, not used for the choice: test accuracy" in text
    fresh = result.study.fresh
    assert set(zip(fresh.batch_size, fresh.base_lr, fresh.seed, strict=True)) == {(best.batch_size, best.base_lr, 2)}


def test_the_same_call_trains_nothing_more(found):
    workdir, result = found
    before = (workdir / "timings.csv").read_text().count("segment")
    again = sbj.search(tiny.TinyModel(), tiny.dataset(60), 4, workdir=workdir, **OPTIONS)
    assert str(again) == str(result)
    assert (workdir / "timings.csv").read_text().count("segment") == before
    assert len(results.load(workdir)) == len(result.study.rows)


@pytest.mark.long
def test_a_relative_workdir_stays_where_it_is_when_a_callback_changes_the_folder(tmp_path, monkeypatch):
    class Moves(NoProgress):
        def show(self, *args, **options):
            os.chdir(tmp_path)

    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    one_run = {"batch_sizes": (4,), "base_lrs": (2**-7,), "confirm": 0}
    assert len(sbj.search(tiny.TinyModel(), tiny.dataset(), 1, workdir="rel", progress=Moves(), **one_run).study.rows)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w"]


@pytest.mark.long
def test_a_budget_alone_says_how_long_to_train():
    """With two batch sizes, three full runs each and one that confirms, there are 7 runs of 60 examples an epoch."""
    found = sbj.search(tiny.TinyModel(), tiny.dataset(60), budget=3.9 * 7 * 60, **OPTIONS)
    assert found.study.experiment.epochs == 3
    assert found.study.experiment.search.budget == 3.9 * 7 * 60


def test_data_with_a_validation_split_keep_it():
    data = tiny.dataset(60)
    images, labels = data.train_images, data.train_labels
    data = Dataset(images[:40], labels[:40], data.test_images, data.test_labels, 3, None, images[40:], labels[40:])
    assert "validation" in data.splits()
    found = sbj.search(tiny.TinyModel(), data, 2, budget=400, batch_sizes=(8,), **OPTIONS)
    assert found.study.examples == (40, 20)
    assert found.study.metric.column == "validation_accuracy"


def test_a_regression_is_searched_by_its_loss():
    x = np.linspace(-1, 1, 60, dtype=np.float32)[:, None]
    data = Dataset(x, 2 * x, x[:20], 2 * x[:20], None)
    functions = (lambda key, x: {"w": np.zeros((1, 1), np.float32)}, lambda params, x: x @ params["w"])
    found = sbj.search(functions, data, 3, batch_sizes=(2, 6), **OPTIONS)
    assert found.study.metric.column == "validation_loss"
    assert found.recommendation.best.validation_loss < 0.1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"budget": 100, "seconds": 5}, "seconds: a search has one budget; give seconds or budget, not both."),
        ({"epochs": 0}, "epochs: got 0, accepts an integer from 1 to 100000."),
        ({"dataset": 3}, "dataset: got a int; accepts a name, or a data.Dataset of your own arrays."),
        ({"batch_sizes": (0,)}, "grid.batch_sizes: got 0, accepts an integer from 1"),
        ({"batch_sizes": ()}, "grid.batch_sizes"),
        ({"base_lrs": {2: 0.1}}, "grid.base_lr_by_batch_size: a search chooses the base learning rates itself"),
        ({"budgets": 3}, "budgets: unknown field; did you mean 'budget'?"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, tmp_path):
    given = {"model": tiny.TinyModel(), "dataset": tiny.dataset(), "epochs": 2, "workdir": tmp_path / "w"} | arguments
    with pytest.raises(InputError, match=line):
        sbj.search(**given)
    assert not (tmp_path / "w").exists()
