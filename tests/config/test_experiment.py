"""Tests that a config becomes runs and programs, or one line that says what is wrong with it."""

import itertools
import math

import numpy as np
import pytest
from asked import changed, experiment, refusal

from smallbatch_jax.config.experiment import (
    Experiment,
    Run,
    default_config,
    from_config,
    programs,
    single_run,
)


def test_default_config_is_valid_and_is_the_default_experiment():
    assert from_config(default_config()) == from_config(default_config().to_dict()) == Experiment()


BAD_INTEGERS = [0, -1, 4.5, 8.0, True, "8", None, math.nan, 2**31, (2,)]
BAD_BASE_LRS = [0, 0.0, -0.1, math.inf, -math.inf, math.nan, 1e39, 1e-46, True, "0.1", None]
NO_TUPLES = [8, 0.5, "8", "(2, 8)", {2: 8}, {2, 8}, np.array(8), np.zeros((2, 2))]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("grid.batch_sizes", (2, value)) for value in BAD_INTEGERS),
        *(("grid.base_lrs", (0.5, value)) for value in BAD_BASE_LRS),
        *(("grid.bn_batch_sizes", (1, value)) for value in BAD_INTEGERS),
        *(("grid.seeds", (1, value)) for value in [-1, 2**31, 0.0, True, "0", None]),
        *((f"grid.{name}", value) for name in ("batch_sizes", "base_lrs", "seeds") for value in [(), [], None, *NO_TUPLES]),
        *(("grid.bn_batch_sizes", value) for value in [(), *NO_TUPLES]),
        ("grid.batch_sizes", (2, 8, 2)),
        ("grid.base_lrs", (1, 0.5, 1.0)),
        ("grid.bn_batch_sizes", (2, 2)),
        ("grid.seeds", (0, 0)),
        ("grid.bn_batch_sizes", (64, 128)),
        *(("batch_size", value) for value in BAD_INTEGERS if value is not None),
        *(("base_lr", value) for value in BAD_BASE_LRS if value is not None),
        *(("bn_batch_size", value) for value in BAD_INTEGERS if value is not None),
        *(("seed", value) for value in [-1, 2**31, 0.0, True, "0", None]),
        *((name, value) for name in ("name", "dataset.data_dir") for value in ["", " ", "two\nlines", "\x1b[31m", 3, ("a",)]),
        *(
            (f"{name}", value)
            for name in ("model.name", "model.norm", "dataset.name", "precision")
            for value in ["", "x", 3, None]
        ),
        *(("model.name", value) for value in [["alexnet"], np.array(["alexnet", "alexnet"])]),
        *(("dataset.augment", value) for value in [0, 1, "True", None]),
        *(("dataset.image_size", value) for value in BAD_INTEGERS if value is not None),
        *(("epochs", value) for value in [*BAD_INTEGERS, 100_001]),
        *(("weight_decay", value) for value in [-1e-4, math.nan, math.inf, True, "0", None]),
        *(("keep_parameters", value) for value in ["worst", True, 1, ("best",)]),
        *(("keep_gib", value) for value in [0, -1, math.inf, math.nan, "4", None]),
        *(("weight_decay_mask", value) for value in ["kernel", True, None, ("all",)]),
        *(
            ("schedule.boundaries", value)
            for value in [(-0.1,), (0.5, 1.1), (0.5, 0.5), (math.nan,), (None,), 0.5, None, "0.5"]
        ),
        *(("schedule.factor", value) for value in [0, -1, 1.5, math.nan, None]),
        *(("schedule.warmup_fraction", value) for value in [-0.1, 1.1, math.nan, math.inf, "0", None, True]),
        *(("lanes", value) for value in [0, -1, 4097, 2.0, True, "8"]),
        *(("segment_seconds", value) for value in [0, -1, 3601, math.nan, None]),
        *(("checkpoint_seconds", value) for value in [-1, math.inf, math.nan, None]),
        *((section, value) for section in ("dataset", "model", "schedule", "grid") for value in [None, 3, "x", (1,), []]),
    ],
    ids=repr,
)
def test_bad_value_is_refused_in_one_line_that_begins_with_the_field(field, value):
    assert refusal(from_config, changed(**{field.replace(".", "__"): value})).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"grid__batch_sizes": (8,), "grid__bn_batch_sizes": (6,)},
            "grid.bn_batch_sizes: 6 does not divide batch size 8; each SGD batch is split into equal BN sub-batches. "
            "Use 1, 2, 4 or 8.",
        ),
        (
            {"grid__batch_sizes": (2, 4), "grid__bn_batch_sizes": (8, 16)},
            "grid.bn_batch_sizes: (8, 16) leaves no run, every one is larger than every batch size in (2, 4). Use some that "
            "divide the batch sizes.",
        ),
        ({"grid__batch_sizes": (4.5,)}, "grid.batch_sizes: got 4.5, accepts an integer from 1 to 2147483647."),
        ({"grid__base_lrs": (math.nan,)}, "grid.base_lrs: got nan, accepts a number above 0 and finite (in float32)."),
        ({"grid__seeds": (3, 3)}, "grid.seeds: 3 appears twice in (3, 3); give every value once."),
        (
            {"grid__base_lrs": (0.1, 0.1 + 1e-9)},
            "grid.base_lrs: 0.100000001 appears twice in (0.1, 0.100000001) in float32; give",
        ),
        ({"grid__seeds": ()}, "grid.seeds: got (), accepts a tuple of at least 1 value(s)."),
        ({"schedule__boundaries": (1.5,)}, "schedule.boundaries: got 1.5, accepts a number from 0 to 1."),
        ({"precision": "float16"}, "precision: unknown precision 'float16'; did you mean 'bfloat16'? Known: float32, tf32"),
        ({"model": 3}, "model: got 3, accepts a section with the fields name, norm, bn_decay, bn_statistics."),
    ],
)
def test_refusal_says_what_it_got_and_what_it_accepts(values, message):
    assert refusal(from_config, changed(**values)).startswith(message)


