"""Tests that any config is either accepted and can be stored, or refused in one line that names the field."""

import copy
import datetime
import decimal
import fractions
import functools
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from asked import FIELDS, PATHS, SECTIONS, changed, from_command_line, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from smallbatch_jax.config import catalog, experiment, fields, grid, overrides
from smallbatch_jax.config.experiment import Experiment, InputError, default_config, from_config, single_run

ROOT = Path(__file__).parents[2]


WORDS = [
    *(*experiment.DATASETS, *catalog.MODELS, *catalog.NORMS, *experiment.BN_STATISTICS, *experiment.PRECISIONS),
    *catalog.DIAGNOSTICS,
    *(*experiment.BROKEN_IMAGES, *catalog.OPTIMIZERS, *catalog.RULES, *experiment.BETA_RULES, *catalog.TASKS, *catalog.METRICS),
    *(*experiment.WEIGHT_DECAY_MASKS, *experiment.KEEP_PARAMETERS),
    experiment.OWN,
]


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


class Lines:
    def __repr__(self):
        return "two\nlines\u2028\x1b[31m\ud800" + "x" * 1000


def nested(levels, wrap):
    value = 0
    for _ in range(levels):
        value = wrap(value)
    return value


PLAUSIBLE = [
    None,
    True,
    0,
    1,
    8,
    0.5,
    (2, 8),
    (0.25, 0.5),
    (),
    ("runs/a",),
    ((2, 0.1), (8, 0.1), (32, 0.1)),
    ("test_loss", "min"),
    *WORDS,
]
NUMBERS = [-1, 2**31 - 1, 2**31, 2**62, 10**15, 10**400, -(10**400), 10**5000, -0.0, 5e-324, 1e-46, 3.5e38, math.inf, math.nan]
TEXTS = ["", " ", "a\nb", "\0", "\x1b[31m", "a\u2028b", "\ud800", "\u202e", "$x$", "../a", ".", "x" * 10**5, "é" * 200]
OBJECTS = [
    *(np.float32(0.5), np.float64(0.5), np.int64(4), np.bool_(True), np.str_("none"), np.zeros(3), np.zeros((40, 40))),
    *(b"x", bytearray(b"x"), 1j, decimal.Decimal("0.5"), fractions.Fraction(1, 2), datetime.date(2018, 4, 20), range(3), ...),
    *(
        {"gamma": (0.5, 0.9)},
        {2, 8},
        frozenset({2}),
        iter((2, 8)),
        print,
        Experiment,
        Experiment(),
        object(),
        Unprintable(),
        Lines(),
        Unprintable,
    ),
    *(ConfigDict({"name": "alexnet"}), config_dict.placeholder(int), {}, {"norm": "batch"}, {2: 0.1, 8: 0.1, 32: 0.1}),
    *(nested(5000, lambda v: [v]), nested(5000, lambda v: {"name": v})),
]
SPECIMENS = [*PLAUSIBLE, *NUMBERS, *TEXTS, *OBJECTS]

