"""Files that are written whole or not at all, and the one line that users see where they cannot be written."""

import errno
import fcntl
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smallbatch_jax.config.fields import InputError

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class WriteError(Exception):
    """The disk is full or fails; what was saved before is whole.

    Args:
      path: the file or folder that cannot be written.
      reason: what the system said.
    """

    def __str__(self) -> str:  # built from the arguments, so that the error can be pickled
        path, reason = self.args
        return f"{path} cannot be written: {' '.join(reason.split())}; the same command goes on once it can."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system raises within the block into one line that names the path.

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
    """Replaces a file (text in UTF-8), so that readers see the old one or the new one, never a mixture.

    Raises:
      WriteError, InputError: as `writing` does; the old file is still there.
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


def is_temporary(name: str, of: str = "") -> bool:
    """Whether a file of this name is a temporary file of `write_atomically`, for the file `of` if it is given."""
    return name.startswith(f".{of}") and name.endswith(".tmp")


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of writers that were killed."""
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


class AppendOnly(io.FileIO):
    """A file that grows by whole lines; lines that do not fit on the disk leave it unchanged."""

    def __init__(self, path: Path):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(path, "a+")
        self._path = path

    def lock(self, wait: bool) -> bool:
        """Makes this the only writer until it is closed; False if another is, or if another file has taken the path."""
        try:
            fcntl.flock(self, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self.fileno()), os.stat(self._path))
        except OSError:
            return False

    def append(self, lines: str, header: str = "") -> None:
        """Adds lines, each with its line break, after `header` if the file is empty."""
        with writing(self._path):
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


def append_line(path: Path, line: str, header: str = "") -> None:
    """Adds a line to a file that other processes may append to as well; an empty file begins with the line `header`."""
    with AppendOnly(path) as file:
        file.lock(wait=True)  # where there are no locks, lines are whole all the same
        file.append(f"{line}\n", f"{header}\n" if header else "")


def whole_lines(path: Path) -> tuple[list[str], bool]:
    """Returns the lines of a file that end with a line break, and whether anything follows them."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        *lines, torn = file.read().split("\n")
    return lines, bool(torn)


def read_table(path: Path, kind: type[T]) -> tuple[list[T], bool]:
    """Reads a CSV file whose columns are the fields of a NamedTuple.

    Returns:
      The whole rows, and whether there is anything else: damaged lines, or one that a kill left half written.
    """
    types = kind.__annotations__.values()
    header = ",".join(kind.__annotations__)
    lines, damaged = whole_lines(path)
    rows, damaged = [], damaged or lines[:1] not in ([], [header])
    for line in lines:
        try:
            rows.append(kind(*[parse(value) for parse, value in zip(types, line.split(","), strict=True)]))
        except ValueError:
            damaged |= line != header
    return rows, damaged


def table_frame(rows: Iterable[Any], kind: type) -> "pd.DataFrame":
    """Rows as a DataFrame, which has the fields of their NamedTuple as columns even without rows, numbers in 64 bits."""
    import pandas as pd

    types = {name: f"{dtype.__name__}64" for name, dtype in kind.__annotations__.items() if dtype is not str}
    return pd.DataFrame(list(rows), columns=list(kind.__annotations__)).astype(types)
