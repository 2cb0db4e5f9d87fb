"""Draws the figures of a workdir from its stored results, as PNG and PDF, and prints its table.

python experiments/figures.py --workdir=runs/quickstart [--out=DIR]
"""

from pathlib import Path

import command
from absl import flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results.")
OUT = flags.DEFINE_string("out", None, "Folder of the figures; WORKDIR/figures by default.")


def main() -> int:
    command.show(Path(command.given(WORKDIR, "runs/quickstart")), Path(OUT.value) if OUT.value else None)
    return 0


if __name__ == "__main__":
    command.run(main)
