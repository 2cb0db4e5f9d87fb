"""Tests the results: rows are appended once and read back bit for bit, whatever a crash left behind."""

import math
import os
import resource
from contextlib import nullcontext

import numpy as np
import pytest
import tiny

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.store import results, skipped, workdir
from smallbatch_jax.store.files import WriteError
from smallbatch_jax.store.results import ProgramResults, Row

NAN = float("nan")


def row(epoch, base_lr=2**-7, seed=0, test_accuracy=0.5, **fields):
    values = {"step": 13 * epoch, "train_loss": 1 / 3, "train_accuracy": 0.25, "test_loss": 0.1 + 0.2}
    return Row(4, 4, base_lr, seed, epoch, test_accuracy=test_accuracy, **values | fields)


@pytest.fixture
def store(tmp_path):
    """Yields a workdir of a 3-epoch experiment without rows, which this process owns."""
    with workdir.open_workdir(tmp_path / "w", tiny.grid(), {"num_classes": 3}) as folder:
        yield folder


def append(folder, *rows):
    with ProgramResults(folder, 4, 4) as program:
        program.append(rows)


def test_rows_come_back_to_the_bit_with_the_columns_of_the_public_surface(store):
    exact = row(1, base_lr=0.1, train_loss=float(np.nextafter(1, 2)), test_loss=5e-324, test_accuracy=1 / 3)
    append(store, exact)
    frame = results.load(store)
    assert list(frame.columns) == list(results.COLUMNS)
    found = frame.iloc[0]
    assert (found.experiment, found.batch_size, found.base_lr, found.bn_batch_size) == ("experiment", 4, 0.1, 4)
    assert (found.train_loss, found.test_loss, found.test_accuracy) == (exact.train_loss, 5e-324, 1 / 3)
    assert [frame[c].dtype.kind for c in ("batch_size", "seed", "epoch", "step", "base_lr")] == list("iiiif")


def test_status_is_that_of_the_run_on_all_its_rows(store):
    append(store, *(row(e, seed=0) for e in (1, 2, 3)), row(1, seed=1), row(2, seed=1), row(1, seed=2))
    append(store, row(2, seed=2, test_accuracy=NAN, train_accuracy=NAN, train_loss=math.inf))
    frame = results.load(store)
    assert frame.groupby("seed")["status"].unique().map(list).to_dict() == {
        0: ["finished"],
        1: ["running"],
        2: ["diverged"],
    }
    assert math.isinf(frame[(frame.seed == 2) & (frame.epoch == 2)].train_loss.item())


def test_a_row_is_written_once_even_by_another_process(store):
    append(store, row(1), row(2))
    append(store, row(1), row(2), row(3))
    assert list(results.load(store).epoch) == [1, 2, 3]
    assert (store / "results/m00004_b00004.csv").read_text().count("\n") == 4


def test_a_diverged_run_takes_no_more_rows(store):
    append(store, row(1, test_accuracy=NAN))
    append(store, row(2))
    assert list(results.load(store).epoch) == [1]


def test_a_line_torn_by_a_crash_is_left_out_by_readers_and_cut_off_by_the_next_writer(store):
    append(store, row(1), row(2))
    path = store / "results/m00004_b00004.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.warns(UserWarning, match=r"m00004_b00004.csv: left out damaged or incomplete lines"):
        assert list(results.load(store).epoch) == [1]
    append(store, row(2))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"batch_si"])
def test_a_file_torn_in_its_header_is_begun_anew(store, content):
    (store / "results").mkdir()
    (store / "results/m00004_b00004.csv").write_bytes(content)
    append(store, row(1))
    assert list(results.load(store).epoch) == [1]


def test_rows_of_another_program_and_of_later_epochs_are_left_out(store):
    append(store, row(1), row(2), row(3), row(4))
    path = store / "results/m00004_b00004.csv"
    path.write_text(path.read_text() + path.read_text().split("\n")[1].replace("4,4,", "64,64,", 1) + "\n")
    with pytest.warns(UserWarning, match="damaged or incomplete"), pytest.warns(UserWarning, match="epochs beyond 3: 1$"):
        found = results.load(store)
    assert (list(found.epoch), set(found.batch_size)) == ([1, 2, 3], {4})