any_text = st.text(st.characters(), max_size=20)  # with control characters and lone surrogates
sizes, rates = st.integers(1, 64), st.floats(0, 1)
scalars = st.one_of(
    st.integers(0, len(SPECIMENS) - 1).map(lambda index: SPECIMENS[index]),  # sampled_from would print them all
    any_text,
    st.integers(),
    st.floats(),
    st.decimals(),
    st.binary(max_size=5),
    sizes,
    rates,
)
names = st.one_of(st.sampled_from([path[-1] for path in PATHS]), any_text, st.none(), st.integers(), st.tuples(any_text))
values = st.one_of(
    st.sampled_from(PLAUSIBLE),
    st.lists(st.one_of(sizes, rates), max_size=3, unique=True).map(tuple),
    st.lists(st.tuples(sizes, rates), max_size=3),
    st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(names, inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
misspelt = st.tuples(st.sampled_from([path[-1] for path in PATHS]), st.integers(0, 30)).map(
    lambda n: n[0][: n[1]] + n[0][n[1] + 1 :]
)
unknown = st.one_of(misspelt, names, st.just("x" * 10**5))
REMOVED = object()
edits = st.one_of(
    st.tuples(st.sampled_from(FIELDS), values),
    st.tuples(st.sampled_from(SECTIONS[1:]), values),
    st.tuples(st.sampled_from(PATHS), st.just(REMOVED)),
    st.tuples(st.builds(lambda section, name: (*section, name), st.sampled_from(SECTIONS), unknown), values),
)


def edited(changes):
    """Returns a config with some fields changed, and their paths; changes in a section that was removed are skipped."""
    config, done = changed(batch_size=8, base_lr=0.5), []
    for (*sections, name), value in changes:
        target = config
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            continue
        if value is REMOVED:
            target.pop(name, None)
        else:
            target[name] = copy.copy(value) if isinstance(value, dict) else value
        done.append((*sections, name))
    return config, done


def judged(make, config, places):
    """Returns "accepted" for a config that can then be stored, or "refused" if one line names one of `places`."""
    try:
        found = make(config)
    except InputError as error:
        line = str(error)
        assert line.splitlines() == [line]
        assert line.isprintable()
        assert len(line) < 1000
        assert any(_names(line, place) for place in places), (line, places)
        return "refused"
    stored = json.dumps(found.to_dict(), ensure_ascii=False).encode()
    assert fields.parse(Experiment, json.loads(stored), "") == found
    assert hash(found) is not None
    if not found.grid.base_lrs_from:
        assert len(found.runs()) <= grid.MOST_RUNS
    return "accepted"


def _names(line, place):
    """Returns whether a refusal names this path, an element of its value, or a section that contains it."""
    path = str(InputError(".".join(map(fields.label, place)) or "config"))
    return line.startswith((f"{path}:", f"{path}.")) or path.startswith(line.partition(":")[0] + ".")


def examples(count, **options):
    """Returns Hypothesis settings for `count` examples; fewer than 1000 are the same in every session."""
    few = count < 1000
    return settings(max_examples=count, derandomize=few, deadline=None, database=None, print_blob=not few, **options)


@functools.cache
def accepted(path):
    """Returns the specimens that a field accepts while all other fields have their defaults."""
    return [value for value in SPECIMENS if judged(from_config, *edited([(path, value)])) == "accepted"]


fitting = st.sampled_from(FIELDS).flatmap(lambda path: st.tuples(st.just(path), st.sampled_from(accepted(path))))
FEW_AND_MANY = pytest.mark.parametrize("count", [100, pytest.param(20_000, marks=pytest.mark.slow)])


@FEW_AND_MANY
@pytest.mark.parametrize("make", [from_config, single_run])
def test_changed_fields_are_accepted_or_one_of_them_is_named(make, count):
    """A few fields or sections are changed, removed or added anywhere in the config."""
    outcomes = Counter()

    @examples(count, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(edits, min_size=1, max_size=4) | st.lists(fitting, min_size=1, max_size=6))
    def judge(changes):
        config, places = edited(changes)
        outcomes[judged(make, config, places)] += 1

    judge()
    assert min(outcomes["accepted"], outcomes["refused"]) > count / 10


@FEW_AND_MANY
def test_whatever_is_given_as_a_config_is_accepted_or_refused(count):
    @examples(count, suppress_health_check=[HealthCheck.too_slow])
    @given(st.one_of(values, st.dictionaries(names, values)))
    def judge(config):
        places = [(), *((name,) for name in config)] if isinstance(config, dict) else [()]
        judged(from_config, config, places)
        if isinstance(config, dict):
            try:
                same = ConfigDict(config)
            except Exception:  # ml_collections itself rejects some names
                return
            judged(from_config, same, places)

    judge()


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_every_field_accepts_something_and_refuses_something(path):
    assert 0 < len(accepted(path)) < len(SPECIMENS)


def on_command_line(path, *arguments):
    """Returns the value of a field after the quickstart config and these command-line arguments."""
    values = from_command_line(*arguments, make=ConfigDict.to_dict)
    for name in path:
        values = values[name]
    return values


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_field_is_the_same_in_every_way_of_giving_it(path, tmp_path):
    """A value can follow =, follow a space or be in a flagfile, and the last of several is used."""
    flag, default, file = f"--config.{'.'.join(path)}", overrides.FIELDS[".".join(path)].default, tmp_path / "flags"
    plausible = [value for value in accepted(path) if any(value is known for known in (*PLAUSIBLE, *NUMBERS))]
    assert None in plausible or default is not None
    for value in plausible[:4] + [None] * (default is None):
        text = repr(value) if isinstance(value, str) else str(value)
        file.write_text(f"{flag}={text}\n")
        wrong = f"{flag}={'false' if value is True else '17'}"
        found = [
            on_command_line(path, wrong, f"{flag}={text}"),
            on_command_line(path, wrong, flag, text),
            on_command_line(path, wrong, f"--flagfile={file}"),
            on_command_line(path, f"--flagfile={file}", wrong, f"{flag}={text}"),
        ]
        assert found == [value] * len(found)
        assert {type(other) for other in found} <= {type(value), type(default)}


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_none_is_taken_where_it_is_the_default_and_refused_elsewhere(path):
    name = ".".join(path)
    line = from_command_line(f"--config.{name}=None")
    assert (line if isinstance(line, str) else None) == (
        None if overrides.FIELDS[name].default is None else refusal(from_config, changed(**{"__".join(path): None}))
    )


@pytest.mark.parametrize("path", SECTIONS[1:], ids=".".join)
def test_a_section_accepts_only_mappings(path):
    found = accepted(path)
    assert {} in found
    assert all(isinstance(value, (dict, ConfigDict)) for value in found)


THOUSAND = tuple(range(1, 1001))
HUGE = {
    "epochs": {"epochs": 10**5000},
    "batch_size": {"batch_size": 2**62},
    "grid.batch_sizes": {"grid__batch_sizes": (10**15,), "grid__bn_batch_sizes": (7,)},
    "grid.bn_batch_sizes": {"grid__batch_sizes": (2**31 - 1,), "grid__bn_batch_sizes": (2,)},
    "grid.seeds": {"grid__seeds": tuple(range(10**6))},
    "grid.base_lrs": {"grid__base_lrs": (*range(1, 99_999), 1)},  # 1 occurs twice
    "grid": {"grid__seeds": THOUSAND, "grid__base_lrs": THOUSAND},
    "grid ": {"grid__batch_sizes": THOUSAND, "grid__bn_batch_sizes": THOUSAND, "grid__base_lrs_from": ("runs/a",)},
    "grid.base_lr_by_batch_size": {"grid__base_lr_by_batch_size": dict.fromkeys(range(3, 90000), 1.0)},
    "schedule.boundaries": {"schedule__boundaries": tuple(1 / k for k in THOUSAND)},
    "name": {"name": "x" * 10**7},
    "model.name": {"model__name": "x" * 10**7},
    "drawn_from": {"drawn_from": (nested(10**5, lambda v: [v]),)},
    "'" + "x" * 116: {"x" * 10**6: 1},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_config_is_refused_at_once(name):
    config = changed(**HUGE[name])
    began = time.process_time()
    assert refusal(from_config, config).startswith(name.strip() + ("..." if name.startswith("'") else ": "))
    assert time.process_time() - began < 1


def test_as_many_runs_as_there_may_be_are_listed_at_once():
    config = changed(
        grid__seeds=tuple(range(100)), grid__batch_sizes=THOUSAND, grid__base_lr_by_batch_size=dict.fromkeys(THOUSAND, 1.0)
    )
    began = time.process_time()
    assert len(from_config(config).runs()) == grid.MOST_RUNS
    assert time.process_time() - began < 3


def test_a_config_that_contains_itself_is_refused():
    config = default_config()
    with config.unlocked():
        config.model.model = config
    assert refusal(from_config, config).startswith("model.model: unknown field")


def test_a_section_for_a_number_is_refused_though_its_names_cannot_be_sorted():
    config = ConfigDict({"base_lr": {"x": None, 0: None}})
    assert refusal(from_config, config).startswith("base_lr: got a value of type ConfigDict")


def test_a_reference_without_a_value_is_named():
    config = ConfigDict({"grid": {"seeds": config_dict.placeholder(tuple, required=True)}})
    assert refusal(from_config, config).startswith("grid.seeds: cannot be read: RequiredValueError")
