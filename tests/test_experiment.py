"""A config becomes runs and programs, or one line that says what is wrong with it."""

import itertools
import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from smallbatch_jax import fields
from smallbatch_jax.experiment import (
    Experiment,
    InputError,
    Run,
    default_config,
    differences,
    from_config,
    programs,
    require_field,
    single_run,
)


def changed(**values):
    """The default config as plain nested values, with some changed: `section__field=value`."""
    config = default_config().to_dict()
    for path, value in values.items():
        *sections, name = path.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[name] = value
    return config


def experiment(**values):
    return from_config(changed(**values))


def refusal(make, *arguments):
    """The message of the InputError, seen to be one line."""
    with pytest.raises(InputError) as error:
        make(*arguments)
    message = str(error.value)
    assert message.splitlines() == [message]
    return message


def test_default_config_is_valid_and_is_the_default_experiment():
    assert from_config(default_config()) == from_config(default_config().to_dict()) == Experiment()


BAD_INTEGERS = [0, -1, 4.5, 8.0, True, "8", None, math.nan, 2**31, (2,)]
BAD_BASE_LRS = [0, 0.0, -0.1, math.inf, -math.inf, math.nan, 1e39, 1e-46, True, "0.1", None]
NO_TUPLES = [8, 0.5, "8", "(2, 8)", {2: 8}, {2, 8}, range(3), np.array([2, 8])]


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
        ({"grid__seeds": (3, 3)}, "grid.seeds: 3 stands twice in (3, 3); give every value once."),
        ({"grid__seeds": ()}, "grid.seeds: got (), accepts a tuple of at least 1 value(s)."),
        ({"schedule__boundaries": (1.5,)}, "schedule.boundaries: got 1.5, accepts a number from 0 to 1."),
        ({"precision": "float16"}, "precision: unknown precision 'float16'; did you mean 'bfloat16'? Known: float32, tf32"),
        ({"model": 3}, "model: got 3, accepts a section with the fields name, norm."),
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
    """So a misspelt override never trains the default in silence."""
    message = refusal(from_config, changed(**values))
    assert message.startswith(f"{unknown}: unknown field; did you mean '{nearest}'? Known: ")
    assert refusal(require_field, unknown).startswith(message.split("Known")[0])


def test_field_of_a_field_is_unknown():
    assert refusal(require_field, "epochs.many").startswith("epochs.many: unknown field; epochs has no fields")
    require_field("grid.base_lrs")
    require_field("batch_size")


def test_norm_that_the_model_does_not_offer_is_refused():
    """A norm that only another model knows; the message lists what this one accepts."""
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

    monkeypatch.setattr("smallbatch_jax.experiment.range", counting, raising=False)
    message = refusal(from_config, changed(grid__batch_sizes=(2**31 - 1,), grid__bn_batch_sizes=(2,)))
    assert message.endswith("Use 1 or 2147483647.")


def test_integer_too_long_to_print_is_refused():
    """Python refuses to print more than 4300 digits; the refusal must be the field's all the same."""
    assert refusal(from_config, changed(epochs=10**5000)).startswith("epochs: ")


def test_long_values_are_cut_short_in_a_refusal():
    assert len(refusal(from_config, changed(precision="x" * 10_000))) < 300


def test_runs_are_the_full_product_in_the_order_given():
    """Batch sizes, then BN batch sizes, then base learning rates, then seeds."""
    found = experiment(
        grid__batch_sizes=[8, 2], grid__bn_batch_sizes=(2, 1), grid__base_lrs=(0.5, 1, 0.25), grid__seeds=(7, 3)
    ).runs()
    product = itertools.product((8, 2), (2, 1), (0.5, 1.0, 0.25), (7, 3))
    assert found == [Run(m, b, lr, seed) for m, b, lr, seed in product]


def test_bn_batch_size_is_the_batch_size_where_none_is_given():
    found = experiment(grid__batch_sizes=(4, 1), grid__base_lrs=(1.0,)).runs()
    assert found == [Run(4, 4, 1.0, 0), Run(1, 1, 1.0, 0)]


def test_bn_batch_sizes_larger_than_the_batch_are_left_out():
    """m = 2 is not crossed with b = 4; m = 1 has no run left, and that is no error as long as some m has."""
    found = experiment(grid__batch_sizes=(1, 2, 8), grid__bn_batch_sizes=(2, 4), grid__base_lrs=(1.0,)).runs()
    assert [(run.batch_size, run.bn_batch_size) for run in found] == [(2, 2), (8, 2), (8, 4)]


def test_programs_group_by_shape_with_the_lowest_base_lr_first():
    """One program per (m, b) in the order of the runs; within it by base_lr, then seed."""
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
    """The rest of the experiment stays; b is m unless it is given."""
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


FULL = {
    "name": "fig",
    "dataset__data_dir": "/data",
    "grid__batch_sizes": (2, 8),
    "grid__bn_batch_sizes": (2,),
    "grid__base_lrs": (0.1, 2.0**-8),
    "grid__seeds": (0, 5),
    "schedule__boundaries": (1 / 3, 2 / 3, 8 / 9),
}


