"""Tests that TensorBoard's own reader shows each stored row once, however the process ended."""

import gc
import math
import resource
import shutil
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tiny
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tracked import assert_all_shown, expected, points, row, runs_shown, show, train

import smallbatch_jax as sbj
from smallbatch_jax.cluster import launcher, worker
from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.program import processes
from smallbatch_jax.runner import scheduler
from smallbatch_jax.runner.grid import Interrupted
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.runner.signals import Stop
from smallbatch_jax.store import results
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.tracking.trackers import TRACKERS, Trackers, hparams, name_of

NAN = float("nan")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Returns the workdir and rows of a grid that was trained without interruption."""
    workdir = tmp_path_factory.mktemp("watched") / "w"
    return workdir, train(workdir)


def test_tensorboard_reads_every_row_of_every_run(watched):
    workdir, frame = watched
    assert len(expected(frame)) == 6
    assert set(frame["status"]) == {"finished", "diverged"}
    assert_all_shown(workdir)
    assert len(list(workdir.rglob("*tfevents*"))) == 6


def test_watching_changes_no_result(watched, tmp_path):
    pd.testing.assert_frame_equal(watched[1], train(tmp_path / "w", tensorboard=False), check_exact=True)
    assert not (tmp_path / "w/tensorboard").exists()


def plugin(run, tag):
    return run.SummaryMetadata(tag).plugin_data.content


def test_the_learning_rate_follows_the_optimizers_rule_and_its_scalars_are_shown():
    shown = hparams(tiny.grid(optimizer={"name": "momentum", "rule": "sqrt"}), Run(4, 4, 0.5, 0))
    assert (shown["learning_rate"], shown["optimizer"], shown["momentum"]) == (1.0, "momentum", 0.9)


def test_the_table_of_hyperparameters_says_what_a_run_was_and_how_it_ended(watched):
    shown = runs_shown(watched[0])
    run = shown["m00004_lr0.1_seed1"]
    found = metadata.parse_session_start_info_plugin_data(plugin(run, metadata.SESSION_START_INFO_TAG))
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in found.hparams.items()}
    assert values.pop("log2_base_lr") == math.log2(0.1)
    assert values == {
        "batch_size": 4,
        "bn_batch_size": 4,
        "base_lr": 0.1,
        "learning_rate": 0.4,
        "optimizer": "sgd",
        "seed": 1,
        "experiment": "experiment",
        "dataset": "digits",
        "augment": False,
        "model": "alexnet",
        "norm": "none",
        "bn_statistics": "running",
        "epochs": 3,
        "weight_decay": 1e-3,
        "weight_decay_mask": "all",
        "warmup_fraction": 0.0,
        "precision": "float32",
    }
    table = metadata.parse_experiment_plugin_data(plugin(run, metadata.EXPERIMENT_TAG))
    assert {info.name for info in table.hparam_infos} == {"log2_base_lr", *values}
    assert [info.name.tag for info in table.metric_infos] == ["final/test_accuracy", "final/diverged"]
    for name, run in shown.items():
        end = plugin(run, metadata.SESSION_END_INFO_TAG)
        status = Status.STATUS_FAILURE if "1e+30" in name else Status.STATUS_SUCCESS
        assert metadata.parse_session_end_info_plugin_data(end).status == status


def test_a_diverged_run_says_so_and_shows_nothing_that_is_not_finite(watched):
    shown = {tag: value for tag, _, value in points(runs_shown(watched[0])["m00004_lr1e+30_seed0"])}
    assert shown.keys() <= {"updates", "test/loss", "train/loss", "final/diverged"}
    assert shown["final/diverged"] == 1
    assert np.isfinite(list(shown.values())).all()


def test_the_final_accuracy_is_the_median_of_the_last_five_epochs(tmp_path):
    accuracies = (0.9, 0.9, 0.1, 0.5, 0.4, 0.2, 0.9)
    show(tmp_path, *(row(e, test_accuracy=a) for e, a in enumerate(accuracies, 1)))
    assert ("final/test_accuracy", 7, float(np.float32(0.4))) in points(runs_shown(tmp_path)["m00004_lr2^-7_seed0"])


class Looking(NoProgress):
    """Progress display that checks TensorBoard's content after every segment."""

    def __init__(self, workdir):
        self.workdir, self.seen = workdir, []

    def show(self, status, doing):
        if not doing.startswith("compiling"):
            assert_all_shown(self.workdir)
            self.seen.append(len(results.load(self.workdir)))


