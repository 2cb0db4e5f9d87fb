"""Tests the preparation of ImageNet from manually downloaded archives, and the errors without them."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def prepare(data_dir, **environment):
    """Runs the command that prepares ImageNet and returns its result."""
    line = [sys.executable, "experiments/prepare_data.py", "--dataset=imagenet2012", f"--data_dir={data_dir}"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, timeout=200)


def archive(files):
    """Returns a tar archive of `files`, a dict from name to content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def jpeg(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def data_dir(tmp_path):
    """Returns a folder with archives like ImageNet's: six training images in two nested archives, and four for validation."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    classes = {f"{wnid}.tar": archive({f"{wnid}_{i}.JPEG": jpeg(i) for i in range(3)}) for wnid in ("n01440764", "n01443537")}
    (manual / TRAIN).write_bytes(archive(classes))
    (manual / VALIDATION).write_bytes(archive({f"ILSVRC2012_val_{i:08}.JPEG": jpeg(i) for i in range(1, 5)}))
    return tmp_path


@pytest.fixture
def no_tfds(tmp_path_factory):
    """Returns environment variables under which importing TensorFlow or TFDS ends the command."""
    folder = tmp_path_factory.mktemp("modules")
    for name in ("tensorflow", "tensorflow_datasets"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


@pytest.mark.parametrize("missing", [(TRAIN, VALIDATION), (TRAIN,), (VALIDATION,)])
def test_missing_archives_are_one_line_with_every_step(data_dir, no_tfds, missing):
    """The error comes before TensorFlow or TFDS is imported, and before anything is written."""
    manual = data_dir / "downloads" / "manual"
    for name in missing:
        (manual / name).unlink()
    before = sorted(data_dir.rglob("*"))
    done = prepare(data_dir, **no_tfds)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    sizes = {TRAIN: "138 GB", VALIDATION: "6.3 GB"}
    lacks = f"{manual} lacks {' and '.join(f'{name} ({sizes[name]})' for name in missing)}. "
    steps = ("Register at https://image-net.org/download-images", f"put the archives into {manual} as they are")
    for words in (lacks, *steps, "repeat this command", "300 GB of disk"):
        assert words in done.stderr
    assert sorted(data_dir.rglob("*")) == before


def test_a_folder_that_is_not_there_is_not_made(tmp_path, no_tfds):
    assert prepare(tmp_path / "none", **no_tfds).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_with_its_archives_the_command_goes_on_to_tfds(data_dir, no_tfds):
    done = prepare(data_dir, **no_tfds)
    assert (done.returncode, done.stderr) == (1, "tensorflow_datasets was imported\n")


@pytest.mark.parametrize(("folder", "goes_on"), [("5.1.0", True), ("incomplete.XY_5.1.0", False)])
def test_once_it_is_prepared_the_archives_may_go(tmp_path, no_tfds, folder, goes_on):
    (tmp_path / "imagenet2012" / folder).mkdir(parents=True)
    (tmp_path / "imagenet2012" / folder / "dataset_info.json").write_text("{}")
    done = prepare(tmp_path, **no_tfds)
    assert done.returncode == 2
    assert ("5.1.0' cannot be read as imagenet2012: KeyError" in done.stderr) is goes_on


def test_the_counts_are_printed_and_no_image_is_loaded(data_dir, tmp_path_factory):
    """A fake builder of empty files replaces that of TFDS, which needs TensorFlow; reading an image would fail."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "tensorflow.py").touch()
    (folder / "tensorflow_datasets.py").write_text(
        """if True:
        import json
        from types import SimpleNamespace as Namespace

        def builder(name, data_dir, file_format):
            def prepare():
                print(name, data_dir, file_format)
                folder = data_dir / name / "5.1.0"
                folder.mkdir(parents=True)
                splits = [{"name": "train", "shardLengths": ["1281167"]}, {"name": "validation", "shardLengths": ["50000"]}]
                (folder / "dataset_info.json").write_text(json.dumps({"splits": splits}))
                features = {"featuresDict": {"features": {"label": {"classLabel": {"numClasses": "1"}}}}}
                (folder / "features.json").write_text(json.dumps(features))
                (folder / "label.labels.txt").write_text("n01440764")
                for split in ("train", "validation"):
                    (folder / f"{name}-{split}.array_record-00000-of-00001").touch()

            return Namespace(download_and_prepare=prepare)
        """
    )
    done = prepare(data_dir, PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"imagenet2012 {data_dir} array_record",
        "imagenet2012: 1,281,167 training and 50,000 test images are ready",
    ]


@pytest.mark.slow
def test_tfds_own_builder_prepares_the_archives(data_dir):
    pytest.importorskip("tensorflow")
    done = prepare(data_dir)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("imagenet2012: 6 training and 4 test images are ready")
    (version,) = (data_dir / "imagenet2012").iterdir()
    records = sorted(path.name for path in version.glob("*.array_record-*"))
    assert records == [f"imagenet2012-{split}.array_record-00000-of-00001" for split in ("train", "validation")]


@pytest.mark.slow
def test_a_damaged_archive_is_named_so_in_the_last_line(data_dir):
    pytest.importorskip("tensorflow")
    os.truncate(data_dir / "downloads" / "manual" / TRAIN, 15_000)
    done = prepare(data_dir)
    assert done.returncode == 2
    assert "--dataset: an archive of imagenet2012 is damaged (" in done.stderr.splitlines()[-1]
