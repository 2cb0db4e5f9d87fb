"""Tests studies read from workdirs: rows, planned cells, and the best base learning rates for another grid."""

import dataclasses
import math

import pytest
import tiny
from shell import QUICKSTART, run

from smallbatch_jax.config.experiment import InputError, from_config
from smallbatch_jax.runner import progress
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.store import workdir
from smallbatch_jax.store.results import ProgramResults, Row, Timings
from smallbatch_jax.study import cost, study

RATES = (2**-9, 2**-7, 2**-5)


def store(path, accuracies, **fields):
    """Writes a workdir of 3-epoch runs with `accuracies` by (m, base_lr): NaN diverged, None never began. Returns `path`."""
    sizes = tuple(dict.fromkeys(m for m, _ in accuracies))
    experiment = tiny.grid(batch_sizes=sizes, base_lrs=RATES, **fields)
    with workdir.open_workdir(path, experiment, {"num_classes": 3, "examples": [50, 20]}) as folder:
        for (m, lr), accuracy in accuracies.items():
            with ProgramResults(folder, m, m) as program:
                epochs = () if accuracy is None else (1,) if math.isnan(accuracy) else (1, 2, 3)
                program.append(Row(m, m, lr, 0, e, 10 * e, 1.0, accuracy, 1.0, accuracy) for e in epochs)
    return path


def whole(path, best, **fields):
    """Writes a complete workdir in which batch size m is best at base_lr best[m], and returns `path`."""
    return store(path, {(m, lr): 0.9 if lr == best[m] else 0.5 for m in best for lr in RATES}, **fields)


def test_a_study_has_a_row_for_every_planned_cell(tmp_path):
    path = store(tmp_path / "w", {(2, RATES[0]): 0.5, (2, RATES[1]): math.nan, (8, RATES[0]): None})
    found = study.load(path)
    cells = found.cells.set_index(["batch_size", "base_lr"])
    assert len(cells) == 6
    assert list(cells.loc[(2, RATES[0]), ["test_accuracy", "finished", "diverged", "pending"]]) == [0.5, 1, 0, 0]
    assert list(cells.loc[(2, RATES[1]), ["finished", "diverged", "pending"]]) == [0, 1, 0]
    assert cells["pending"].sum() == 4
    assert cells["test_accuracy"].isna().sum() == 5
    assert (found.name, found.runs, found.chance, found.examples) == ("experiment", (2, 6), 1 / 3, (50, 20))
    of_five = dataclasses.replace(found.experiment, select=("test_top5_accuracy", "max"), metrics=("top5_accuracy",))
    assert dataclasses.replace(found, experiment=of_five, num_classes=10).chance == 1 / 2
    assert dataclasses.replace(found, experiment=of_five).chance == 1


def test_a_study_has_the_timings_of_its_workdir(tmp_path):
    path = store(tmp_path / "w", {(2, RATES[0]): 0.5})
    assert study.load(path).timings.empty
    Timings(path).add("segment", 1.5, 2, 2, 1, 10, 20)
    assert study.load(path).timings[["seconds", "images"]].values.tolist() == [[1.5, 20]]


def test_rows_of_growing_batches_say_how_many_examples_were_seen(tmp_path):
    """4 updates have 4 examples, 8 have 8 and then all have 16: 10 updates see 64 examples, 20 see 208; time is by example."""
    schedule = {"boundaries": (0.1, 0.5), "batch_growth": 2}
    path = store(tmp_path / "w", {(4, RATES[0]): 0.5}, schedule=schedule)
    Timings(path).add("segment", 2.0, 4, 4, 1, 10, 64)
    found = study.load(path)
    assert list(found.rows.examples[:2]) == [64, 208]
    assert list(cost.with_time(found.rows, found.timings).seconds[:2]) == [2.0, 6.5]
    assert "m = 4, grown 2-fold at each reduction" in study.describe(found)


def test_a_seed_that_still_runs_is_pending(tmp_path):
    path = store(tmp_path / "w", {(2, RATES[0]): 0.5}, seeds=(0, 1))
    with ProgramResults(path, 2, 2) as program:
        program.append([Row(2, 2, RATES[0], 1, 1, 10, 1.0, 0.4, 1.0, 0.4)])
    cell = study.load(path).cells.iloc[0]
    assert (cell["test_accuracy"], cell["finished"], cell["pending"]) == (0.5, 1, 1)


