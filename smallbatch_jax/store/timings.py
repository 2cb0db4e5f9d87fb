"""Where the time of a workdir went: WORKDIR/timings.csv, kept apart from the results, which hold no clock."""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.store.files import append_line, read_table

if TYPE_CHECKING:
    import pandas as pd

TIMING_COLUMNS = ("phase", "batch_size", "bn_batch_size", "lanes", "seconds", "steps", "images", "peak_bytes")
_TYPES = (str, int, int, int, float, int, int, int)


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
        """Adds a line; steps and images are summed over the lanes, peak_bytes is `LaneProgram.peak_bytes`."""
        row = (phase, batch_size, bn_batch_size, lanes, round(seconds, 6), steps, images, peak_bytes)
        append_line(self._path, ",".join(map(str, row)), header=",".join(TIMING_COLUMNS))


class NoTimings(Timings):
    """Timings of a process that writes nothing."""

    def __init__(self) -> None: ...

    def add(self, *_: object, **__: object) -> None: ...


def load_timings(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Returns the stored timings: one row per measurement, columns as in `Timings.add`.

    0 means not applicable or not known: batch_size outside programs, peak_bytes outside the phase "compile". Damaged lines are
    left out, and so is a file that cannot be read, with a warning.
    """
    return timing_frame(timing_rows(workdir))


def timing_rows(workdir: str | os.PathLike[str]) -> list[list[Any]]:
    """The rows of `load_timings` as plain values, for training, which has no time to import pandas."""
    path = Path(expanded_path("workdir", workdir)) / "timings.csv"
    try:
        return read_table(path, TIMING_COLUMNS, _TYPES)[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.warn(f"{path} left out: {error.strerror}", stacklevel=3)
        return []


def timing_frame(rows: Iterable[Sequence[Any]] = ()) -> "pd.DataFrame":
    """Timings, each with a value for every column, as `load_timings` returns them."""
    import pandas as pd

    types = {name: f"{kind.__name__}64" for name, kind in zip(TIMING_COLUMNS[1:], _TYPES[1:], strict=True)}
    return pd.DataFrame(list(rows), columns=list(TIMING_COLUMNS)).astype(types)
