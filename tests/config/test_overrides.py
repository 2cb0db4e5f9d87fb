"""Tests config fields given on a command line: after =, after a space or in a flagfile; the last value is used."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from asked import changed, from_command_line

from smallbatch_jax.config.experiment import default_config, from_config
from smallbatch_jax.config.fields import expanded_path


def value_of(chosen, path):
    for name in path.split("."):
        assert dataclasses.is_dataclass(chosen), chosen
        chosen = getattr(chosen, name)
    return chosen


GIVEN = [
    ("lanes", "None", None),
    ("lanes", "null", None),
    ("lanes", "08", 8),
    ("wandb", "None", None),
    ("wandb", "none", None),
    ("wandb", "'None'", "None"),
    ("dataset.data_dir", "None", None),
    ("dataset.data_dir", "~/images", "~/images"),  # workers may have another home directory
    ("grid.bn_batch_sizes", "None", None),
    ("grid.bn_batch_sizes", "2", (2,)),
    ("name", "123", "123"),
    ("name", "'a b'", "a b"),
    ("name", "none", "none"),
    ("model.norm", "none", "none"),
    ("epochs", " 5 ", 5),
    ("epochs", "1_0", 10),
    ("epochs", "2^3", 8),
    ("epochs", "2^3^2", 512),
    ("epochs", "3  # three", 3),
    ("weight_decay", "1", 1.0),
    ("weight_decay", "5e-4", 5e-4),
    ("weight_decay", "10^\u22123", 1e-3),
    ("dataset.augment", "TRUE", True),
    ("dataset.augment", "yes", True),
    ("dataset.augment", "1", True),
    ("dataset.augment", "False", False),
    ("dataset.augment", "off", False),
    ("grid.batch_sizes", "8", (8,)),
    ("grid.batch_sizes", "2,8", (2, 8)),
    ("grid.batch_sizes", "[2, 8]", (2, 8)),
    ("grid.batch_sizes", "(2^1, 2**3)", (2, 8)),
    ("grid.base_lrs", "0.1", (0.1,)),
    ("grid.base_lrs", "(2^-8.5,)", (2**-8.5,)),
    ("grid.base_lrs", "(2^-8,2^-7)", (2**-8, 2**-7)),
    ("grid.base_lrs", "2**-8, 10^-3, 12^2", (2**-8, 1e-3, 144.0)),
    ("grid.base_lrs", "2^\u22127", (2**-7,)),
    ("drawn_from", "runs/a", ("runs/a",)),
    ("drawn_from", "(runs/a, runs/b)", ("runs/a", "runs/b")),
    ("drawn_from", "('runs/a', 'b^c')", ("runs/a", "b^c")),
    ("schedule.boundaries", "()", ()),
]


@pytest.mark.parametrize(("path", "text", "value"), GIVEN)
def test_a_field_is_read_by_its_type(path, text, value):
    found = value_of(from_command_line(f"--config.{path}={text}"), path)
    assert found == value
    assert type(found) is type(value)


def test_base_lrs_of_batch_sizes_may_be_powers():
    wanted = ((2, 2**-8), (8, 2**-7.5))
    for text in ("((2,2^-8),(8,2^-7.5))", "{2: 2^-8, 8: 2**-7.5}"):
        found = from_command_line("--config.grid.batch_sizes=2,8", f"--config.grid.base_lr_by_batch_size={text}")
        assert found.grid.base_lr_by_batch_size == wanted


REFUSED = [
    (["--config.name=None"], "name: got None, accepts text"),
    (["--config.grid=None"], "grid: got None, accepts a section with the fields batch_sizes"),
    (["--config.grid={'seed': 1}"], "grid.seed: unknown field; did you mean 'seeds'?"),
    (["--config.epochs=1e1"], "epochs: got 10.0, accepts an integer"),
    (["--config.epochs=\u22125"], "epochs: got -5, accepts an integer"),
    (["--config.epochs="], "epochs: got '', accepts an integer"),
    (["--config.name", "--config.lanes=1"], "--config.name: has no value, the next argument is '--config.lanes=1'"),
    (["--config.epochs"], "Missing value for flag --config.epochs"),
    (["--config.epochs", "--config.lanes=1"], "--config.epochs: has no value, the next argument is"),
    (["--config.weight_decay=True"], "weight_decay: got 'True', accepts a number"),
    (["--config.dataset.augment=maybe"], "dataset.augment: got 'maybe', accepts True or False"),
    (["--config.dataset.augment=2"], "dataset.augment: got '2', accepts True or False"),
    (["--noconfig.epochs"], "Unknown command line flag 'noconfig.epochs'. Did you mean: config.epochs ?"),
    (["--noconfig.dataset.augment=True"], "--noconfig.dataset.augment=True does not take an argument"),
    (["--config.weight_decay=nan"], "weight_decay: got nan"),
    (["--config.grid.base_lrs=(0.1,nan)"], "grid.base_lrs: got nan"),
    (["--config.grid.base_lrs=9**9**9"], "grid.base_lrs: got '9**9**9'"),
    (["--config.grid.base_lrs=(1/256,)"], "grid.base_lrs: got '1/256'"),
    (["--config.grid.base_lrs=(0.1,many)"], "grid.base_lrs: got '(0.1,many)'"),
    (["--config.epochs=-2^2"], "epochs: got -4"),
    (["--config.grid.base_lrs=(-8)^0.5"], "grid.base_lrs: got (1.73"),
    (["--config.grid.base_lrs=" + "(" * 3000], "grid.base_lrs: got '(((("),
    (["--config.grid.seeds={0,1}"], "grid.seeds: got '{0,1}', accepts a tuple"),
    (["--config.grid.batch_sizes=(2,"], "grid.batch_sizes: got '(2,', accepts a tuple"),
    (["--config.grid.batch_sizes="], "grid.batch_sizes: got '', accepts a tuple"),
    (["--config.grid.batch_sizes=many"], "grid.batch_sizes: got 'many', accepts an integer"),
    (["--config.epochs.many=2"], "Unknown command line flag 'config.epochs.many'. Did you mean: config.epochs ?"),
    (["--config.grid.batch_size=8"], "flag 'config.grid.batch_size'. Did you mean: config.grid.batch_sizes ?"),
    (["--config."], "Unknown command line flag 'config.'. Did you mean: config.base_lr, config.batch_size"),
    (["--flagfile=/nowhere"], "Unable to open flagfile: [Errno 2] No such file"),
    (["--flagfile=/"], "Unable to open flagfile: [Errno 21] Is a directory"),
    (["--flagfile"], "--flagfile with no argument"),
    (["--flagfile=~nobody_here/x"], "No such file or directory: '~nobody_here/x'"),
    (["--config="], "--config: empty; give a path"),
    (["--config=~/nowhere.py"], "/nowhere.py: FileNotFoundError: [Errno 2] No such file"),
    (["--othr=3"], "Unknown command line flag 'othr'. Did you mean: other ?"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_what_cannot_be_read_is_one_line(arguments, says):
    line = from_command_line(*arguments)
    assert isinstance(line, str)
    assert says in line
    assert line.splitlines() == [line]


def test_switches_and_spaces():
    augmented = [
        ["--config.dataset.augment"],
        ["--config.dataset.augment", "--other=x"],
        ["--config.dataset.augment", "True"],
        ["-config.dataset.augment=t"],
        ["--noconfig.dataset.augment", "--config.dataset.augment"],
    ]
    assert all(from_command_line(*arguments).dataset.augment is True for arguments in augmented)
    assert from_command_line("--config.dataset.augment", "--noconfig.dataset.augment").dataset.augment is False
    assert from_command_line("--config.dataset.augment", "no", "--config.epochs", "3").epochs == 3


def test_a_section_keeps_its_other_fields_and_is_set_before_its_fields():
    found = from_command_line("--config.grid.seeds=(1,)", "--config.grid={'seeds': (5, 6), 'batch_sizes': (4,)}").grid
    assert (found.batch_sizes, found.seeds) == ((4,), (1,))
    assert found.base_lrs == from_command_line().grid.base_lrs


def test_the_file_may_come_after_its_fields(tmp_path):
    file = tmp_path / "other.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'weight_decay': 0.25})")
    found = from_command_line("--config.grid.seeds=7", f"--config={file}")  # it follows the --config of the quickstart
    assert (found.weight_decay, found.grid.seeds) == (0.25, (7,))


@pytest.mark.parametrize("kind", ["FrozenConfigDict", "dict"])
def test_the_file_may_give_another_kind_of_mapping(tmp_path, kind):
    file = tmp_path / "other.py"
    returned = f"{kind}({{'grid': {{'seeds': (1, 2)}}}})"
    file.write_text(f"from ml_collections import FrozenConfigDict\ndef get_config(): return {returned}")
    found = from_command_line(f"--config={file}", "--config.grid.batch_sizes=4")
    assert (found.grid.batch_sizes, found.grid.seeds) == ((4,), (1, 2))


def test_a_reference_to_an_overridden_field_follows_it(tmp_path):
    file = tmp_path / "referring.py"
    body = "config = default_config(); config.lanes = config.get_ref('epochs'); return config"
    file.write_text(f"from smallbatch_jax.config.experiment import default_config\ndef get_config(): {body}")
    assert from_command_line("--config.epochs=5", f"--config={file}").lanes == 5


def test_a_flagfile_has_comments_quotes_and_other_flagfiles(tmp_path):
    (tmp_path / "more").write_text("--config.dataset.augment\n--config.lanes=4\n")
    (tmp_path / "flags").write_text(
        '# a comment\n// another\n\n--config.epochs=3\n--config.name="a b"\n'
        f"--config.grid.base_lrs=(2^-8.5, 2^-7)\n--config.wandb=None\n--flagfile={tmp_path}/more\n"
    )
    found = from_command_line(f"--flagfile={tmp_path}/flags", "--config.lanes", "2")
    assert (found.epochs, found.name, found.wandb, found.lanes, found.dataset.augment) == (3, "a b", None, 2, True)
    assert found.grid.base_lrs == (2**-8.5, 2**-7)


def test_a_flagfile_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "flags").write_bytes(b"\xff\xfe")
    assert "'utf-8' codec" in from_command_line("--flagfile", tmp_path / "flags")


PLAIN = [
    ("epochs", np.int64(8), 8),
    ("epochs", jnp.int32(8), 8),
    ("epochs", np.array(8), 8),
    ("weight_decay", np.float32(0.01), float(np.float32(0.01))),
    ("weight_decay", jnp.float32(0.25), 0.25),
    ("weight_decay", jnp.bfloat16(0.25), 0.25),
    ("name", np.str_("a"), "a"),
    ("dataset.augment", np.bool_(True), True),
    ("grid.seeds", range(3), (0, 1, 2)),
    ("grid.seeds", np.arange(2), (0, 1)),
    ("grid.batch_sizes", [np.int64(2), jnp.int32(8)], (2, 8)),
    ("grid.base_lrs", np.array([0.5, 0.25]), (0.5, 0.25)),
    ("grid.base_lrs", 2.0 ** jnp.arange(-2, 0), (0.25, 0.5)),
    ("grid.base_lr_by_batch_size", {np.int64(2): np.float64(0.5), 8: 1, 32: 1}, ((2, 0.5), (8, 1.0), (32, 1.0))),
    ("grid.base_lr_by_batch_size", np.array([[2, 1], [8, 1], [32, 1]]), ((2, 1.0), (8, 1.0), (32, 1.0))),
    ("dataset.data_dir", Path("a/b"), "a/b"),
    ("drawn_from", [Path("a/b")], ("a/b",)),
    ("schedule.boundaries", np.linspace(0.25, 0.75, 3), (0.25, 0.5, 0.75)),
]


@pytest.mark.parametrize(("path", "given", "value"), PLAIN)
def test_numbers_of_numpy_and_jax_and_ranges_are_taken_wherever_a_config_comes_from(path, given, value):
    config = default_config()
    *sections, name = path.split(".")
    (config[sections[0]] if sections else config)[name] = given  # as in a config file
    for found in (from_config(config), from_config(changed(**{path.replace(".", "__"): given}))):
        assert value_of(found, path) == value
        assert type(value_of(found, path)) is type(value)


def test_a_config_takes_no_true_for_a_number():
    """True is refused for a number although a ConfigDict would turn it into 1.0."""
    config = default_config()
    config.weight_decay = True
    with pytest.raises(ValueError, match="weight_decay: got True, accepts a number"):
        from_config(config)


def test_huge_ranges_and_arrays_are_refused_at_once():
    for huge in (range(10**12), np.arange(10**6)):
        with pytest.raises(ValueError, match=r"grid\.seeds: got 100001 values, accepts a tuple of at most 100000"):
            from_config(changed(grid__seeds=huge))


def test_home_is_expanded_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded_path("workdir", "~/runs/x") == "/home/me/runs/x"
    assert expanded_path("workdir", "runs/~x") == "runs/~x"
    for given, says in (("", "empty"), ("  ", "empty"), ("a\0b", "accepts a path"), ("~nobody_here/x", "no such user")):
        with pytest.raises(ValueError, match=f"workdir: .*{says}"):
            expanded_path("workdir", given)
