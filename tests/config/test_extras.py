"""Tests that everything imports without the extras, and that a feature that needs one names it in one line."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import Fork
from shell import variables

import smallbatch_jax as sbj
from smallbatch_jax import data
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.config.extras import EXTRAS

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(package for packages in EXTRAS.values() for package in packages)

# Imports every module of smallbatch_jax while no package of an extra can be imported, and prints the modules that fail.
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({PACKAGES})
import smallbatch_jax
for module in pkgutil.walk_packages(smallbatch_jax.__path__, "smallbatch_jax."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(module.name, error.name)
"""


@pytest.mark.long
def test_without_the_extras_every_module_imports_but_the_one_that_only_they_use():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["smallbatch_jax.data.streaming.views cv2"]


def test_setup_cfg_has_every_extra_with_the_packages_that_are_imported():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = config["options.extras_require"]
    distributions = importlib.metadata.packages_distributions()
    for extra, packages in EXTRAS.items():
        required = re.findall(r"^[\w-]+", declared[extra], re.M)
        for package in packages:
            names = distributions.get(package, [package, f"{package}-cpu"])
            if extra.startswith("target-"):  # jax[cuda12] and jax[tpu] bring the compilers
                names = ["jax"]
            assert set(names) & set(required), f"{package} is not in the extra {extra}"


def test_constraints_pin_every_package_that_setup_cfg_names_but_pytorch():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    named = set(re.findall(r"^[\w-]+", "\n".join(declared).lower().replace("_", "-"), re.M))
    assert named - set(re.findall(r"^[\w-]+(?===)", (ROOT / "constraints.txt").read_text(), re.M)) == {"torch"}


@pytest.fixture
def without(monkeypatch):
    """Returns a function that makes the packages of an extra impossible to import, as if it were not installed."""
    return lambda extra: [monkeypatch.setitem(sys.modules, package, None) for package in EXTRAS[extra]]


def streamed_folder(root, workdir):
    data.load("folder", root, image_size=8)


def made_up_photographs(root, workdir):
    data.random("imagenet2012", image_size=8)


def sweep_with(**tracker):
    def sweep(root, workdir):
        rows, labels = np.zeros((4, 2), np.float32), np.arange(4) % 2
        sbj.sweep("alexnet", data.Dataset(rows, labels, rows, labels, 2), (2,), (0.1,), epochs=1, workdir=workdir, **tracker)

    return sweep


@pytest.mark.parametrize(
    ("extra", "use", "says"),
    [
        ("photographs", streamed_folder, "dataset.image_size: needs grain"),
        ("photographs", made_up_photographs, "dataset.name=imagenet2012: needs grain"),
        ("tensorboard", sweep_with(tensorboard=True), "tensorboard: needs tensorboardX"),
    ],
)
def test_a_feature_without_its_extra_ends_in_one_line_that_names_it(extra, use, says, without, root, tmp_path):
    without(extra)
    with pytest.raises(InputError) as error:
        use(root, tmp_path / "w")
    assert str(error.value) == f'{says}, which is not installed; run pip install -e ".[{extra}]".'
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("launch", ("--config=configs/quickstart.py",), "launch.py: needs ray"),
        ("benchmark", ("--config=configs/quickstart.py", "--peer"), "--peer: needs torch"),
        ("prepare_data", ("--dataset=cifar10",), "--dataset=cifar10: needs tensorflow"),
    ],
)
def test_a_command_without_its_extra_ends_in_one_line_and_exit_status_2(script, flags, says, tmp_path):
    begin = f"import runpy, sys; sys.modules |= dict.fromkeys({PACKAGES}); sys.path.insert(0, 'experiments');"
    begin += f"runpy.run_path('experiments/{script}.py', run_name='__main__')"
    folder = "data_dir" if script == "prepare_data" else "workdir"
    line = ["-c", begin, *flags, *([] if script == "benchmark" else [f"--{folder}={tmp_path / 'w'}"])]
    with Fork(line, variables()) as process:
        out, errors = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(rf'{re.escape(says)}, which is not installed; run pip install -e "\.\[\w+\]"\.\n', errors)
    assert not (tmp_path / "w").exists()
