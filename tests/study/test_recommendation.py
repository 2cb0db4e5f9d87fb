"""Tests the recommendation: its cell, its uncertainty, its fresh seeds, and the best at equal epochs and time."""

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from claimed import LOST, LRS, rows_of, study
from rows import results, run, segment, timings
from scipy.special import ndtri

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.store.results import ProgramResults, Row
from smallbatch_jax.store.workdir import open_workdir
from smallbatch_jax.study import analysis, equal_time
from smallbatch_jax.study.answer import answer
from smallbatch_jax.study.noise import Noise, noise_of
from smallbatch_jax.study.recommendation import interval, recommend
from smallbatch_jax.study.study import Study, load

STORED = Path(__file__).parents[2] / "notebooks/results"


def said(found, **options):
    made = found if isinstance(found, Study) else study("fig08", found, **options)
    return " ".join(recommend(made).sentences)


def of_losses(table, **options):
    """Returns a study with the test losses of `table`, which is selected by test loss."""
    made = study("fig08", table, **options)
    experiment = dataclasses.replace(made.experiment, select=("test_loss", "min"))
    rows = made.rows.assign(test_loss=made.rows["test_accuracy"])
    cells = analysis.planned_cells(rows, experiment.runs(), "fig08", experiment.metric)
    return dataclasses.replace(made, experiment=experiment, rows=rows, cells=cells, guess={"loss": 2.3})


def test_a_cell_of_which_only_some_seeds_have_ended_is_not_named():
    """m = 4 has the best mean by one lucky seed, but its other seed is still training."""
    made = study("fig08", {4: [[0.95, None]], 8: [[0.9, 0.9]], 16: [[0.8, 0.8]]}, lrs=LRS[:1], seeds=(0, 1))
    assert recommend(made).best["batch_size"] == 8
    assert answer(made).sentence.startswith("So far (5 of 6 runs ended): best at m = 8, η̃ = 2^-9: 90.0 ± 0.0 %")
    assert recommend(made).as_good["batch_size"].tolist() == [8]
    assert "largest batch size" not in said(made)  # m = 4 may still turn out as good
    none = study("fig08", {4: [[0.95, None]], 8: [[0.9, None]]}, lrs=LRS[:1], seeds=(0, 1))
    assert recommend(none).best["batch_size"] == 4


def test_where_a_search_gave_runs_up_cells_with_all_its_seeds_are_named():
    """The single run of m = 8 beats the mean of three of m = 4 only by luck, so m = 4 is named; nothing is pending."""
    finished = [run([0.9], seed=seed) for seed in (0, 1, 2)] + [run([0.92], batch_size=8)]
    rows = results(*finished, run([0.5], "stopped", batch_size=16))
    cells = analysis.known_cells(rows)
    assert cells["pending"].tolist() == [0, 0, 0]
    made = Study(Path("exp"), tiny.grid(name="exp", seeds=(0, 1, 2)), rows, cells, 10, (40, 1000))
    assert recommend(made).best["batch_size"] == 4
    made = dataclasses.replace(made, timings=timings(segment(4, 4, 40), segment(8, 4, 40)))
    assert equal_time.sentence([made]).count("m = 4, η̃ = 2^-1 (90.0 %)") == 3
    assert made.runs == (4, 4)


def with_fresh(values, seeds=(0,), table=None):
    """Returns a study with fresh seeds 7, 8, … of its best cell, m = 8."""
    made = study("fig08", table or {4: 0.8, 8: 0.9, 16: 0.7}, lrs=LRS[:1], seeds=seeds)
    if not values:
        return made
    fresh = [row for i, value in enumerate(values) for row in rows_of("fig08", Run(8, 8, LRS[0], 7 + i), value, 1)]
    return dataclasses.replace(made, rows=pd.concat([made.rows, pd.DataFrame(fresh, columns=made.rows.columns)]))


def test_only_fresh_seeds_confirm():
    made = with_fresh([0.86, 0.88, 0.87])
    found = recommend(made)
    assert found.fresh["test_accuracy"] == pytest.approx(0.87)
    assert found.fresh["finished"] == 3
    assert "3 fresh seeds, not used for the choice: test accuracy 87.0 ± 0.6 %, mean ± standard error." in said(made)
    assert "looks better than it is" not in said(made)
    assert "1 fresh seed, not used for the choice: test accuracy 86.0 %." in said(with_fresh([0.86]))
    assert "Fresh seeds do not confirm it: all 1 diverged." in said(with_fresh([LOST]))
    assert "fresh" not in said(with_fresh([]))


