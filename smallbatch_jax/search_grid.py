"""The public function `search`, which finds the batch size and learning rate to train with, within a budget."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from smallbatch_jax.config import fields
from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.config.grid import Grid, Search
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.runner.sweep import loaded, require_workdir, sweep
from smallbatch_jax.study import study
from smallbatch_jax.study.answer import Answer, answer
from smallbatch_jax.study.recommendation import Recommendation
from smallbatch_jax.study.study import Study

BATCH_SIZES = tuple(2**k for k in range(1, 12, 2))  # 2, 8, … 2048
BASE_LRS = tuple(2.0**k for k in range(-20, 3))  # lattice of rates; those far from the best cost a search little
LEAST_UPDATES = 4  # minimum updates per epoch at the largest default batch size
VALIDATION_FRACTION = 0.1


class Found(NamedTuple):
    """The result of a search; printed, it is the answer in plain English."""

    answer: Answer
    study: Study

    @property
    def recommendation(self) -> Recommendation:
        """The recommended cell and its uncertainty."""
        return self.answer.recommendation

    def __str__(self) -> str:
        details = (*self.recommendation.sentences, *self.answer.caveats)
        return "\n".join([self.answer.sentence, *(f"- {line}" for line in details)])


def search(
    model: Any,
    dataset: str | Dataset | Photographs,
    epochs: int | None = None,
    *,
    budget: float | None = None,
    seconds: float | None = None,
    batch_sizes: Sequence[int] | None = None,
    base_lrs: Sequence[float] = BASE_LRS,
    seeds: Sequence[int] = (0, 1, 2),
    workdir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Found:
    """Finds the batch size m and base learning rate η̃ to train with, stopping runs that lose early.

    At each m learning rates are bracketed and then pruned by successive halving, with rungs in examples seen (`runner.policy`);
    the leaders get further seeds, and fresh seeds confirm the recommended cell on the test set. The workdir is an ordinary one:
    the same call resumes it, and `results.load`, figures and the report read it.

    Args:
      model: as for `sweep`.
      dataset: as for `sweep`. A tenth of its training examples is held out for selection, unless `validation_fraction` or
        `select` is given, or the data have a validation split of their own or are streamed.
      epochs: E, of a whole run; stopped runs train for fewer. None takes as many as have a default
        budget within `budget`, or 8, a config's default, if `budget` is None.
      budget: training examples summed over all runs and epochs; None takes three whole runs for each batch size (two if there
        is one seed), and the confirming runs.
      seconds: the budget as time instead, converted to examples by a measurement before the first run.
      batch_sizes: the candidates; None takes those of 2, 8, 32, … 2048 with at least four updates per epoch.
      base_lrs: the lattice of η̃ to search; a finer one costs little more.
      seeds: the first is used to find rates, the others replicate the leaders.
      workdir: folder of the results, which the same call resumes; None stores nothing.
      **options: options of `sweep`, such as `optimizer`, `norm`, `loss` and `confirm`, the number of fresh seeds.

    Returns:
      The answer with its recommendation, and the study behind them.

    Raises:
      InputError: one line that names the invalid argument.
    """
    if budget is not None and seconds is not None:
        raise InputError("seconds: a search has one budget; give seconds or budget, not both.")
    images = loaded(dataset, options.get("data_dir"), options.get("image_size"))
    require_workdir(options, workdir)
    workdir = None if workdir is None else os.path.abspath(fields.expanded_path("workdir", workdir))
    if "select" not in options and isinstance(images, Dataset) and "validation" not in images.splits():
        options = {"validation_fraction": VALIDATION_FRACTION} | options
    if batch_sizes is None:
        batch_sizes = [m for m in BATCH_SIZES if m * LEAST_UPDATES <= images.num_train] or [1]
    sections = {"batch_sizes": batch_sizes, "bn_batch_sizes": options.get("bn_batch_sizes"), "seeds": seeds}
    asked = fields.parse(Search, {"confirm": options.get("confirm", Search.confirm), "budget": budget}, "search")
    per_epoch = asked.default_budget(fields.parse(Grid, sections, "grid"), 1, images.num_train)
    if epochs is None:
        epochs = Experiment.epochs if asked.budget is None else max(1, int(asked.budget // per_epoch))
    length: int = fields.integer(1, 100_000)("epochs", fields.plain(epochs))
    if budget is None and seconds is None:
        budget = length * per_epoch
    with tempfile.TemporaryDirectory() if workdir is None else nullcontext(workdir) as folder:
        options = {"name": "search"} | options | {"budget": budget, "seconds": seconds}
        sweep(model, dataset, batch_sizes, base_lrs, length, seeds, folder, **options)
        found = study.load(folder)
    return Found(answer(found), found)