@pytest.mark.parametrize("content", [b"", b"image,rea", b"\xff\0\n", b"a,b,c\n", b'image,reason\n"a', b"one,two\nthree,four\n"])
def test_a_damaged_list_of_skipped_images_is_read_and_continued(store, content):
    (store / "skipped.csv").write_bytes(content)
    known = list(skipped.load(store)["image"])
    assert known == (["one", "three"] if content.startswith(b"one") else [])
    left_out = skipped.SkippedImages(store)
    for image in ("a\nb.png", "\udcff.png", "\udcff.png"):
        left_out.add(image, "is broken")
    assert list(skipped.load(store)["image"])[len(known) :] == ["a\\nb.png", "\\udcff.png"]


def test_a_damaged_line_in_the_middle_costs_that_line_alone(store):
    append(store, row(1), row(2), row(3))
    path = store / "results/m00004_b00004.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1], "\0garbage\n", lines[3]]))
    with pytest.warns(UserWarning, match="damaged or incomplete"), pytest.warns(UserWarning, match="missing"):
        assert list(results.load(store).epoch) == [1, 3]


def test_the_final_accuracy_of_a_run_is_the_median_of_its_last_five_epochs(store):
    accuracies = [0.9, 0.8, 0.1, 0.2, 0.6, 0.3, 0.4]
    with ProgramResults(store, 4, 4) as program:
        program.append(row(epoch, test_accuracy=value) for epoch, value in enumerate(accuracies, 1))
        program.append([row(1, seed=1, test_accuracy=NAN)])
        assert program.final(row(1).run) == 0.3
        assert math.isnan(program.final(row(1, seed=1).run))


def test_readers_are_warned_of_lost_rows(store):
    append(store, row(1), row(2), row(1, seed=1), row(2, seed=1))
    path = store / "results/m00004_b00004.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.warns(UserWarning, match=r"missing \(runs: 1\)"):
        assert list(results.load(store).epoch) == [2, 1, 2]


@pytest.mark.parametrize(
    "damage", ["a line lost", "a line damaged", "a number beyond int64", "the header lost", "a line twice", "no UTF-8"]
)
def test_the_next_writer_repairs_the_file_and_drops_rows_that_follow_lost_ones(store, damage):
    """A run with lost rows is trained again from the first of them; a run without is not."""
    append(store, row(1), row(1, seed=1), row(2), row(2, seed=1), row(3), row(3, seed=1, test_accuracy=NAN))
    path = store / "results/m00004_b00004.csv"
    lines = path.read_text().splitlines(keepends=True)
    damaged = {
        "a line lost": lines[:3] + lines[4:],
        "a line damaged": [*lines[:3], lines[3].replace("4,4,", "4,x,"), *lines[4:]],
        "a number beyond int64": [*lines[:3], lines[3].replace("4,4,", f"4,{10**20},"), *lines[4:]],
        "the header lost": lines[1:],
        "a line twice": [*lines, lines[2]],
        "no UTF-8": [*lines[:3], lines[3].replace("4,4,", "4,\xff,"), *lines[4:]],
    }[damage]
    path.write_bytes("".join(damaged).encode("latin-1"))
    kept = [1, 2, 3] if damage in ("the header lost", "a line twice") else [1]
    whole = damage == "the header lost"
    with nullcontext() if whole else pytest.warns(UserWarning, match=r"were removed; .*/m00004_b00004.csv.damaged has them"):
        program = ProgramResults(store, 4, 4)
    assert whole or path.with_suffix(".csv.damaged").read_bytes() == "".join(damaged).encode("latin-1")
    with program:
        assert program.epochs(row(1).run) == kept[-1]
        assert program.complete(row(1).run, 3) == (kept[-1] == 3)
        assert program.diverged(row(1, seed=1).run)
        frame = results.load(store)
        assert list(frame[frame.seed == 0].epoch) == kept
        assert list(frame[frame.seed == 1].epoch) == [1, 2, 3]
        program.append([row(2), row(3)])
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_a_missing_file_is_named_and_the_rest_is_read(tmp_path):
    grid = tiny.grid(batch_sizes=(4, 8))
    with workdir.open_workdir(tmp_path / "w", grid, {"num_classes": 3}) as folder:
        append(folder, row(1))
        with pytest.warns(UserWarning, match=r"m00008_b00008.csv: missing; its runs are treated as not trained"):
            assert list(results.load(folder).batch_size) == [4]