@pytest.mark.parametrize("facts", [{}, {"num_classes": "3"}, {"num_classes": 0}, {"examples": [50, 20]}])
def test_a_workdir_that_does_not_know_its_classes_is_one_line(tmp_path, facts):
    with workdir.open_workdir(tmp_path / "w", tiny.grid(), facts):
        pass
    with pytest.raises(InputError, match=r"w/experiment\.json is damaged: its facts"):
        study.load(tmp_path / "w")


def test_two_workdirs_of_one_name_are_refused(tmp_path):
    a, b = (whole(tmp_path / name, {2: RATES[0]}) for name in "ab")
    c = whole(tmp_path / "c", {2: RATES[0]}, name="other")
    assert list(study.load_all([c, a])) == ["other", "experiment"]
    assert list(study.load_all(c)) == list(study.load_all(str(c))) == ["other"]
    with pytest.raises(InputError, match="both hold 'experiment'"):
        study.load_all([a, c, b])


def fig13(*sources, **fields):
    return tiny.grid(base_lrs_from=tuple(map(str, sources)), **{"batch_sizes": (2, 8), "bn_batch_sizes": (2, 8), **fields})


def chosen(*sources, **fields):
    return dict(study.choose_base_lrs(fig13(*sources, **fields)).grid.base_lr_by_batch_size)


def test_each_batch_size_takes_its_best_rate_from_the_stored_results(tmp_path):
    source = whole(tmp_path / "s", {2: RATES[2], 8: RATES[0], 32: RATES[1]})
    runs = study.choose_base_lrs(fig13(source)).runs()
    assert [(run.batch_size, run.bn_batch_size, run.base_lr) for run in runs] == [
        (2, 2, RATES[2]),
        (8, 2, RATES[0]),
        (8, 8, RATES[0]),
    ]


def test_the_batch_sizes_may_lie_in_several_workdirs(tmp_path):
    sources = whole(tmp_path / "a", {2: RATES[2]}), whole(tmp_path / "b", {8: RATES[1]})
    assert chosen(*sources) == {2: RATES[2], 8: RATES[1]}


def test_rates_that_are_given_are_not_read_and_the_others_are(tmp_path):
    """A given base_lr needs no stored result and takes precedence over one, as in Fig. 14."""
    source = whole(tmp_path / "s", {2: RATES[2], 8: RATES[0]})
    given = {"batch_sizes": (2, 8, 32), "base_lr_by_batch_size": ((32, 2**-10), (8, 2**-3))}
    assert chosen(source, **given) == {2: RATES[2], 8: 2**-3, 32: 2**-10}
    with pytest.raises(InputError, match="no run of batch size 64 in "):
        chosen(source, **{**given, "batch_sizes": (2, 8, 32, 64)})


def test_the_rate_that_is_best_is_so_on_average_over_seeds(tmp_path):
    path = store(tmp_path / "s", {(2, RATES[0]): 0.6, (2, RATES[1]): 0.7, (2, RATES[2]): 0.2}, seeds=(0, 1))
    with ProgramResults(path, 2, 2) as program:
        for lr, accuracy in zip(RATES, (0.6, 0.3, 0.2), strict=True):
            program.append(Row(2, 2, lr, 1, e, 10 * e, 1.0, accuracy, 1.0, accuracy) for e in (1, 2, 3))
    assert chosen(path, batch_sizes=(2,), bn_batch_sizes=None) == {2: RATES[0]}


def test_of_equals_the_smallest_rate_is_taken_and_diverged_runs_never(tmp_path):
    nan = math.nan
    cells = {
        (2, RATES[0]): nan,
        (2, RATES[1]): 0.7,
        (2, RATES[2]): 0.7,
        (8, RATES[0]): 0.1,
        (8, RATES[1]): nan,
        (8, RATES[2]): nan,
    }
    assert chosen(store(tmp_path / "s", cells)) == {2: RATES[1], 8: RATES[0]}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({(2, lr): 0.5 for lr in RATES}, "no run of batch size 8 in "),
        ({(m, lr): 0.5 for m in (2, 8) for lr in RATES[:2]}, r"1 run\(s\) of batch size 2 have not ended yet in .*sweep\.py"),
        ({(m, lr): math.nan if m == 8 else 0.5 for m in (2, 8) for lr in RATES}, "every run of batch size 8 diverged in "),
    ],
)
def test_results_that_do_not_say_which_rate_is_best_are_refused(tmp_path, cells, message):
    with pytest.raises(InputError, match=r"^grid\.base_lrs_from: " + message):
        chosen(store(tmp_path / "s", cells))


