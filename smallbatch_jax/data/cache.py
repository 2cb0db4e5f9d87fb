"""On-disk cache of decoded images, so that a folder is decoded once.

A cache file is a .npz archive, whose arrays carry checksums. It is never read as a pickle, and the images of an
invalid file are decoded again. Losing the cache costs only time.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

FORMAT_VERSION = 2
_ABANDONED_AFTER = 24 * 3600  # seconds; a temporary file this old belongs to a process that was killed


def directory() -> Path:
    """Returns $SMALLBATCH_CACHE, or else $XDG_CACHE_HOME/smallbatch_jax, or else ~/.cache/smallbatch_jax."""
    chosen = os.environ.get("SMALLBATCH_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen))
    base = os.environ.get("XDG_CACHE_HOME", "")  # its specification says to ignore a relative path
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "smallbatch_jax"


def kept(name: str, key: str, count: int, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays uint8 or int32 [count, …] that `make` returns, from the cache file NAME-KEY.npz if it is valid.

    Otherwise they are stored there and other files of this name are removed. The file is written atomically, so that
    processes do not disturb each other. If it cannot be written, one line on stderr says so, and nothing is raised.
    """
    path = directory() / f"{name}-{key}.npz"
    arrays = _read(path, count)
    if arrays is None:
        arrays = make()
        _write(path, arrays, replaces=f"{name}-*")
    return arrays


def _read(path: Path, count: int) -> dict[str, np.ndarray] | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        if all(array.dtype in (np.uint8, np.int32) and len(array) == count for array in arrays.values()):
            return arrays
        reason = "it holds other arrays"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # numpy promises no particular error for a damaged file
        reason = " ".join(str(error).split())
    print(f"warning: cache file {str(path)!r} is not usable ({reason}); decoding the images again", file=sys.stderr)
    return None


def _write(path: Path, arrays: dict[str, np.ndarray], replaces: str) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
        with open(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
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
            if old != path and (old.suffix != ".tmp" or old.stat().st_mtime < time.time() - _ABANDONED_AFTER):
                old.unlink(missing_ok=True)
