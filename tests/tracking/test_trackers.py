"""TensorBoard's own reader shows the rows of the store, each once, whatever became of the process."""

import math
import resource
import shutil
import signal
from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import tiny
from mirrored import assert_all_shown, expected, points, row, runs_shown, show, train
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status

import smallbatch_jax as sbj
from smallbatch_jax.cluster import launcher as cluster
from smallbatch_jax.cluster import ray as tasks
from smallbatch_jax.cluster import worker
from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.program import processes
from smallbatch_jax.runner import driver
from smallbatch_jax.runner import scheduler as feeder
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results
from smallbatch_jax.store.files import WriteError
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.tracking import events
from smallbatch_jax.tracking.metrics import name_of
from smallbatch_jax.tracking.trackers import Trackers

NAN = float("nan")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A grid trained without a stop: its workdir and rows."""
    workdir = tmp_path_factory.mktemp("watched") / "w"
    return workdir, train(workdir)


def test_tensorboard_reads_every_row_of_every_run(watched):
    workdir, frame = watched
    assert len(expected(frame)) == 6
    assert set(frame["status"]) == {"finished", "diverged"}
    assert_all_shown(workdir)
    assert [path.name for path in workdir.rglob("*tfevents*")] == ["events.out.tfevents.0"] * 6


def test_watching_changes_no_result(watched, tmp_path):
    pd.testing.assert_frame_equal(watched[1], train(tmp_path / "w", tensorboard=False), check_exact=True)
    assert not (tmp_path / "w/tensorboard").exists()


def plugin(run, tag):
    return run.SummaryMetadata(tag).plugin_data.content


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
        "seed": 1,
        "experiment": "experiment",
        "dataset": "digits",
        "augment": False,
        "model": "alexnet",
        "norm": "none",
        "bn_statistics": "running",
        "epochs": 3,
        "weight_decay": 1e-3,
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
    """Has TensorBoard read after every segment."""

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


class StopAfter(NoProgress):
    """Sends this process a signal after a number of segments, as a user would."""

    def __init__(self, segments):
        self.left = segments

    def show(self, status, doing):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("segments", [3, 6])
@pytest.mark.parametrize("checkpoint", ["kept", "lost"])
def test_a_stopped_grid_shows_each_row_once_when_it_goes_on(watched, tmp_path, monkeypatch, segments, checkpoint):
    """Even those that are trained once more, where the checkpoint is lost."""
    monkeypatch.setattr(feeder.Pace, "FIRST_IMAGES", 24)
    with pytest.raises(driver.Interrupted):
        train(tmp_path / "w", StopAfter(segments), segment_seconds=1e-9)
    assert_all_shown(tmp_path / "w")
    assert 0 < len(results.load(tmp_path / "w")) < len(watched[1])
    if checkpoint == "lost":
        shutil.rmtree(tmp_path / "w/checkpoints")
    pd.testing.assert_frame_equal(train(tmp_path / "w"), watched[1], check_exact=True)
    assert_all_shown(tmp_path / "w")


@pytest.mark.parametrize("before", [0, 1, 4])
def test_rows_that_a_kill_kept_from_being_shown_are_shown_by_the_next_start(tmp_path, before):
    """Stored, and the process killed before TensorBoard's file had them; or TensorBoard was off until now."""
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
    "nothing": lambda content: content,
    "a torn record": lambda content: content[:-9],
    "a torn length": lambda content: content[: -(len(content) % 100) - 3],
    "a flipped bit": lambda content: content[:700] + bytes([content[700] ^ 4]) + content[701:],
    "other rows": lambda content: events.encode([events.FILE_VERSION, events.scalars(1, {"train/loss": 3.0})]),
    "more rows than are stored": lambda content: content + events.encode([events.scalars(e, {"updates": e}) for e in (5, 6)]),
    "twice": lambda content: content + content[-100:],
    "no file": lambda content: b"",
    "zeros": lambda content: content + bytes(4096),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_event_file_that_is_not_what_it_should_be_is_mended(tmp_path, damage):
    rows = [row(e) for e in range(1, 6)]
    show(tmp_path / "whole", *rows)
    show(tmp_path / "damaged", *rows[:4])
    file = tmp_path / "damaged/tensorboard/m00004_lr2^-7_seed0/events.out.tfevents.0"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    show(tmp_path / "damaged", rows[4])
    (whole,), (mended,) = runs_shown(tmp_path / "whole").values(), runs_shown(tmp_path / "damaged").values()
    assert points(mended) == points(whole)
    assert len(points(mended)) == 5 * 5
    assert events.read(file)[1] == file.stat().st_size


