"""Tests the answer in one sentence, and what it says about noise and unfinished runs."""

import dataclasses

import pytest
from claimed import LOST, LRS, study

from smallbatch_jax.config.experiment import Schedule
from smallbatch_jax.study import analysis
from smallbatch_jax.study.answer import answer
from smallbatch_jax.study.study import describe

FAR = {4: [0.5, 0.912, 0.4], 64: [0.6, 0.5, LOST], 128: [0.3, LOST, LOST]}


def sentence(table, **options):
    return answer(study("fig08", table, **options)).sentence


def caveats(table, **options):
    return " ".join(answer(study("fig08", table, **options)).caveats)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (FAR, "Best at m = 4, η̃ = 2^-8: 91.2 %; no other batch size reaches it."),
        ({2: 0.905, **FAR}, "Best at m = 4, η̃ = 2^-8: 91.2 %; m ≥ 64 never reaches it."),
        ({2: 0.4, **FAR, 8: 0.911}, "Best at m = 4, η̃ = 2^-8: 91.2 %; m = 2 and m ≥ 64 never reach it."),
        ({2: 0.4, 4: 0.9, 8: 0.4, 16: 0.9}, "Best at m = 4, η̃ = 2^-9: 90.0 %; m = 2, 8 never reach it."),
        ({4: 0.9, 8: 0.9, 16: 0.5}, "Best at m = 4, η̃ = 2^-9: 90.0 %; m = 16 never reaches it."),
        ({4: 0.9, 8: 0.895}, "Best at m = 4, η̃ = 2^-9: 90.0 %; every other batch size is within the noise of it."),
        ({4: 0.9, 8: LOST}, "Best at m = 4, η̃ = 2^-9: 90.0 %; m = 8 never reaches it."),
        ({4: 0.9}, "Best at m = 4, η̃ = 2^-9: 90.0 %."),
        ({4: LOST, 8: LOST}, "Every run diverged."),
        ({4: 0.1, 8: 0.05}, "No run is better than chance, 10.0 %."),
        ({4: 0.11, 8: 0.05}, "No run is distinguishable from chance, 10.0 %: the best has 11.0 %."),
        ({4: 0.15, 8: 0.124}, "Best at m = 4, η̃ = 2^-9: 15.0 %; every other batch size is within the noise of it."),
    ],
)
def test_the_sentence(table, says):
    assert sentence(table) == says


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            {4: [0.9, None, LOST], 8: [0.5, 0.6, LOST]},
            "So far (5 of 6 runs ended): best at m = 4, η̃ = 2^-9: 90.0 %; m = 8 never",
        ),
        ({4: 0.9, 8: [0.5, None, LOST]}, "So far (5 of 6 runs ended): best at m = 4, η̃ = 2^-9: 90.0 %."),
        ({4: 0.9, 8: [0.5, None, LOST], 16: 0.9}, "%; every other whose runs have ended is within the noise of it."),
        ({4: [None, None, LOST]}, "So far (1 of 3 runs ended): none of them has finished."),
    ],
)
def test_while_runs_are_to_come_only_what_has_ended_is_judged(table, says):
    assert says in sentence(table)


def test_batch_sizes_for_which_a_budget_was_too_small_are_named_and_not_compared():
    made = study("fig08", dict.fromkeys((2, 8, 32, 128), 0.9))

    def searched(rows):
        return answer(dataclasses.replace(made, rows=rows, cells=analysis.known_cells(rows)))

    rows = made.rows[made.rows["batch_size"] != 8]
    found = searched(rows.assign(status=rows["status"].where(rows["batch_size"] != 32, "stopped")))
    assert found.sentence.endswith("; every other whose runs have ended is within the noise of it.")
    assert "Not trained to the last epoch, so not compared: m = 8, 32." in found.caveats
    assert searched(rows.assign(status="stopped")).sentence == "No run has finished within the budget."


