"""Atomic file writes, append-only files, and one-line errors for files that cannot be written."""

import errno
import fcntl
import io
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smallbatch_jax.config.fields import InputError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
ABANDONED_SECONDS = 3600  # age above which a temporary file is taken to have no writer


class WriteError(Exception):
    """The disk is full or fails; data saved before is intact.

    Args:
      path: the file or folder that cannot be written.
      reason: the system's message.
    """

    def __str__(self) -> str:  # built from the arguments, so that the error can be pickled
        path, reason = self.args
        return f"{path} cannot be written: {' '.join(reason.split())}; the same command resumes once it can."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns system errors within the block into one line that names the path.

    Raises:
      WriteError: if the disk is full or fails.
      InputError: for any other system error, such as missing permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise WriteError(path, str(error.strerror)) from error
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file (text in UTF-8), so that readers see the old one or the new one, never a mixture.

    Raises:
      WriteError, InputError: as `writing` does; the old file is still there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):  # replacing would remove a device or a pipe
        raise InputError(f"{path} cannot be written: it is not a regular file.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            try:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of writers that were killed."""
    with suppress(OSError):
        for path in folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


class AppendOnly(io.FileIO):
    """A file that grows by whole lines; lines that cannot be written leave it unchanged."""

    def __init__(self, path: Path):
        with writing(path):
            super().__init__(path, "a+")
        self._path = path

    def lock(self, wait: bool) -> bool:
        """Locks the file until it is closed; returns False if another process holds it, or another file has taken the path."""
        try:
            fcntl.flock(self, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._require_in_place()
        except OSError:
            return False
        return True

    def _require_in_place(self) -> None:
        """Raises FileNotFoundError if the file was removed or replaced since it was opened."""
        if not os.path.samestat(os.fstat(self.fileno()), os.stat(self._path)):
            raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")

    def append(self, lines: str, header: str = "") -> None:
        """Adds lines, each with its line break, after `header` if the file is empty."""
        with writing(self._path):
            self._require_in_place()
            size = self.seek(0, os.SEEK_END)
            self.seek(max(0, size - 1))
            torn = self.read(1) not in (b"", b"\n")  # a killed process left half a line
            rest = memoryview((("\n" if torn else "") + ("" if size else header) + lines).encode())
            try:
                while rest:
                    rest = rest[self.write(rest) :]
            except OSError:
                with suppress(OSError):
                    self.truncate(size)
                raise

    def sync(self) -> None:
        """Waits until the lines are on the disk."""
        with writing(self._path):
            os.fsync(self)
            self._require_in_place()


def append_line(path: Path, line: str, header: str = "") -> None:
    """Adds a line to a file that other processes may append to as well; an empty file begins with the line `header`."""
    with AppendOnly(path) as file:
        file.lock(wait=True)  # without locks, lines are still written whole
        file.append(f"{line}\n", f"{header}\n" if header else "")


def count(text: str) -> int:
    """Parses a number that is not negative; raises ValueError beyond int64."""
    if not 0 <= (value := int(text)) < 2**63:
        raise ValueError(f"{text} is not in int64")
    return value


def whole_lines(path: Path) -> tuple[list[str], bool]:
    """Returns the lines of a file that end with a line break, and whether anything follows them."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        *lines, torn = file.read().split("\n")
    return lines, bool(torn)
