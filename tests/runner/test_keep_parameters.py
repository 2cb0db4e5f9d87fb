"""`keep_parameters` stores the final parameters of finished runs as they were evaluated, whatever killed the sweep."""

import jax
import numpy as np
import optax
import pytest
import tiny

import smallbatch_jax as sbj
from smallbatch_jax.cluster import worker
from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.config.metric import ACCURACY
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.runner.signals import Stop
from smallbatch_jax.store import parameters, results
from smallbatch_jax.store.results import ProgramResults

# Two lanes for three or more runs: lanes are refilled while the parameters of ended runs are still being stored.
GRID = {"batch_sizes": (4, 8), "bn_batch_sizes": (4, 8), "base_lrs": (2**-9, 2**-6, 1e30), "seeds": (0, 1), "lanes": 2}

DATA = tiny.TinyModel(), tiny.dataset()


def train(workdir, keep, **fields):
    """Trains a tiny grid into a workdir and returns its rows."""
    chosen = tiny.grid(**GRID | {"keep_parameters": keep} | fields)
    train_grid(chosen, workdir, tiny.dataset(), NoProgress(), lambda b: tiny.TinyModel(b))
    return results.load(workdir)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("all") / "w"
    return workdir, train(workdir, "all")


def names(workdir):
    return sorted(path.name for path in (workdir / "parameters").glob("m*"))


def loaded(workdir, row):
    return sbj.load_parameters(workdir, row.batch_size, row.base_lr, row.bn_batch_size, row.seed)


def last_rows(frame):
    """Returns the last row of each finished run, with its final accuracy."""
    finished = frame[frame.status == "finished"]
    runs = finished.groupby(list(results.RUN_COLUMNS))
    accuracies = runs.test_accuracy.median().rename("final")  # of three epochs
    return finished[finished.epoch == 3].merge(accuracies, left_on=results.RUN_COLUMNS, right_index=True)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    return True


def test_kept_parameters_have_the_stored_test_accuracy_and_loss(every):
    workdir, frame = every
    last, data = last_rows(frame), tiny.dataset()
    assert set(frame.status) == {"finished", "diverged"}
    assert len(names(workdir)) == len(last) > 4
    stored = {kept.run: kept.value for kept in parameters._stored(workdir / "parameters", ACCURACY)}
    assert stored == {Run(*row[:4]): row.final for row in last[[*results.RUN_COLUMNS, "final"]].itertuples(index=False)}
    mean, std = data.train_images.mean((0, 1, 2)), data.train_images.std((0, 1, 2))
    for row in last.itertuples():
        logits = tiny.TinyModel().apply(loaded(workdir, row), ((data.test_images - mean) / std).astype(np.float32))
        assert (logits.argmax(-1) == data.test_labels).mean() == pytest.approx(row.test_accuracy, abs=1e-12)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.test_labels).mean()
        np.testing.assert_allclose(loss, row.test_loss, rtol=1e-6)


def test_the_best_run_of_each_batch_size_is_kept_over_all_bn_batch_sizes(every, tmp_path):
    workdir, frame = every
    assert train(tmp_path / "w", "best").equals(frame)
    ranked = last_rows(frame).sort_values(["final", *results.RUN_COLUMNS], ascending=[False, True, True, True, True])
    best = ranked.drop_duplicates("batch_size")
    assert len(names(tmp_path / "w")) == 2
    for row in best.itertuples():
        assert equal(sbj.load_parameters(tmp_path / "w", batch_size=row.batch_size), loaded(workdir, row))
    assert equal(sbj.load_parameters(tmp_path / "w"), loaded(workdir, ranked.iloc[0]))


@pytest.mark.long
def test_a_kill_between_the_parameters_and_the_last_row_loses_and_doubles_nothing(every, tmp_path, monkeypatch):
    workdir, frame = every

    def append(self, rows, real=ProgramResults.append):
        if any(row.epoch == 3 for row in rows):
            raise KeyboardInterrupt
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ProgramResults, "append", append)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "w", "all")
    before = names(tmp_path / "w")
    assert before
    assert not (results.load(tmp_path / "w").epoch == 3).any()
    assert train(tmp_path / "w", "all").equals(frame)
    assert names(tmp_path / "w") == names(workdir)
    for row in last_rows(frame).itertuples():
        assert equal(loaded(tmp_path / "w", row), loaded(workdir, row))


def test_a_sweep_that_is_resumed_keeps_the_runs_that_finish_from_then_on(tmp_path):
    alone = {"batch_sizes": (4,), "bn_batch_sizes": None, "seeds": (0,)}
    train(tmp_path / "w", None, **alone, base_lrs=(2**-9,))
    assert not (tmp_path / "w/parameters").exists()
    train(tmp_path / "w", "all", **alone, base_lrs=(2**-9, 2**-6))
    assert names(tmp_path / "w") == ["m00004_lr2^-6_seed0"]


def test_a_run_that_diverges_in_its_last_epoch_keeps_nothing(tmp_path):
    alone = {"batch_sizes": (4,), "bn_batch_sizes": None, "seeds": (0,), "epochs": 1}
    frame = train(tmp_path / "w", "all", **alone, base_lrs=(2**-6, 1e30))
    assert list(frame.status) == ["finished", "diverged"]
    assert names(tmp_path / "w") == ["m00004_lr2^-6_seed0"]


@pytest.mark.parametrize(("keep", "said"), [("all", "18 runs, 396 bytes each"), ("best", "2 runs, 396 bytes each")])
def test_more_parameters_than_may_be_kept_are_refused_before_anything_is_written(tmp_path, keep, said):
    with pytest.raises(InputError, match=r"^keep_gib: got 1e-07, the parameters of") as error:
        train(tmp_path / "w", keep, keep_gib=1e-7)
    assert said in str(error.value)
    assert ("keep_parameters='best'" in str(error.value)) == (keep == "all")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("option", [{"keep_parameters": "best"}, {"tensorboard": True}, {"wandb": "project"}])
@pytest.mark.parametrize("train", [lambda **o: sbj.sweep(*DATA, (4,), (2**-7,), 1, **o), lambda **o: sbj.search(*DATA, **o)])
def test_what_writes_into_a_workdir_needs_one(monkeypatch, train, option):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(InputError, match=rf"^{next(iter(option))}: needs a workdir; give one,"):
        train(**option)


def test_a_progress_that_shows_nothing_is_refused():
    with pytest.raises(InputError, match=r"^progress: got a function, accepts an object with the methods show and close\."):
        sbj.sweep(*DATA, (4,), (2**-7,), 1, progress=lambda *_: None)


def test_a_worker_that_cannot_reach_the_workdir_says_that_it_keeps_no_parameters(tmp_path):
    task = worker.ProgramTask(tiny.grid(keep_parameters="best"), tmp_path / "elsewhere", (4, 4), "another", [], ["launch.py"])
    outcome = worker.train(task, None, Stop(), lambda status: None)
    assert outcome.failure.startswith(f"keep_parameters: {tmp_path}/elsewhere, which keeps them, is not reached from here; use")