def test_fresh_seeds_of_another_cell_do_not_say_how_much_the_best_varies():
    made = with_fresh([0.86, 0.88])
    other = made.rows["base_lr"].where(~made.rows["seed"].isin([7, 8]), LRS[1])
    one_seed = "One seed: the variation between seeds is not known."
    assert one_seed not in answer(made).caveats
    assert one_seed in answer(dataclasses.replace(made, rows=made.rows.assign(base_lr=other))).caveats


def test_fresh_seeds_of_a_workdir_are_in_no_cell(tmp_path):
    experiment = tiny.grid(name="exp", epochs=1)
    facts = {"num_classes": 3, "examples": [50, 20]}
    with open_workdir(tmp_path, experiment, facts), ProgramResults(tmp_path, 4, 4) as program:
        for lr, seed, accuracy in ((2**-9, 0, 0.8), (2**-7, 0, 0.7), (2**-5, 0, 0.6), (2**-9, 5, 0.5), (2**-7, 6, 0.99)):
            program.append([Row(4, 4, lr, seed, 1, 10, 1.0, accuracy, 1.0, accuracy)])
    found = load(tmp_path)
    assert found.cells["test_accuracy"].tolist() == [0.8, 0.7, 0.6]
    assert found.cells["finished"].tolist() == [1, 1, 1]
    assert (found.choosing["seed"].unique().tolist(), found.fresh["seed"].unique().tolist()) == ([0], [5, 6])
    assert recommend(found).fresh["test_accuracy"] == 0.5


def test_the_interval_covers_by_seeds_and_by_the_test_set():
    noise = Noise(Metric(), 10**6, math.nan)
    for count in (2, 3):
        draw, hits = np.random.default_rng(0), []
        for _ in range(400):
            seeds = 0.9 + 0.01 * draw.normal(size=count)
            cell = pd.Series({"test_accuracy": seeds.mean(), "test_accuracy_std": seeds.std(ddof=1), "finished": count})
            low, high = interval(cell, noise)
            hits.append(low <= 0.9 <= high)
        assert 0.86 <= np.mean(hits) <= 0.94
        assert noise.source(cell).endswith("seeds")
    assert "Its test accuracy is 88.3 … 91.5 % (90 %, by 1,000 test examples)." in said({4: 0.9})
    assert interval(
        pd.Series({"test_accuracy": 1.0, "test_accuracy_std": 0.0, "finished": 1}), Noise(Metric(), 20, math.nan)
    ) == (
        pytest.approx((1 / (1 + 1.645**2 / 20), 1.0), abs=1e-3)  # 88.1 %, by Wilson
    )
    three = said({4: [[0.9, 0.89, 0.91]]}, lrs=LRS[:1], seeds=(0, 1, 2))
    assert "Its test accuracy is 88.3 … 91.7 % (90 %, by 3 seeds)." in three


def test_each_split_has_its_own_size():
    made = study("fig08", {4: 0.9})
    assert noise_of(made).examples == 1000
    of_training = dataclasses.replace(made.experiment, select=("train_accuracy", "max"))
    assert noise_of(dataclasses.replace(made, experiment=of_training)).examples == 5000
    split = dataclasses.replace(made.experiment.dataset, validation_fraction=0.2)
    experiment = dataclasses.replace(made.experiment, dataset=split)
    assert noise_of(dataclasses.replace(made, experiment=experiment)).examples == 1250  # of 6,250, of which 5,000 train


def test_the_best_of_many_noisy_cells_looks_better_than_it_is():
    many = dict.fromkeys((2, 4, 8, 16, 32, 64), 0.9)
    found = recommend(study("fig08", many))
    assert found.optimism == pytest.approx(1.267 * math.sqrt(0.9 * 0.1 / 1000), rel=0.1)  # mean maximum of six normal deviates
    chosen = "The test set chose it among 6 cells, so it looks better than it is, by up to 1.2 points on average."
    assert chosen in found.sentences
    assert "looks better" not in said({4: 0.9, 8: 0.5})


