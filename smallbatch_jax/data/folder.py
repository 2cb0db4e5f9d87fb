"""Your own pictures: ROOT/train/CLASS/*.jpg|jpeg|png and ROOT/test/CLASS/…, all of one size or streamed."""

import hashlib
import os
import stat
from typing import NamedTuple

import numpy as np

from smallbatch_jax.data import cache, decode
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.photographs import Files, Photographs
from smallbatch_jax.experiment import InputError

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
_LAYOUT = "train/CLASS/*.jpg|jpeg|png and test/CLASS/*.jpg|jpeg|png"


class ImageFile(NamedTuple):
    """One picture on disk, as its directory lists it."""

    path: str
    bytes: int
    mtime_ns: int


def load_folder(data_dir: str | os.PathLike | None) -> Dataset:
    """Loads the pictures below `data_dir` as uint8[N, H, W, C], C = 1 if all of them are grey and 3 otherwise.

    The classes are the sorted names of the directories in train/, the same as in test/. Suffixes count in upper and
    lower case; other files, hidden files and directories below a class are not looked at. Pictures come in order of
    class, then of file name. How one is decoded is said in decode.py. The arrays are kept in a cache outside the
    folder (cache.py), and read from there until a name, a size or a modification time below the folder changes.

    Raises:
      InputError: one line with the path of what is missing, unreadable or of another size.
    """
    root, classes, listing = _listed(data_dir)
    files = [file for split in SPLITS for file in listing[split]]

    cache_file = cache.directory() / f"{_cache_name(root, files)}.npy"
    images = cache.read(cache_file, len(files))
    if images is None:
        images = decode.decode_images([file.path for file in files], sum(file.bytes for file in files))
        cache.write(cache_file, images, replaces=f"{_root_name(root)}-*.npy")

    train_labels, test_labels = (_labels(classes, listing[split]) for split in SPLITS)
    train_images, test_images = np.split(images, [len(train_labels)])
    return Dataset(train_images, train_labels, test_images, test_labels, len(classes), tuple(classes))


def stream_folder(data_dir: str | os.PathLike | None, image_size: int) -> Photographs:
    """The pictures below `data_dir`, of any sizes and always RGB, to be read as they are needed; listed as `load_folder` does.

    Raises:
      InputError: one line with the path of what is missing.
    """
    root, classes, listing = _listed(data_dir)
    train, test = (Files(root, [file.path for file in listing[split]], _labels(classes, listing[split])) for split in SPLITS)
    name = _cache_name(root, [file for split in SPLITS for file in listing[split]])
    return Photographs(train, test, image_size, len(classes), tuple(classes), listing=name)


def _listed(data_dir: str | os.PathLike | None) -> tuple[str, list[str], dict[str, list[ImageFile]]]:
    """The root, the classes, and the pictures of each split in order of class, then of file name."""
    root = _checked_root(data_dir)
    listing = {split: _list_split(root, split) for split in SPLITS}
    classes = _common_classes(root, listing)
    return root, classes, {split: [file for name in classes for file in listing[split][name]] for split in SPLITS}


def _labels(classes: list[str], files: list[ImageFile]) -> np.ndarray:
    """int32[N]: the class of each picture, whose directory has its name."""
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[os.path.basename(os.path.dirname(file.path))] for file in files], np.int32)


def _checked_root(data_dir: str | os.PathLike | None) -> str:
    """Returns the real path of a directory that holds one directory for each split."""
    if not isinstance(data_dir, (str, os.PathLike)):
        raise InputError(f"dataset.data_dir: got {data_dir!r}; 'folder' accepts the path of a ROOT that holds {_LAYOUT}")
    given = os.path.expanduser(os.fsdecode(data_dir))
    for path in (given, *(os.path.join(given, split) for split in SPLITS)):
        try:
            os.scandir(path).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"dataset.data_dir: cannot list {path!r} ({reason}); it accepts a ROOT that holds {_LAYOUT}"
            ) from error
    return os.path.realpath(given)


def _list_split(root: str, split: str) -> dict[str, list[ImageFile]]:
    """Returns the pictures of each class of one split: names sorted, files sorted."""
    return {
        entry.name: _list_class(entry.path) for entry in _visible_entries(os.path.join(root, split)) if _is_directory(entry)
    }


def _list_class(path: str) -> list[ImageFile]:
    images = [entry for entry in _visible_entries(path) if entry.name.lower().endswith(SUFFIXES)]
    return [_image_file(entry) for entry in images if not _is_directory(entry)]


def _visible_entries(path: str) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_directory(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a symbolic link that leads to itself
        raise _unreadable(entry.path, error) from error


def _image_file(entry: os.DirEntry) -> ImageFile:
    try:
        status = entry.stat()
    except OSError as error:
        raise _unreadable(entry.path, error) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise InputError(f"dataset.data_dir: {entry.path!r} is not a regular file; a JPEG or PNG image is needed")
    return ImageFile(entry.path, status.st_size, status.st_mtime_ns)


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"dataset.data_dir: {path!r} cannot be read ({error.strerror}); make it readable or remove it")


def _common_classes(root: str, listing: dict[str, dict[str, list[ImageFile]]]) -> list[str]:
    """Returns the sorted class names, after checking that each has pictures in both splits."""
    classes = sorted(listing["train"].keys() | listing["test"].keys())
    if not classes:
        raise InputError(f"dataset.data_dir: {root!r} holds no class directories; it accepts {_LAYOUT}")
    for split, other in (SPLITS, SPLITS[::-1]):
        for name in classes:
            path = os.path.join(root, split, name)
            if name not in listing[split]:
                raise InputError(
                    f"dataset.data_dir: class {name!r} is in {other}/ only; {path!r} is needed too, with its images"
                )
            if not listing[split][name]:
                raise InputError(
                    f"dataset.data_dir: class {name!r} has no images in {split}/; "
                    f"{path!r} must hold at least one .jpg, .jpeg or .png file, not in a directory below it"
                )
    return classes


def _root_name(root: str) -> str:
    return "folder-" + hashlib.sha256(os.fsencode(root)).hexdigest()[:16]


def _cache_name(root: str, files: list[ImageFile]) -> str:
    """Returns a file name that changes with the listing, the way of decoding and the cache's format."""
    digest = hashlib.sha256(f"{cache.FORMAT_VERSION} {decode.version()}\0".encode())
    for path, size, mtime_ns in files:
        digest.update(os.fsencode(path.removeprefix(root)) + f"\0{size} {mtime_ns}\0".encode())
    return f"{_root_name(root)}-{digest.hexdigest()}"
