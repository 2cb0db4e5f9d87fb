"""Tests kept parameters: each run's are complete or absent, "best" keeps one run per batch size, and all can be loaded."""

import math
import shutil
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pictures import error_line

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.store import parameters
from smallbatch_jax.store.parameters import Parameters
from smallbatch_jax.store.workdir import open_workdir


def variables(value):
    """Returns arrays of several dtypes and shapes in unsorted dicts, with empty batch_stats."""
    kernel = np.random.default_rng(value).normal(size=(4, 3)).astype(np.float32)
    return {
        "params": {"b": {"kernel": kernel}, "a": np.full(3, value, jnp.bfloat16), "c": np.int32(value)},
        "batch_stats": {},
    }


# Accuracies by run; ties go to the first run in order.
RUNS = {Run(4, 4, 0.5, 0): 0.3, Run(4, 2, 0.1, 0): 0.7, Run(4, 4, 0.1, 1): 0.7, Run(4, 4, 0.1, 0): 0.7, Run(8, 8, 0.5, 0): 0.1}


def name(run):
    return f"m{run.batch_size}_b{run.bn_batch_size}_lr{run.base_lr}_seed{run.seed}"


def saved(folder, keep, runs=RUNS):
    with open_workdir(folder, tiny.grid(), {}):
        kept = Parameters(folder, keep)
        for value, run in enumerate(RUNS):
            if run in runs:
                kept.save(name(run), run, RUNS[run], variables(value))
    return folder


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("all") / "w", "all")


@pytest.fixture
def folder(every, tmp_path):
    return shutil.copytree(every, tmp_path / "w")


def test_a_run_without_a_value_is_never_the_best(tmp_path):
    kept = Parameters(tmp_path, "best")
    kept.save("m4_good", Run(4, 4, 0.1, 0), 0.7, variables(0))
    kept.save("m4_unknown", Run(4, 4, 0.5, 0), math.nan, variables(1))
    assert names(tmp_path) == ["m4_good"]


def test_what_another_metric_chose_is_not_mixed(tmp_path):
    Parameters(tmp_path, "best").save("m4_good", Run(4, 4, 0.1, 0), 0.7, variables(0))
    says = f"select: the runs in {tmp_path}/parameters were chosen by test_accuracy; use that, or remove the folder."
    assert error_line(Parameters, tmp_path, "best", Metric("test_loss", "min")) == says
    Parameters(tmp_path, None, Metric("test_loss", "min"))


def names(folder):
    return sorted(path.name for path in (folder / "parameters").iterdir() if path.name != "lock")


def value_of(found):
    value = int(found["params"]["c"])
    assert jax.tree.structure(found) == jax.tree.structure(variables(value))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(variables(value)), strict=True):
        assert type(a) is np.ndarray
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return value


def test_every_run_comes_back_to_the_bit_and_arguments_narrow_the_runs(every):
    assert names(every) == sorted(map(name, RUNS))
    for value, run in enumerate(RUNS):
        assert value_of(sbj.load_parameters(every, run.batch_size, run.base_lr, run.bn_batch_size, run.seed)) == value
    asked = [{}, {"batch_size": 8}, {"base_lr": 0.5}, {"bn_batch_size": 4}, {"seed": 1}, {"batch_size": 4, "base_lr": 0.5}]
    assert [value_of(sbj.load_parameters(str(every), **given)) for given in asked] == [1, 4, 0, 3, 2, 0]


@pytest.mark.parametrize("order", [list(RUNS), list(RUNS)[::-1], [*list(RUNS)[2:], *list(RUNS)[:2]]])
def test_the_best_of_each_batch_size_is_kept_in_whatever_order_runs_finish(tmp_path, order):
    with open_workdir(tmp_path / "w", tiny.grid(), {}):
        kept = Parameters(tmp_path / "w", "best")
        for run in order:
            kept.save(name(run), run, RUNS[run], variables(list(RUNS).index(run)))
    assert names(tmp_path / "w") == ["m4_b2_lr0.1_seed0", "m8_b8_lr0.5_seed0"]
    assert value_of(sbj.load_parameters(tmp_path / "w", batch_size=4)) == 1


