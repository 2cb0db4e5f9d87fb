"""Commands as a user types them: a mistake is one line and exit status 2; results do not depend on how they are requested."""

import os
import re
import signal
import subprocess
import time

import compiled
import pandas as pd
import pytest
from PIL import Image
from shell import QUICKSTART, ROOT, command, refused, run, run_anew, start

import smallbatch_jax as sbj
from smallbatch_jax.runner import signals
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results
from smallbatch_jax.study.figures import COST_FIGURES as COST_STEMS

pytestmark = pytest.mark.usefixtures("optimized")

SMALL = (QUICKSTART, "--config.epochs=1", "--config.grid.batch_sizes=(512,)", "--config.grid.base_lrs=(0.001,8.0)")


def sweep(workdir, *arguments):
    """Trains a tiny program of the reduced AlexNet on digits."""
    return run("sweep.py", *SMALL, f"--workdir={workdir}", *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep") / "w"
    return workdir, sweep(workdir)


@pytest.mark.parametrize("script", ["sweep.py", "train.py", "figures.py", "launch.py"])
def test_help_says_how_and_exits_0_within_two_seconds(script):
    before = os.times()
    done = run_anew(script, "--help")
    assert done.returncode == 0
    assert f"python experiments/{script}" in done.stdout
    assert "--workdir" in done.stdout
    after = os.times()  # CPU seconds of ended children, which other processes do not lengthen
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


@pytest.mark.long
def test_a_sweep_trains_draws_and_prints_its_table(trained):
    workdir, done = trained
    assert done.returncode == 0, done.stderr
    assert re.search(r"^512 +\d+\.\d\d % ", done.stdout, re.M)
    assert "Converging:" in done.stdout
    assert "2/2 runs done (1 diverged)" in done.stderr
    drawn = {path.name for path in (workdir / "figures").iterdir()}
    stems = ("accuracy_vs_batch_size", "accuracy_vs_base_lr", "heat_map", "convergence", *COST_STEMS)
    assert drawn == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    frame = results.load(workdir)
    assert frame.groupby("base_lr").status.unique().map(list).to_dict() == {0.001: ["finished"], 8.0: ["diverged"]}


@pytest.mark.slow
def test_a_search_ends_with_a_recommendation(tmp_path):
    options = ("--config.epochs=2", "--config.grid.batch_sizes=(128,)", "--config.dataset.validation_fraction=0.2")
    done = run("search.py", QUICKSTART, f"--workdir={tmp_path / 'w'}", *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Best at m = 128, η̃ = 2\^-\d+: validation accuracy \d+\.\d %", done.stdout, re.M)
    frame = results.load(tmp_path / "w")
    assert frame.groupby(["base_lr", "seed"]).size().sum() <= (2 + 2) * 2
    assert set(frame.status) <= {"finished", "stopped", "diverged"}


@pytest.mark.slow
@pytest.mark.long
def test_a_finished_sweep_is_redrawn_and_not_trained_again(trained):
    workdir, first = trained
    stored = {p: p.read_bytes() for p in (workdir / "results").iterdir()}
    (workdir / "figures/heat_map.png").unlink()
    again = sweep(workdir)
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert (workdir / "figures/heat_map.png").exists()
    assert stored == {p: p.read_bytes() for p in (workdir / "results").iterdir()}


@pytest.mark.slow
@pytest.mark.long
def test_train_py_equals_the_same_run_of_the_sweep_bit_for_bit(trained, tmp_path):
    one = ("--config.epochs=1", "--config.batch_size=512", "--config.base_lr=0.001", "--config.data_devices=1")
    assert run("train.py", QUICKSTART, f"--workdir={tmp_path / 'one'}", *one).returncode == 0
    frame = results.load(trained[0])
    of_sweep = frame[(frame.batch_size == 512) & (frame.base_lr == 0.001)].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_sweep, results.load(tmp_path / "one"), check_exact=True)


@pytest.mark.long
def test_sweep_from_python_equals_the_command_line_bit_for_bit(trained):
    frame = sbj.sweep(
        "alexnet", "digits", (512,), (0.001, 8.0), epochs=1, weight_decay=5e-4, name="quickstart", progress=NoProgress()
    )
    pd.testing.assert_frame_equal(frame, results.load(trained[0]), check_exact=True)


@pytest.mark.slow
@pytest.mark.long
def test_figures_go_where_they_are_asked_to(trained, tmp_path):
    done = run("figures.py", f"--workdir={trained[0]}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:-2] == trained[1].stdout.splitlines()[:-2]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (trained[0] / "figures").iterdir()}


@pytest.mark.parametrize("signum", [signal.SIGUSR1, *(pytest.param(s, marks=pytest.mark.slow) for s in signals.handled())])
@pytest.mark.long
def test_a_signal_saves_and_says_that_the_same_command_goes_on(tmp_path, signum):
    results_file = tmp_path / "w/results/m00512_b00512.csv"
    long = ("--config.epochs=500", "--config.grid.base_lrs=(0.00001,)")
    with start("sweep.py", *SMALL, *long, f"--workdir={tmp_path / 'w'}", environment=compiled.ENVIRONMENT) as process:
        while not (results_file.exists() and results_file.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert errors.splitlines()[-1].endswith("the same command resumes")
    assert list((tmp_path / "w/checkpoints/m00512_b00512").iterdir())


def test_a_command_whose_output_is_closed_ends_as_ever():
    line, options = command("claims.py", "--workdir=notebooks/results/digits/fig18")
    done = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *line], **options, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    line, options = command("plan.py", QUICKSTART, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(line, **options) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


MISTAKES = [
    (["--config.grid.batch_size=(2,)"], "Did you mean: config.grid.batch_sizes ?"),
    (["--config.grid.batch_sizes=(0,2)"], "grid.batch_sizes: got 0"),
    (["--config.grid.batch_sizes=(2,5000)"], "grid.batch_sizes (batch_size for one run): 5000 is larger than"),
    (["--config.grid.batch_sizes=()"], "grid.batch_sizes: got ()"),
    (["--config.grid.batch_sizes=(2,"], "grid.batch_sizes: got '(2,'"),
    (["--config.grid.base_lrs=(0.5,0.5)"], "grid.base_lrs: 0.5 appears twice"),
    (["--config.grid.base_lrs=(1e999,)"], "grid.base_lrs: got inf"),
    (["--config.grid.base_lrs=(2^-7,2**-7,2^0)"], "0.0078125 appears twice in (0.0078125, 0.0078125, 1)"),
    (["--config.grid.base_lrs=(0.5,12^^2)"], "grid.base_lrs: got '(0.5,12^^2)'"),
    (["--flagfile=/nowhere"], "Unable to open flagfile"),
    (["--config.grid.bn_batch_sizes=(6,)"], "grid.bn_batch_sizes: 6 does not divide batch size 8"),
    (["--config.model.name=resnet9000"], "model.name: unknown model 'resnet9000'"),
    (["--config.epochs=many"], "epochs: got 'many'"),
    (["--config.dataset.name=folder"], "dataset.data_dir: got None"),
    (["--config.dataset.name=folder", "--config.dataset.data_dir=/nowhere"], "dataset.data_dir: cannot list '/nowhere'"),
    (["--no_such_flag"], "no_such_flag"),
    (["stray"], "'stray': unknown argument"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_one_line_exit_status_2_and_nothing_written(tmp_path, arguments, says):
    refused(run("sweep.py", QUICKSTART, f"--workdir={tmp_path / 'w'}", *arguments), says)
    assert not (tmp_path / "w").exists()


WHAT_TO_DO = [
    ("sweep.py", [QUICKSTART], "--workdir: not given"),
    ("sweep.py", ["--workdir=w"], "--config: not given"),
    ("sweep.py", [QUICKSTART, "--workdir", "--config.epochs=2"], "--workdir: has no value, the next argument is"),
    ("sweep.py", ["--workdir=w", "--config.epochs=2"], "--config: not given, but --config.epochs is"),
    ("claims.py", ["--workdir=~nobody_here/w"], "--workdir: got '~nobody_here/w', there is no such user"),
    ("figures.py", ["--workdir=w", "--out="], "--out: empty"),
    ("sweep.py", ["--config=configs/none.py", "--workdir=w"], "--config=configs/none.py"),
    ("sweep.py", ["--config=README.md", "--workdir=w"], "--config=README.md"),
    ("sweep.py", [QUICKSTART, "--workdir=configs"], "but no experiment; give a new or empty folder"),
    ("sweep.py", [QUICKSTART, "--workdir=README.md"], "--workdir: README.md is a file"),
    ("train.py", [QUICKSTART, "--workdir=w"], "batch_size: not given"),
    ("train.py", [QUICKSTART, "--workdir=w", "--config.batch_size=8", "--config.base_lr=nan"], "base_lr: got nan"),
    ("figures.py", ["--workdir=configs"], "--workdir: configs is not a workdir"),
    ("launch.py", [QUICKSTART, "--workdir=w", "--config.search.seconds=9"], "search: quickstart is a search"),
    ("search.py", [QUICKSTART, "--workdir=w", "--config.search.budget=0"], "search.budget: got 0"),
    ("plan.py", [QUICKSTART, "--batch_sizes=8"], "--batch_sizes: belongs to --target"),
    ("plan.py", [QUICKSTART, "--target=h100", "--elsewhere=x"], "--elsewhere: the time on another device is planned without"),
    ("benchmark.py", [QUICKSTART, "--batch_sizes=100000"], "100000 is larger than the training set of 1437 examples"),
    ("plan.py", [QUICKSTART, "--probe_seconds=nan"], "--probe_seconds: got nan, accepts a number from 0 to 1e+06"),
    ("plan.py", [QUICKSTART, "--probe_seconds=x"], "--probe_seconds: got 'x', accepts a number from 0 to 1e+06"),
]


@pytest.mark.parametrize(("script", "arguments", "says"), WHAT_TO_DO)
def test_a_mistake_in_what_to_do_is_one_line_and_exit_status_2(script, arguments, says):
    refused(run(script, *arguments), says)
    assert not (ROOT / "w").exists()


@pytest.mark.parametrize(
    "body", ["def get_config(:", "x = 1", "raise RuntimeError('a\\nb')", "def get_config(): return 3", "exit(0)"]
)
def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path, body):
    (tmp_path / "config.py").write_text(body)
    refused(run("sweep.py", f"--config={tmp_path / 'config.py'}", "--workdir=w"), "config.py: ")


@pytest.mark.long
def test_a_workdir_of_another_experiment_is_refused_with_the_fields_that_differ(trained):
    refused(sweep(trained[0], "--config.weight_decay=0.1"), "weight_decay is 0.0005 there and 0.1 here")


@pytest.fixture
def pictures(tmp_path):
    """Returns the arguments of a small sweep on a folder of two classes."""
    data = tmp_path / "data"
    for split, count in (("train", 12), ("test", 4)):
        for kind, shade in (("dark", 40), ("light", 200)):
            (data / split / kind).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (shade, shade + i, shade)).save(data / split / kind / f"{i}.png")
    folder = ("--config.dataset.name=folder", f"--config.dataset.data_dir={data}")
    grid = ("--config.epochs=1", "--config.grid.batch_sizes=(8,)", "--config.grid.base_lrs=(0.001,)")
    return QUICKSTART, *folder, *grid, f"--workdir={tmp_path / 'w'}"


@pytest.mark.slow
def test_a_folder_of_images_is_trained(pictures, tmp_path):
    done = run("sweep.py", *pictures)
    assert done.returncode == 0, done.stderr
    assert results.load(tmp_path / "w").step.item() == 3


def test_a_broken_image_is_named_before_anything_is_written(pictures, tmp_path):
    (tmp_path / "data/train/dark/3.png").write_text("this is no image")
    refused(run("sweep.py", *pictures), "dark/3.png")
    assert not (tmp_path / "w").exists()