def test_tensorboard_sees_each_epoch_as_it_ends(tmp_path):
    looking = Looking(tmp_path / "w")
    train(tmp_path / "w", looking)
    assert len(set(looking.seen)) > 3


@pytest.mark.parametrize("segments", [3, 6])
@pytest.mark.parametrize("checkpoint", ["kept", "lost"])
@pytest.mark.long
def test_a_stopped_grid_shows_each_row_once_when_it_goes_on(watched, tmp_path, monkeypatch, segments, checkpoint):
    """Rows that are trained again because the checkpoint is lost appear once, too."""
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 24)
    with pytest.raises(Interrupted):
        train(tmp_path / "w", tiny.StopAfter(segments), segment_seconds=1e-9)
    assert_all_shown(tmp_path / "w")
    assert 0 < len(results.load(tmp_path / "w")) < len(watched[1])
    if checkpoint == "lost":
        shutil.rmtree(tmp_path / "w/checkpoints")
    pd.testing.assert_frame_equal(train(tmp_path / "w"), watched[1], check_exact=True)
    assert_all_shown(tmp_path / "w")


@pytest.mark.parametrize("before", [0, 1, 4])
def test_rows_that_a_kill_kept_from_being_shown_are_shown_by_the_next_start(tmp_path, before):
    """The next start shows rows stored before a kill, or while TensorBoard was off."""
    show(tmp_path, *(row(e) for e in range(1, before + 1)), row(1, seed=1))
    show(tmp_path, *(row(e) for e in range(before + 1, 7)), row(2, seed=1), tensorboard=False)
    show(tmp_path)
    shown = runs_shown(tmp_path)
    assert [s.step for s in shown["m00004_lr2^-7_seed0"].Scalars("test/loss")] == [1, 2, 3, 4, 5, 6]
    assert [s.step for s in shown["m00004_lr2^-7_seed1"].Scalars("test/loss")] == [1, 2]


