"""Wall times of a workdir in WORKDIR/timings.csv, separate from the results, which hold no wall-clock times."""

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.store.files import append_line, count, whole_lines

if TYPE_CHECKING:
    import pandas as pd

TIMING_COLUMNS: dict[str, type] = {
    "phase": str,  # import, data, compile, segment, checkpoint or draw
    **dict.fromkeys(("batch_size", "bn_batch_size", "lanes"), int),  # of the program
    "seconds": float,
    **dict.fromkeys(("steps", "images", "peak_bytes"), int),  # summed over the lanes; `LaneProgram.peak_bytes`
}


class Timings:
    """Writer of WORKDIR/timings.csv; a workdir of None stores nothing."""

    def __init__(self, workdir: Path | None):
        self._path = workdir and workdir / "timings.csv"

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
        if self._path:
            append_line(self._path, ",".join(map(str, row)), header=",".join(TIMING_COLUMNS))


def load_timings(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Returns the stored timings, one row per measurement; no rows if there are none.

    Columns: phase (import, data, compile, segment, checkpoint or draw); batch_size m, bn_batch_size and lanes of the program;
    seconds of wall time; steps and images, summed over the lanes; peak_bytes, the memory that the program needs on the devices
    of one process, without a resident dataset. 0 means not applicable or not known: batch_size outside programs, peak_bytes
    outside the phase "compile". Damaged lines are left out, and so is a file that cannot be read, with a warning.
    """
    path, lines, rows = Path(expanded_path("workdir", workdir)) / "timings.csv", [], []
    try:
        lines, _ = whole_lines(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        warnings.warn(f"{path} left out: {error.strerror}", stacklevel=2)
    for line in lines:
        with suppress(ValueError):
            kinds = zip(TIMING_COLUMNS.values(), line.split(","), strict=True)
            rows.append([count(value) if kind is int else kind(value) for kind, value in kinds])
    return timing_frame(rows)


def timing_frame(rows: Iterable[Sequence[Any]] = ()) -> "pd.DataFrame":
    """Returns rows of timings, each with a value for every column, in the form of `load_timings`."""
    import pandas as pd

    dtypes = {name: f"{kind.__name__}64" for name, kind in TIMING_COLUMNS.items() if kind is not str}
    return pd.DataFrame(list(rows), columns=list(TIMING_COLUMNS)).astype(dtypes)
