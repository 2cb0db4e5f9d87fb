"""Tests the Prefetcher: an index gives the same image for any process, any order and any number of workers."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import photos
import pytest
import tiny
from pictures import error_line
from PIL import Image

from smallbatch_jax import data
from smallbatch_jax.config.experiment import Dataset as DatasetConfig
from smallbatch_jax.data.streaming import prefetch
from smallbatch_jax.data.streaming.prefetch import Prefetcher, WorkerDied
from smallbatch_jax.data.streaming.sample_index import BatchSlice, Decoded, SampleIndex

BYTES = photos.SIZE**2 * 3
SEEDS = (3, 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return photos.write(tmp_path_factory.mktemp("photos"))


def sample_index(root, augment=True, **slices):
    return SampleIndex(photos.load(root), SEEDS, DatasetConfig(augment=augment), **slices)


def one_by_one(images, first, count):
    return Decoded(*(np.stack(values) for values in zip(*(images[first + i] for i in range(count)), strict=True)))


def equal(found, expected, first=None):
    """Asserts that `found` equals `expected`, or its first `first` examples."""
    for name, a, b in zip(Decoded._fields, found, expected, strict=True):
        np.testing.assert_array_equal(a, b[:first] if first is not None else b, name)


@pytest.fixture(scope="module")
def two_workers(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "MOST_PER_MESSAGE", 7)
        prefetcher = Prefetcher(sample_index(root), BYTES, 2)
    yield prefetcher
    prefetcher.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.long
def test_a_prefetcher_goes_on_from_any_number(root, two_workers, workers, monkeypatch):
    """Seeks forwards, backwards, into the middle of a message, across seeds and to the test set give the right images."""
    monkeypatch.setattr(prefetch, "MOST_PER_MESSAGE", 7)
    images = sample_index(root)
    prefetcher = two_workers if workers else Prefetcher(sample_index(root), BYTES, 0)
    second, test = images.training(7, 0), images.testing(0)
    for number, count in ((10, 25), (35, 4), (0, 10), (3, 1), (4, 40), (200, 5), (second, 9), (test, 20), (5, 30), (test, 20)):
        prefetcher.seek(number)
        equal(prefetcher.take(0), one_by_one(images, number, 1), first=0)
        equal(prefetcher.take(count), one_by_one(images, number, count))
        time.sleep(0.2 * (number == test))  # lets the workers run on beyond the last image
        assert prefetcher.number == number + count


def test_a_seeds_numbers_are_the_stream_of_its_epochs(root):
    images = sample_index(root)
    for seed in SEEDS:
        found = [int(images[images.training(seed, position)].examples) for position in range(110)]
        np.testing.assert_array_equal(found, tiny.batch_indices(seed, 0, 11, 10, 50).reshape(-1))
    assert [int(images[images.testing(i)].examples) for i in range(20)] == list(range(20))


def test_labels_are_those_of_the_files(root):
    images, memory = sample_index(root, augment=False), photos.in_memory(root)
    for position in range(60):
        found = images[images.training(7, position)]
        np.testing.assert_array_equal(found.images, memory.train_images[found.examples])
        assert found.labels == memory.train_labels[found.examples]


def test_what_an_image_looks_like_depends_on_seed_epoch_and_example(root):
    images = sample_index(root)
    looks = {(seed, epoch): images.decode_training(seed, epoch, 5).images.tobytes() for seed in SEEDS for epoch in range(3)}
    assert len(set(looks.values())) == 6
    assert images.decode_training(3, 1, 5).images.tobytes() == looks[3, 1]
    assert images.decode_training(3, 1, 6).images.tobytes() != looks[3, 1]


def test_the_parts_of_two_processes_are_the_whole(root):
    """Each process takes half of every batch of 6, and of every 8 test images."""
    whole = sample_index(root)
    halves = [sample_index(root, train=BatchSlice(6, first, 3), test=BatchSlice(8, first // 3 * 4, 4)) for first in (0, 3)]
    for seed in SEEDS:
        for step in (0, 1, 9, 20):
            begins = [half.training(seed, 6 * step) for half in halves]
            found = [int(half[begin + i].examples) for half, begin in zip(halves, begins, strict=True) for i in range(3)]
            assert found == [int(whole[whole.training(seed, 6 * step + i)].examples) for i in range(6)]
            for half, begin, position in zip(halves, begins, (6 * step + 1, 6 * step + 4), strict=True):
                assert half.training_image(begin + 1) == whole.training_image(whole.training(seed, position))
    for begin in (0, 8):
        found = [int(half[half.testing(begin) + i].examples) for half in halves for i in range(4)]
        assert found == list(range(begin, begin + 8))
    assert not halves[1][halves[1].testing(16) + 4].valid  # there are only 20 test images


def test_a_broken_file_is_marked_and_the_others_are_as_they_were(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    images = sample_index(copy)
    path = Path(photos.load(copy).train.name(11))
    for content in (b"", b"not a picture", path.read_bytes()[:100], None):
        path.unlink() if content is None else path.write_bytes(content)
        assert not images.decode_training(3, 0, 11).valid
        assert not images.decode_training(3, 0, 11).images.any()
    equal(images.decode_training(3, 0, 12), sample_index(root).decode_training(3, 0, 12))


@pytest.mark.long
@pytest.mark.parametrize("taken", [0, 3])
def test_a_worker_that_dies_is_reported(root, taken):
    """A dead worker is reported after some images were taken, and before it is ready to decode any."""
    before = children(os.getpid())
    prefetcher = Prefetcher(sample_index(root), BYTES, 1)
    prefetcher.seek(0)
    if taken:
        prefetcher.take(taken)
    while not (workers := children(os.getpid()) - before):  # it has not started Python yet
        time.sleep(0.01)
    os.kill(workers.pop(), signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"a process that decodes images died: .* exit code -9"):
        prefetcher.take(2000)  # more than there is on its way
    prefetcher.close()


def children(pid):
    """Returns the ids of the processes that decode for process `pid`."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rsplit(")")[-1].split()[1])
            if parent == pid and "spawn_main" in (folder / "cmdline").read_text():
                found.add(int(folder.name))
    return found