def test_a_finished_grid_is_shown_when_tensorboard_is_turned_on_later(watched, tmp_path):
    shutil.copytree(watched[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w/tensorboard")
    train(tmp_path / "w")
    assert_all_shown(tmp_path / "w")


DAMAGES = {
    "a torn record": lambda content: content[:-9],
    "a flipped bit": lambda content: content[:700] + bytes([content[700] ^ 4]) + content[701:],
    "twice": lambda content: content + content[-100:],
    "no file": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_event_file_is_replaced_by_the_next_start(tmp_path, damage):
    rows = [row(e) for e in range(1, 6)]
    show(tmp_path / "whole", *rows)
    show(tmp_path / "damaged", *rows[:4])
    (file,) = event_files(tmp_path / "damaged")
    if DAMAGES[damage]:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    else:
        file.unlink()
    show(tmp_path / "damaged", rows[4])
    (whole,), (mended,) = runs_shown(tmp_path / "whole").values(), runs_shown(tmp_path / "damaged").values()
    assert points(mended) == points(whole)
    assert len(points(mended)) == 5 * 5
    assert len(event_files(tmp_path / "damaged")) == 1


def event_files(workdir):
    """Returns the event files of a run that are not empty."""
    return [file for file in (workdir / "tensorboard/m00004_lr2^-7_seed0").glob("*tfevents*") if file.stat().st_size]


def test_an_event_file_of_an_earlier_version_is_replaced(tmp_path):
    folder = tmp_path / "tensorboard/m00004_lr2^-7_seed0"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.0").write_bytes(b"rows")
    show(tmp_path, row(1))
    assert len(event_files(tmp_path)) == 1
    assert [s.step for s in runs_shown(tmp_path)["m00004_lr2^-7_seed0"].Scalars("updates")] == [1]


def test_a_tensorboard_that_is_open_shows_each_row_once_after_a_resume(tmp_path):
    show(tmp_path, row(1), row(2))
    watching = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    time.sleep(1.1)  # event file names contain the time in seconds
    show(tmp_path, row(3))
    watching.Reload()
    assert [s.step for s in watching.Scalars("m00004_lr2^-7_seed0", "updates")] == [1, 2, 3]


def test_a_run_that_ended_is_not_written_again(tmp_path):
    show(tmp_path, row(1), row(2), epochs=2)
    (file,) = event_files(tmp_path)
    before = file.read_bytes()
    show(tmp_path, epochs=2)
    assert event_files(tmp_path) == [file]
    assert file.read_bytes() == before


@pytest.mark.filterwarnings("ignore")  # a warning about the file that could not be closed
@pytest.mark.parametrize("room", [0, 50, 300])
def test_a_full_disk_is_one_warning_and_the_next_start_shows_all_rows(tmp_path, capsys, room):
    with ProgramResults(tmp_path, 4, 4) as stored:
        stored.append([row(e) for e in range(1, 7)])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with Trackers(tiny.grid(epochs=7, tensorboard=True), tmp_path, [stored]):
                pass
            gc.collect()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said == "warning: tensorboard gets no further results; training continues: OSError: [Errno 27] File too large\n"
    show(tmp_path)
    assert [s.step for s in runs_shown(tmp_path)["m00004_lr2^-7_seed0"].Scalars("updates")] == [1, 2, 3, 4, 5, 6]


def test_each_run_has_a_folder_of_its_own_that_can_be_read():
    assert name_of(Run(8, 8, 2**-7, 0)) == "m00008_lr2^-7_seed0"
    assert name_of(Run(8, 4, 1.0, 12)) == "m00008_b00004_lr2^0_seed12"
    rates = (0.1, 0.1 + 0.2, 0.3, 1e-30, float(np.nextafter(0.5, 1)), 0.5, 2.0**-126, 3e38)
    names = {name_of(Run(8, b, lr, seed)) for lr in rates for b in (8, 4) for seed in (0, 1)}
    assert len(names) == 4 * len(rates)
    assert not any(set(name) & set("/\\ *?\"'") or len(name) > 100 for name in names)


def test_a_sweep_without_a_workdir_has_nothing_to_show():
    with pytest.raises(InputError, match=r"^tensorboard: .*workdir.*give one"):
        sbj.sweep(tiny.PlainModel(), tiny.dataset(), [4], [2**-7], 1, tensorboard=True)


def test_a_sweep_from_python_is_shown(tmp_path):
    sbj.sweep(
        tiny.PlainModel(), tiny.dataset(), [4], [2**-7], 1, workdir=tmp_path / "w", tensorboard=True, progress=NoProgress()
    )
    assert_all_shown(tmp_path / "w")


def test_what_a_worker_trained_elsewhere_is_shown_in_the_launchers_workdir(tmp_path, monkeypatch):
    """A worker that cannot see the workdir runs no trackers, because its own folder would be lost."""
    asked, grid = [], tiny.grid(tensorboard=True, wandb="p")
    monkeypatch.setattr("smallbatch_jax.runner.grid.train_program", lambda experiment, *_: asked.append(experiment))
    monkeypatch.setattr(sys, "argv", sys.argv)
    task = worker.ProgramTask(grid, tmp_path / "w", (4, 4), "another machine", [], [])
    worker.train(task, None, Stop(), lambda status: None)
    assert not any(getattr(asked[0], name) for name in TRACKERS)
    task = worker.ProgramTask(tiny.grid(tensorboard=True), tmp_path / "w", (4, 4), "", [], [])
    launcher._store(task, worker.Outcome(None, rows=[row(1), row(2)]))
    assert [s.step for s in runs_shown(tmp_path / "w")["m00004_lr2^-7_seed0"].Scalars("updates")] == [1, 2]


def test_a_program_that_needs_no_worker_is_shown_by_the_launcher(tmp_path):
    rates = tiny.grid().grid.base_lrs
    show(tmp_path, *(row(1, base_lr) for base_lr in rates), epochs=1, tensorboard=False)
    (tmp_path / "lock").touch()
    launcher._programs(tiny.grid(epochs=1, tensorboard=True), tmp_path, 50)
    assert len(runs_shown(tmp_path)) == len(rates)


def test_of_several_processes_one_shows_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)  # as in the other processes
    train(tmp_path / "w")
    assert not (tmp_path / "w/tensorboard").exists()
