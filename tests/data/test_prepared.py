"""Tests datasets prepared by TensorFlow Datasets: real folders are read without TensorFlow."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from pictures import error_line
from PIL import Image
from shell import refused, run

from smallbatch_jax import data
from smallbatch_jax.data import prepared

ROOT = Path(__file__).parents[2]
NAMES = [f"class {i}" for i in range(300)]  # more classes than a byte can index


def label(i):
    return 7 * i % len(NAMES)


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def builder():
    """Returns a TFDS builder of a small dataset of PNGs."""
    import tensorflow_datasets as tfds

    class Cifar10(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
            features["label"] = tfds.features.ClassLabel(names=NAMES)
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(30)), "test": self._generate_examples(range(100, 112))}

        def _generate_examples(self, numbers):
            for i in numbers:
                file = io.BytesIO()
                Image.fromarray(picture(i)).save(file, "PNG")
                file.seek(0)
                yield i, {"id": f"{i}", "image": file, "label": label(i)}

    return Cifar10


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, builder):
    """Returns a folder as `prepare_data.py` leaves it: array_record files, written by TFDS itself."""
    folder = tmp_path_factory.mktemp("tfds")
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def by_content(images, labels):
    """Returns the labels by pixel content, because TFDS shuffles the examples as it writes them."""
    return {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def test_every_example_comes_back_with_its_label(data_dir):
    found = data.load("cifar10", data_dir)
    assert found.train_images.dtype == np.uint8
    assert by_content(found.train_images, found.train_labels) == {picture(i).tobytes(): label(i) for i in range(30)}
    assert by_content(found.test_images, found.test_labels) == {picture(i).tobytes(): label(i) for i in range(100, 112)}
    assert (found.num_classes, found.class_names) == (len(NAMES), tuple(NAMES))


def test_the_second_load_reads_the_cache_alone(data_dir, monkeypatch):
    first = data.load("cifar10", data_dir)
    monkeypatch.setattr(prepared, "_read", None)
    second = data.load("cifar10", data_dir)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_reading_needs_no_tensorflow(data_dir, cache_dir):
    code = f"""
        import sys
        from smallbatch_jax import data
        print(len(data.load("cifar10", {str(data_dir)!r}).train_labels), "tensorflow" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "30 False", done.stderr


def test_data_that_is_not_there_is_one_line_with_the_command_that_prepares_it(tmp_path, monkeypatch):
    line = error_line(data.load, "cifar100", tmp_path)
    assert f"python experiments/prepare_data.py --dataset=cifar100 --data_dir={tmp_path}" in line
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    assert f"--data_dir={tmp_path / 'elsewhere'}" in error_line(data.load, "cifar10")


def test_the_newest_complete_version_is_taken(tmp_path):
    for version in ("3.0.2", "3.0.10", "3.0.11-old", "incomplete.XY_4.0.0"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").write_text("{}")
    (tmp_path / "cifar10" / "9.0.0").mkdir()
    assert prepared.newest_version("cifar10", tmp_path).name == "3.0.10"


def test_a_damaged_folder_is_one_line(data_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    (record,) = (copy / "cifar10/3.0.2").glob("*train.array_record*")
    record.write_bytes(record.read_bytes()[:100])
    assert str(copy) in error_line(data.load, "cifar10", copy)
    (copy / "cifar10/3.0.2/dataset_info.json").write_text("{")
    assert "cannot be read as cifar10" in error_line(data.load, "cifar10", copy)


def test_another_file_format_is_one_line_that_helps(data_dir, tmp_path):
    """The line names another folder: TFDS's default is tfrecord, and preparing again in the same folder changes nothing."""
    folder = tmp_path / "my data"
    version = shutil.copytree(data_dir, folder) / "cifar10" / "3.0.2"
    for path in version.glob("*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    info = version / "dataset_info.json"
    facts = json.loads(info.read_text())
    for named in ({"fileFormat": "tfrecord"}, {}):  # old versions of TFDS do not store the format
        info.write_text(json.dumps({k: v for k, v in facts.items() if k != "fileFormat"} | named))
        line = error_line(data.load, "cifar10", folder)
        assert "was prepared as tfrecord, and lacks array_record files" in line
        assert f"--dataset=cifar10 --data_dir='{folder}/array_record'" in line


@pytest.mark.parametrize("wrong", ["cifar10", "cifar10/3.0.2", ".."])
def test_a_folder_above_or_below_is_answered_with_the_right_one(data_dir, tmp_path, wrong):
    folder = tmp_path / "more"
    folder.symlink_to(data_dir)
    line = error_line(data.load, "cifar10", tmp_path if wrong == ".." else folder / wrong)
    assert f"Give {str(folder)!r}, where it is." in line
    assert "prepare_data.py" not in line


def test_prepare_data_takes_a_renamed_version_for_none(tmp_path):
    """The loader ignores it too; each would else send the user to the other."""
    (tmp_path / "imagenet2012" / "5.1.0-old").mkdir(parents=True)
    (tmp_path / "imagenet2012" / "5.1.0-old" / "dataset_info.json").write_text("{}")
    refused(run("prepare_data.py", "--dataset=imagenet2012", f"--data_dir={tmp_path}"), "ILSVRC2012_img_train.tar")


def test_prepare_data_refuses_what_it_does_not_know():
    refused(run("prepare_data.py", "--dataset=cifar11"), "did you mean 'cifar10'?")


def downloaded(name, folder):
    """Writes random CIFAR files in the authors' binary format; returns the pixels and class of the first test image."""
    rng = np.random.default_rng(0)
    if name == "cifar10":
        batches, classes = folder / "cifar-10-batches-bin", [10]
        sizes = {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)} | {"test_batch.bin": 10_000}
        names = {"batches.meta.txt": 10}
    else:
        batches, classes = folder / "cifar-100-binary", [20, 100]  # coarse and fine
        sizes = {"train.bin": 50_000, "test.bin": 10_000}
        names = {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
    batches.mkdir()
    for file, count in names.items():
        (batches / file).write_text("\n".join(f"class{i}" for i in range(count)) + "\n")
    records = np.empty(0)
    for file, size in sizes.items():
        labels = [rng.integers(0, count, (size, 1)) for count in classes]
        records = np.concatenate([*labels, rng.integers(0, 256, (size, 3072))], 1).astype(np.uint8)
        (batches / file).write_bytes(records.tobytes())
    first = records[0]
    return first[len(classes) :].reshape(3, 32, 32).transpose(1, 2, 0), first[len(classes) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_own_builder_prepares_what_we_read(name, tmp_path):
    """The command runs TFDS's own builder, with only its download replaced."""
    pytest.importorskip("tensorflow")
    pixels, label = downloaded(name, tmp_path)
    code = f"""
        import runpy, sys
        import tensorflow_datasets as tfds
        tfds.download.DownloadManager.download_and_extract = lambda self, url: {str(tmp_path)!r}
        sys.argv = ["prepare_data.py", "--dataset={name}", "--data_dir={tmp_path / "out"}"]
        sys.path.insert(0, "experiments")
        runpy.run_path("experiments/prepare_data.py", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "50,000 training and 10,000 test images are ready" in done.stdout
    found = data.load(name, tmp_path / "out")
    assert found.num_classes == int(name.removeprefix("cifar"))
    assert list(found.test_labels[(found.test_images == pixels).all((1, 2, 3))]) == [label]
