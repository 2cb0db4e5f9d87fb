"""Helpers for the loaders that read folders."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def nearby(folder: str | os.PathLike, accepts: Callable[[Path], bool]) -> Path | None:
    """Returns the first folder that `accepts` is true for, among the two above the given one and its subfolders, or None."""
    with suppress(OSError, ValueError):  # if one cannot be listed
        given = Path(os.path.abspath(folder))
        below = sorted(given.iterdir()) if given.is_dir() else []
        return next((found for found in (given.parent, given.parent.parent, *below) if accepts(found)), None)
    return None