def limit_file_size(size):
    """Limits files that this process writes to `size` bytes, like a full disk; the hard limit is unchanged."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    yield
    limit_file_size(resource.RLIM_INFINITY)


@pytest.mark.parametrize("room", [0, 1, 60, 100])
def test_rows_that_do_not_fit_leave_the_file_whole_and_are_not_counted(store, unlimited, room):
    append(store, row(1))
    path = store / "results/m00004_b00004.csv"
    whole = path.read_bytes()
    with ProgramResults(store, 4, 4) as program:
        limit_file_size(len(whole) + room)
        with pytest.raises(WriteError, match=r"m00004_b00004.csv cannot be written: File too large"):
            program.append([row(2), row(3)])
        assert path.read_bytes() == whole
        assert program.epochs(row(1).run) == 1
        limit_file_size(resource.RLIM_INFINITY)
        program.append([row(2), row(3)])
    assert list(results.load(store).epoch) == [1, 2, 3]


def test_no_rows_are_an_empty_frame_with_all_columns(store):
    frame = results.load(store)
    assert frame.empty
    assert list(frame.columns) == list(results.COLUMNS)


def test_further_columns_are_there_before_the_first_row(tmp_path):
    grid = {"weight_decays": (0.0, 0.1), "dataset": {"validation_fraction": 0.5}, "diagnostics": ("noise_scale",)}
    with workdir.open_workdir(tmp_path / "w", tiny.grid(**grid), {"num_classes": 3}) as folder:
        frame = results.load(folder)
    assert {"weight_decay", "validation_accuracy", "train_noise_scale"} <= set(frame.columns)
    assert frame.dtypes["weight_decay"] == np.float64


def test_a_read_only_reader_needs_no_lock(store):
    """Rows can be read although the fixture `store` holds the lock."""
    append(store, row(1))
    assert len(results.load(str(store))) == 1


def test_complete_says_which_runs_need_no_more_training(store):
    append(store, *(row(e) for e in (1, 2, 3)), row(1, seed=1), row(1, seed=2, test_accuracy=NAN))
    with ProgramResults(store, 4, 4) as program:
        assert [program.complete(row(1, seed=s).run, 3) for s in (0, 1, 2, 3)] == [True, False, True, False]


@pytest.mark.parametrize("lost", ["results", "results/m00004_b00004.csv", "."])
def test_rows_of_a_file_that_was_removed_or_replaced_are_refused_in_one_line(store, lost):
    with ProgramResults(store, 4, 4) as program:
        program.append([row(1)])
        program.sync()
        os.rename(store / lost, store.parent / "elsewhere")
        for store_more in (lambda: program.append([row(2)]), program.sync):
            with pytest.raises(InputError, match=r"m00004_b00004.csv cannot be written: No such file or directory\."):
                store_more()
        program.path.parent.mkdir(parents=True, exist_ok=True)
        program.path.write_text("")
        with pytest.raises(InputError, match=r"m00004_b00004.csv cannot be written: it was replaced by another file\."):
            program.append([row(2)])


def test_a_full_paper_grid_loads_within_two_seconds(tmp_path):
    """The grid has 143 cells × 164 epochs × 5 seeds."""
    import time

    experiment = tiny.grid(epochs=164)
    with workdir.open_workdir(tmp_path, experiment, {"num_classes": 3}), ProgramResults(tmp_path, 4, 4) as program:
        program.append(row(e, base_lr=lr / 1000, seed=s) for lr in range(1, 144) for s in range(5) for e in range(1, 165))
    began = time.process_time()
    assert len(results.load(tmp_path)) == 143 * 164 * 5
    assert time.process_time() - began < 2 * SLACK


SLACK = 2  # allows for machines that are busy with other tests
