"""Tests that the commands answer any invalid config file or flag with one line that names what is wrong."""

import random

import pytest
from asked import FIELDS
from shell import QUICKSTART, run

ODD_TEXTS = [
    "nan",
    "-1",
    "1e999",
    "",
    "a\nb",
    "\u2028",
    "\x1b[31m",
    "\udcff",
    "None",
    "9" * 4000,
    "(0,)",
    "(1,1)",
    "((((",
    "{}",
    "0.5",
]
ACCEPTED = "but no experiment"  # an accepted config is then refused for its workdir, which holds something else


def odd_overrides():
    """Yields an override with an odd value for each field, always the same, and the strings of which its error has one."""
    rng = random.Random(0)
    for path in FIELDS:
        name = ".".join(path)
        yield f"--config.{name}={rng.choice(ODD_TEXTS)}", (f"{name}: ", f"--config.{name}=", ACCEPTED)


OVERRIDES = [
    ("plan.py", ["--config.grid.seeds=(1e400,)"], "grid.seeds: got inf"),
    ("plan.py", ["--config.grid.base_lrs=(0.1,nan)"], "grid.base_lrs: got nan"),
    ("plan.py", ["--config.x\u2028\udcff=3"], "Unknown command line flag 'config.x \\udcff'"),
    ("train.py", ["--config.batch_size=4611686018427387904"], "batch_size: got 4611686018427387904"),
    ("train.py", ["--config.batch_size=8", "--config.base_lr=1e-50"], "base_lr: got 1e-50"),
    ("train.py", ["--config.batch_size=8", "--config.base_lr=0.5"], ACCEPTED),
    ("sweep.py", ["--config.name=été 🚀"], ACCEPTED),
    ("sweep.py", ["--config.name=../a"], "name: got '../a'"),
]
CONFIG_FILE = """
import numpy
from ml_collections import ConfigDict, config_dict
from smallbatch_jax.config.experiment import default_config

class Odd:
    epochs = 3

    def __init__(self, shown=None):
        self.shown = shown

    def __repr__(self):
        return self.shown.strip()

def get_config():
    config = default_config()
    config.unlock()
    """
BODIES = [
    ("return ConfigDict({'épochs': 3})", "épochs: unknown field; did you mean 'epochs'?"),
    (r"return ConfigDict({'a\n\x1b\ud800': 1})", r"'a\n\x1b\ud800': unknown field"),
    ("return ConfigDict({3: 1})", "3: unknown field"),
    (r"return ConfigDict({'name': '\ud800'})", r"name: got '\ud800'"),
    ("return ConfigDict({'model': object()})", "model: got <object object at"),
    (r"return ConfigDict({'epochs': Odd('a\n\u2028b\x1b')})", r"epochs: got a b\x1b, accepts"),
    ("return ConfigDict({'epochs': Odd()})", "epochs: got a value of type Odd"),
    ("return ConfigDict({'grid': {'seeds': numpy.zeros(3)}})", "grid.seeds: got 0.0, accepts an integer"),
    ("return ConfigDict({'grid': {'base_lr_by_batch_size': {2: 0.1, 8: 0.1, 32: 0.1}}})", ACCEPTED),
    ("return ConfigDict({'epochs': 3})", ACCEPTED),
    ("for _ in range(90): config = {'model': config}\n    return ConfigDict(config)", "model.model: unknown field"),
    ("config.model.me = config; return config", "model.me: unknown field"),
    ("return ConfigDict({'epochs': config_dict.placeholder(int, required=True)})", "RequiredValueError"),
    ("return {'epochs': -3}", "epochs: got -3"),
    ("config.epochs = 'three'; return config", "epochs: got 'three', accepts an integer"),
    ("pass", "get_config() returned None"),
    ("return Odd('')", "--config="),
]


@pytest.mark.long
def test_the_commands_refuse_in_one_line_whatever_is_asked_of_them(tmp_path):
    """Commands exit with status 2, an empty stdout and no workdir; an accepted config shows as an error about the workdir."""
    foreign, missing = tmp_path / "foreign", tmp_path / "missing"
    foreign.mkdir()
    (foreign / "file").touch()
    asked = [(script, [QUICKSTART, *options], (says,)) for script, options, says in OVERRIDES]
    asked += [("sweep.py", [QUICKSTART, option], says) for option, says in odd_overrides()]
    for index, (body, says) in enumerate(BODIES):
        file = tmp_path / f"config{index}.py"
        file.write_text(CONFIG_FILE + body)
        asked.append(("sweep.py", [f"--config={file}"], (says,)))

    for script, options, says in asked:
        workdir = [] if script == "plan.py" else [f"--workdir={foreign if ACCEPTED in says else missing}"]
        done = run(script, *options, *workdir)
        line = done.stderr
        assert (done.returncode, done.stdout, line.count("\n")) == (2, "", 1), (options, line)
        assert any(said in line for said in says), (options, line)
        assert "Traceback" not in line
        assert len(line) < 1100
    assert not missing.exists()
    assert [path.name for path in foreign.iterdir()] == ["file"]
