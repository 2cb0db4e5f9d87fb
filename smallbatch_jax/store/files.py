"""Files that are written whole or not at all, and what is said where they cannot be."""

import errno
import fcntl
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smallbatch_jax.config.fields import InputError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class WriteError(Exception):
    """The disk is full or fails: one line that names what could not be written. What was saved before is whole."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be written: {' '.join(reason.split())}; the same command goes on once it can.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it what the system refuses to write becomes one line that names the path.

    Raises:
      WriteError: if the disk is full or fails.
      InputError: if nobody may write there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise WriteError(path, str(error.strerror)) from error
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, in UTF-8 if it is text, so that readers see the old one or the new one, never a part.

    Raises:
      WriteError, InputError: as `writing` does; the old one is there still.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def write_from(path: Path, size: int, content: bytes) -> None:
    """Has a file go on with `content` after its first `size` bytes, whatever was behind them; made if it is not there.

    Raises:
      WriteError, InputError: as `writing` does; it ends after `size` bytes then.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
            file.truncate(size)
            file.seek(size)
            _write_whole(file, content, size)


def _write_whole(file: io.FileIO, content: bytes, size: int) -> None:
    """All of it behind the first `size` bytes, where the file stands, or none."""
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def is_temporary(name: str, of: str = "") -> bool:
    """Whether a file of that name is one that `write_atomically` was about to put in place."""
    return name.startswith(f".{of}") and name.endswith(".tmp")


def remove_abandoned(folder: Path) -> None:
    """Removes what writers that were killed left of files they were about to put in place."""
    with suppress(OSError):
        for path in folder.iterdir():
            if is_temporary(path.name) and not _is_running(path.name.split(".")[-3:][0]):
                path.unlink()


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


class AppendOnly:
    """A file that grows by whole lines: those that do not fit on the disk leave it as it was. A context manager."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - nothing may wait in a buffer to be written later

    def owned(self) -> bool:
        """Makes this the file's one writer until it is closed; False if another is, or if the file was replaced meanwhile."""
        try:
            fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self.fileno()), os.stat(self._path))
        except OSError:
            return False

    def fileno(self) -> int:
        return self._file.fileno()

    def append(self, lines: str) -> None:
        """Adds lines, each with its line break."""
        with writing(self._path):
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(0, size - 1))
            half_line = self._file.read(1) not in (b"", b"\n")  # left by a process that was killed
            _write_whole(self._file, (b"\n" if half_line else b"") + lines.encode(), size)

    def sync(self) -> None:
        """Brings it to the disk."""
        with writing(self._path):
            os.fsync(self.fileno())

    def __enter__(self) -> "AppendOnly":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


def append_line(path: Path, line: str, header: str = "") -> None:
    """Adds a line to a file, which begins with `header` if this is its first; other processes may do so at the same time."""
    with AppendOnly(path) as file, writing(path):
        with suppress(OSError):  # where there are no locks, lines are whole at least
            fcntl.flock(file, fcntl.LOCK_EX)
        file.append((f"{header}\n" if header and path.stat().st_size == 0 else "") + f"{line}\n")
