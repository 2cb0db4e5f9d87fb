"""Tests folders of pictures: they are decoded correctly, or an error of one line names the path."""

import io
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from pictures import GREEN, RED, error_line, load, save
from PIL import Image

from smallbatch_jax import data
from smallbatch_jax.data import decode


def test_folder_gives_the_pictures_by_class_and_name(root):
    pictures = load(root)
    assert pictures.class_names == ("cat", "dog")
    assert pictures.num_classes == 2
    assert pictures.train_images.shape == (6, 4, 6, 3)
    assert pictures.test_images.shape == (4, 4, 6, 3)
    assert pictures.train_images.dtype == np.uint8
    np.testing.assert_array_equal(pictures.train_labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(pictures.test_labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(pictures.train_images[:, 0, 0, :], [(*c[:2], i) for c in (RED, GREEN) for i in range(3)])


def test_folder_ignores_what_is_no_picture(root, capsys):
    (root / "README.txt").write_text("hello")
    (root / "train" / "notes.txt").write_text("hello")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    (root / "train" / "cat" / "labels.txt").write_text("hello")
    (root / "train" / "cat" / "README").write_text("hello")
    (root / "train" / "cat" / "._0.png").write_bytes(b"\0")
    (root / "train" / "cat" / "more.png").mkdir()
    assert load(root).train_images.shape == (6, 4, 6, 3)
    assert capsys.readouterr().err == ""


def test_folder_takes_suffixes_in_any_case(root, capsys):
    names = ("x.JPG", "y.Jpeg", "z.PNG", "a.webp", "b.bmp", "c.TIF", "d.tiff", "e.gif", "f.jpe")
    for name in names:
        save(root / "train" / "dog" / name, Image.new("RGB", (6, 4)))
    save(root / "train" / "dog" / "g.jfif", Image.new("RGB", (6, 4)), format="JPEG")
    assert len(load(root).train_images) == 6 + len(names) + 1
    assert capsys.readouterr().err == ""


def test_what_may_be_pictures_and_is_left_out_is_counted_in_one_warning(root, capsys):
    picture = Image.new("RGB", (6, 4))
    for name in ("a.png", "b.webp"):
        save(root / "train" / "cat" / "more" / "deep" / name, picture)
    save(root / "test" / "c.png", picture)
    (root / "elsewhere").mkdir()
    save(root / "elsewhere" / "d.jpg", picture)
    (root / "train" / "dog" / "link").symlink_to(root / "elsewhere", target_is_directory=True)
    for name in ("e.heic", "f.HEIC", "g.npy", "noending", "h.png.bak"):
        (root / "train" / "dog" / name).write_bytes(b"x")
    for _ in range(2):
        assert len(load(root).train_images) == 6
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"warning: dataset.data_dir: {str(root)!r} has files that are left out: ")
    counted = line.partition("left out: ")[2].partition(";")[0].split(", ")
    assert sorted(counted) == [
        "1 .bak",
        "1 .npy",
        "1 picture(s) directly in test/",
        "1 without a suffix",
        "2 .heic",
        "3 picture(s) in directories below a class",
    ]


@pytest.mark.parametrize("wrong", ["train", "test", "train/cat", "..", "../more/.."])
def test_a_folder_above_or_below_is_answered_with_the_right_one(root, wrong):
    line = error_line(load, root / wrong)
    assert f"give {str(root)!r}, which holds train/CLASS/" in line.replace("more/../", "")


def test_folder_follows_links_and_home(root, tmp_path, monkeypatch):
    (root / "train" / "dog" / "link.png").symlink_to(root / "train" / "cat" / "0.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("folder", data_dir="~/pictures").train_images) == 7


def test_many_small_files_keep_their_order(tmp_path, monkeypatch):
    """Decoding in chunks by several threads does not change the order."""
    root = tmp_path / "many"
    for i in range(40):
        save(root / "train" / "a" / f"{i:02}.png", Image.new("L", (2, 2), i))
    save(root / "test" / "a" / "0.png", Image.new("L", (2, 2), 200))
    monkeypatch.setattr(decode, "_CHUNK", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    before = threading.active_count()
    np.testing.assert_array_equal(load(root).train_images[:, 1, 1, 0], np.arange(40))
    assert threading.active_count() == before


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_pictures_have_one_channel(tmp_path, mode):
    for split in ("train", "test"):
        save(tmp_path / split / "a" / "0.png", Image.new(mode, (3, 2)))
        save(tmp_path / split / "a" / "1.jpg", Image.new("L", (3, 2), 90))
    pictures = load(tmp_path)
    assert pictures.train_images.shape == (2, 2, 3, 1)
    np.testing.assert_array_equal(pictures.train_images[:, 0, 0, 0], [0, 90])


@pytest.mark.parametrize("colour_first", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_one_colour_picture_makes_all_colour(tmp_path, split, colour_first):
    """One colour picture at any place gives all of them three channels; grey ones repeat their values in each."""
    for name in ("train", "test"):
        save(tmp_path / name / "a" / "5.png", Image.new("L", (3, 2), 90))
    save(tmp_path / split / "a" / ("0.png" if colour_first else "9.png"), Image.new("RGB", (3, 2), RED))
    pictures = load(tmp_path)
    assert pictures.train_images.shape[1:] == pictures.test_images.shape[1:] == (2, 3, 3)
    images = pictures.train_images if split == "train" else pictures.test_images
    np.testing.assert_array_equal(images[:, 0, 0], [RED, (90,) * 3] if colour_first else [(90,) * 3, RED])


@pytest.mark.parametrize(
    ("image", "suffix", "pixel"),
    [
        (Image.new("RGBA", (6, 4), (*RED, 0)), "png", RED),
        (Image.new("RGB", (6, 4), RED).quantize(), "png", RED),
        (Image.new("CMYK", (6, 4), (0, 0, 0, 255)), "jpg", (0, 0, 0)),
        (Image.fromarray(np.full((4, 6), 0x8642, np.uint16)), "png", (0x86,) * 3),
        (Image.new("1", (6, 4), 1), "png", (255,) * 3),
    ],
    ids=["alpha", "palette", "cmyk", "16-bit", "1-bit"],
)
def test_every_mode_becomes_rgb(root, image, suffix, pixel):
    save(root / "train" / "cat" / f"00.{suffix}", image)
    np.testing.assert_array_equal(load(root).train_images[1, 0, 0], pixel)


def test_palette_with_transparency_is_decoded_quietly(root):
    """Pillow warns about such a palette, and pytest would turn the warning into an error."""
    image = Image.new("RGB", (6, 4), RED).quantize()
    save(root / "train" / "cat" / "00.png", image, transparency=bytes([128] * 3))
    np.testing.assert_array_equal(load(root).train_images[1, 0, 0], RED)


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6 asks for a quarter turn: a picture stored 4 high and 2 wide becomes 2 high and 4 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("L", (2, 4))
    image.putpixel((0, 0), 255)
    for split in ("train", "test"):
        save(tmp_path / split / "a" / "0.png", image, exif=exif)
    picture = load(tmp_path).train_images[0, :, :, 0]
    assert picture.shape == (2, 4)
    assert np.argwhere(picture).tolist() == [[0, 3]]  # the first stored row is the right-hand column


def image_bytes(file_format):
    """Returns a valid file of 64 × 64 pixels of noise."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, file_format)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image"),
        (b"I am a text file", "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image"),
        (image_bytes("PPM"), "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image"),
        (image_bytes("JPEG")[:2000], "cannot be decoded"),
        (image_bytes("JPEG")[:30], "cannot be decoded"),
    ],
    ids=["empty", "text", "ppm", "truncated", "header cut"],
)
@pytest.mark.parametrize("name", ["0.png", "1.jpg"])
def test_unreadable_picture_is_named(root, name, content, said):
    path = root / "train" / "dog" / name
    path.write_bytes(content)
    message = error_line(load, root)
    assert message.startswith(f"dataset.data_dir: {str(path)!r}")
    assert said in message


@pytest.mark.parametrize("where", ["train/cat/0.png", "train/dog/1.png", "test/dog/1.png"])
def test_odd_sized_picture_is_named(root, where):
    """The error names it and a picture of the common size, even where the odd one comes first."""
    save(root / where, Image.new("RGB", (5, 4)))
    message = error_line(load, root)
    assert message.startswith("dataset.data_dir: ")
    assert f"{str(root / where)!r} is 5x4" in message
    assert " is 6x4" in message


def test_data_dir_is_needed():
    assert error_line(data.load, "folder").startswith("dataset.data_dir: got None")
    assert error_line(data.load, "folder", data_dir="").startswith("dataset.data_dir: got None")
    assert error_line(load, 5).startswith("dataset.data_dir: got 5")


def test_missing_folder_is_named(tmp_path):
    assert f"cannot list {str(tmp_path / 'none')!r} (No such file" in error_line(load, tmp_path / "none")


def test_root_that_is_no_directory_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert f"cannot list {str(path)!r} (Not a directory)" in error_line(load, path)


@pytest.mark.parametrize("data_dir", ["a\0b", "x" * 5000, "two\nlines"])
def test_impossible_paths_are_one_line(data_dir):
    assert error_line(load, data_dir).startswith("dataset.data_dir: cannot list ")


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split_is_named(root, split):
    (root / split).rename(root / "elsewhere")
    assert f"cannot list {str(root / split)!r}" in error_line(load, root)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_class_in_one_split_is_named(root, split, other):
    save(root / split / "bird" / "0.png", Image.new("RGB", (6, 4)))
    message = error_line(load, root)
    assert f"class 'bird' has no images in {other}/" in message
    assert str(root / other / "bird") in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_without_images_is_named(root, split):
    for path in (root / split / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert f"class 'dog' has no images in {split}/" in error_line(load, root)


def test_folder_without_classes_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    assert f"{str(tmp_path)!r} holds no class directories" in error_line(load, tmp_path)


@pytest.mark.parametrize("where", ["train", "train/dog", "test/dog/9.png", "train/bird"])
def test_link_to_itself_is_named(root, where):
    path = root / where
    if path.exists():
        path.rename(root / "elsewhere")
    path.symlink_to(path)
    message = error_line(load, root)
    assert message.startswith("dataset.data_dir: ")
    assert repr(str(path)) in message
    assert "symbolic link" in message


def test_dangling_link_is_named(root):
    path = root / "train" / "dog" / "9.png"
    path.symlink_to(root / "nowhere.png")
    assert f"{str(path)!r} cannot be read (No such file or directory)" in error_line(load, root)


def test_pipe_is_refused_rather_than_waited_for(root):
    path = root / "train" / "dog" / "9.png"
    os.mkfifo(path)
    assert f"{str(path)!r} is not a regular file" in error_line(load, root)


@pytest.fixture
def reachable(root, request):
    """Yields a copy that any user can read except for the path in the test's parameter, and that path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        copy = shutil.copytree(root, Path(folder) / "pictures")
        (copy / request.param).chmod(0)
        yield copy, request.param
        (copy / request.param).chmod(0o700)


@pytest.mark.parametrize("reachable", [".", "train", "train/dog", "test/dog/0.png"], indirect=True)
def test_forbidden_path_is_named(reachable, request):
    copy, where = reachable
    request.getfixturevalue("forbidden")  # from here on this process is not root
    line = error_line(load, copy)
    assert "Permission denied" in line
    assert str(copy / where) in line
