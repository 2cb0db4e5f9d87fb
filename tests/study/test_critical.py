"""Tests the critical batch size: examples to a target, censored where it is not reached, and the fitted hyperbola."""

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
from rows import results, run

from smallbatch_jax.study.analysis import known_cells
from smallbatch_jax.study.critical import critical_batch_size, examples_to_target, fit_hyperbola, noise_scale
from smallbatch_jax.study.study import Study

SIZES = 2.0 ** np.arange(1, 10)


def study(*runs, seeds=(0,)):
    """Returns a study with chance accuracy 0.1, whose runs have 10 steps an epoch."""
    frame = results(*runs)
    experiment = tiny.grid(name="exp", epochs=4, seeds=seeds)
    return Study(Path("exp"), experiment, frame, known_cells(frame), 10, (40, 10))


def test_the_critical_size_is_recovered_and_its_interval_covers_it():
    draw, found = np.random.default_rng(0), []
    for _ in range(200):
        crit = 2 ** draw.uniform(2, 8)
        examples = 1e5 * (1 + SIZES / crit) * np.exp(0.1 * draw.normal(size=9))
        smallest, size, low, high = fit_hyperbola(SIZES, examples, np.ones(9, bool))
        found.append((math.log(size / crit), math.log(smallest / 1e5), low <= crit <= high))
    sizes, smallest, covered = np.array(found).T
    assert abs(np.median(sizes)) < 0.1
    assert abs(np.median(smallest)) < 0.05
    assert 0.84 <= covered.mean() <= 0.96


def test_without_the_loss_of_a_guess_there_is_no_target():
    experiment = tiny.grid(name="exp", epochs=4, select=("test_loss", "min"))
    frame = results(*(run([0.5, 0.6, 0.7, 0.8], batch_size=m) for m in (4, 8, 16)))
    made = Study(Path("exp"), experiment, frame, known_cells(frame, experiment.metric), None, (40, 10))
    assert critical_batch_size(made).sentence() == "Critical batch size: cannot tell; the loss of a guess is not known."
    assert "fewer than three" in critical_batch_size(made, 0.01).sentence()


def test_batch_sizes_that_never_get_there_are_censored_and_not_dropped():
    """The four largest need more than 300,000 examples, which shows that the curve rises; the others alone hardly show it."""
    draw = np.random.default_rng(1)
    true = 1e5 * (1 + SIZES / 16) * np.exp(0.1 * draw.normal(size=9))
    reached = SIZES <= 32
    _, _, _, dropped = fit_hyperbola(SIZES[reached], true[reached], np.ones(5, bool))
    _, size, low, high = fit_hyperbola(SIZES, np.where(reached, true, 3e5), reached)
    assert low < 16 < high < dropped
    assert size == pytest.approx(16, rel=0.5)
    enough = np.where(reached, true, np.array(1e4))  # a bound of 10,000 examples adds no information
    assert fit_hyperbola(SIZES, enough, reached)[3] > 0.7 * dropped


def test_examples_are_interpolated_within_the_epoch_at_the_rate_that_is_there_first():
    slower = run([0.2, 0.3, 0.9], batch_size=4, base_lr=0.25)
    table = examples_to_target(study(run([0.3, 0.5], batch_size=4), slower, run([0.5], batch_size=2, base_lr=0.25)), 0.4)
    assert table.to_dict("list") == {
        "batch_size": [2, 4],
        "base_lr": [0.25, 0.5],
        "examples": pytest.approx([20 * 0.75, 40 + 20]),  # between 0.1 (chance) and 0.5, and between 0.3 and 0.5
        "reached": [True, True],
    }


def test_examples_of_batches_that_grow_are_as_many_as_were_trained_on():
    made = study(run([0.5, 0.6, 0.7], batch_size=4))
    made.rows["examples"] = [40, 120, 280]  # epochs of 10 steps at m = 4, 8 and 16
    assert examples_to_target(made, 0.65)["examples"].tolist() == pytest.approx([120 + 160 / 2])


def test_incomplete_cells_are_censored_at_their_last_epoch():
    half = [run([0.5, 0.6], seed=0), run([0.2, 0.3], seed=1)]
    lost = run([0.6, 0.7], "diverged", batch_size=8)
    stopped = run([0.2, 0.5], "stopped", batch_size=16)
    table = examples_to_target(study(*half, lost, stopped, seeds=(0, 1)), 0.4)
    assert table["reached"].tolist() == [False, False, True]
    assert table["examples"].tolist() == pytest.approx([80, 240, 160 + 160 * 2 / 3])


def test_a_turn_is_named_and_without_one_it_cannot_be_told():
    sizes = (2, 4, 8, 16, 32, 64, 128)

    def found(crit):
        logs = np.random.default_rng(2).normal(size=7)
        epochs = [(1 + m / crit) * math.exp(0.02 * z) * 2 for m, z in zip(sizes, logs, strict=True)]
        rows = [run([0.1 + 0.8 * e / n for e in range(1, 40)], batch_size=m) for m, n in zip(sizes, epochs, strict=True)]
        made = study(*rows)
        made.rows["step"] = made.rows["epoch"] * 6400 // made.rows["batch_size"]  # an epoch has 6400 examples at every m
        return critical_batch_size(made, 0.9)

    turn = found(20)
    assert turn.known
    assert turn.low < 20 < turn.high
    assert turn.costly == pytest.approx(0.2 * turn.size)
    assert turn.sentence().startswith("Critical batch size: m_crit = ")
    assert turn.examples == pytest.approx(12_800, rel=0.1)
    none = found(1e6)
    assert not none.known
    assert (none.low > 128, none.high) == (True, math.inf)
    assert (
        "cannot tell; the examples to 90.0 % test accuracy have no certain turn between m = 2 and 128; m_crit is above"
        in none.sentence()
    )


def test_too_few_batch_sizes_cannot_tell():
    few = critical_batch_size(study(run([0.5, 0.9]), run([0.9], batch_size=8)))
    assert few.sentence() == "Critical batch size: cannot tell; fewer than three batch sizes reached a target."


def test_the_noise_scale_is_that_of_late_epochs_of_the_best_cell():
    made = study(run([0.1, 0.2, 0.3, 0.4]), run([0.1, 0.1, 0.1, 0.1], base_lr=0.25))
    assert noise_scale(made) is None
    values = {"train_noise_scale": [1.0, 2, 10, 30, 7, 7, 7, 7], "train_noise_scale_error": [1.0] * 8}
    for name, column in values.items():
        made.rows[name] = column
    assert noise_scale(made).to_dict("list") == {"batch_size": [4], "scale": [20.0], "error": [1.0]}