def test_what_is_shown_already_is_not_written_again(tmp_path):
    """So that a TensorBoard that has read it sees nothing twice, and times stay those at which a row came."""
    show(tmp_path, row(1), row(2))
    file = tmp_path / "tensorboard/m00004_lr2^-7_seed0/events.out.tfevents.0"
    before = file.read_bytes()
    show(tmp_path, row(3))
    assert file.read_bytes().startswith(before)
    assert len(file.read_bytes()) > len(before)


def test_a_folder_that_was_removed_meanwhile_is_made_whole(tmp_path):
    with (
        ProgramResults(tmp_path, 4, 4) as stored,
        Trackers(tiny.grid(epochs=7, tensorboard=True), tmp_path, [stored]) as mirrors,
    ):
        mirrors.add(stored.append([row(1), row(2)]))
        shutil.rmtree(tmp_path / "tensorboard")
        mirrors.add(stored.append([row(3)]))
    assert [s.step for s in runs_shown(tmp_path)["m00004_lr2^-7_seed0"].Scalars("updates")] == [1, 2, 3]


@pytest.mark.parametrize("room", [0, 50, 300])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, room):
    show(tmp_path, row(1))
    (file,) = tmp_path.rglob("events.*")
    size, hard = file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, hard))
    try:
        with pytest.raises(WriteError, match=r"events.out.tfevents.0 cannot be written: File too large; the same command"):
            show(tmp_path, *(row(e) for e in range(2, 7)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert file.stat().st_size == size
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
    """One that does not see the workdir mirrors nothing itself, into a folder that would be lost."""
    asked, grid = [], tiny.grid(tensorboard=True, wandb="p")
    monkeypatch.setattr(worker, "_train", lambda part, folder, report: asked.append(part.experiment) or worker.Outcome(None))
    worker.train(worker.Part(grid, tmp_path, (4, 4), "no such token", "", [], None), lambda status: 0)
    assert (asked[0].tensorboard, asked[0].wandb) == (False, None)
    with ProgramResults(tmp_path / "elsewhere", 4, 4) as elsewhere:
        elsewhere.append([row(1), row(2)])
    outcome = worker.Outcome(None, rows=elsewhere.path.read_text())
    program = tasks.Program(tiny.grid(tensorboard=True), tmp_path / "w", (4, 4), "", [], 1, driver.Status(1, 1, 0.0))
    tasks._store(program, outcome)
    assert [s.step for s in runs_shown(tmp_path / "w")["m00004_lr2^-7_seed0"].Scalars("updates")] == [1, 2]


def test_a_program_that_needs_no_worker_is_shown_by_the_launcher(tmp_path):
    rates = tiny.grid().grid.base_lrs
    show(tmp_path, *(row(1, base_lr) for base_lr in rates), epochs=1, tensorboard=False)
    cluster._programs(tiny.grid(epochs=1, tensorboard=True), tmp_path, "", 50)
    assert len(runs_shown(tmp_path)) == len(rates)


def test_of_several_processes_one_shows_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "on_first", lambda function: None)  # as in the others
    with ExitStack() as stack:
        driver._mirrors(tiny.grid(tensorboard=True), tmp_path, [], stack).add([row(1)])
    assert not list(tmp_path.iterdir())
