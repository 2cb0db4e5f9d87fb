"""Where images come from: the Dataset, the digits, folders of pictures, and the cache of decoded ones."""

import io
import os
import pickle
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from smallbatch_jax import data
from smallbatch_jax.data import cache, decode
from smallbatch_jax.experiment import InputError

RED, GREEN = (250, 10, 10), (10, 250, 10)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """Each test has a cache of its own; the user's is left alone."""
    monkeypatch.setenv("SMALLBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    """Two classes, three training and two test pictures each: PNG, 6 wide and 4 high, RGB."""
    root = tmp_path / "pictures"
    for split, count in (("train", 3), ("test", 2)):
        for name, colour in (("cat", RED), ("dog", GREEN)):
            for i in range(count):
                save(root / split / name / f"{i}.png", Image.new("RGB", (6, 4), (*colour[:2], i)))
    return root


@pytest.fixture
def decoded_files(monkeypatch):
    """The paths that were decoded, in a list that grows."""
    seen = []
    real = decode._decode_image
    monkeypatch.setattr(decode, "_decode_image", lambda path: seen.append(path) or real(path))
    return seen


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load(root):
    return data.load("folder", data_dir=root)


def error_line(call, *args, **kwargs):
    """The message of the InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def arrays(**changes):
    """Arguments of a small valid Dataset, some of them changed."""
    return {
        "train_images": np.zeros((4, 5, 5, 3), np.uint8),
        "train_labels": np.array([0, 1, 2, 1]),
        "test_images": np.zeros((2, 5, 5, 3), np.uint8),
        "test_labels": np.array([2, 0]),
        "num_classes": 3,
    } | changes


@pytest.mark.parametrize(
    ("name", "hint"), [("digit", "did you mean 'digits'?"), ("Folder", "did you mean 'folder'?"), ("xyz", "'xyz'.")]
)
def test_unknown_name_is_refused_with_the_nearest(name, hint):
    message = error_line(data.load, name)
    assert message.startswith(f"dataset.name: unknown dataset {name!r}")
    assert hint in message
    assert message.endswith("Known: digits, folder.")


def test_image_size_is_refused(root):
    assert error_line(data.load, "folder", data_dir=root, image_size=32).startswith("dataset.image_size: got 32")


def test_import_loads_no_heavy_library():
    """Commands show their --help without waiting for JAX, scikit-learn or Pillow."""
    code = "import sys, smallbatch_jax.data; print([m for m in ('jax', 'sklearn', 'PIL', 'rich') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_dataset_normalises_types():
    """Labels become int32; floating images become float32 with their values kept; lists will do."""
    images = np.linspace(-1, 1, 8).reshape(4, 2)
    dataset = data.Dataset(
        **arrays(
            train_images=images,
            train_labels=[0, 1, 0, 1],
            test_images=images[:1].tolist(),
            test_labels=np.array([1], np.uint8),
            num_classes=np.int64(2),
        )
    )
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.float32
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    assert type(dataset.num_classes) is int
    np.testing.assert_allclose(dataset.train_images, images, rtol=1e-6)


def test_dataset_does_not_copy_what_already_fits():
    images = np.zeros((4, 5, 5, 3), np.uint8)
    assert data.Dataset(**arrays(train_images=images)).train_images is images


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"train_images": np.zeros((4, 5, 5, 3), np.int64)}, "train_images", "int64"),
        ({"train_images": np.zeros((4, 5, 5, 3), object)}, "train_images", "object"),
        ({"train_images": [[1.0, 2.0], [3.0]]}, "train_images", "cannot be made an array"),
        ({"train_images": np.zeros(4, np.uint8)}, "train_images", "(4,)"),
        ({"train_images": np.zeros((4, 0), np.uint8)}, "train_images", "(4, 0)"),
        ({"train_images": np.zeros((0, 5, 5, 3), np.uint8), "train_labels": []}, "train_images", "(0, 5, 5, 3)"),
        ({"test_images": np.zeros((0, 5, 5, 3), np.uint8)}, "test_images", "(0, 5, 5, 3)"),
        ({"test_images": np.zeros((2, 5, 6, 3), np.uint8)}, "test_images", "(5, 6, 3)"),
        ({"test_images": np.zeros((2, 5, 5, 3), np.float32)}, "test_images", "float32"),
        ({"train_images": np.full((4, 5), np.nan), "test_images": np.zeros((2, 5))}, "train_images", "finite"),
        ({"train_images": np.full((4, 5), 1e300), "test_images": np.zeros((2, 5))}, "train_images", "finite"),
        ({"train_labels": np.zeros(3, int)}, "train_labels", "3 labels for 4 images"),
        ({"test_labels": np.zeros(3, int)}, "test_labels", "3 labels for 2 images"),
        ({"train_labels": np.array([0, 1, 2, 3])}, "train_labels", "0 to 3"),
        ({"train_labels": np.array([0, 1, 2, -1])}, "train_labels", "-1 to 2"),
        ({"test_labels": np.array([2**32, 0])}, "test_labels", str(2**32)),
        ({"train_labels": np.zeros(4)}, "train_labels", "float64"),
        ({"train_labels": np.eye(4, 3, dtype=int)}, "train_labels", "(4, 3)"),
        ({"num_classes": 0}, "num_classes", "0"),
        ({"num_classes": 2.5}, "num_classes", "2.5"),
        ({"class_names": ("a", "b")}, "class_names", "3 strings"),
        ({"class_names": "abc"}, "class_names", "3 strings"),
    ],
)
def test_bad_arrays_are_refused_by_name(changes, argument, said):
    message = error_line(data.Dataset, **arrays(**changes))
    assert message.startswith(f"Dataset.{argument}: ")
    assert said in message


