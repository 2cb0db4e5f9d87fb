"""Your own pictures: ROOT/train/CLASS/*.jpg|png|… and ROOT/test/CLASS/…, all of one size or streamed."""

import functools
import hashlib
import itertools
import os
import stat
import sys
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import cache, decode
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.photographs import Files, Photographs

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_LAYOUT = f"train/CLASS/* and test/CLASS/*, pictures of {decode.KINDS}"
# Notes about pictures, and files of file managers. Any other file that is left out is counted in the warning.
_NO_PICTURES = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".xml",
    ".md",
    ".yaml",
    ".yml",
    ".html",
    ".log",
    ".py",
    ".ipynb",
    ".db",
    ".ini",
)
_MOST_WALKED = 100_000  # directories and files below classes, that are counted


class ImageFile(NamedTuple):
    """One picture on disk, as its directory lists it."""

    path: str
    bytes: int
    mtime_ns: int


def load_folder(data_dir: str | os.PathLike | None) -> Dataset:
    """Loads the pictures below `data_dir` as uint8[N, H, W, C], C = 1 if all of them are grey and 3 otherwise.

    The classes are the sorted names of the directories in train/, the same as in test/. Suffixes count in upper and
    lower case; other files, hidden files and directories below a class are left out, with one warning that counts those
    that may be pictures. Pictures come in order of class, then of file name. How one is decoded is said in decode.py. The
    arrays are kept in a cache outside the folder (cache.py), and read from there until a name, a size or a modification
    time below the folder changes.

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
    left_out: Counter[str] = Counter()
    listing = {split: _list_split(root, split, left_out) for split in SPLITS}
    classes = _common_classes(root, listing)
    if left_out:
        counted = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
        _warn(f"dataset.data_dir: {root!r} has files that are left out: {counted}; read are {_LAYOUT}")
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
            other = _other_root(given)
            way = f"give {other!r}, which holds" if other else "it accepts a ROOT that holds"
            raise InputError(f"dataset.data_dir: cannot list {path!r} ({reason}); {way} {_LAYOUT}") from error
    return os.path.realpath(given)


def _other_root(given: str) -> str | None:
    """Returns a directory above or below the given one that holds both splits."""
    with suppress(OSError, ValueError):
        path = os.path.abspath(given)
        parents = [os.path.dirname(path), os.path.dirname(os.path.dirname(path))]
        below = [os.path.join(path, name) for name in sorted(os.listdir(path))] if os.path.isdir(path) else []
        for candidate in (*parents, *below):
            if all(os.path.isdir(os.path.join(candidate, split)) for split in SPLITS):
                return candidate
    return None


@functools.cache
def _warn(message: str) -> None:
    """Prints a warning, once per process."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _list_split(root: str, split: str, left_out: Counter[str]) -> dict[str, list[ImageFile]]:
    """Returns the pictures of each class of one split: names sorted, files sorted; and counts what is left out."""
    classes = {}
    for entry in _visible_entries(os.path.join(root, split)):
        if _is_directory(entry):
            classes[entry.name] = _list_class(entry.path, left_out)
        elif _suffix(entry.name) in SUFFIXES:
            left_out[f"picture(s) directly in {split}/"] += 1
    return classes


def _list_class(path: str, left_out: Counter[str]) -> list[ImageFile]:
    images = []
    for entry in _visible_entries(path):
        if _is_directory(entry):
            left_out.update(_pictures_below(entry))
        elif _suffix(entry.name) in SUFFIXES:
            images.append(_image_file(entry))
        elif _suffix(entry.name) not in _NO_PICTURES and not entry.name.startswith(("README", "LICENSE")):
            left_out[_suffix(entry.name) or "without a suffix"] += 1
    return images


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _pictures_below(directory: os.DirEntry) -> dict[str, int]:
    """Counts the pictures in a directory below a class, which is not read; of a link only those directly in it."""
    walk = os.walk(directory.path)
    levels = itertools.islice(walk, 1) if directory.is_symlink() else walk
    names = itertools.islice((name for _, _, files in levels for name in files), _MOST_WALKED)
    count = sum(_suffix(name) in SUFFIXES and not name.startswith(".") for name in names)
    return {"picture(s) in directories below a class": count} if count else {}


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
        raise InputError(f"dataset.data_dir: {entry.path!r} is not a regular file; a {decode.KINDS} image is needed")
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
                    f"{path!r} must hold at least one {decode.KINDS} file, not in a directory below it"
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