@pytest.mark.parametrize(
    ("values", "field", "known"),
    [
        ({"model__name": "alexnett"}, "model.name", ("alexnet",)),
        ({"model__norm": "bath"}, "model.norm", ("none", "batch", "batch_conv_only")),
        ({"dataset__name": "digit"}, "dataset.name", ("digits", "folder")),
        ({"precision": "bloat16"}, "precision", ("float32", "tf32", "bfloat16")),
    ],
)
def test_unknown_choice_lists_what_is_known_and_suggests_the_nearest(values, field, known):
    message = refusal(from_config, changed(**values))
    assert message.startswith(f"{field}: unknown ")
    assert "did you mean " in message
    assert all(name in message.split("Known: ")[1] for name in known)


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"epoch": 3}, "epoch", "epochs"),
        ({"grid__batch_size": 3}, "grid.batch_size", "batch_sizes"),
        ({"model__nrom": "none"}, "model.nrom", "norm"),
        ({"dataset__date_dir": "."}, "dataset.date_dir", "data_dir"),
        ({"schedule__warmup_fractions": 0.1}, "schedule.warmup_fractions", "warmup_fraction"),
    ],
)
def test_unknown_field_is_refused_with_the_nearest_at_every_level(values, unknown, nearest):
    """A misspelt override never silently trains with the default."""
    message = refusal(from_config, changed(**values))
    assert message.startswith(f"{unknown}: unknown field; did you mean '{nearest}'? Known: ")


def test_norm_that_the_model_does_not_offer_is_refused():
    """A norm that only another model offers is refused, and the message lists those that this model accepts."""
    message = refusal(from_config, changed(model__name="resnet8", model__norm="batch_conv_only"))
    assert message.startswith("model.norm: resnet8 has no norm 'batch_conv_only'; it accepts none, batch")
    assert experiment(model__name="alexnet", model__norm="batch_conv_only").model.norm == "batch_conv_only"


def test_refusal_of_a_huge_batch_size_comes_at_once(monkeypatch):
    """The divisors it lists are found without counting up to m = 2³¹ - 1."""
    counted = []

    def counting(*bounds):
        counted.append(range(*bounds))
        assert len(counted[-1]) < 10**6
        return counted[-1]

    monkeypatch.setattr("smallbatch_jax.config.experiment.range", counting, raising=False)
    message = refusal(from_config, changed(grid__batch_sizes=(2**31 - 1,), grid__bn_batch_sizes=(2,)))
    assert message.endswith("Use 1 or 2147483647.")