def test_noise_that_already_spreads_the_observed_values_is_not_added_to_them_again():
    """Of 24 equal cells the best overstates by 1.95 errors on average: the mean maximum of as many normal deviates."""
    error = math.sqrt(0.9 * 0.1 / 1000)
    rates = tuple(2.0**-k for k in range(24))
    spread = study("fig08", {4: list(0.9 + error * ndtri((np.arange(24) + 0.5) / 24))}, lrs=rates)
    assert recommend(spread).optimism == pytest.approx(1.95 * error, rel=0.1)


def test_a_cell_with_a_seed_that_collapsed_is_neither_as_good_nor_noise():
    """Its two seeds differ so much that two standard errors reach the best."""
    made = study("fig08", {4: [[0.9, 0.902]], 8: [[0.88, 0.1]]}, lrs=LRS[:1], seeds=(0, 1))
    found = recommend(made)
    assert (found.largest, found.optimism < 0.01) == (4, True)
    assert "within the noise of it" not in " ".join(answer(made).caveats)


def test_a_best_cell_with_a_diverged_seed_is_recommended_where_no_cell_converged():
    made = study("fig08", {4: [[0.9, LOST]], 8: [[LOST, LOST]]}, lrs=LRS[:1], seeds=(0, 1))
    found = recommend(made)
    assert (found.best["batch_size"], found.largest, len(found.as_good)) == (4, None, 0)
    assert answer(made).sentence.startswith("Best at m = 4, ")


def test_the_largest_batch_size_as_good_has_no_diverged_seed():
    table = {4: [[0.9, 0.9]], 8: [[0.895, 0.9]], 16: [[0.9, LOST]], 32: [[0.5, 0.5]]}
    found = recommend(study("fig08", table, lrs=LRS[:1], seeds=(0, 1)))
    assert found.largest == 8
    assert "m = 8 is the largest batch size within the noise of the best, at m = 8, η̃ = 2^-9: 89.8 ± 0.4 %." in found.sentences


def test_the_largest_batch_size_is_one_whose_own_best_reaches_the_best():
    """A worse cell of m = 8, whose two seeds differ, is within the noise, but the best of m = 8 is not."""
    made = study("fig08", {4: [[0.9, 0.902]] * 2, 8: [[0.84, 0.842], [0.9, 0.77]]}, lrs=LRS[:2], seeds=(0, 1))
    found = recommend(made)
    assert found.as_good["batch_size"].tolist() == [4, 4, 8]
    assert (found.largest, answer(made).sentence.partition("; ")[2]) == (4, "m = 8 never reaches it.")


def test_a_batch_size_without_a_converging_cell_never_reaches_the_best():
    made = study("fig08", {4: [[0.9, 0.902]], 8: [[0.88, 0.1]]}, lrs=LRS[:1], seeds=(0, 1))
    assert answer(made).sentence.endswith("; m = 8 never reaches it.")


def test_one_batch_size_is_neither_the_largest_nor_the_fastest():
    assert "batch size within" not in said({4: 0.9})
    assert "At equal" not in said({4: 0.9})


def test_the_interval_of_an_error_does_not_go_below_zero():
    made = of_losses({4: tuple([0.02, 0.0, 0.06] * 3), 8: tuple([0.3] * 9)}, epochs=9)
    assert said(made).startswith("Its test loss is 0 … 0.0")


def test_a_single_loss_of_unknown_noise_tells_nothing_of_other_batch_sizes():
    made = of_losses({4: 0.30, 8: 0.31, 16: LOST})
    assert answer(made).sentence.endswith(
        ": test loss 0.3; m = 16 never reaches it; whether m = 8 reaches it cannot be told from single seeds."
    )
    assert said(made).startswith("How good it is cannot be told: the noise of a single seed's loss is not known.")


