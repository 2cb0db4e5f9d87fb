"""Where the time of a workdir went: WORKDIR/timings.csv, kept apart from the results, which hold no clock."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.store.files import append_line

if TYPE_CHECKING:
    import pandas as pd

TIMING_COLUMNS = ("phase", "batch_size", "bn_batch_size", "lanes", "seconds", "steps", "images", "peak_bytes")
_TYPES: tuple[Any, ...] = (str, *(float if name == "seconds" else int for name in TIMING_COLUMNS[1:]))
_OLD_COLUMNS = list(TIMING_COLUMNS[:-1])  # of files begun before memory was stored


class Timings:
    """Appends to WORKDIR/timings.csv: seconds per phase (import, data, compile, segment, checkpoint, draw) and program."""

    def __init__(self, workdir: Path):
        self._path = workdir / "timings.csv"

    def add(
        self,
        phase: str,
        seconds: float,
        batch_size: int = 0,
        bn_batch_size: int = 0,
        lanes: int = 0,
        steps: int = 0,
        images: int = 0,
        peak_bytes: int = 0,
    ) -> None:
        """One line; steps and images are summed over the lanes, peak_bytes is a compiled program's `LaneProgram.peak_bytes`."""
        row = (phase, batch_size, bn_batch_size, lanes, round(seconds, 6), steps, images, peak_bytes)
        append_line(self._path, ",".join(map(str, row)), header=",".join(TIMING_COLUMNS))


class NoTimings(Timings):
    """Of a process that writes nothing."""

    def __init__(self) -> None: ...

    def add(self, *_: object, **__: object) -> None: ...


def load_timings(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Where the time went: one row per measured piece, columns as in `Timings.add`.

    0 stands for what there is none of: batch_size outside programs, peak_bytes outside the phase "compile" and where it is not
    known. Lines that are not whole are left out, and so is a file that cannot be read, with a warning.
    """
    return timing_frame(timing_rows(workdir))


def timing_rows(workdir: str | os.PathLike[str]) -> list[list[Any]]:
    """The same as plain values in the order of the columns, for who trains and has no time to import pandas."""
    path = Path(expanded_path("workdir", workdir)) / "timings.csv"
    try:
        *lines, _ = path.read_text("utf-8", errors="replace").split("\n")  # a last line without its end is torn
    except FileNotFoundError:
        lines = []
    except OSError as error:
        warnings.warn(f"{path} left out: {error.strerror}", stacklevel=3)
        lines = []
    return list(_whole_timings(lines))


def timing_frame(rows: Iterable[Sequence[Any]] = ()) -> "pd.DataFrame":
    """Timings, each with a value for every column, as `load_timings` gives them."""
    import pandas as pd

    types = {name: kind.__name__ + "64" for name, kind in zip(TIMING_COLUMNS[1:], _TYPES[1:], strict=True)}
    return pd.DataFrame(list(rows), columns=list(TIMING_COLUMNS)).astype(types)


def _whole_timings(lines: Iterable[str]) -> Iterator[list[Any]]:
    """The rows of a file. One that an older version began has lines of both lengths, if it was resumed since."""
    shorter = False
    for line in lines:
        values = line.split(",")
        if values[0] == TIMING_COLUMNS[0]:
            shorter = values == _OLD_COLUMNS
        elif shorter and len(values) == len(_OLD_COLUMNS):
            values.append("0")
        try:
            row = [kind(value) for kind, value in zip(_TYPES, values, strict=True)]
        except ValueError:  # of a header, or of what is torn or damaged
            continue
        yield row
