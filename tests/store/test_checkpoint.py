"""Tests checkpoints: damaged ones are skipped, and those of another experiment or model are refused."""

import dataclasses
import shutil
import warnings

import numpy as np
import pytest
import tiny

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.store import checkpoint
from smallbatch_jax.store.checkpoint import Checkpoints

RUNS = [tiny.grid().runs()[0], None]


def lanes(value, rows=2):
    """Returns a stand-in for the lanes of a program: arrays of different dtypes, stacked by lane."""
    noise = np.random.default_rng(value).normal(size=(rows, 40, 30)).astype(np.float32)
    return {"params": noise, "step": np.full(rows, value, np.int32), "alive": np.ones(rows, bool)}


def equal(found, expected):
    return found is not None and all(np.array_equal(found[0][name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a folder with two checkpoints, of `lanes(1)` and `lanes(2)`."""
    folder = tmp_path_factory.mktemp("checkpoints") / "m00004_b00004"
    checkpoints = Checkpoints(folder, tiny.grid())
    for value in (0, 1, 2):
        checkpoints.save(lanes(value), RUNS)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


def steps(folder):
    return sorted(path.name for path in folder.iterdir())


def restored(folder, experiment=None, template=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints = Checkpoints(folder, experiment or tiny.grid())
        found = checkpoints.restore(template or lanes(0))
    return found, [str(warning.message) for warning in caught]


def test_the_last_two_are_kept_and_the_newest_comes_back_with_its_runs(folder):
    assert steps(folder) == ["1", "2"]
    found, said = restored(folder, template=lanes(0, rows=8))
    assert equal(found, lanes(2))
    assert found[1] == RUNS
    assert said == []


def of_model(name):
    return dataclasses.replace(tiny.grid(), model=dataclasses.replace(tiny.grid().model, name=name))


@pytest.mark.parametrize(("name", "resumed"), [("own:Net-0123456789ab", True), ("own:Other-0123456789ab", False)])
def test_a_checkpoint_of_an_own_model_whose_name_has_the_digest_of_earlier_versions_is_resumed(tmp_path, name, resumed):
    checkpoints = Checkpoints(tmp_path / "own", of_model(name))
    checkpoints.save(lanes(1), RUNS)
    if resumed:
        assert equal(restored(tmp_path / "own", of_model("own:Net"))[0], lanes(1))
    else:
        with pytest.raises(InputError, match="another experiment or model"):
            restored(tmp_path / "own", of_model("own:Net"))


def test_nothing_saved_is_none(tmp_path):
    assert restored(tmp_path / "none") == (None, [])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def pickle(path):
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(path.parent.parent / "ran").encode() + b"'\ntR.")


DAMAGE = {
    "halve": halve,
    "empty": lambda path: path.write_bytes(b""),
    "flip": flip,
    "remove": lambda p: p.unlink(),
    "pickle": pickle,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.long
def test_any_damaged_file_is_noticed_and_the_checkpoint_before_is_taken(saved, tmp_path, damage):
    """Damage to an unimportant file is ignored, and restored arrays always equal saved ones bit for bit."""
    files = [path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file()]
    fell_back = []
    for i, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(i) / saved.name)
        DAMAGE[damage](folder / name)
        found, said = restored(folder)
        if equal(found, lanes(2)):
            assert said == []
            continue
        assert equal(found, lanes(1)), name
        assert len(said) == 1
        assert said[0].startswith("damaged checkpoint put aside in ")
        assert len(said[0].splitlines()) == 1
        assert not list(folder.parent.rglob("ran"))
        fell_back.append(name)
    assert len(fell_back) >= 2, fell_back


def test_a_number_changed_in_the_description_is_noticed(folder):
    """Otherwise the lanes would resume with another base learning rate."""
    (described,) = (path for path in (folder / "2").rglob("*") if path.is_file() and b'"base_lr": ' in path.read_bytes())
    described.write_text(described.read_text().replace('"base_lr": 0.00', '"base_lr": 0.01'))
    found, said = restored(folder)
    assert equal(found, lanes(1))
    assert "its description does not match its checksum" in said[0]


def test_after_damage_two_good_ones_are_kept_again(folder):
    shutil.rmtree(folder / "2/default")
    checkpoints = Checkpoints(folder, tiny.grid())
    with pytest.warns(UserWarning, match="put aside"):
        checkpoints.restore(lanes(0))
    checkpoints.save(lanes(3), RUNS)
    assert steps(folder) == ["1", "2"]
    assert equal(restored(folder)[0], lanes(3))


def test_with_none_whole_all_begins_anew(folder):
    for step in ("1", "2"):
        shutil.rmtree(folder / step / "default")
    found, said = restored(folder)
    assert found is None
    assert len(said) == 2


@pytest.mark.parametrize(
    ("experiment", "template", "says"),
    [
        (tiny.grid(weight_decay=0.5), None, "weight_decay is 0.001 there and 0.5 here"),
        (tiny.grid(base_lrs=(2**-5,)), None, "grid lacks"),
        (
            None,
            {**lanes(0), "params": np.zeros((2, 40, 31), np.float32)},
            "['params'] is float32[40, 30] there and float32[40, 31]",
        ),
        (None, {**lanes(0), "step": np.zeros(2, np.int8)}, "['step'] is int32[] there and int8[] here"),
        (None, {"params": lanes(0)["params"]}, "['alive'] is bool[] there and missing here"),
    ],
)
@pytest.mark.long
def test_what_is_of_another_experiment_or_model_is_refused_with_what_differs(folder, experiment, template, says):
    with pytest.raises(InputError) as error:
        restored(folder, experiment, template)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert steps(folder) == ["1", "2"]


def test_another_format_is_put_aside_and_its_runs_begin_again(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    found, said = restored(folder)
    assert found is None
    assert "it has format 2, this version reads 3; its runs begin again" in said[0]


def test_a_grid_that_grew_takes_its_checkpoints(folder):
    found, said = restored(folder, tiny.grid(seeds=(0, 1)))
    assert equal(found, lanes(2))
    assert said == []
