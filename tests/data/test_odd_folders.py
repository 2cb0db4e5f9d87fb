"""Tests folders with unusual links, file names and numbers of pictures."""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from pictures import GREEN, error_line, load, save
from PIL import Image

from smallbatch_jax.data import decode


@pytest.mark.parametrize("where", ["train/cat/up", "train/cat/1.png", "test/dog/x.jpg"])
def test_links_to_directories_above_are_not_followed_within_a_class(root, where):
    path = root / where
    path.unlink(missing_ok=True)
    path.symlink_to(root, target_is_directory=True)
    assert load(root).train_images.shape[1:] == (4, 6, 3)


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_class_that_leads_back_to_a_directory_above_is_named(root, target):
    """A link to its split, the root or the root's parent is a class without pictures, and the error names it."""
    (root / "test" / "loop").symlink_to(target, target_is_directory=True)
    assert "class 'loop' has no images in train/" in error_line(load, root)
    (root / "train" / "loop").symlink_to(target, target_is_directory=True)
    line = error_line(load, root)
    assert "class 'loop' has no images in train/" in line
    assert repr(str(root / "train" / "loop")) in line


def test_a_directory_may_be_named_like_a_picture(root):
    """Such a directory is a class in a split, and is ignored within a class."""
    for split in ("train", "test"):
        save(root / split / "x.png" / "0.png", Image.new("RGB", (6, 4), (1, 2, 3)))
        (root / split / "x.png" / "1.png").mkdir()
    pictures = load(root)
    assert pictures.class_names == ("cat", "dog", "x.png")
    np.testing.assert_array_equal(pictures.train_images[pictures.train_labels == 2], np.full((1, 4, 6, 3), (1, 2, 3)))


@pytest.mark.parametrize("becomes", ["nothing", "directory", "empty"])
def test_a_picture_that_goes_away_while_others_are_read_is_named(root, monkeypatch, becomes):
    path = root / "train" / "dog" / "1.png"
    decode_images = decode.decode_images

    def decode_later(*args):
        path.unlink()
        if becomes == "directory":
            path.mkdir()
        elif becomes == "empty":
            path.touch()
        return decode_images(*args)

    monkeypatch.setattr(decode, "decode_images", decode_later)
    said = {"nothing": "cannot be read (No such file or directory)", "directory": "cannot be read (Is a directory)"}
    assert error_line(load, root).startswith(f"dataset.data_dir: {str(path)!r} {said.get(becomes, 'is not a JPEG')}")


NAMES = {
    "spaces": " two words ",
    "combining": "e\u0301",
    "composed": "\xe9",
    "emoji": "🐈‍⬛",
    "right to left": "חתול \u202e gpj",
    "dash": "-rf",
    "line break": "a\nb\r\u2028c",
    "quotes": 'it\'s "this"',
    "format": "%s{0}\\n",
    "not UTF-8": os.fsdecode(b"\xff\xfe cat"),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_any_name_of_a_class_and_of_a_picture_will_do(root, name):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / name)
    save(root / "train" / name / f"{name}.png", Image.new("RGB", (6, 4), (7, 8, 9)))
    pictures = load(root)
    assert pictures.class_names == tuple(sorted(["cat", name]))
    label = pictures.class_names.index(name)
    mine = pictures.train_images[pictures.train_labels == label][:, 0, 0].tolist()
    assert sorted(mine) == sorted([[7, 8, 9], *([*GREEN[:2], i] for i in range(3))])
    assert load(root).class_names == pictures.class_names  # from the cache


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_any_name_is_one_line_that_can_be_printed(root, name):
    path = root / "train" / name / f"{name}.png"
    for split in ("train", "test"):
        save(root / split / name / f"{name}.png", Image.new("RGB", (6, 4)))
    path.write_bytes(b"text")
    line = error_line(load, root)
    assert line.startswith(f"dataset.data_dir: {str(path)!r} is not a JPEG, PNG, WebP, BMP, TIFF or GIF image")
    line.encode("utf-8")
    (root / "test" / name).rename(root / "elsewhere")
    line = error_line(load, root)
    assert f"class {name!r} has no images in test/" in line
    line.encode("utf-8")


def test_errors_can_be_printed_where_the_terminal_knows_ascii_alone(root):
    """Errors about names that are not UTF-8 print on an ASCII stream, and about any other name in an ASCII locale."""
    for name, environment in (
        (os.fsdecode(b"\xff"), {"PYTHONIOENCODING": "ascii"}),
        ("\xe9🐈", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ):
        path = root / "train" / "cat" / f"{name}.png"
        path.write_bytes(b"")
        code = f"""
from smallbatch_jax import data
try:
    data.load("folder", {str(root)!r})
except ValueError as error:
    print(error)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | environment)
        assert run.stderr == b""
        assert run.stdout.startswith(b"dataset.data_dir: ")
        assert run.stdout.isascii()
        assert run.stdout.endswith(b" image; replace or remove it\n")
        path.unlink()


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_class_of_many_pictures(tmp_path, count):
    """Many pictures (links to ten files, which are quick to make) are read with few files open at a time."""
    for i in range(10):
        save(tmp_path / "sources" / f"{i}.png", Image.new("RGB", (8, 8), (i, 10 * i, 255 - i)))
    for split, name, number in (("train", "many", count), ("train", "one", 1), ("test", "many", 1), ("test", "one", 1)):
        (tmp_path / "root" / split / name).mkdir(parents=True)
        for i in range(number):
            os.link(tmp_path / "sources" / f"{i % 10}.png", tmp_path / "root" / split / name / f"{i:06}.png")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
        began = time.perf_counter()
        pictures = load(tmp_path / "root")
        seconds = time.perf_counter() - began
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert pictures.train_images.shape == (count + 1, 8, 8, 3)
    np.testing.assert_array_equal(pictures.train_labels, [0] * count + [1])
    number = np.append(np.arange(count) % 10, 0)
    np.testing.assert_array_equal(pictures.train_images[:, 0, 0], np.stack([number, 10 * number, 255 - number], -1))
    np.testing.assert_array_equal(pictures.train_images.max((1, 2)), pictures.train_images.min((1, 2)))
    assert seconds < 60
