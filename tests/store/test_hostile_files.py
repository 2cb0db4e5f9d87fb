"""Tests that no content of a dataset, a cache or a workdir is ever unpickled, imported or executed."""

import contextlib
import io
import json
import os
import pickle
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from pictures import Bomb, error_line, load
from PIL import Image

from smallbatch_jax import data
from smallbatch_jax.runner import scheduler
from smallbatch_jax.runner.grid import Interrupted, train_grid
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results
from smallbatch_jax.store.checkpoint import Checkpoints
from smallbatch_jax.store.files import write_atomically
from smallbatch_jax.study import figures, study


def test_a_pipe_is_not_replaced_and_a_link_leads_to_the_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.html").symlink_to("page.html")
    assert error_line(write_atomically, tmp_path / "pipe", "page").endswith("pipe cannot be written: it is not a regular file.")
    assert (tmp_path / "pipe").is_fifo()
    write_atomically(tmp_path / "link.html", "page")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text() == "page"


@pytest.fixture
def mark(tmp_path):
    """Yields a path that planted code creates when it runs, and fails the test if the path exists at its end."""
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(params=["text pickle", "binary pickle", "array of objects"])
def bomb(request, mark):
    """Returns the bytes of a file that runs code if it is unpickled."""
    if request.param == "array of objects":
        stream = io.BytesIO()
        np.save(stream, np.array([Bomb(mark)], object), allow_pickle=True)
        return stream.getvalue()
    return pickle.dumps(Bomb(mark), protocol=0 if request.param == "text pickle" else 5)


@pytest.mark.filterwarnings("default")
def test_the_bombs_of_these_tests_go_off(tmp_path):
    for protocol in (0, 5):
        pickle.loads(pickle.dumps(Bomb(tmp_path / f"{protocol}"), protocol))
        assert (tmp_path / f"{protocol}").is_dir()


@pytest.mark.parametrize("name", ["1.png", "9.jpg"])
def test_a_pickle_for_a_picture_is_refused(root, bomb, name):
    path = root / "train" / "dog" / name
    path.write_bytes(bomb)
    assert error_line(load, root).startswith(
        f"dataset.data_dir: {str(path)!r} is not a JPEG, PNG, WebP, BMP, TIFF or GIF image"
    )


def test_other_files_in_a_folder_of_pictures_are_left_alone(root, bomb, mark, monkeypatch):
    monkeypatch.chdir(root)
    for folder in (root, root / "train", root / "train" / "cat"):
        for name in ("data.pkl", "labels.npy", "cache.npy", "1.npz"):
            (folder / name).write_bytes(bomb)
        for name in ("__init__.py", "conftest.py", "cat.py"):
            (folder / name).write_text(module(mark))
    assert load(root).train_images.shape == (6, 4, 6, 3)


def module(mark):
    return f"import os\nos.mkdir({str(mark)!r})\n"