UNGUARDED = """
import photos, tiny
import smallbatch_jax as sbj

sbj.sweep(tiny.PlainModel(), photos.load({!r}), [4], [2**-9], 1, workers=1)
"""
WITH_TESTS = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[2:0:-1]))}


@pytest.mark.long
def test_a_script_that_calls_sweep_as_it_is_imported_says_what_it_lacks(root, tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED.format(str(root)))
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=WITH_TESTS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "sweep: call it below `if __name__ == '__main__':`" in done.stderr


READER = """
import sys, time
import photos
from smallbatch_jax.config.experiment import Dataset
from smallbatch_jax.data.streaming import prefetch, sample_index
if __name__ == "__main__":
    images = sample_index.SampleIndex(photos.load(sys.argv[1]), (0,), Dataset(augment=True))
    prefetcher = prefetch.Prefetcher(images, 192, 2)
    prefetcher.seek(0)
    prefetcher.take(9)
    print("reading", flush=True)
    sys.stdin.readline()
    prefetcher.take(2000)  # more than there is on its way
    print("still", flush=True)
    time.sleep(60)
"""


@pytest.mark.long
def test_workers_outlive_a_signal_to_their_group_and_not_their_parent(root, tmp_path):
    (tmp_path / "reader.py").write_text(textwrap.dedent(READER))
    command = [sys.executable, str(tmp_path / "reader.py"), str(root)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, env=WITH_TESTS, start_new_session=True) as process:
        while len(workers := children(process.pid)) < 2:  # still importing, and has not set its signal handlers
            assert process.poll() is None
        end(workers)
        assert process.stdout.readline() == "reading\n"
        end(workers)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still\n"
        process.kill()
        process.communicate()
    until = time.monotonic() + 20
    while alive := [worker for worker in workers if running(worker)]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


