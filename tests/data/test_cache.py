"""Tests the cache of decoded pictures: it is read when nothing changed, and its content is checked and never executed."""

import io
import os
import pickle
import threading

import numpy as np
import pytest
from pictures import Bomb, load, save
from PIL import Image

from smallbatch_jax.data import cache


def cache_file(cache_dir):
    (path,) = cache_dir.iterdir()
    return path


def assert_same(first, second):
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.class_names == second.class_names


def test_second_load_decodes_nothing(root, decoded_files):
    first = load(root)
    assert len(decoded_files) == 10
    assert_same(load(root), first)
    assert len(decoded_files) == 10


def test_nothing_is_written_into_the_folder(root):
    before = sorted(root.rglob("*"))
    load(root)
    assert sorted(root.rglob("*")) == before


def touch(root):
    os.utime(root / "train" / "cat" / "0.png", ns=(1, 1))


def rename(root):
    (root / "train" / "cat" / "2.png").rename(root / "train" / "cat" / "3.png")  # the order within its class stays the same


def remove(root):
    (root / "test" / "cat" / "0.png").unlink()


def move_to_other_split(root):
    (root / "train" / "cat" / "2.png").rename(root / "test" / "cat" / "2.png")


def change_size_alone(root):
    path = root / "train" / "cat" / "0.png"
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize("change", [touch, rename, remove, move_to_other_split, change_size_alone])
def test_a_changed_folder_is_decoded_again(root, decoded_files, cache_dir, change):
    """The new arrays replace the old ones, so that the cache does not grow with every change."""
    load(root)
    old = cache_file(cache_dir)
    decoded_files.clear()
    change(root)
    load(root)
    assert len(decoded_files) >= 9
    assert cache_file(cache_dir) != old


@pytest.mark.parametrize("name", ["cache.FORMAT_VERSION", "decode.VERSION"])
def test_a_new_version_does_not_read_old_files(root, decoded_files, monkeypatch, name):
    load(root)
    monkeypatch.setattr(f"smallbatch_jax.data.{name}", 999)
    load(root)
    assert len(decoded_files) == 20


def test_two_folders_keep_separate_files(root, tmp_path, cache_dir, decoded_files):
    """Two folders have separate cache files even if names, sizes and times are the same to the nanosecond."""
    other = tmp_path / "other"
    for path in root.rglob("*.png"):
        copy = other / path.relative_to(root)
        save(copy, Image.new("RGB", (6, 4)))
        copy.write_bytes(copy.read_bytes().ljust(200, b"\0"))
        path.write_bytes(path.read_bytes().ljust(200, b"\0"))
        os.utime(copy, ns=(1, 1))
        os.utime(path, ns=(1, 1))
    load(root)
    assert load(other).train_images.max() == 0
    assert load(root).train_images.max() == 250
    assert len(list(cache_dir.iterdir())) == 2
    assert len(decoded_files) == 20


def npz_bytes(array):
    stream = io.BytesIO()
    np.savez(stream, images=array)
    return stream.getvalue()


def flipped(content):
    return content[:300] + bytes([content[300] ^ 1]) + content[301:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-40],
        lambda content: content[:300],
        lambda content: b"\0" * len(content),
        flipped,
        lambda content: npz_bytes(np.zeros((9, 4, 6, 3), np.uint8)),
        lambda content: npz_bytes(np.zeros((10, 4, 6, 3), np.float32)),
        lambda content: npz_bytes(np.zeros((), np.uint8)),
        lambda content: content.replace(b"(10, 4, 6, 3)", b"(10, 4, 6,2**62)"[:13]),
        lambda content: content.replace(b"(10, 4, 6, 3)", b"(10, 99999999)").ljust(300),
    ],
)
def test_a_damaged_cache_is_decoded_again_and_mended(root, cache_dir, decoded_files, capsys, damage):
    first = load(root)
    path = cache_file(cache_dir)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    assert path.read_bytes() != sound
    decoded_files.clear()
    assert_same(load(root), first)
    assert len(decoded_files) == 10
    assert_same(load(root), first)
    assert len(decoded_files) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(str(path)) in line


@pytest.mark.parametrize("in_npz", [True, False], ids=["object array", "bare pickle"])
def test_a_planted_pickle_is_not_run(root, cache_dir, tmp_path, in_npz):
    first = load(root)
    bomb, mark = Bomb(tmp_path / "exploded"), tmp_path / "exploded"
    content = npz_bytes(np.array([bomb], object)) if in_npz else pickle.dumps(bomb)
    cache_file(cache_dir).write_bytes(content)
    assert_same(load(root), first)
    assert not mark.exists()


def full_disk(cache_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)


def file_in_the_way(cache_dir, monkeypatch):
    cache_dir.write_text("")


@pytest.mark.parametrize("trouble", [full_disk, file_in_the_way])
def test_a_cache_that_cannot_be_written_costs_one_line(root, cache_dir, monkeypatch, capsys, trouble):
    trouble(cache_dir, monkeypatch)
    assert load(root).train_images.shape == (6, 4, 6, 3)
    lines = capsys.readouterr().err.splitlines()
    assert "were not kept" in lines[-1]
    assert str(cache_dir) in lines[-1]
    assert len(lines) == 1
    assert not cache_dir.is_dir() or not list(cache_dir.iterdir())


def test_nothing_is_said_where_stderr_is_no_terminal(root, capfd):
    load(root)
    load(root)
    assert capfd.readouterr() == ("", "")


def test_concurrent_loads_leave_one_sound_file(root, cache_dir, decoded_files):
    threads = [threading.Thread(target=load, args=(root,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache_file(cache_dir).suffix == ".npz"
    decoded_files.clear()
    load(root)
    assert decoded_files == []


def test_abandoned_temporary_files_are_removed(root, cache_dir):
    """A temporary file that a killed writer left is removed once it is a day old."""
    load(root)
    path = cache_file(cache_dir)
    old, fresh = (path.with_name(f"{path.name}.{name}.tmp") for name in ("old", "fresh"))
    for temporary in (old, fresh):
        temporary.write_bytes(b"")
    os.utime(old, (1, 1))
    touch(root)
    load(root)
    assert fresh.exists()
    assert not old.exists()


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "cache"
    monkeypatch.delenv("SMALLBATCH_CACHE")
    assert cache.directory() == tmp_path / "xdg" / "smallbatch_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.directory() == tmp_path / ".cache" / "smallbatch_jax"