def test_integer_too_long_to_print_is_refused():
    """The message names the field although Python refuses to print more than 4300 digits."""
    assert refusal(from_config, changed(epochs=10**5000)).startswith("epochs: ")


def test_long_values_are_cut_short_in_a_refusal():
    assert len(refusal(from_config, changed(precision="x" * 10_000))) < 300


def test_runs_are_the_full_product_in_the_order_given():
    """The order is by batch size, then BN batch size, then base learning rate, then seed."""
    found = experiment(
        grid__batch_sizes=[8, 2], grid__bn_batch_sizes=(2, 1), grid__base_lrs=(0.5, 1, 0.25), grid__seeds=(7, 3)
    ).runs()
    product = itertools.product((8, 2), (2, 1), (0.5, 1.0, 0.25), (7, 3))
    assert found == [Run(m, b, lr, seed) for m, b, lr, seed in product]


def test_bn_batch_size_is_the_batch_size_where_none_is_given():
    found = experiment(grid__batch_sizes=(4, 1), grid__base_lrs=(1.0,)).runs()
    assert found == [Run(4, 4, 1.0, 0), Run(1, 1, 1.0, 0)]


def test_bn_batch_sizes_larger_than_the_batch_are_left_out():
    """m = 2 has no run with b = 4; m = 1 has no run at all, which is no error as long as another m has one."""
    found = experiment(grid__batch_sizes=(1, 2, 8), grid__bn_batch_sizes=(2, 4), grid__base_lrs=(1.0,)).runs()
    assert [(run.batch_size, run.bn_batch_size) for run in found] == [(2, 2), (8, 2), (8, 4)]


def test_programs_group_by_shape_with_the_lowest_base_lr_first():
    """There is one program per (m, b), in the order of the runs; its runs are sorted by base_lr, then seed."""
    runs = experiment(
        grid__batch_sizes=(8, 2), grid__bn_batch_sizes=(2, 1), grid__base_lrs=(0.5, 0.25), grid__seeds=(3, 1)
    ).runs()
    grouped = programs(runs)
    assert list(grouped) == [(8, 2), (8, 1), (2, 2), (2, 1)]
    assert sorted(itertools.chain(*grouped.values())) == sorted(runs)
    for (m, b), members in grouped.items():
        assert members == [Run(m, b, 0.25, 1), Run(m, b, 0.25, 3), Run(m, b, 0.5, 1), Run(m, b, 0.5, 3)]


def test_fields_of_one_run_are_checked_but_are_not_part_of_a_grid():
    assert experiment(batch_size=8, base_lr=0.5, bn_batch_size=4, seed=3) == Experiment()


def test_single_run_narrows_the_grid_to_the_run_of_the_config():
    """Other fields of the experiment are kept, and b is m unless it is given."""
    config = changed(epochs=3, batch_size=8, base_lr=0.5, seed=4)
    assert single_run(config).runs() == [Run(8, 8, 0.5, 4)]
    assert single_run(config).epochs == 3
    assert single_run({**config, "bn_batch_size": 2}).runs() == [Run(8, 2, 0.5, 4)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_lr": 0.5}, "batch_size: not given"),
        ({"batch_size": 8}, "base_lr: not given"),
        ({"batch_size": 8, "base_lr": 0.5, "bn_batch_size": 3}, "bn_batch_size: 3 does not divide batch size 8"),
        ({"batch_size": 8, "base_lr": 0.5, "bn_batch_size": 16}, "bn_batch_size: 16 does not divide batch size 8"),
    ],
)
def test_single_run_refuses_an_incomplete_choice(values, message):
    assert refusal(single_run, changed(**values)).startswith(message)


def test_batch_larger_than_the_training_set_is_refused():
    found = experiment(grid__batch_sizes=(2, 100))
    found.require_examples(100)
    message = refusal(found.require_examples, 99)
    assert message.startswith("grid.batch_sizes")
    assert message.endswith("100 is larger than the training set of 99 examples; use 1 to 99.")
