"""Reads a workdir as a study, to draw figures, judge claims, or choose the base learning rates of another grid."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from smallbatch_jax.config.catalog import METRICS
from smallbatch_jax.config.experiment import OWN, Experiment, InputError
from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.text import axis_title, format_base_lr, plural
from smallbatch_jax.data.order import BatchSchedule
from smallbatch_jax.store import results
from smallbatch_jax.store.timings import timing_frame
from smallbatch_jax.store.workdir import is_finished, read_workdir
from smallbatch_jax.study import analysis


@dataclass(frozen=True, eq=False)
class Study:
    """The stored results of one workdir, finished or not.

    Attributes:
      workdir: the folder that holds them.
      experiment: the config; its name says which figure it is.
      rows: `results.load`, one row per run and epoch; where batches grow, also `examples`, the number trained on so far.
      cells: `analysis.planned_cells`, one row per cell, trained or not.
      num_classes: number of classes of the data, or of different tokens; None for a regression.
      examples: numbers of training and test examples; None if unknown.
      timings: `results.load_timings`; may have no rows.
      guess: metrics of a constant guess on the test set, by name without the split, of `runner.grid.facts`; may be empty.
      finished: whether the last training command completed.
    """

    workdir: Path
    experiment: Experiment
    rows: pd.DataFrame
    cells: pd.DataFrame
    num_classes: int | None
    examples: tuple[int, int] | None
    timings: pd.DataFrame = field(default_factory=timing_frame)
    guess: Mapping[str, float] = field(default_factory=dict)
    finished: bool = True

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def chance(self) -> float:
        """The metric of a constant guess; if it is not known, the accuracy of a uniform guess, and NaN for a loss."""
        name, entry = self.metric.name, METRICS.get(self.metric.name)
        if name in self.guess:
            return self.guess[name]
        if entry and entry.guesses and self.num_classes:
            return min(1.0, entry.guesses / self.num_classes)
        return 0.0 if self.metric.fraction else math.nan

    @property
    def metric(self) -> Metric:
        """The metric that says which run is best."""
        return self.experiment.metric

    @property
    def converged(self) -> pd.Series:
        """Whether each row of `cells` converges (`analysis.convergent`)."""
        return analysis.convergent(self.cells, self.chance, self.metric)

    @property
    def choosing(self) -> pd.DataFrame:
        """The rows of the seeds of the grid, by which cells are compared."""
        return self.rows[self.rows["seed"].isin(self.experiment.grid.seeds)]

    @property
    def fresh(self) -> pd.DataFrame:
        """The rows of other seeds, which only confirm what was chosen."""
        return self.rows[~self.rows["seed"].isin(self.experiment.grid.seeds)]

    @property
    def runs(self) -> tuple[int, int]:
        """Numbers of runs that have ended and of all planned runs."""
        ended = int(self.cells["finished"].sum() + self.cells["diverged"].sum())
        return ended, ended + int(self.cells["pending"].sum())

    @property
    def unfinished(self) -> bool:
        """Whether runs have not ended, or a search may begin others."""
        ended, runs = self.runs
        return ended < runs or (self.experiment.search.active and not self.finished)


def load(workdir: str | Path) -> Study:
    """Returns the study that a workdir holds, finished or not; writes nothing.

    Raises:
      InputError: if the folder is not a workdir, or its experiment.json is damaged.
    """
    path = Path(expanded_path("workdir", workdir))
    (experiment, facts), rows = read_workdir(path), results.load(path)
    choosing = rows[rows["seed"].isin(experiment.grid.seeds)]
    if experiment.search.active and len(choosing):  # a search plans a run only when it starts it
        cells = analysis.known_cells(choosing, experiment.metric)
    else:
        planned = [run for run in experiment.runs() if run.seed in experiment.grid.seeds]
        cells = analysis.planned_cells(choosing, planned, experiment.name, experiment.metric)
    num_classes, examples = facts.get("num_classes"), facts.get("examples")
    counted = examples is None or _are_counts(examples, 2)
    if not counted or (experiment.task == "classification" and not _are_counts([num_classes], 1)):
        raise InputError(
            f"--workdir: {path}/experiment.json is damaged: its facts lack num_classes or two numbers of examples."
        )
    if examples and experiment.schedule.batch_growth > 1:
        of_size = {m: BatchSchedule.of(experiment, examples[0], m) for m in experiment.grid.batch_sizes}
        rows["examples"] = [of_size[m].examples(step) for m, step in zip(rows["batch_size"], rows["step"], strict=True)]
    found = path, experiment, rows, cells, num_classes, examples and tuple(examples)
    return Study(*found, results.load_timings(path), facts.get("guess", {}), is_finished(path))


def _are_counts(values: Any, number: int) -> bool:
    """Returns whether stored facts are a list of this many positive integers."""
    return isinstance(values, list) and len(values) == number and all(type(value) is int and value > 0 for value in values)


def load_all(workdirs: str | Path | Iterable[str | Path]) -> dict[str, Study]:
    """Returns the studies of several workdirs, or of one, by name, in the order given.

    Raises:
      InputError: if a folder is not a workdir, or two hold an experiment of one name.
    """
    studies: dict[str, Study] = {}
    for workdir in [workdirs] if isinstance(workdirs, (str, Path)) else workdirs:
        study = load(workdir)
        if study.name in studies:
            both = f"{studies[study.name].workdir} and {workdir} both hold {study.name!r}"
            raise InputError(f"--workdir: {both}; give one of them, or train one under another name.")
        studies[study.name] = study
    return studies


def summaries(studies: Sequence[Study]) -> str:
    """Formats `analysis.summary` of each study, one block for each, with the convergence rules underneath."""
    blocks = []
    for study in studies:
        table = analysis.summary(study.rows, study.chance, study.cells, study.metric)
        blocks.append(f"{study.name}\n{analysis.format_block(table, study.metric)}")
    return "\n\n".join([*blocks, *dict.fromkeys(analysis.convergence_rule(study.metric) for study in studies)])


def describe(study: Study) -> str:
    """Returns one line: what was trained, on what data, over which grid, and how many of its runs have ended."""
    e, cells = study.experiment, study.cells
    images = " ({:,} + {:,} images)".format(*study.examples) if study.examples else ""
    facts = [e.model.name.removeprefix(OWN), f"norm {e.model.norm}"]
    facts += ["precise statistics"] * (e.model.bn_statistics == "precise")
    facts += e.optimizer.described()
    facts += [f"{'own data' if e.dataset.name.startswith(OWN) else e.dataset.name}{images}"]
    facts += ["augmented"] * e.dataset.augment
    facts += [plural(e.epochs, "epoch")]
    facts += [f"warm-up {100 * e.schedule.warmup_fraction:g} %"] * (
        e.schedule.warmup_fraction > 0 and not e.grid.warmup_fractions
    )
    facts += [f"m = {_span(cells['batch_size'])}"]
    facts += [f"grown {e.schedule.batch_growth}-fold at each reduction"] * (e.schedule.batch_growth > 1)
    facts += [f"BN batch {_span(cells['bn_batch_size'])}"] * (not cells["bn_batch_size"].equals(cells["batch_size"]))
    facts += [f"{axis_title(name)} {_span(cells[name], '{:g}'.format)}" for name in analysis.axes(cells)]
    facts += [f"base_lr {_span(cells['base_lr'], format_base_lr)}", plural(len(e.grid.seeds), "seed")]
    ended, planned = study.runs
    counts = f"{ended:,} of {planned:,} runs ended"
    if e.search.active:
        begun = len(study.rows.drop_duplicates([*analysis.cell_columns(study.rows), "seed"]))
        counts = f"a search within {e.search.budget:,.0f} training images, {begun:,} runs begun, {ended:,} ended"
    return f"{', '.join(facts)}: {counts}"


def _span(values: Iterable[Any], shown: Callable[[Any], str] = str) -> str:
    """Formats the smallest and largest value as "2 … 64", or one of them if they are equal."""
    ordered = sorted(values)
    return " … ".join(dict.fromkeys(map(shown, (*ordered[:1], *ordered[-1:])))) or "none"


def choose_base_lrs(experiment: Experiment, workdir: str | Path | None = None) -> Experiment:
    """Returns the experiment with each batch size's best base_lr in the results that `grid.base_lrs_from` names (§3.6).

    A `workdir` that has begun keeps its choice, so it can be resumed even if those results have changed since.

    Raises:
      InputError: if results are missing or incomplete for a batch size.
    """
    grid = experiment.grid
    if not grid.base_lrs_from or experiment.drawn_from:
        return experiment
    chosen = dict(grid.base_lr_by_batch_size)
    if workdir is not None and os.path.isfile(Path(workdir) / "experiment.json"):
        chosen = dict(read_workdir(Path(workdir))[0].grid.base_lr_by_batch_size) | chosen
    missing = [m for m in grid.batch_sizes if m not in chosen]
    if missing:
        sources = [_source(expanded_path("grid.base_lrs_from", path)) for path in grid.base_lrs_from]
        columns = {study.metric.column: str(study.workdir) for study in sources}
        if len(columns) > 1:
            each = ", ".join(f"{workdir} by {column}" for column, workdir in columns.items())
            raise InputError(f"grid.base_lrs_from: the best runs are chosen by different columns: {each}.")
        chosen |= {m: _best_base_lr(m, sources) for m in missing}
    pairs = tuple((m, chosen[m]) for m in grid.batch_sizes)
    return dataclasses.replace(experiment, grid=dataclasses.replace(grid, base_lr_by_batch_size=pairs))


def _source(path: str) -> Study:
    if not os.path.isfile(Path(path, "experiment.json")):
        command = f"python experiments/sweep.py --config=… --workdir={path}"
        raise InputError(f"grid.base_lrs_from: {path} holds no results yet; train it first: {command}")
    return load(path)


def _best_base_lr(batch_size: int, sources: list[Study]) -> float:
    """Returns the base_lr of the best cell of a batch size; ties go to the smallest."""
    cells = pd.concat([study.cells for study in sources], ignore_index=True)
    cells = cells[cells["batch_size"] == batch_size]
    named = ", ".join(str(study.workdir) for study in sources)
    if cells.empty:
        raise InputError(f"grid.base_lrs_from: no run of batch size {batch_size} in {named}.")
    if pending := int(cells["pending"].sum()):
        lack = f"{pending} run(s) of batch size {batch_size} have not ended yet in {named}"
        raise InputError(f"grid.base_lrs_from: {lack}; the same sweep.py command resumes them.")
    if not cells["finished"].any():
        raise InputError(f"grid.base_lrs_from: every run of batch size {batch_size} diverged in {named}.")
    return float(analysis.best_first(cells, sources[0].metric)["base_lr"].iloc[0])
