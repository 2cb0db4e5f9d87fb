"""Plans of what a grid takes, compared with known values and with measured trials."""

import json
import math

import compiled
import numpy as np
import pytest
import tiny
from flax import linen as nn
from shell import QUICKSTART, refused, run

from smallbatch_jax import data
from smallbatch_jax.config import experiment
from smallbatch_jax.models import create_model
from smallbatch_jax.runner import flops, planning
from smallbatch_jax.runner.jobs import Setup

ONE_PROGRAM = ("--config.grid.batch_sizes=(64,)", "--config.grid.base_lrs=(0.001,8.0)")


@pytest.fixture(scope="module")
def probed():
    experiment = tiny.grid(base_lrs=(2**-7, 1e30), seeds=(0, 1), epochs=500)
    (trial,) = planning.measure(Setup(experiment, tiny.dataset(), lambda b: tiny.PlainModel()))
    return trial, planning.plan_program(trial, 10.0, 0.05)


def test_a_probe_sees_the_speed_and_what_diverges_at_once(probed):
    trial, found = probed
    assert trial.program.lanes == 4
    assert found.images_per_second > 0
    assert 0 < found.evaluation_seconds < 1
    assert found.compile_seconds > 0
    assert found.peak_bytes > 4 * 4 * 200  # four states of about 200 float32 at least
    assert trial.diverged() == {1e30}
    assert trial.alive.sum() == 2


def test_a_plan_counts_the_runs_that_go_on(probed):
    trial, plan = probed
    assert (len(trial.job.runs), plan.diverging, trial.job.total_steps) == (4, 2, 6250)
    assert plan.flops == 10 * 6250 * 4 * 4
    expected = 2 * 6250 * 4 / plan.images_per_second + 2 * 500 * plan.evaluation_seconds
    assert plan.seconds == pytest.approx(expected)


def test_a_trial_takes_the_steps_it_says(probed):
    """The two surviving runs take exactly the updates whose images are counted, on the stream that training would see."""
    trial, _ = probed
    before = np.asarray(trial._lanes.read().train.step)
    images, seconds = trial.train(0.02)
    after = np.asarray(trial._lanes.read().train.step)
    assert images == (after - before).sum() * 4
    assert seconds >= 0.02
    np.testing.assert_array_equal(after[trial.alive], np.array(trial._lanes.steps)[trial.alive])
    assert (after == before)[~trial.alive].all()


def test_the_rates_that_survive_keep_all_devices_at_work():
    experiment = tiny.grid(base_lrs=(2**-9, 2**-7, 1e30, 2e30), epochs=500)
    (trial,) = planning.measure(Setup(experiment, tiny.dataset(), lambda b: tiny.PlainModel()))
    trial.train(0.02)
    assert sorted(trial.program.row_of_lane(lane) for lane in np.flatnonzero(trial.alive)) == [0, 1]


def test_compiling_ahead_costs_nothing_that_training_hides(monkeypatch):
    plans = [plan(compile_seconds=c, seconds=s) for c, s in ((5, 10), (4, 1), (3, 2))]
    for slowdown, total in ((1.0, 5 + 10 + 3 + 2), (3.0, 15 + 12 + 9 + 2)):
        monkeypatch.setitem(planning.COMPILING_BESIDE, "cpu", slowdown)
        assert planning.total_seconds(plans) == pytest.approx(total)
    assert planning.total_seconds([]) == 0


def plan(**fields):
    known = {"flops": 1.0, "diverging": 1, "compile_seconds": 1.0, "images_per_second": 5.0, "evaluation_seconds": 0.1}
    known |= {"seconds": 1.0, "peak_bytes": 1}
    return planning.ProgramPlan(**{**known, **fields})


def test_another_device_is_read_off_its_stored_rates():
    stored = [{"batch_size": 4, "images_per_second": 100.0}, {"batch_size": 16, "images_per_second": 400.0}]
    assert planning.elsewhere(8, 3, 1000, stored) == pytest.approx(3 * 1000 / 200)  # halfway between on log axes
    assert planning.elsewhere(64, 3, 1000, stored) == pytest.approx(3 * 1000 / 400)
    assert math.isnan(planning.elsewhere(8, 3, 1000, []))


@pytest.mark.parametrize(("devices", "each"), [(1, 26), (8, 4), (13, 2), (64, 1)])
def test_several_devices_elsewhere_share_out_the_runs(devices, each):
    stored = [{"batch_size": 4, "images_per_second": 100.0}]
    assert planning.elsewhere(4, 26, 1000, stored, devices) == pytest.approx(each * 1000 / 100)