def test_results_that_choose_by_different_columns_are_refused(tmp_path):
    """Whose rows lack the column of the other would take the smallest base_lr in place of the best."""
    a, b = whole(tmp_path / "a", {2: RATES[2]}), whole(tmp_path / "b", {8: RATES[1]}, select=("test_loss", "min"))
    with pytest.raises(
        InputError, match=r"^grid\.base_lrs_from: .* different columns: .*a by test_accuracy, .*b by test_loss\.$"
    ):
        chosen(a, b)


def test_a_resumed_workdir_keeps_the_rates_it_began_with(tmp_path):
    """The base_lrs stay the same even when the results that they came from are gone."""
    source = whole(tmp_path / "s", {2: RATES[2], 8: RATES[0]})
    began = study.choose_base_lrs(fig13(source))
    with workdir.open_workdir(tmp_path / "w", began, {}):
        pass
    gone = fig13(tmp_path / "gone")
    assert study.choose_base_lrs(gone, tmp_path / "w").runs() == began.runs()
    with pytest.raises(InputError, match="gone holds no results yet; train it first"):
        study.choose_base_lrs(gone)
    grown = dataclasses.replace(gone.grid, batch_sizes=(2, 8, 32))
    with pytest.raises(InputError, match="gone holds no results yet"):
        study.choose_base_lrs(dataclasses.replace(gone, grid=grown), tmp_path / "w")


def test_a_grid_at_the_best_rates_trains(tmp_path):
    train_grid(tiny.grid(), tmp_path / "s", tiny.dataset(), progress.for_stream(), tiny.TinyModel)
    best = study.load(tmp_path / "s").cells.sort_values("test_accuracy", ascending=False).iloc[0]["base_lr"]
    experiment = study.choose_base_lrs(fig13(tmp_path / "s", batch_sizes=(4,), bn_batch_sizes=(4,)), tmp_path / "w")
    train_grid(experiment, tmp_path / "w", tiny.dataset(), progress.for_stream(), tiny.TinyModel)
    ours, theirs = tiny.rows(tmp_path / "w"), tiny.rows(tmp_path / "s", base_lr=best)
    assert ours.equals(theirs)


def test_rates_can_be_given_by_batch_size():
    config = {"grid": {"batch_sizes": (2, 8), "base_lr_by_batch_size": {2: 0.5, 8: 0.25}, "seeds": (0, 1)}}
    assert [(run.batch_size, run.base_lr) for run in from_config(config).runs()] == [(2, 0.5), (2, 0.5), (8, 0.25), (8, 0.25)]
    with pytest.raises(InputError, match="has no base_lr for batch size 32"):
        from_config({"grid": {"batch_sizes": (2, 32), "base_lr_by_batch_size": ((2, 0.5),)}})
    for wrong in (3, (2, 0.5), ((2, -1.0),), ((2, 0.5), (2, 0.25)), ((2.5, 0.5),), "ab"):
        with pytest.raises(InputError, match=r"^grid\.base_lr_by_batch_size: "):
            from_config({"grid": {"base_lr_by_batch_size": wrong}})


def test_the_command_says_in_one_line_what_is_not_there_yet(tmp_path):
    source = whole(tmp_path / "s", {2: RATES[2], 8: RATES[0]})

    def plan(*flags):
        return run("plan.py", QUICKSTART, "--probe_seconds=0", *flags)

    missing = plan(f"--config.grid.base_lrs_from=('{tmp_path / 'no'}',)")
    assert missing.returncode == 2
    assert missing.stderr.startswith("grid.base_lrs_from: ")
    assert missing.stderr.count("\n") == 1
    there = plan(f"--config.grid.base_lrs_from=('{source}',)", "--config.grid.batch_sizes=(2,8)")
    assert there.stdout.startswith("quickstart: 2 runs of 8 epochs in 2 programs"), there.stderr


@pytest.mark.parametrize("examples", ["abc", 5, [5], [5, 0], [5, "x"]])
def test_facts_without_two_numbers_of_examples_are_damaged(tmp_path, examples):
    with (
        workdir.open_workdir(tmp_path, tiny.grid(), {"num_classes": 3, "examples": examples}),
        pytest.raises(InputError, match=r"experiment\.json is damaged: its facts lack"),
    ):
        study.load(tmp_path)