def test_the_noise_of_a_loss_comes_from_late_epochs_or_neighbouring_rates():
    wavy = tuple(0.3 + d - 0.03 * e for e, d in enumerate((0.3, 0.2, 0.01, -0.01, 0.01, -0.01, 0.01)))
    made = of_losses({4: wavy, 8: tuple(v + 0.02 for v in wavy), 16: tuple(v + 0.2 for v in wavy)}, epochs=7)
    assert noise_of(made).scatter == pytest.approx(0.0126, rel=0.01)
    assert answer(made).sentence.endswith("m = 16 never reaches it.")
    assert "by the scatter of epochs and neighbouring rates" in said(made)
    rates = tuple(2.0**k for k in range(-12, -3))
    bowl = [0.3 + 0.02 * (k - 4) ** 2 for k in range(9)]
    assert noise_of(of_losses({4: bowl}, lrs=rates)).scatter == pytest.approx(0, abs=1e-12)
    rough = [v + d for v, d in zip(bowl, np.random.default_rng(0).normal(0, 0.01, 9), strict=True)]
    assert noise_of(of_losses({4: rough}, lrs=rates)).scatter == pytest.approx(0.01, rel=0.6)


@pytest.mark.parametrize("guess", [{"loss": 2.3}, {}])
def test_rates_that_nearly_diverge_are_no_noise(guess):
    bowl = [0.3 + 0.02 * (k - 5) ** 2 for k in range(7)] + [1e9, 1e13]
    made = of_losses({4: bowl, 8: bowl}, lrs=tuple(2.0**k for k in range(-12, -3)))
    assert noise_of(dataclasses.replace(made, guess=guess)).scatter == pytest.approx(0, abs=1e-12)


def timed(epochs=4, name="exp", best=0.9):
    """Returns a study where m = 2 is best at 4 s an epoch of 40 examples, and m = 8, at 1 s, is ahead after 4 s."""
    slow, fast = [0.3, 0.5, best, best], [0.6, 0.7, 0.7, 0.7]
    frame = results(run(slow[-epochs:], batch_size=2, experiment=name), run(fast[-epochs:], batch_size=8, experiment=name))
    frame["step"] = 40 * frame["epoch"] // frame["batch_size"]
    made = Study(Path(name), tiny.grid(name=name, epochs=epochs), frame, analysis.known_cells(frame), 10, (40, 10))
    return dataclasses.replace(made, timings=timings(segment(2, 4, 40), segment(8, 1, 40)))


def test_the_best_at_equal_epochs_and_at_equal_time():
    fast, slow = equal_time.by_time([timed()])
    assert (fast.seconds, fast.cell["batch_size"], fast.cell["test_accuracy"]) == (4, 8, pytest.approx(0.7))
    assert (slow.seconds, slow.cell["batch_size"], slow.cell["test_accuracy"]) == (16, 2, pytest.approx(0.7))
    assert equal_time.sentence([timed()]) == (
        "At equal epochs the best is m = 2, η̃ = 2^-1 (70.0 %); at equal time m = 8, η̃ = 2^-1 (70.0 %) in 4 s, the time of the "
        "fastest batch size, and m = 2, η̃ = 2^-1 (70.0 %) in 16 s, that of the slowest."
    )
    untimed = dataclasses.replace(timed(), timings=timings())
    for some in ([untimed], [untimed, timed(2, "short", best=0.8)]):
        assert equal_time.sentence(some).endswith("; the best at equal time is not known, since some runs have no timings.")
    other = dataclasses.replace(timed().experiment, model=dataclasses.replace(timed().experiment.model, norm="batch"))
    by_loss = dataclasses.replace(timed().experiment, select=("test_loss", "min"))
    for experiment in (other, by_loss):
        assert equal_time.sentence([timed(), dataclasses.replace(timed(), experiment=experiment)]) == ""


def test_studies_of_several_lengths_are_each_named():
    told = equal_time.sentence([timed(), timed(2, "short", best=0.8)])
    assert told.startswith(
        "At equal epochs the best is 2 epochs: m = 2, η̃ = 2^-1 (80.0 %), 4 epochs: m = 2, η̃ = 2^-1 (70.0 %);"
    )
    assert "m = 8, η̃ = 2^-1 of 2 epochs (70.0 %) in 2 s" in told


@pytest.mark.parametrize("name", ["cifar10/fig08", "cifar10_subset/fig01", "cifar10_subset/fig13_cifar10", "digits/fig18"])
def test_stored_studies_have_a_recommendation(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recommend(load(STORED / name))
    assert found.low < found.best["test_accuracy"] < found.high
    assert found.largest >= found.best["batch_size"]
    assert not any(word in line for line in found.sentences for word in ("nan", "None", "e+"))
    assert len(found.sentences) >= 4