def test_a_metric_without_a_value_has_no_best():
    made = study("fig08", {4: 0.9, 8: 0.8})
    said = answer(dataclasses.replace(made, cells=made.cells.assign(test_accuracy=float("nan"))))
    assert (said.sentence, said.best) == ("test accuracy is NaN in every finished run.", None)


def test_the_best_cell_is_that_of_the_analysis():
    found = study("fig08", {2: 0.4, **FAR})
    cells = analysis.final_accuracy(found.rows)
    best = cells.loc[cells["test_accuracy"].idxmax()]
    assert answer(found).best[analysis.CELL].tolist() == best[analysis.CELL].tolist()


def test_seeds_give_the_deviation_and_the_noise():
    """0.02 is 12 standard errors with three seeds; with one seed 0.03 is 2.2 for 1,000 test examples and 1.5 for 500."""
    close = {4: [[0.9, 0.902, 0.898]], 8: [[0.88, 0.882, 0.878]]}
    assert sentence(close, lrs=LRS[:1], seeds=(0, 1, 2)) == "Best at m = 4, η̃ = 2^-9: 90.0 ± 0.2 %; m = 8 never reaches it."
    one = study("fig08", {4: 0.91, 8: 0.88})
    assert answer(one).sentence.endswith("m = 8 never reaches it.")
    assert answer(dataclasses.replace(one, examples=(5000, 500))).sentence.endswith("is within the noise of it.")
    unknown = answer(dataclasses.replace(one, examples=None)).sentence
    assert unknown.endswith("whether m = 8 reaches it cannot be told from single seeds.")


def test_seeds_that_differ_much_tell_little():
    apart = {4: [[0.85, 0.9, 0.95]], 8: [[0.8, 0.85, 0.9]]}
    assert sentence(apart, lrs=LRS[:1], seeds=(0, 1, 2)).endswith("every other batch size is within the noise of it.")


def test_two_seeds_that_agree_by_luck_do_not_count_as_certain():
    assert sentence({4: [[0.9, 0.9]], 8: [[0.895, 0.895]]}, lrs=LRS[:1], seeds=(0, 1)).endswith("is within the noise of it.")


def test_a_bn_batch_size_of_its_own_is_named():
    found = study("fig13_cifar10", {32: {8: 0.8}}, lrs=LRS[:1], bn=(4, 8, 32))
    assert answer(found).sentence == "Best at m = 32, BN batch size 8, η̃ = 2^-9: 80.0 %."


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({2: 0.3, 4: [0.9, 0.5, 0.4], 8: 0.3}, "2^-9 is the smallest η̃ tried at m = 4: a smaller one may be better still."),
        ({2: 0.3, 4: [0.5, 0.6, 0.9], 8: 0.3}, "2^-7 is the largest η̃ tried at m = 4: a larger one may be better still."),
        ({2: 0.9, 4: 0.3}, "2 is the smallest batch size tried: a smaller one may be better still."),
        ({2: 0.3, 4: 0.9}, "4 is the largest batch size tried: a larger one may be better still."),
        ({2: 0.9}, "One seed"),
        ({2: 0.9, 4: 0.899, 8: 0.3}, "1 other cell is within the noise of it, at m = 4."),
        ({2: 0.9, 4: [0.899, 0.901, 0.3]}, "2 other cells are within the noise of it, at m = 2, 4."),
    ],
)
def test_what_a_careful_reader_would_ask(table, says):
    assert says in caveats(table)


def test_the_optimizer_and_its_rule_are_named_as_others_write_them():
    adamw = {"name": "adamw", "rule": "sqrt", "beta1": 0.8, "beta_rule": "half_life", "beta_batch_size": 2}
    found = study("fig08", {4: 0.9}, optimizer=adamw)
    rate = found.cells["base_lr"].iloc[0] * 2
    expected = f"learning rate η = η̃·√m = {rate:.6g} on the mean gradient, AdamW, beta1 0.64, beta2 0.998001, epsilon 1e-08"
    assert expected in answer(found).caveats[0]
    assert ", AdamW, sqrt rule, " in describe(found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "SGD without momentum, times 0.1"),
        ({"weight_decay_mask": "kernels"}, "SGD without momentum, times 0.1"),
        ({"weight_decay": 5e-4}, "SGD without momentum, weight decay 0.0005, times 0.1"),
        ({"weight_decay": 0.01, "weight_decay_mask": "kernels"}, "momentum, weight decay 0.01 of kernels alone, times 0.1"),
    ],
)
def test_weight_decay_is_told_where_there_is_any(fields, said):
    found = study("fig08", {4: 0.9})
    found = dataclasses.replace(found, experiment=dataclasses.replace(found.experiment, **{"weight_decay": 0.0} | fields))
    assert said in answer(found).caveats[0]