def end(processes):
    for pid in processes:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def photograph(i):
    rng = np.random.default_rng(i)
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((40 + i, 30))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Returns a small folder as `prepare_data.py` leaves it: array_record files of JPEGs, written by TFDS itself."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {"image": tfds.features.Image(encoding_format="jpeg"), "file_name": tfds.features.Text()}
            features["label"] = tfds.features.ClassLabel(names=["n01", "n02", "n03"])
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(30)), "validation": self._generate_examples(range(100, 112))}

        def _generate_examples(self, numbers):
            for i in numbers:
                yield i, {"image": io.BytesIO(photograph(i)), "file_name": f"{i}.JPEG", "label": i % 3}

    folder = tmp_path_factory.mktemp("tfds")
    Imagenet2012(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_imagenet_is_read_record_by_record(imagenet):
    found = data.load("imagenet2012", imagenet, 16)
    assert (found.num_train, found.num_test, found.num_classes, found.image_shape) == (30, 12, 3, (16, 16, 3))
    for source, numbers in ((found.train, range(30)), (found.test, range(100, 112))):
        content = dict(source.read(i) for i in reversed(range(len(source))))
        assert content == {photograph(i): i % 3 for i in numbers}
    mean, deviation = found.channel_statistics()
    np.testing.assert_allclose(mean / 255, [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(deviation / 255, [0.229, 0.224, 0.225], rtol=1e-6)


def test_workers_read_records(imagenet):
    images = SampleIndex(data.load("imagenet2012", imagenet, 16), (0,), DatasetConfig(augment=True, color_jitter=True))
    prefetcher = Prefetcher(images, 16 * 16 * 3, 1)
    prefetcher.seek(0)
    found = prefetcher.take(40)
    prefetcher.close()
    equal(found, one_by_one(images, 0, 40))
    assert found.valid.all()


def test_a_missing_file_of_records_is_refused(imagenet, tmp_path):
    copy = shutil.copytree(imagenet, tmp_path / "copy")
    info = copy / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"30"', '"20", "10"'))
    line = error_line(data.load, "imagenet2012", copy, 16)
    assert "5.1.0' has 1 of the 2 array_record files of train; delete it and prepare it again: python experiments/" in line


def test_a_copy_of_a_folder_has_its_digest_and_a_changed_one_another(imagenet, root, tmp_path):
    def digest(name, folder):
        return data.load(name, folder, 16).digest()

    copy = tmp_path / "copy"
    shutil.copytree(imagenet, copy, copy_function=shutil.copyfile)  # with other modification times
    assert digest("imagenet2012", copy) == digest("imagenet2012", imagenet)
    shutil.copytree(root, copy, copy_function=shutil.copyfile, dirs_exist_ok=True)
    assert digest("folder", copy) == digest("folder", root)
    first = min(copy.glob("train/*/*"))
    first.write_bytes(b"")  # a broken picture may be replaced
    assert digest("folder", copy) == digest("folder", root)
    first.rename(first.with_stem("renamed"))
    assert digest("folder", copy) != digest("folder", root)


def test_imagenet_that_is_not_there_says_how_to_prepare_it(tmp_path):
    assert "python experiments/prepare_data.py --dataset=imagenet2012" in error_line(data.load, "imagenet2012", tmp_path, 224)


def test_statistics_of_a_folder_are_those_of_its_training_images(root):
    mean, deviation = photos.in_memory(root).channel_statistics()
    found = photos.load(root).channel_statistics()
    np.testing.assert_allclose(found[0], mean, rtol=1e-6)
    np.testing.assert_allclose(found[1], deviation, rtol=1e-6)


def test_a_folder_without_one_sound_image_is_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    for path in copy.glob("train/*/*"):
        path.write_bytes(b"x")
    assert "none of 50 training images can be decoded" in error_line(photos.load(copy).channel_statistics)
