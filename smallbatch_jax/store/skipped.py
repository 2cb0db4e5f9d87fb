"""Images that could not be decoded and were left out: WORKDIR/skipped.csv, one line for each."""

import csv
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.store.files import append_line

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("image", "reason")


class SkippedImages:
    """Adds each image once, whatever how often it was met and by how many processes in turn."""

    def __init__(self, workdir: Path | None):
        """None writes nothing, and says it all the same."""
        self._path = workdir and workdir / "skipped.csv"
        self._known = set() if workdir is None else set(load(workdir)["image"])

    def add(self, image: str, reason: str) -> None:
        if image in self._known:
            return
        self._known.add(image)
        print(f"warning: {image!r} {reason}; skipped", file=sys.stderr, flush=True)
        if self._path:
            line = io.StringIO()
            csv.writer(line, lineterminator="").writerow((image, reason))
            append_line(self._path, line.getvalue(), header=",".join(COLUMNS))


def load(workdir: str | os.PathLike[str]) -> "pd.DataFrame":
    """The images that runs of a workdir left out: columns image (its path) and reason, one row for each."""
    import pandas as pd

    path = Path(expanded_path("workdir", workdir)) / "skipped.csv"
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.read_csv(path, on_bad_lines="skip", encoding_errors="replace", dtype=str).drop_duplicates(
        "image", ignore_index=True
    )