def one_class(images):
    return data.Dataset(images, np.zeros(len(images), int), images[:1], np.zeros(1, int), num_classes=1)


@pytest.mark.parametrize("shape", [(700, 6, 5, 3), (700, 6, 5, 1), (700, 4)])
def test_channel_statistics_are_numpys(shape, monkeypatch):
    """Sums over chunks equal the mean and deviation of the whole array in float64."""
    monkeypatch.setattr("smallbatch_jax.data.dataset._STATISTICS_CHUNK_BYTES", 4096)  # several chunks, the last not full
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dataset = one_class(images)
    mean, std = dataset.channel_statistics()
    flat = images.reshape(-1, shape[-1])
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, flat.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, flat.std(axis=0, dtype=np.float64), rtol=1e-6)


def test_channel_statistics_of_a_constant_channel_can_divide():
    images = np.full((3, 7, 7, 2), 77, np.uint8)
    images[0, 0, 0, 1] = 78
    mean, std = one_class(images).channel_statistics()
    assert mean[0] == 77
    assert std[0] == 1
    assert 0 < std[1] < 1


def test_channel_statistics_leave_float_images_as_they_are():
    images = np.random.default_rng(0).normal(5, 3, (4, 2, 2, 3))
    mean, std = one_class(images).channel_statistics()
    np.testing.assert_array_equal(mean, np.zeros(3, np.float32))
    np.testing.assert_array_equal(std, np.ones(3, np.float32))


def test_digits_shapes_and_range():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert digits.num_classes == 10
    assert digits.class_names == tuple("0123456789")


def test_digits_scale_is_linear_in_the_ink():
    """The source's 17 levels 0..16 become round(255·x/16)."""
    levels = np.unique(data.load("digits").train_images)
    np.testing.assert_array_equal(levels, [round(255 * x / 16) for x in range(17)])


