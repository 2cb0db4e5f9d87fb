"""Images that could not be decoded and were left out: WORKDIR/skipped.csv, one line for each."""

import csv
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.store.files import append_line, whole_lines

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("image", "reason")


class SkippedImages:
    """Record of skipped images, which warns of each one once; a workdir of None stores nothing."""

    def __init__(self, workdir: Path | None):
        self._path = workdir and workdir / "skipped.csv"
        self._known = set() if workdir is None else set(load(workdir)["image"])

    def add(self, image: str, reason: str) -> None:
        image = image.encode(errors="backslashreplace").decode().replace("\n", r"\n")  # a file may have any name
        if image in self._known:
            return
        self._known.add(image)
        print(f"warning: {image!r} {reason}; skipped", file=sys.stderr, flush=True)
        if self._path:
            line = io.StringIO()
            csv.writer(line, lineterminator="").writerow((image, reason))
            append_line(self._path, line.getvalue(), header=",".join(COLUMNS))


def load(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """Loads the images that the runs of a workdir left out, one row each: columns image (its path) and reason.

    Damaged lines are left out.
    """
    import pandas as pd

    path = Path(expanded_path("workdir", workdir)) / "skipped.csv"
    rows = [row for line in (whole_lines(path)[0] if path.is_file() else ()) for row in csv.reader([line])]
    found = [row for row in rows if len(row) == len(COLUMNS) and row[0] != COLUMNS[0]]
    return pd.DataFrame(found, columns=list(COLUMNS), dtype=str).drop_duplicates("image", ignore_index=True)