class OneProduct(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(10, use_bias=False)(images.reshape(images.shape[0], -1))


def test_flops_are_those_of_the_model_as_written():
    """A product of 400 inputs and 10 outputs, forward and for the kernel's gradient, takes 2·2·4000 and little else."""
    assert flops.flops_per_image(OneProduct(), (20, 20, 1)) == pytest.approx(16_000, rel=0.05)
    # ResNet-8 on 32×32×3: 12.2 M multiplications forward (padding left out: 11.7 M), thrice that in a step, and BN.
    assert flops.flops_per_image(create_model("resnet8", 10), (32, 32, 3)) == pytest.approx(6 * 11.7e6, rel=0.05)


def test_the_matrix_rate_is_that_of_numpy_within_reason():
    rate = flops.matrix_rate(256, 4)
    assert 1e9 < rate < 1e15


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_random_images_have_the_shapes_of_the_dataset(name):
    drawn = data.random(name)
    assert len(drawn.train_labels) == data.num_train_examples(experiment.Dataset(name))
    assert drawn.train_labels.max() == drawn.num_classes - 1
    if name == "digits":
        real = data.load(name)
        for field in ("train_images", "train_labels", "test_images", "test_labels"):
            ours, theirs = getattr(drawn, field), getattr(real, field)
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.long
def test_plan_prints_what_each_program_costs_and_the_sum(tmp_path):
    stored = {
        "device": "1 x H100",
        "results": [{"model": "alexnet", "norm": "none", "batch_size": 64, "images_per_second": 1e6}],
    }
    (tmp_path / "h100.json").write_text("some text\n" + json.dumps(stored) + "\n")
    flags = ("--probe_seconds=0.1", f"--elsewhere={tmp_path}/h100.json")
    done = run("plan.py", QUICKSTART, *ONE_PROGRAM, *flags, environment=compiled.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    row, total = done.stdout.strip().split("\n")[-2:]
    assert row.split()[:4] == ["64", "64", "2", "1"]  # m, BN batch, lanes, diverging
    assert "MiB" in row
    assert total.startswith("1 compilation")
    assert "on 1 x H100 0 s" in total


def test_plan_lists_what_fig_12_costs_on_one_device_and_on_eight_from_stored_rates(tmp_path):
    """At m = 2, 26 of the 286 runs take 90 epochs of 1,281,167 images at 1,000 images/s; the busiest of 8 devices has 4."""
    sizes = [2**k for k in range(1, 12)]
    rows = [{"model": "resnet50", "norm": "batch", "batch_size": m, "images_per_second": 500.0 * m} for m in sizes]
    (tmp_path / "h100.json").write_text(json.dumps({"device": "1 x H100", "results": rows}))
    given = ("--probe_seconds=0", f"--elsewhere={tmp_path}/h100.json", "--elsewhere_devices=1,8")
    done = run("plan.py", "--config=configs/fig12_resnet50.py", *given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().split("\n")
    assert lines[1].split()[-4:] == ["there", "there", "x", "8"]
    assert lines[2].endswith("    832 h 45 min    128 h 07 min")  # 26 and 4 times 90 * 1,281,167 / 1,000 seconds
    assert lines[-1].startswith("on 1 x H100")
    assert "(8 of them)" in lines[-1]


@pytest.mark.parametrize("row", [{}, {"batch_size": "a", "images_per_second": 1}, {"batch_size": 2, "images_per_second": 0}])
def test_rates_that_are_none_are_refused(tmp_path, row):
    stored = {"device": "x", "results": [{"model": "alexnet", "norm": "none"} | row]}
    (tmp_path / "x.json").write_text(json.dumps(stored))
    refused(
        run("plan.py", QUICKSTART, "--probe_seconds=0", f"--elsewhere={tmp_path}/x.json"), "is not what benchmark.py --json"
    )


def test_a_mistaken_number_of_devices_is_refused(tmp_path):
    done = run("plan.py", QUICKSTART, "--probe_seconds=0", "--elsewhere_devices=1,x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_plan_without_the_data_lists_and_says_how_to_measure(tmp_path):
    done = run("plan.py", "--config=configs/fig08_resnet32.py", f"--config.dataset.data_dir={tmp_path}")
    assert done.returncode == 0
    assert "143 runs" in done.stdout
    assert "--random_images" in done.stdout.strip().split("\n")[-1]


def test_plan_refuses_a_file_that_holds_no_probe(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    done = run("plan.py", QUICKSTART, f"--elsewhere={tmp_path}/bad.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bad.json" in done.stderr


@pytest.mark.slow
def test_benchmark_prints_a_row_and_the_json_that_plan_reads():
    flags = ("--batch_sizes=64", "--seconds=0.05", "--repeats=2", "--json", "--config.grid.base_lrs=(0.1,0.2)")
    done = run("benchmark.py", QUICKSTART, *flags)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.strip().split("\n")[-1])
    (result,) = printed["results"]
    assert (result["model"], result["batch_size"], result["lanes"]) == ("alexnet", 64, 2)
    assert result["images_per_second"] > 0
    assert result["seconds_to_compile"] > 0
    assert result["peak_bytes"] > 0
    assert len(result["rates"]["ours"]) == 2


def test_benchmark_compares_no_other_optimizer_with_the_peers():
    done = run("benchmark.py", QUICKSTART, "--peer", "--config.optimizer.name=adam")
    refused(done, "--peer: its step is SGD without momentum, the config's optimizer is adam.")


@pytest.mark.parametrize("sizes", ["0", "4,4", "x", "2,-1", "1.5"])
def test_benchmark_refuses_batch_sizes_that_are_none(sizes):
    done = run("benchmark.py", QUICKSTART, f"--batch_sizes={sizes}")
    assert done.returncode == 2
    assert done.stderr.startswith("--batch_sizes: ")
    assert done.stderr.count("\n") == 1