def test_digits_split_covers_the_source_once():
    """Every digit of the source is in one split, none in both."""
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    ours = np.concatenate([digits.train_images, digits.test_images]).reshape(1797, 64)
    theirs = np.rint(np.asarray(load_digits(return_X_y=True)[0]) * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_digits_split_is_stratified():
    """Each class gives a fifth of itself to the test split, to within one example."""
    digits = data.load("digits")
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert len(train) == len(test) == 10
    assert np.all(np.abs(test - (train + test) / 5) <= 1)


def test_digits_are_the_same_on_each_call():
    first, second = data.load("digits"), data.load("digits", data_dir="")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_digits_refuse_a_folder(tmp_path):
    assert error_line(data.load, "digits", data_dir=tmp_path).startswith(f"dataset.data_dir: got {str(tmp_path)!r}")


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


def test_folder_ignores_what_is_no_picture(root):
    (root / "README.txt").write_text("hello")
    (root / "train" / "notes.txt").write_text("hello")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    (root / "train" / "cat" / "labels.txt").write_text("hello")
    (root / "train" / "cat" / "._0.png").write_bytes(b"\0")
    (root / "train" / "cat" / "more.png").mkdir()
    assert load(root).train_images.shape == (6, 4, 6, 3)


def test_folder_takes_suffixes_in_any_case(root):
    for name in ("x.JPG", "y.Jpeg", "z.PNG"):
        save(root / "train" / "dog" / name, Image.new("RGB", (6, 4)))
    assert len(load(root).train_images) == 9


def test_folder_follows_links_and_home(root, tmp_path, monkeypatch):
    (root / "train" / "dog" / "link.png").symlink_to(root / "train" / "cat" / "0.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("folder", data_dir="~/pictures").train_images) == 7


def test_many_small_files_keep_their_order(tmp_path, monkeypatch):
    """Threads and their chunks change nothing about the order."""
    root = tmp_path / "many"
    for i in range(40):
        save(root / "train" / "a" / f"{i:02}.png", Image.new("L", (2, 2), i))
    save(root / "test" / "a" / "0.png", Image.new("L", (2, 2), 200))
    monkeypatch.setattr(decode, "_CHUNK", 3)
    monkeypatch.setattr(decode, "_CHUNKS_AHEAD", 2)
    monkeypatch.setattr(decode, "_THREADS_PAY_ABOVE", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    np.testing.assert_array_equal(load(root).train_images[:, 1, 1, 0], np.arange(40))
    assert threading.active_count() == 1


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
    """Wherever it stands; the grey ones keep their values in three channels."""
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
    """Pillow has a warning for this; it would be an error here."""
    image = Image.new("RGB", (6, 4), RED).quantize()
    save(root / "train" / "cat" / "00.png", image, transparency=bytes([128] * 3))
    np.testing.assert_array_equal(load(root).train_images[1, 0, 0], RED)


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6 is a picture that must be turned by a quarter: 4 high and 2 wide as stored is 2 high and 4 wide."""
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
    """A sound file of 64 × 64 pixels of noise."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, file_format)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"I am a text file", "is not a JPEG or PNG image"),
        (image_bytes("GIF"), "is not a JPEG or PNG image"),
        (image_bytes("JPEG")[:2000], "cannot be decoded"),
        (image_bytes("JPEG")[:30], "cannot be decoded"),
    ],
    ids=["empty", "text", "gif", "truncated", "header cut"],
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
    """Also where the odd one comes first, and the others differ from it."""
    save(root / where, Image.new("RGB", (5, 4)))
    message = error_line(load, root)
    assert message.startswith(f"dataset.data_dir: {str(root / where)!r} is 5x4 pixels and others are 6x4")


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
    assert f"class 'bird' is in {split}/ only" in message
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("where", [".", "train", "train/dog", "test/dog/0.png"])
def test_forbidden_path_is_named(root, where):
    (root / where).chmod(0)
    try:
        assert "Permission denied" in error_line(load, root)
    finally:
        (root / where).chmod(0o700)


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
    (root / "train" / "cat" / "2.png").rename(root / "train" / "cat" / "3.png")  # still the last of its class


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
    """And takes the place of the old arrays, so that the cache does not grow with every change."""
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
    """Even if their listings are the same to the nanosecond."""
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


def npy_bytes(array, allow_pickle=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def with_checksum(array):
    return npy_bytes(array) + npy_bytes(np.array(zlib.crc32(array.data), np.uint32))


class _Bomb:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def flipped(content):
    return content[:200] + bytes([content[200] ^ 1]) + content[201:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-40],
        lambda content: content[:300],
        lambda content: b"\0" * len(content),
        flipped,
        lambda content: npy_bytes(np.zeros((10, 4, 6, 3), np.uint8)),
        lambda content: with_checksum(np.zeros((9, 4, 6, 3), np.uint8)),
        lambda content: with_checksum(np.zeros((10, 4, 6, 2), np.uint8)),
        lambda content: with_checksum(np.zeros((10, 72), np.uint8)),
        lambda content: with_checksum(np.zeros((10, 4, 6, 3), np.float32)),
        lambda content: with_checksum(np.zeros((), np.uint8)),
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
    assert path.read_bytes() == sound
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(str(path)) in line


@pytest.mark.parametrize("in_npy", [True, False], ids=["object array", "bare pickle"])
def test_a_planted_pickle_is_not_run(root, cache_dir, tmp_path, in_npy):
    first = load(root)
    bomb, mark = _Bomb(tmp_path / "exploded"), tmp_path / "exploded"
    content = npy_bytes(np.array([bomb], object), allow_pickle=True) if in_npy else pickle.dumps(bomb)
    cache_file(cache_dir).write_bytes(content)
    assert_same(load(root), first)
    assert not mark.exists()


def full_disk(cache_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.npy, "write_array", fail)


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
    assert cache_file(cache_dir).suffix == ".npy"
    decoded_files.clear()
    load(root)
    assert decoded_files == []


def test_abandoned_temporary_files_are_removed(root, cache_dir):
    """A writer that was killed leaves one; a day later nobody is writing it."""
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
