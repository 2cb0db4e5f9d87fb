"""A grid's stored results depend neither on what ran beside a run nor on how often the work was killed and resumed."""

import dataclasses
import io
import json
import os
import resource
import signal
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from flax import linen as nn
from forks import Fork

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.models.layers import Dense
from smallbatch_jax.models.norm import BatchNorm
from smallbatch_jax.program import devices
from smallbatch_jax.runner import compiler, scheduler
from smallbatch_jax.runner.grid import Interrupted, require_trainable, train_grid
from smallbatch_jax.runner.progress import NoProgress, PlainProgress
from smallbatch_jax.runner.signals import Stop
from smallbatch_jax.store import results
from smallbatch_jax.store.files import WriteError

pytestmark = pytest.mark.usefixtures("optimized")


def train(workdir, model=tiny.TinyModel, data=None, **fields):
    """Trains a tiny grid into a workdir and returns its rows."""
    make = (lambda b: model(b)) if model is tiny.TinyModel else (lambda b: model())
    train_grid(tiny.grid(**fields), workdir, data or tiny.dataset(), NoProgress(), make)
    return results.load(workdir)


def test_a_compilation_that_takes_long_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "SLOW_SECONDS", 0)
    log = io.StringIO()
    make = lambda b: tiny.PlainModel()  # noqa: E731
    train_grid(tiny.grid(base_lrs=(2**-9,)), tmp_path / "w", tiny.dataset(), PlainProgress(log), make)
    assert "compiling m = 4 takes more than 0 s\n" in log.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the rows of fourteen runs of two seeds, trained in six lanes, which are refilled."""
    return train(tmp_path_factory.mktemp("undisturbed") / "w", **GRID)


GRID = {"base_lrs": (2**-12, 2**-9, 2**-7, 2**-5, 2**-3, 2.0, 1e30), "seeds": (0, 1), "lanes": 6}


def test_every_run_of_the_grid_has_one_row_per_epoch(undisturbed):
    epochs = undisturbed.groupby(["base_lr", "seed"])["epoch"].apply(list)
    assert len(epochs) == 14
    finished = undisturbed[undisturbed.status == "finished"].groupby(["base_lr", "seed"])["epoch"].apply(list)
    assert len(finished) >= 8
    assert all(found == [1, 2, 3] for found in finished)


def test_rows_carry_the_steps_of_constant_work(undisturbed):
    """Epoch e of 50 examples with m = 4 ends after floor(12.5 e + 1/2) updates."""
    steps = undisturbed[undisturbed.status == "finished"].groupby("epoch")["step"].unique()
    assert [list(s) for s in steps] == [[13], [25], [38]]


@pytest.mark.parametrize("base_lr", [2**-9, 2**-3])
def test_a_run_of_a_sweep_equals_the_same_run_trained_alone_bit_for_bit(undisturbed, tmp_path, base_lr):
    alone = train(tmp_path / "w", base_lrs=(base_lr,), seeds=(1,))
    of_sweep = undisturbed[(undisturbed.base_lr == base_lr) & (undisturbed.seed == 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_sweep, alone, check_exact=True)


def test_lane_count_and_segment_length_change_no_bit(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    other = train(tmp_path / "w", **{**GRID, "lanes": 2, "segment_seconds": 1e-9})
    pd.testing.assert_frame_equal(undisturbed, other, check_exact=True)


def test_a_diverged_run_ends_with_one_row_without_accuracies(tmp_path):
    frame = train(tmp_path / "w", tiny.PlainModel, base_lrs=(2**-7, 1e30))
    lost = frame[frame.status == "diverged"]
    assert len(lost) == 1
    row = lost.iloc[0]
    assert (row.epoch, row.base_lr) == (1, 1e30)
    assert row.step in (1, 2)
    assert np.isnan(row.train_accuracy)
    assert np.isnan(row.test_accuracy)
    assert not np.isfinite(row.train_loss)
    assert list(frame[frame.base_lr == 2**-7].status) == ["finished"] * 3


def test_a_test_loss_that_is_not_finite_is_a_divergence_too(tmp_path):
    """Test images far outside the training range overflow although every training loss is finite."""
    data = tiny.dataset()
    test = np.full(data.test_images.shape, 3e38, np.float32)
    data = type(data)(data.train_images.astype(np.float32) / 99, data.train_labels, test, data.test_labels, 3)
    frame = train(tmp_path / "w", tiny.PlainModel, data, base_lrs=(2**-7,))
    assert list(frame.epoch) == [1]
    assert list(frame.status) == ["diverged"]
    assert frame.step[0] == 13
    assert np.isfinite(frame.train_loss[0])
    assert frame[["train_accuracy", "test_accuracy"]].isna().all(axis=None)


class Overflowing(nn.Module):
    """A model whose activations are so large that their variance overflows, which normalises them to 0."""

    @nn.compact
    def __call__(self, images, train=False):
        x = BatchNorm(None, 0.99)(1e30 * Dense(8)(images.reshape(images.shape[0], -1)), train)
        return Dense(3)(nn.relu(x))


def test_an_overflow_in_batch_norms_statistics_is_a_divergence_too(tmp_path):
    frame = train(tmp_path / "w", Overflowing, base_lrs=(2**-9,))
    assert list(frame.epoch) == [1]
    assert list(frame.status) == ["diverged"]
    assert np.isfinite(frame.train_loss[0])


def test_the_slot_of_a_diverged_run_is_given_to_the_next_within_a_segment(tmp_path, monkeypatch):
    sent = []
    run = scheduler.LaneProgram.run
    monkeypatch.setattr(scheduler.LaneProgram, "run", lambda self, *a: sent.append(a[2].steps.copy()) or run(self, *a))
    frame = train(tmp_path / "w", tiny.PlainModel, base_lrs=(1e30, 2e30, 3e30, 4e30), lanes=2)
    assert (frame.status == "diverged").all()
    # Two runs in segment 1; no results yet in segment 2; the other two in 3, known to have diverged by the end of 4.
    assert [list(s > 0) for s in sent] == [[True, True]] * 4
    assert len(frame) == 4


def test_a_grid_may_grow_and_keeps_its_old_rows(tmp_path):
    before = train(tmp_path / "w", base_lrs=(2**-9,))
    lines = (tmp_path / "w/results/m00004_b00004.csv").read_text()
    after = train(tmp_path / "w", base_lrs=(2**-9, 2**-7), batch_sizes=(4, 8))
    assert (tmp_path / "w/results/m00004_b00004.csv").read_text().startswith(lines)
    kept = after[(after.base_lr == 2**-9) & (after.batch_size == 4)].reset_index(drop=True)
    pd.testing.assert_frame_equal(before, kept, check_exact=True)
    assert len(after) == 12


def test_a_workdir_of_another_experiment_is_refused_with_the_fields_that_differ(tmp_path):
    before = train(tmp_path / "w", base_lrs=(2**-9,))
    with pytest.raises(InputError, match=r"epochs is 3 there and 4 here; weight_decay is 0\.001 there and 0\.0 here"):
        train(tmp_path / "w", base_lrs=(2**-9,), epochs=4, weight_decay=0.0)
    with pytest.raises(InputError, match="grid lacks 1 run"):
        train(tmp_path / "w", base_lrs=(2**-7,))
    pd.testing.assert_frame_equal(results.load(tmp_path / "w"), before, check_exact=True)


def test_a_batch_larger_than_the_training_set_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"grid.batch_sizes.*: 51 is larger than the training set of 50"):
        train(tmp_path / "w", batch_sizes=(4, 51))
    assert not (tmp_path / "w").exists()


def test_bn_batch_sizes_are_runs_of_their_own(tmp_path):
    frame = train(tmp_path / "w", base_lrs=(2**-7,), batch_sizes=(4, 8), bn_batch_sizes=(4, 8))
    pairs = frame[["batch_size", "bn_batch_size"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [[4, 4], [8, 4], [8, 8]]
    last = frame[frame.epoch == 3].set_index(["batch_size", "bn_batch_size"]).train_loss
    assert last.nunique() == 3
    whole = train(tmp_path / "whole", base_lrs=(2**-7,))
    assert last[4, 4] == whole.train_loss.iloc[-1]


def test_provenance_says_with_what_the_results_were_made(tmp_path):
    train(tmp_path / "w", base_lrs=(2**-9,))
    start, finish = (json.loads(line) for line in (tmp_path / "w/provenance.jsonl").read_text().splitlines())
    assert start["event"] == "start"
    assert {"jax", "jaxlib", "flax", "optax", "python"} <= set(start["versions"])
    assert start["device"]["count"] == 2
    assert start["precision"] == "float32"
    assert finish["event"] == "finish"
    assert start["time"] <= finish["time"]
    timings = results.load_timings(tmp_path / "w")
    assert {"compile", "segment"} <= set(timings.phase)
    assert timings[timings.phase == "segment"].images.sum() == 38 * 4
    assert (timings.peak_bytes > 0).equals(timings.phase == "compile")


@pytest.mark.parametrize(
    ("arrive", "noted"),
    [((signal.SIGTERM, signal.SIGUSR1), signal.SIGTERM), ((signal.SIGUSR1, signal.SIGINT, signal.SIGHUP), signal.SIGINT)],
)
def test_a_warning_signal_does_not_replace_the_one_that_ends_the_process(arrive, noted):
    stop = Stop()
    for signum in arrive:
        stop.note(signum)
    assert stop.signum == noted


@pytest.mark.parametrize(
    ("segments", "signum"),
    [(2, signal.SIGINT), (7, signal.SIGUSR1), pytest.param(3, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_stopped_grid_goes_on_from_its_checkpoint_bit_for_bit(undisturbed, tmp_path, monkeypatch, segments, signum):
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    fields = {**GRID, "segment_seconds": 1e-9}
    with pytest.raises(Interrupted) as caught:
        train_grid(
            tiny.grid(**fields), tmp_path / "w", tiny.dataset(), tiny.StopAfter(segments, signum), lambda b: tiny.TinyModel(b)
        )
    assert caught.value.signum == signum
    assert len(results.load(tmp_path / "w")) < len(undisturbed)
    assert list((tmp_path / "w/checkpoints/m00004_b00004").iterdir())
    restored = []
    restore = scheduler.Checkpoints.restore
    monkeypatch.setattr(scheduler.Checkpoints, "restore", lambda *a: restored.append(restore(*a)) or restored[-1])
    again = train(tmp_path / "w", **{**fields, "lanes": 4})  # on another number of lanes, too
    assert restored[0][0].train.step.max() > 0
    pd.testing.assert_frame_equal(undisturbed, again, check_exact=True)
    assert not (tmp_path / "w/checkpoints/m00004_b00004").exists()


def test_rows_lost_behind_a_checkpoint_are_trained_again(undisturbed, tmp_path, monkeypatch):
    """A workdir that was copied while it was written may have a checkpoint newer than its rows."""
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
    fields = {**GRID, "segment_seconds": 1e-9}
    with pytest.raises(Interrupted):
        train_grid(
            tiny.grid(**fields), tmp_path / "w", tiny.dataset(), tiny.StopAfter(22, signal.SIGTERM), lambda b: tiny.TinyModel(b)
        )
    file = tmp_path / "w/results/m00004_b00004.csv"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) > 6
    file.write_text("".join(lines[:-5]))
    pd.testing.assert_frame_equal(undisturbed, train(tmp_path / "w", **fields), check_exact=True)


@pytest.mark.parametrize("size", [1500, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 2500))])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(undisturbed, tmp_path, monkeypatch, size):
    """With files limited to `size` bytes, the experiment, the rows or a checkpoint does not fit."""
    monkeypatch.setattr(scheduler, "CHECKPOINT_SHARE", 1e9)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(WriteError, match=r"cannot be written: File too large; the same command resumes") as error:
            train(tmp_path / "w", **GRID, checkpoint_seconds=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert len(str(error.value).splitlines()) == 1
    pd.testing.assert_frame_equal(undisturbed, train(tmp_path / "w", **GRID), check_exact=True)
    assert not list((tmp_path / "w").rglob("*tmp*"))


KILLED = textwrap.dedent("""
    import sys
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    import tiny
    from smallbatch_jax.runner import compiler, scheduler
    from smallbatch_jax.runner.grid import train_grid
    from smallbatch_jax.runner.progress import NoProgress, PlainProgress
    scheduler.Pace.FIRST_IMAGES = 8
    fields = dict(base_lrs={base_lrs!r}, seeds=(0, 1), lanes=6, segment_seconds=1e-9, checkpoint_seconds=0.0)
    scheduler.CHECKPOINT_SHARE = 1e9
    train_grid(tiny.grid(**fields), {workdir!r}, tiny.dataset(), NoProgress(), lambda b: tiny.TinyModel(b))