def test_a_run_that_is_trained_again_replaces_itself_and_best_removes_what_all_kept(folder):
    Parameters(folder, "all").save(name(Run(4, 4, 0.5, 0)), Run(4, 4, 0.5, 0), 0.3, variables(9))
    assert len(names(folder)) == len(RUNS)
    assert value_of(sbj.load_parameters(folder, 4, 0.5)) == 9
    Parameters(folder, "best").save(name(Run(4, 4, 0.5, 0)), Run(4, 4, 0.5, 0), 0.3, variables(9))
    assert names(folder) == ["m4_b2_lr0.1_seed0", "m8_b8_lr0.5_seed0"]


@pytest.mark.parametrize("keep", [None, "all"])
def test_nothing_is_written_unasked_or_by_other_processes(tmp_path, keep):
    Parameters(None if keep else tmp_path / "w", keep).save("m4", Run(4, 4, 0.1, 0), 0.5, variables(0))
    assert not (tmp_path / "w").exists()


def test_a_half_written_folder_is_not_loaded_and_goes_with_the_next_run(folder, monkeypatch):
    """The writer is killed just before Orbax renames the folder to its final name."""
    run = Run(4, 4, 2.0, 0)

    def killed(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", killed)
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Parameters(folder, "all").save(name(run), run, 0.9, variables(7))
    unfinished = set(names(folder)) - set(map(name, RUNS))
    assert len(unfinished) == 1
    assert name(run) not in unfinished
    assert value_of(sbj.load_parameters(folder)) == 1
    Parameters(folder, "all").save(name(run), run, 0.9, variables(7))
    assert names(folder) == sorted([*map(name, RUNS), name(run)])
    assert value_of(sbj.load_parameters(folder)) == 7


def test_a_kill_while_a_rival_is_removed_leaves_no_half_of_it(folder, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (path / "_METADATA").unlink(missing_ok=True))
    Parameters(folder, "best").save(name(Run(8, 8, 0.1, 0)), Run(8, 8, 0.1, 0), 0.9, variables(7))
    monkeypatch.undo()
    assert value_of(sbj.load_parameters(folder, batch_size=8)) == 7
    Parameters(folder, "all").save(name(Run(8, 8, 0.1, 0)), Run(8, 8, 0.1, 0), 0.9, variables(7))
    assert names(folder) == sorted([name(Run(8, 8, 0.1, 0)), *map(name, list(RUNS)[:4])])


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped", "described"])
def test_a_damaged_folder_is_left_out_with_a_warning(folder, damage):
    best = folder / "parameters" / "m4_b2_lr0.1_seed0"
    if damage == "described":
        (best / "_CHECKPOINT_METADATA").write_text("{")
    else:
        for path in (path for path in best.rglob("d/*") if path.is_file()):
            content = path.read_bytes()
            path.write_bytes({"lost": b"", "cut": content[:-9], "flipped": bytes(b ^ 1 for b in content)}[damage])
    with pytest.warns(UserWarning, match=r"m4_b2_lr0.1_seed0 left out, it is damaged: "):
        assert value_of(sbj.load_parameters(folder)) == 3


def test_other_arrays_than_those_described_are_not_loaded(folder, monkeypatch):
    """A checksum detects arrays that the disk corrupted, which Orbax does not notice."""
    monkeypatch.setattr(parameters, "_checksum", lambda variables: 0)
    with pytest.warns(UserWarning, match="arrays do not match"), pytest.raises(InputError, match="holds no run with seed 1"):
        sbj.load_parameters(folder, seed=1)


def refused(*given, **asked):
    with pytest.raises(InputError) as error, warnings.catch_warnings():
        sbj.load_parameters(*given, **asked)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_what_is_not_stored_is_told_in_one_line(every, tmp_path):
    line = refused(every, batch_size=16, seed=0)
    assert line.startswith("workdir: ")
    assert "holds no run with batch_size 16, seed 0; it holds m4_b2_lr0.1_seed0, m4_b4_lr0.1_seed0, " in line
    assert "is not a workdir" in refused(tmp_path)
    assert "is not a workdir" in refused(tmp_path / "missing")
    assert "holds no parameters; a sweep with keep_parameters='best' or 'all' keeps some." in refused(
        saved(tmp_path / "w", None)
    )


def test_a_writer_waits_for_those_who_read(folder):
    run = Run(8, 8, 0.1, 0)
    writer = threading.Thread(target=Parameters(folder, "best").save, args=(name(run), run, 0.9, variables(7)))
    with parameters._locked(folder / "parameters", "r"), parameters._locked(folder / "parameters", "r"):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert len(names(folder)) == len(RUNS)
    writer.join(20)
    assert value_of(sbj.load_parameters(folder, batch_size=8)) == 7
