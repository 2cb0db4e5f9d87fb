"""Tests what a workdir stores of its experiment, and what may change when it is resumed."""

import json

import pytest
from asked import experiment
from ml_collections import ConfigDict

from smallbatch_jax.config import fields
from smallbatch_jax.config.experiment import (
    Experiment,
    default_config,
    differences,
    from_config,
)
from smallbatch_jax.store.workdir import parse_stored

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
    """to_dict → JSON → parse gives an equal experiment without differences."""
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
        ("weight_decay_mask", "kernels"),
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


def test_a_workdir_of_an_older_version_decays_every_parameter():
    stored = experiment().to_dict()
    del stored["weight_decay_mask"]
    assert parse_stored(stored) == experiment(weight_decay_mask="all")


def test_trackers_and_kept_parameters_may_change_and_older_versions_did_not_store_them():
    watched = experiment(tensorboard=True, wandb="project", keep_parameters="best", keep_gib=1.0)
    stored = experiment().to_dict()
    del stored["tensorboard"], stored["wandb"], stored["keep_parameters"], stored["keep_gib"]
    before = fields.parse(Experiment, stored, "")
    assert before == experiment()
    assert differences(before, watched) == differences(watched, before) == []


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
    """Values may be added in any order; the message for a grid that shrinks counts its missing runs."""
    small, large = experiment(**FULL), experiment(**{**FULL, f"grid__{name}": larger})
    assert differences(small, large) == []
    missing = len(set(large.runs()) - set(small.runs()))
    assert missing > 0
    assert [phrase.split(" run")[0] for phrase in differences(large, small)] == [f"grid lacks {missing}"]


@pytest.mark.parametrize("change", [{"search__confirm": 1}, {"search__budget": None}, {"grid__seeds": (5, 0)}])
def test_a_search_may_be_confirmed_otherwise_or_become_a_whole_grid(change):
    """The seeds that confirm a search's choice are not part of its grid."""
    before = {"search__budget": 1e5, "search__confirm": 2}
    assert differences(experiment(**before), experiment(**before | change)) == []
    assert differences(experiment(**before, grid__seeds=(0, 9)), experiment(**before | change)) != []


def test_grid_may_say_the_same_runs_in_other_words():
    """b = None and b = m give the same runs."""
    values = {"grid__batch_sizes": (8,)}
    assert differences(experiment(**values), experiment(**values, grid__bn_batch_sizes=(8,))) == []


def test_config_dict_takes_a_plain_section_and_a_plain_config_a_config_dict():
    config = default_config()
    config.model = {"name": "alexnet", "norm": "batch"}
    assert from_config(config).model.norm == "batch"
    assert from_config({"model": ConfigDict({"norm": "batch"})}).model.norm == "batch"