@pytest.mark.parametrize("values", [{}, FULL])
def test_an_experiment_survives_being_stored_as_json(values):
    """to_dict → JSON → parse gives an equal experiment, and nothing differs from it."""
    before = experiment(**values)
    after = fields.parse(Experiment, json.loads(json.dumps(before.to_dict())), "")
    assert after == before
    assert hash(after) == hash(before)
    assert differences(before, after) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "other"),
        ("dataset.name", "folder"),
        ("dataset.augment", True),
        ("dataset.image_size", 32),
        ("model.norm", "batch"),
        ("epochs", 9),
        ("weight_decay", 0.1),
        ("schedule.boundaries", (0.5,)),
        ("schedule.factor", 0.5),
        ("schedule.warmup_fraction", 0.05),
        ("precision", "bfloat16"),
    ],
)
def test_changed_field_stands_in_the_way_of_resuming_and_is_named(field, value):
    found = differences(experiment(), experiment(**{field.replace(".", "__"): value}))
    assert len(found) == 1
    assert found[0].startswith(f"{field} is ")
    assert found[0].endswith(f" there and {value!r} here")


def test_every_changed_field_is_named():
    found = differences(experiment(), experiment(epochs=9, precision="tf32", model__norm="batch", grid__batch_sizes=(2, 8)))
    assert [phrase.split()[0] for phrase in found] == ["model.norm", "epochs", "precision", "grid"]


def test_place_of_the_data_and_layout_of_the_work_may_change():
    other = experiment(dataset__data_dir="/elsewhere", lanes=4, segment_seconds=1.0, checkpoint_seconds=5.0)
    assert differences(experiment(), other) == []


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("batch_sizes", (32, 8, 4, 2)),
        ("base_lrs", (1.0, 0.1, 2.0**-8)),
        ("bn_batch_sizes", (1, 2)),
        ("seeds", (2, 5, 0)),
    ],
)
def test_grid_may_grow_and_not_shrink(name, larger):
    """In any order; what shrinks is told by its runs."""
    small, large = experiment(**FULL), experiment(**{**FULL, f"grid__{name}": larger})
    assert differences(small, large) == []
    missing = len(set(large.runs()) - set(small.runs()))
    assert missing > 0
    assert [phrase.split(" run")[0] for phrase in differences(large, small)] == [f"grid lacks {missing}"]


def test_grid_may_say_the_same_runs_in_other_words():
    """b = None and b = m are the same runs."""
    values = {"grid__batch_sizes": (8,)}
    assert differences(experiment(**values), experiment(**values, grid__bn_batch_sizes=(8,))) == []


def test_config_dict_takes_a_plain_section_and_a_plain_config_a_config_dict():
    config = default_config()
    config.model = {"name": "alexnet", "norm": "batch"}
    assert from_config(config).model.norm == "batch"
    assert from_config({"model": ConfigDict({"norm": "batch"})}).model.norm == "batch"


SCALARS = (None, True, 0, 1, -1, 8, 2**31, 10**400, 0.5, -0.0, 1e-320, math.nan, -math.inf, "", "batch", "a\nb", "\u2028", b"x")
OBJECTS = (
    object(),
    1j,
    np.float32(0.5),
    np.int64(4),
    np.zeros(3),
    np.zeros((40, 40)),
    np.str_("none"),
    print,
    Experiment,
    set(),
)
PLAUSIBLE = (1, 4, 0.5, (2, 8), (1,), [4, 2], (0.5, 1), None, False, "none", "digits", {}, {"norm": "batch"})


def random_value(rng, depth=0):
    if rng.random() < 0.4:
        return PLAUSIBLE[rng.integers(len(PLAUSIBLE))]
    kind = rng.integers(0, 6 if depth < 3 else 3)
    if kind < 2:
        return SCALARS[rng.integers(len(SCALARS))]
    if kind == 2:
        return OBJECTS[rng.integers(len(OBJECTS))]
    values = [random_value(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    if kind == 3:
        return values
    if kind == 4:
        return tuple(values)
    keys = ["name", "norm", "batch_sizes", "grid", 3, None, "a\nb", ("x",), ""]
    return {keys[rng.integers(len(keys))]: value for value in values}


def mutate(rng, config):
    """Replaces, removes or adds a field somewhere in the nested values."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    section = sections[rng.integers(len(sections))]
    names = list(section)
    if not names or rng.random() < 0.15:
        section[[*"ab", 3, None, "x\ny", "epoch"][rng.integers(6)]] = random_value(rng)
    elif rng.random() < 0.15:
        del section[names[rng.integers(len(names))]]
    else:
        section[names[rng.integers(len(names))]] = random_value(rng)


@pytest.mark.parametrize("seed", range(5))
def test_any_config_is_accepted_or_refused_in_one_line(seed):
    """500 random configs, one or two places changed: an Experiment that can be stored, or an InputError, and nothing else."""
    rng = np.random.default_rng(seed)
    refusals = []
    for _ in range(100):
        config = changed()
        for _ in range(rng.integers(1, 3)):
            mutate(rng, config)
        try:
            found = from_config(config)
        except InputError as error:
            refusals.append(str(error))
        else:
            assert fields.parse(Experiment, json.loads(json.dumps(found.to_dict())), "") == found, config
    assert 20 <= len(refusals) < 100  # both ends are reached
    for message in refusals:
        assert message.splitlines() == [message]
        assert len(message) < 1000