@pytest.fixture
def postscript(mark, tmp_path, monkeypatch):
    """Returns an EPS picture for which Pillow would start the program gs, replaced here by one that creates `mark`."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nmkdir {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "EPS")
    return stream.getvalue()


def test_no_program_is_started_for_a_picture(root, postscript):
    path = root / "train" / "dog" / "1.png"
    path.write_bytes(postscript)
    assert f"{str(path)!r} is not a JPEG, PNG, WebP, BMP, TIFF or GIF image" in error_line(load, root)


def png_of(value):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_records(version, split, images):
    """Writes an array_record file of examples, labelled 0, 1, 2, …"""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(version / f"cifar10-{split}.array_record-00000-of-00001"), "group_size:1")
    for label, image in enumerate(images):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(image)
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()


FEATURES = {"featuresDict": {"features": {"label": {"classLabel": {"numClasses": "2"}}}}}


@pytest.fixture
def prepared(tmp_path):
    """Returns the version folder of a dataset as TFDS prepares it, with two training examples and one test example."""
    version = tmp_path / "tfds" / "cifar10" / "3.0.2"
    version.mkdir(parents=True)
    splits = [{"name": "train", "shardLengths": ["2"]}, {"name": "test", "shardLengths": ["1"]}]
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "array_record", "moduleName": "cifar", "splits": splits}
    (version / "dataset_info.json").write_text(json.dumps(info))
    (version / "features.json").write_text(json.dumps(FEATURES))
    (version / "label.labels.txt").write_text("cat\ndog\n")
    write_records(version, "train", [png_of(10), png_of(20)])
    write_records(version, "test", [png_of(30)])
    return version


def load_prepared(version):
    return data.load("cifar10", version.parent.parent)


def test_a_prepared_dataset_is_read(prepared):
    found = load_prepared(prepared)
    assert found.train_images[:, 0, 0, 0].tolist() == [10, 20]
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([0, 1], [0])
    assert found.class_names == ("cat", "dog")


FILES = ("dataset_info.json", "features.json", "label.labels.txt", "cifar10-train.array_record-00000-of-00001")


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_a_prepared_dataset_is_refused(prepared, bomb, name):
    (prepared / name).write_bytes(bomb)
    assert repr(str(prepared)) in error_line(load_prepared, prepared)


def test_a_pickle_for_an_image_of_a_prepared_dataset_is_refused(prepared, bomb):
    write_records(prepared, "train", [png_of(1), bomb])
    assert f"the records in {str(prepared)!r} cannot be read" in error_line(load_prepared, prepared)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_prepared_dataset_cannot_have_a_module_imported(prepared, mark, monkeypatch, key):
    """TFDS's own reader would import the module of any class that features.json names."""
    (prepared / "planted.py").write_text(module(mark))
    monkeypatch.chdir(prepared)
    monkeypatch.syspath_prepend(str(prepared))  # as in a notebook in the same folder
    (prepared / "features.json").write_text(json.dumps(FEATURES | {key: "planted.Feature", "content": {}}))
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps(info | {"moduleName": "planted", "name": "planted"}))
    assert len(load_prepared(prepared).train_labels) == 2


def test_no_program_is_started_for_an_image_of_a_prepared_dataset(prepared, postscript):
    write_records(prepared, "train", [png_of(1), postscript])
    assert "cannot identify image file" in error_line(load_prepared, prepared)


@pytest.mark.parametrize("splits", [None, 5, [], [{"name": "train"}], [{"name": "train", "shardLengths": [[]]}]])
def test_hostile_json_of_a_prepared_dataset_is_one_line(prepared, splits):
    (prepared / "dataset_info.json").write_text(json.dumps({"splits": splits}))
    assert f"{str(prepared)!r} cannot be read as cifar10" in error_line(load_prepared, prepared)


@pytest.mark.parametrize("number", ["1", "3", "0", "-1", "99999999999999999999"])
def test_a_wrong_number_of_examples_is_one_line(prepared, number):
    path = prepared / "dataset_info.json"
    path.write_text(path.read_text().replace('"2"', f'"{number}"'))
    assert f"of {number} examples found" in error_line(load_prepared, prepared)


@pytest.mark.parametrize("data_dir", [5, b"x", "a\0b", "x" * 5000, "~nobody/x", "two\nlines", os.fsdecode(b"\xff")])
def test_any_place_of_a_prepared_dataset_is_one_line_that_can_be_printed(data_dir):
    error_line(data.load, "cifar10", data_dir).encode("utf-8")


def test_a_prepared_dataset_below_a_name_that_is_no_text_is_one_line(prepared, tmp_path):
    """The record reader accepts only UTF-8 paths."""
    version = shutil.copytree(prepared, tmp_path / os.fsdecode(b"\xff") / "cifar10" / "3.0.2")
    assert f"the records in {str(version)!r} cannot be read" in error_line(load_prepared, version)


def test_a_pickle_in_the_cache_of_a_prepared_dataset_is_mended(prepared, cache_dir, bomb, capsys):
    first = load_prepared(prepared)
    (path,) = cache_dir.glob("cifar10-*.npz")
    path.write_bytes(bomb)
    for _ in range(2):  # the second load reads the repaired file
        np.testing.assert_array_equal(load_prepared(prepared).train_images, first.train_images)
    assert capsys.readouterr().err.count(repr(str(path))) == 1