def test_a_best_inside_the_grid_that_stands_alone_needs_no_caveat_but_its_seed():
    lost = [0.2, 0.3, 0.2]
    first, *caveats = answer(study("fig08", {2: lost, 4: [0.5, 0.9, 0.4], 8: lost})).caveats
    assert first.startswith("In usual terms: learning rate η = η̃·m = 0.015625 on the mean gradient, SGD without momentum")
    assert caveats == ["One seed: the variation between seeds is not known."]
    lost = [[0.2] * 3, [0.3] * 3, [0.2] * 3]
    three = {2: lost, 4: [[0.5] * 3, [0.9, 0.89, LOST], [0.4] * 3], 8: lost}
    said = answer(study("fig08", three, seeds=(0, 1, 2)))
    assert said.sentence.startswith("Best at m = 4, η̃ = 2^-8: 89.5 ± 0.7 %, though 1 of its 3 seeds diverged; ")
    assert len(said.caveats) == 1


def test_one_finished_seed_of_several_is_not_called_a_single_seed():
    said = answer(study("fig08", {4: [[0.9, LOST, LOST]], 8: [[0.5] * 3]}, lrs=LRS[:1], seeds=(0, 1, 2)))
    assert "though 2 of its 3 seeds diverged" in said.sentence
    assert "One seed" not in " ".join(said.caveats)


def test_no_batch_larger_than_the_training_set_is_suggested():
    assert "4 is the largest batch size tried. " in caveats({2: 0.3, 4: 0.9}, examples=(4, 1000))


def test_the_learning_rate_is_told_with_its_schedule():
    def told(**schedule):
        found = study("fig10", {4: 0.9})
        return answer(
            dataclasses.replace(found, experiment=dataclasses.replace(found.experiment, schedule=Schedule(**schedule)))
        ).caveats[0]

    start = "In usual terms: learning rate η = η̃·m = 0.0078125 on the mean gradient, SGD without momentum, weight decay 0.001"
    assert told(boundaries=()) == f"{start}."
    assert told(boundaries=(1 / 3, 0.5), factor=0.2, warmup_fraction=0.05) == (
        f"{start}, times 0.2 after 33.3 % and 50 % of the training, after a warm-up over 5 %."
    )


def test_the_warm_up_is_that_of_the_cell_where_it_is_an_axis():
    found = study("fig10", {4: 0.9})
    grid = dataclasses.replace(found.experiment.grid, warmup_fractions=(0.2,))
    experiment = dataclasses.replace(found.experiment, grid=grid, schedule=Schedule(warmup_fraction=0.1))
    rows, cells = (table.assign(warmup_fraction=0.2) for table in (found.rows, found.cells))
    of_axis = dataclasses.replace(found, experiment=experiment, rows=rows, cells=cells)
    assert answer(of_axis).caveats[0].endswith("after a warm-up over 20 %.")


def test_batch_sizes_that_a_wider_grid_might_help_are_named():
    told = caveats({2: [0.5, 0.9, 0.4], 4: [0.6, 0.5, 0.4], 8: [0.6, 0.5, LOST], 16: [0.1, 0.2, 0.3]})
    assert "m = 4, 8 are best at the smallest η̃ tried: a smaller one may bring them closer." in told
    assert "m = 16 is best at the largest η̃ tried: a larger one may bring it closer." in told
