"""Draws the figures of stored results, finished or not, as PNG and PDF, and prints their table.

    python experiments/figures.py --workdir=runs/quickstart [--out=DIR]
    python experiments/figures.py --workdir=runs/fig07 --workdir=runs/fig08 [--out=DIR]
    python experiments/figures.py --config=configs/fig15_best.py [--out=DIR]

Several workdirs are also drawn beside each other: the best accuracy of each (Fig. 15) and the range of base learning rates
that converge (Fig. 16). A config such as fig15_best.py names the workdirs to compare in `drawn_from`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command
import workdirs

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.config.fields import expanded_path

if TYPE_CHECKING:
    from smallbatch_jax.study.study import Study

CONFIG = command.define_config_flag()
WORKDIR = command.DEFINE_paths("workdir", "Folder of the results; may be given several times.")
OUT = command.DEFINE_path("out", "Folder of the figures; by default WORKDIR/figures, for --config runs/NAME.")


def main() -> int:
    out = Path(OUT.value) if OUT.value else None
    if CONFIG.value is not None:
        if WORKDIR.value:
            raise InputError("--config, --workdir: give one of them; the config names its own workdirs.")
        compare(experiment.from_config(command.given_config(CONFIG)), out)
        return 0
    folders = command.given(WORKDIR, "runs/quickstart")
    if len(folders) == 1:
        workdirs.show(Path(folders[0]), out)
        return 0
    from smallbatch_jax.study import figures, study

    studies = list(study.load_all(folders).values())
    tell(studies, figures.draw_studies(studies, out))
    return 0


def compare(chosen: experiment.Experiment, out: Path | None) -> None:
    """Draws the comparison that a config describes, of the workdirs that exist."""
    if not chosen.drawn_from:
        raise InputError(
            f"--config: {chosen.name} has no drawn_from, it trains runs of its own; draw them with --workdir=runs/{chosen.name}"
        )
    named = [expanded_path("drawn_from", workdir) for workdir in chosen.drawn_from]
    there = [workdir for workdir in named if os.path.exists(workdir)]
    missing = ", ".join(workdir for workdir in named if workdir not in there)
    if not there:
        raise InputError(
            f"drawn_from: not there yet: {missing}; train one first: "
            f"python experiments/sweep.py --config=… --workdir={chosen.drawn_from[0]}"
        )
    from smallbatch_jax.study import figures, study

    studies = list(study.load_all(there).values())
    drawn = figures.draw_summaries(studies, out or Path("runs", chosen.name))
    if missing:
        print(f"not there yet: {missing}")
    tell(studies, drawn)


def tell(studies: "Sequence[Study]", drawn: Sequence[Path]) -> None:
    """Prints one table of all studies, the answer of each, and the folders of the figures."""
    from smallbatch_jax.study import equal_time
    from smallbatch_jax.study.answer import answer
    from smallbatch_jax.study.study import summaries

    print(summaries(studies))
    print("\n".join(["", *(f"{study.name}: {answer(study).sentence}" for study in studies), ""]))
    if len({study.experiment.epochs for study in studies}) > 1:
        print(equal_time.sentence(studies))
    for folder in dict.fromkeys(path.parent for path in drawn):
        stems = dict.fromkeys(path.stem for path in drawn if path.parent == folder)
        print(f"figures: {', '.join(stems)}, as PNG and PDF in {folder}")


if __name__ == "__main__":
    command.run(main)