""")


@pytest.mark.long
def test_a_grid_killed_again_and_again_ends_bit_for_bit_as_one_never_killed(undisturbed, tmp_path):
    workdir = tmp_path / "w"
    code = KILLED.format(tests=str(Path(__file__).parents[1]), workdir=str(workdir), base_lrs=GRID["base_lrs"])
    code = code.replace(repr(str(workdir)), f"__import__('pathlib').Path({str(workdir)!r})")
    file, kills = workdir / "results/m00004_b00004.csv", 0
    for target in (1, 6):  # kill it as soon as it has added some rows
        before = _lines(file)
        with Fork(["-c", code], os.environ) as process:
            while process.poll() is None and _lines(file) < before + target:
                time.sleep(0.002)
            kills += process.poll() is None
    assert kills == 2
    with open(file, "a") as torn:
        torn.write("4,4,0.0078125,0,")  # as a kill during a write leaves it
    with Fork(["-c", code], os.environ) as process:
        assert process.wait() == 0
    pd.testing.assert_frame_equal(undisturbed, results.load(workdir), check_exact=True)
    assert _lines(file) == len(undisturbed) + 1  # nothing was written twice


def _lines(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_second_process_on_the_same_workdir_is_refused(tmp_path):
    class Intruder(NoProgress):
        def show(self, status, doing):
            with pytest.raises(InputError, match="belongs to process"):
                train(tmp_path / "w", base_lrs=(2**-9,))
            self.tried = True

    intruder = Intruder()
    train_grid(tiny.grid(base_lrs=(2**-9,)), tmp_path / "w", tiny.dataset(), intruder, lambda b: tiny.TinyModel(b))
    assert intruder.tried


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("", "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"),
        ("--xla_dump_to=/x", "--xla_dump_to=/x --xla_backend_extra_options=xla_cpu_disable_loop_unrolling"),
        ("--xla_backend_extra_options=xla_cpu_x", "--xla_backend_extra_options=xla_cpu_x"),
    ],
)
def test_loops_are_not_unrolled_unless_the_user_chose(monkeypatch, given, then):
    """The option is added to XLA_FLAGS once, and the user's own flags are kept."""
    monkeypatch.setenv("XLA_FLAGS", given)
    devices.use_all_cores()
    devices.use_all_cores()
    assert os.environ["XLA_FLAGS"] == then


def test_the_cores_are_counted_where_a_process_has_no_affinity(monkeypatch):
    """As on macOS."""
    assert devices.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert devices.cores() == os.cpu_count()


def test_a_single_class_is_refused():
    labels = {f"{split}_labels": np.zeros_like(getattr(tiny.dataset(), f"{split}_labels")) for split in ("train", "test")}
    alike = dataclasses.replace(tiny.dataset(), num_classes=1, **labels)
    with pytest.raises(InputError, match="dataset: has a single class"):
        require_trainable(tiny.grid(), alike)
