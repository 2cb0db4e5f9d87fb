"""Your own pictures: ROOT/train/CLASS/*.jpg|png|… and ROOT/test/CLASS/…, all of one size or streamed."""

import functools
import hashlib
import itertools
import os
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import cache, decode
from smallbatch_jax.data.dataset import Dataset
from smallbatch_jax.data.paths import nearby
from smallbatch_jax.data.streaming.photographs import Files, Photographs

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Notes about pictures, and files of file managers. Any other file that is left out is counted in the warning.
_NOTES = (".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".yaml", ".yml", ".html", ".log", ".py", ".ipynb", ".db", ".ini")
_LAYOUT = f"train/CLASS/* and test/CLASS/*, pictures of {decode.KINDS}"
_MOST_WALKED = 100_000  # maximum number of files counted below a class


class Listing(NamedTuple):
    """The pictures of a folder: for train and test their paths and classes, sorted by class, then by file name."""

    root: str
    classes: tuple[str, ...]
    paths: list[list[str]]
    labels: list[np.ndarray]  # int32[N]
    files: str  # digest of the files' names, the same for a copy of the folder and after a broken picture is replaced
    name: str  # depends only on the root
    key: str  # changes with the files, the way of decoding and the cache's format


def load_folder(data_dir: str | os.PathLike | None) -> Dataset:
    """Loads the pictures below `data_dir` as uint8[N, H, W, C], C = 1 if all of them are grey and 3 otherwise.

    The classes are the sorted names of the directories in train/, the same as in test/. Suffixes may be in upper or
    lower case; other files, hidden files and directories below a class are left out, with one warning that counts those
    that may be pictures. Pictures come in order of class, then of file name; `decode.py` describes how they are decoded. The
    arrays are kept in a cache outside the folder (`cache.py`), and read from there until a name, a size or a modification
    time below the folder changes.

    Raises:
      InputError: one line with the path of what is missing, unreadable or of another size.
    """
    listing = _list_folder(data_dir)
    paths = [*itertools.chain(*listing.paths)]
    arrays = cache.kept(listing.name, listing.key, len(paths), lambda: {"images": decode.decode_images(paths)})
    train_images, test_images = np.split(arrays["images"], [len(listing.paths[0])])
    train_labels, test_labels = listing.labels
    return Dataset(train_images, train_labels, test_images, test_labels, len(listing.classes), listing.classes)


def stream_folder(data_dir: str | os.PathLike | None, image_size: int) -> Photographs:
    """Lists the pictures below `data_dir` as `load_folder` does; they may be of any size, become RGB, and are read on demand.

    Raises:
      InputError: one line with the path of what is missing.
    """
    listing = _list_folder(data_dir)
    train, test = (Files(listing.root, *split) for split in zip(listing.paths, listing.labels, strict=True))
    classes = listing.classes
    return Photographs(train, test, image_size, len(classes), classes, listing=listing.files, test_labels=listing.labels[1])


def _list_folder(data_dir: str | os.PathLike | None) -> Listing:
    root, left_out = _checked_root(data_dir), Counter()
    try:
        splits = {split: _list_split(root, split, left_out) for split in SPLITS}
    except OSError as error:
        raise InputError(
            f"dataset.data_dir: {error.filename!r} cannot be read ({error.strerror}); make it readable or remove it"
        ) from error
    classes = tuple(sorted(splits["train"].keys() | splits["test"].keys()))
    if not classes:
        raise InputError(f"dataset.data_dir: {root!r} holds no class directories; it accepts {_LAYOUT}")
    for split, name in itertools.product(SPLITS, classes):
        if not splits[split].get(name):
            raise InputError(
                f"dataset.data_dir: class {name!r} has no images in {split}/; {os.path.join(root, split, name)!r} must hold at "
                f"least one {decode.KINDS} file, not in a directory below it"
            )
    if left_out:
        counted = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
        _warn(f"dataset.data_dir: {root!r} has files that are left out: {counted}; read are {_LAYOUT}")
    names, key = hashlib.sha256(), hashlib.sha256(f"{cache.FORMAT_VERSION} {decode.version()}\0".encode())
    paths, labels = [], []
    for of_class in splits.values():
        files = [file for name in classes for file in of_class[name]]
        for path, version in files:
            name = os.fsencode(path.removeprefix(root)) + b"\0"
            names.update(name)
            key.update(name + f"{version}\0".encode())
        paths.append([path for path, _ in files])
        labels.append(np.repeat(np.arange(len(classes), dtype=np.int32), [len(of_class[name]) for name in classes]))
    name = "folder-" + hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return Listing(root, classes, paths, labels, names.hexdigest(), name, key.hexdigest())


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
            other = nearby(given, lambda found: all((found / split).is_dir() for split in SPLITS))
            way = f"give {str(other)!r}, which holds" if other else "it accepts a ROOT that holds"
            raise InputError(f"dataset.data_dir: cannot list {path!r} ({reason}); {way} {_LAYOUT}") from error
    return os.path.realpath(given)


@functools.cache
def _warn(message: str) -> None:
    """Prints a warning, once per process."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _list_split(root: str, split: str, left_out: Counter[str]) -> dict[str, list[tuple[str, str]]]:
    """Lists the sorted pictures of each class of one split, and counts what is left out."""
    classes = {}
    for entry in _visible_entries(os.path.join(root, split)):
        if entry.is_dir():
            classes[entry.name] = _list_class(entry.path, left_out)
        elif _suffix(entry.name) in SUFFIXES:
            left_out[f"picture(s) directly in {split}/"] += 1
    return classes


def _list_class(path: str, left_out: Counter[str]) -> list[tuple[str, str]]:
    """Lists the path of each picture, with its size and modification time."""
    images = []
    for entry in _visible_entries(path):
        if entry.is_dir():
            if count := _pictures_below(entry):
                left_out["picture(s) in directories below a class"] += count
        elif _suffix(entry.name) in SUFFIXES:
            status = entry.stat()
            if not entry.is_file():  # opening a pipe would wait for ever
                raise InputError(f"dataset.data_dir: {entry.path!r} is not a regular file; a {decode.KINDS} image is needed")
            images.append((entry.path, f"{status.st_size} {status.st_mtime_ns}"))
        elif _suffix(entry.name) not in _NOTES and not entry.name.startswith(("README", "LICENSE")):
            left_out[_suffix(entry.name) or "without a suffix"] += 1
    return images


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _pictures_below(directory: os.DirEntry) -> int:
    """Counts the pictures in a directory below a class, which is not read; below a link only those directly in it."""
    walk = os.walk(directory.path)
    levels = itertools.islice(walk, 1) if directory.is_symlink() else walk
    names = itertools.islice((name for _, _, files in levels for name in files), _MOST_WALKED)
    return sum(_suffix(name) in SUFFIXES and not name.startswith(".") for name in names)


def _visible_entries(path: str) -> list[os.DirEntry]:
    with os.scandir(path) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