@pytest.fixture(scope="module")
def restored_with():
    """Returns a dict that `stopped` fills with the arguments for opening (after the folder) and restoring its checkpoints."""
    return {}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, restored_with):
    """Returns a workdir whose training was stopped in its second epoch, with its checkpoint."""
    workdir = tmp_path_factory.mktemp("stopped") / "w"
    begin, restore = Checkpoints.__init__, Checkpoints.restore

    def noted_begin(self, folder, *rest):
        restored_with["rest"] = rest
        begin(self, folder, *rest)

    def noted_restore(self, template):
        restored_with["template"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template)
        return restore(self, template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "__init__", noted_begin)
        patch.setattr(Checkpoints, "restore", noted_restore)
        patch.setattr(scheduler.Pace, "FIRST_IMAGES", 8)
        with pytest.raises(Interrupted):
            train(workdir, tiny.StopAfter(14, signal.SIGINT))
    assert set(results.load(workdir).epoch) == {1}
    return workdir


def train(workdir, progress=None):
    grid = tiny.grid(base_lrs=(2**-9, 2**-7), segment_seconds=1e-9)
    train_grid(grid, workdir, tiny.dataset(), progress or NoProgress(), lambda b: tiny.TinyModel(b))


@pytest.fixture
def workdir(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "w")


def draw(workdir):
    return figures.draw_studies([study.load(workdir)])


REST = ("results/m00004_b00004.csv", "timings.csv", "provenance.jsonl", "lock")


def test_a_pickle_for_the_experiment_is_refused(workdir, bomb):
    (workdir / "experiment.json").write_bytes(bomb)
    for call in (results.load, study.load, draw, train):
        assert f"{workdir}/experiment.json is damaged" in error_line(call, workdir)


@pytest.mark.filterwarnings("ignore:.*left out damaged or incomplete lines")
def test_pickled_results_are_no_rows(workdir, bomb):
    (workdir / REST[0]).write_bytes(bomb)
    assert results.load(workdir).empty
    assert study.load(workdir).rows.empty
    assert "hold no rows" in error_line(draw, workdir)


@pytest.mark.parametrize("name", REST[1:])
def test_readers_run_no_pickle_beside_the_results(workdir, bomb, name):
    (workdir / name).write_bytes(bomb)
    assert len(results.load(workdir)) == len(study.load(workdir).rows) == 2


def test_figures_are_drawn_beside_pickles(workdir, mark, monkeypatch):
    monkeypatch.setattr(figures.style, "write", lambda figure, stem: [stem])  # writing takes most of the time
    for name in REST[1:]:
        (workdir / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert draw(workdir)


@pytest.mark.filterwarnings("ignore:.*left out damaged or incomplete lines")
def test_a_workdir_of_pickles_is_resumed_and_none_is_run(workdir, mark):
    """Every file is a pickle except the experiment and the checkpoint, whose lanes resume in the second epoch."""
    for name in REST:
        (workdir / name).write_bytes(pickle.dumps(Bomb(mark)))
    train(workdir)
    assert (results.load(workdir).query("epoch > 1").status == "finished").all()


def checkpoint_files(workdir):
    return sorted(path for path in (workdir / "checkpoints").rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore")  # test_checkpoint.py tests the warnings about damage
@pytest.mark.long
def test_no_file_of_a_checkpoint_is_unpickled(stopped, restored_with, mark, tmp_path):
    """Pickles replace each file of the checkpoint in turn, and then all at once."""

    def restore(workdir):
        (folder,) = (workdir / "checkpoints").iterdir()
        return Checkpoints(folder, *restored_with["rest"]).restore(restored_with["template"])

    assert restore(shutil.copytree(stopped, tmp_path / "sound")) is not None
    files = [path.relative_to(stopped) for path in checkpoint_files(stopped)]
    assert len(files) > 5
    for number, planted in enumerate([*([file] for file in files), files]):
        copy = shutil.copytree(stopped, tmp_path / f"{number}")
        for file in planted:
            (copy / file).write_bytes(pickle.dumps(Bomb(mark), protocol=number % 2 * 5))
        with contextlib.suppress(Exception):
            restore(copy)
        assert not mark.exists(), planted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_pickles_is_not_run_by_resuming(workdir, mark):
    for path in checkpoint_files(workdir):
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with contextlib.suppress(Exception):
        train(workdir)
