"""Decoded images kept on disk, so that a folder is decoded once.

A cache file is a .npy array uint8[N, H, W, C] followed by its checksum, a second .npy array, uint32[]. It is read as
numbers alone, never as a pickle, and anything else is decoded again. Losing the cache costs only time.
"""

import contextlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

FORMAT_VERSION = 1
_ABANDONED_AFTER = 24 * 3600  # seconds; a temporary file this old belongs to a process that was killed


def directory() -> Path:
    """Returns $SMALLBATCH_CACHE, or else $XDG_CACHE_HOME/smallbatch_jax, or else ~/.cache/smallbatch_jax."""
    chosen = os.environ.get("SMALLBATCH_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen))
    base = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored if relative, says its specification
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "smallbatch_jax"


def kept(name: str, key: str, count: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the uint8[count, H, W, C] that `make` returns, from the cache file NAME-KEY.npy if there is a valid one.

    If not, it is stored there and other files of this name are removed. The file appears whole or not at all, so that
    processes do not disturb each other. If it cannot be written, one line on stderr says so, and nothing is raised.
    """
    path = directory() / f"{name}-{key}.npy"
    images = _read(path, count)
    if images is None:
        images = make()
        _write(path, images, replaces=f"{name}-*.npy")
    return images


def _read(path: Path, count: int) -> np.ndarray | None:
    try:
        with open(path, "rb") as file:
            images = npy.read_array(file, allow_pickle=False)
            checksum = npy.read_array(file, allow_pickle=False)
        valid = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count and images.shape[3] in (1, 3)
        if valid and int(checksum) == zlib.crc32(images.data):
            return images
        reason = "its contents do not match its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # numpy promises no particular error for a damaged file
        reason = " ".join(str(error).split())
    print(f"warning: cache file {str(path)!r} is not usable ({reason}); decoding the images again", file=sys.stderr)
    return None


def _write(path: Path, images: np.ndarray, replaces: str) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
        with open(handle, "wb") as file:
            npy.write_array(file, images, allow_pickle=False)
            npy.write_array(file, np.array(zlib.crc32(images.data), np.uint32), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        print(
            f"warning: the decoded images were not kept in {str(path.parent)!r} ({reason}); the next load decodes "
            "them again. SMALLBATCH_CACHE names another folder.",
            file=sys.stderr,
        )
        return
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for old in path.parent.glob(replaces):
            if old != path:
                old.unlink(missing_ok=True)
        for old in path.parent.glob(f"{replaces}.*.tmp"):
            if old.stat().st_mtime < time.time() - _ABANDONED_AFTER:
                old.unlink(missing_ok=True)
