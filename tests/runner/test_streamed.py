"""Training on streamed photographs equals training on them in memory, whatever the workers, the room and the lanes."""

import dataclasses
import os
import shutil

import pandas as pd
import photos
import pytest
import tiny

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data.streaming.prefetch import Prefetcher
from smallbatch_jax.program import lanes
from smallbatch_jax.runner import scheduler
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.input import Streamed
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results, skipped
from smallbatch_jax.store.workdir import read_workdir

RATES = (2**-9, 2**-7, 1e30, 2**-8, 2**-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return photos.write(tmp_path_factory.mktemp("photos"))


def train(workdir, dataset, progress=None, lanes=2, seeds=(0,), base_lrs=RATES, model=tiny.PlainModel, **streaming):
    """Trains a tiny grid into a workdir and returns its rows; uses no worker processes, which take seconds to start."""
    chosen = tiny.grid(base_lrs=base_lrs, lanes=lanes, seeds=seeds, segment_seconds=1e-9)
    chosen = dataclasses.replace(chosen, dataset=dataclasses.replace(chosen.dataset, **{"workers": 0, **streaming}))
    train_grid(chosen, workdir, dataset, progress or NoProgress(), lambda b: model())
    return results.load(workdir)


def same(found, expected):
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.fixture(scope="module")
def augmented(root, tmp_path_factory):
    return train(tmp_path_factory.mktemp("augmented") / "w", photos.load(root), augment=True)


@pytest.mark.parametrize("model", [tiny.PlainModel, pytest.param(tiny.TinyModel, marks=pytest.mark.slow)])
def test_streamed_images_train_as_the_same_images_in_memory_do(root, tmp_path, model):
    """All rows, also of diverged runs and evaluations, agree to the rounding of the channel statistics."""
    found = train(tmp_path / "streamed", photos.load(root), model=model)
    pd.testing.assert_frame_equal(found, train(tmp_path / "w", photos.in_memory(root), model=model), rtol=1e-5)
    assert model is tiny.TinyModel or set(found.status) == {"finished", "diverged"}
    assert found.test_accuracy.max() > 0.6
    guess = [read_workdir(tmp_path / name)[1]["guess"] for name in ("streamed", "w")]
    assert guess[0] == guess[1]  # the classes of the test set are counted, not taken to be balanced


def test_an_augmented_run_is_the_same_alone_and_beside_others(root, augmented, tmp_path):
    alone = train(tmp_path / "w", photos.load(root), augment=True, base_lrs=(2**-8,), lanes=1)
    same(alone, augmented[augmented.base_lr == 2**-8].reset_index(drop=True))
    assert len(alone) == 3


@pytest.mark.long
def test_augmentation_shows_other_images(root, augmented, tmp_path):
    plain = train(tmp_path / "w", photos.load(root))
    assert not plain.train_loss.equals(augmented.train_loss)
    jittered = train(tmp_path / "jittered", photos.load(root), augment=True, color_jitter=True)
    assert not jittered.train_loss.equals(augmented.train_loss)


OUT_OF_STEP = (2**-9, 2**-8, 1e30, 2e30, 3e30, 4e30)  # the last two start once others have diverged


@pytest.fixture(scope="module")
def out_of_step(root, tmp_path_factory):
    return train(tmp_path_factory.mktemp("out") / "w", photos.load(root), augment=True, lanes=4, base_lrs=OUT_OF_STEP)


@pytest.mark.parametrize("room", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_lanes_out_of_step_wait_for_each_other_where_there_is_no_room(root, out_of_step, tmp_path, monkeypatch, room):
    """The pool has room for one or two batches; each device has two lanes, which are refilled."""
    monkeypatch.setattr("smallbatch_jax.runner.input.POOL_BYTES", room * photos.SIZE**2 * 3)
    streams, load, steps = [], Streamed.prepare, Streamed.steps

    def spy(self, program, batch_size, spans):
        streams.append({(span.run.seed, span.first_step) for span in spans if span})
        return load(self, program, batch_size, spans)

    def behind_first(self, program, batch_size, wanted, pace):
        chosen = steps(self, program, batch_size, wanted, pace)
        firsts = [(span.first_step, n) for span, n in zip(wanted, chosen, strict=True) if span]
        went, waited = [step for step, n in firsts if n], [step for step, n in firsts if not n]
        assert not waited or max(went) < min(waited)
        return chosen

    monkeypatch.setattr(Streamed, "prepare", spy)
    monkeypatch.setattr(Streamed, "steps", behind_first)
    same(train(tmp_path / "w", photos.load(root), augment=True, lanes=4, base_lrs=OUT_OF_STEP), out_of_step)
    assert {len(found) for found in streams} == set(range(1, room // 4 + 1))


@pytest.mark.long
def test_two_seeds_are_two_streams(root, augmented, tmp_path):
    both = train(tmp_path / "w", photos.load(root), augment=True, lanes=6, seeds=(0, 1))
    same(both[both.seed == 0].reset_index(drop=True), augmented)
    assert not both[both.seed == 1].reset_index(drop=True).train_loss.equals(augmented.train_loss)


def test_lanes_in_step_share_what_is_decoded(root, tmp_path, monkeypatch):
    """Four runs of one seed decode the training images of one run and the images of each epoch's evaluation."""
    asked, take = [], Prefetcher.take
    monkeypatch.setattr(Prefetcher, "take", lambda self, count: asked.append(count) or take(self, count))
    train(tmp_path / "w", photos.load(root), base_lrs=(2**-9, 2**-8, 2**-7, 2**-6), lanes=4)
    assert sum(asked) == 38 * 4 + 3 * 20


@pytest.mark.long
def test_side_by_side_as_one_after_the_other(root, augmented, tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "lane_mapping", lambda platform: "vmap")
    found = train(tmp_path / "w", photos.load(root), augment=True)
    pd.testing.assert_frame_equal(found, augmented, rtol=1e-4)


@pytest.mark.long
def test_a_batch_shared_by_two_devices(root, augmented, tmp_path):
    chosen = tiny.grid(base_lrs=RATES, segment_seconds=1e-9, data_devices=2)
    chosen = dataclasses.replace(chosen, dataset=dataclasses.replace(chosen.dataset, workers=0, augment=True))
    train_grid(chosen, tmp_path / "w", photos.load(root), NoProgress(), shared_model)
    pd.testing.assert_frame_equal(results.load(tmp_path / "w"), augmented, rtol=1e-4)


def shared_model(bn_batch_size, axis_name=None):
    return tiny.PlainModel()


class Killed(NoProgress):
    """Ends the work after `after` segments, as a SIGKILL would: nothing more is saved."""

    def __init__(self, after):
        self.left = after

    def show(self, *_):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.long
def test_killed_and_resumed_the_next_image_is_the_next(root, augmented, tmp_path, monkeypatch):
    """Killed every six segments, with a checkpoint after each, a sweep has the same rows and decodes few images twice."""
    monkeypatch.setattr(scheduler, "CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(tiny, "grid", lambda grid=tiny.grid, **fields: grid(checkpoint_seconds=0, **fields))
    lives = 0
    while lives < 50:
        lives += 1
        try:
            found = train(tmp_path / "w", photos.load(root), augment=True, progress=Killed(6))
            break
        except KeyboardInterrupt:
            continue
    assert lives > 2
    same(found, augmented)


def broken_root(root, tmp_path, split, count=1):
    """Copies the folder, damages files and returns (root, their paths)."""
    copy = shutil.copytree(root, tmp_path / "broken")
    paths = sorted((copy / split).glob("*/*.jpg"))[-3 - count : -3]  # of the last class
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return copy, paths


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.long
def test_a_broken_image_ends_the_sweep_with_its_path(root, tmp_path, split):
    copy, (path,) = broken_root(root, tmp_path, split)
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        train(tmp_path / "w", photos.load(copy), augment=True)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.long
def test_what_was_trained_before_a_broken_image_is_kept(root, augmented, tmp_path, monkeypatch):
    """Once the file is repaired, the same command resumes from the last segment before it."""
    copy, (path,) = broken_root(root, tmp_path, "train")
    with pytest.raises(InputError):
        train(tmp_path / "w", photos.load(copy), augment=True)
    assert any((tmp_path / "w" / "checkpoints").glob("*/*"))
    shutil.copy(root / path.relative_to(copy), path)
    same(train(tmp_path / "w", photos.load(copy), augment=True), augmented)


@pytest.mark.long
def test_a_broken_training_image_is_replaced_and_counted_once(root, augmented, tmp_path, capsys):
    copy, paths = broken_root(root, tmp_path, "train", count=2)
    found = train(tmp_path / "w", photos.load(copy), augment=True, broken_images="skip")
    assert set(skipped.load(tmp_path / "w")["image"]) == set(map(str, paths))
    assert capsys.readouterr().err.count("; skipped\n") == 2
    assert len(found) == len(augmented)
    assert not found.train_loss.equals(augmented.train_loss)
    again = train(tmp_path / "again", photos.load(copy), augment=True, broken_images="skip", base_lrs=(2**-8,), lanes=1)
    same(again, found[found.base_lr == 2**-8].reset_index(drop=True))


@pytest.mark.long
def test_the_next_image_of_the_training_set_takes_the_place_of_a_broken_one(root, tmp_path):
    """Its label is used too, as if its file were there twice."""
    statistics = photos.load(root).channel_statistics()
    copy, (path,) = broken_root(root, tmp_path, "train")
    found = train(tmp_path / "w", dataclasses.replace(photos.load(copy), statistics=statistics), broken_images="skip")
    files = sorted((copy / "train").glob("*/*.jpg"))
    shutil.copy(files[files.index(path) + 1], path)
    same(found, train(tmp_path / "twice", dataclasses.replace(photos.load(copy), statistics=statistics)))


def test_broken_test_images_alone_are_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    for path in copy.glob("test/*/*"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"^dataset\.data_dir: none of the 20 test images can be decoded"):
        train(tmp_path / "w", photos.load(copy), broken_images="skip", base_lrs=(2**-8,), lanes=1)


def test_a_folder_of_other_files_is_refused_on_resuming(root, tmp_path):
    train(tmp_path / "w", photos.load(root), base_lrs=(2**-8,), lanes=1)
    copy = shutil.copytree(root, tmp_path / "copy")
    for split in ("train", "test"):
        (copy / split / photos.CLASSES[0]).rename(copy / split / "zebra")  # the labels change
    with pytest.raises(InputError, match="holds a different experiment: the dataset has digest"):
        train(tmp_path / "w", photos.load(copy), base_lrs=(2**-8,), lanes=1)


@pytest.mark.long
def test_a_broken_test_image_is_left_out_of_the_accuracy(root, augmented, tmp_path):
    copy, (path,) = broken_root(root, tmp_path, "test")
    found = train(tmp_path / "w", photos.load(copy), augment=True, broken_images="skip")
    assert list(skipped.load(tmp_path / "w")["image"]) == [str(path)]
    assert found.train_loss.equals(augmented.train_loss)
    right = found.test_accuracy.dropna() * 19
    assert (right - right.round()).abs().max() < 1e-9
    path.unlink()
    pd.testing.assert_frame_equal(train(tmp_path / "without", photos.load(copy), augment=True), found, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"color_jitter": True}, "dataset.color_jitter: is a part of the augmentation"),
    ],
)
def test_what_cannot_be_is_refused(root, tmp_path, fields, said):
    with pytest.raises(InputError, match=said):
        train(tmp_path / "w", photos.load(root), **fields)
    assert not os.path.exists(tmp_path / "w")
