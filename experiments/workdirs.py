"""Checks that an experiment belongs in a workdir, and shows a workdir's results; shared by the commands."""

import shlex
import time
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment, InputError


def for_workdir(chosen: Experiment, workdir: str) -> Experiment:
    """Returns the experiment to train into a workdir, with base learning rates from other workdirs filled in.

    Raises:
      InputError: if there is nothing to train, or the workdir holds another experiment.
    """
    if chosen.drawn_from:
        raise InputError(
            f"drawn_from: {chosen.name} is drawn from other results and trains nothing; "
            "use python experiments/figures.py with the same --config."
        )
    from smallbatch_jax.store.workdir import refuse_difference
    from smallbatch_jax.study.study import choose_base_lrs

    chosen = choose_base_lrs(chosen, workdir)
    refuse_difference(Path(workdir), chosen)
    return chosen


def show_and_time(folder: Path, seconds: dict[str, float]) -> None:
    """Shows the results of a workdir, and stores the seconds of this command's phases, this one included."""
    from smallbatch_jax.store.timings import Timings

    began = time.monotonic()
    show(folder)
    for phase, spent in (seconds | {"draw": time.monotonic() - began}).items():
        Timings(folder).add(phase, spent)


def show(folder: Path, out: Path | None = None) -> None:
    """Draws the figures of a workdir and prints its table and the answer."""
    from smallbatch_jax.store import skipped
    from smallbatch_jax.study import figures, study
    from smallbatch_jax.study.answer import answer
    from smallbatch_jax.study.noise import RULE

    stored = study.load(folder)
    print(study.summaries([stored]))
    found = answer(stored)
    details = [f"- {line}" for line in (*found.recommendation.sentences, *found.caveats)]
    print("\n".join(["", found.sentence, *details, f"({RULE})", ""]), flush=True)
    if left_out := len(skipped.load(folder)):
        print(f"skipped images, which could not be decoded: {left_out}, listed in {folder}/skipped.csv")
    drawn = figures.draw_studies([stored], out)
    print(f"figures: {', '.join(dict.fromkeys(path.stem for path in drawn))}, as PNG and PDF in {drawn[0].parent}")
    print(f"as a page: python experiments/report.py --workdir={shlex.quote(str(folder))}")
