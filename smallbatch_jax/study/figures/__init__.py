"""The paper's figures from stored results, complete or partial.

A figure is a function of the cells of one experiment (`analysis.planned_cells`, or `analysis.final_accuracy`), of its rows,
or of several studies; it returns a matplotlib Figure unknown to pyplot, so drawing works without a display and leaves
a notebook's settings alone. `_own_figures` and `draw_summaries` list what the commands draw: to add a figure, write a function
in one of these modules and add a line there.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from smallbatch_jax.config.fields import InputError, folder_name
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.study.analysis import axes, known_cells, require_columns
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.grid import accuracy_against_base_lr as accuracy_against_base_lr
from smallbatch_jax.study.figures.grid import accuracy_against_batch_size as accuracy_against_batch_size
from smallbatch_jax.study.figures.grid import accuracy_against_bn_batch_size as accuracy_against_bn_batch_size
from smallbatch_jax.study.figures.grid import heat_map as heat_map
from smallbatch_jax.study.figures.labels import named_metric
from smallbatch_jax.study.figures.points import one_bn_batch_size, own_base_lrs
from smallbatch_jax.study.figures.runs import accuracy_against_memory as accuracy_against_memory
from smallbatch_jax.study.figures.runs import accuracy_against_time as accuracy_against_time
from smallbatch_jax.study.figures.runs import convergence as convergence
from smallbatch_jax.study.figures.runs import noise_scale as noise_scale
from smallbatch_jax.study.figures.runs import program_costs
from smallbatch_jax.study.figures.runs import sharpness as sharpness
from smallbatch_jax.study.figures.runs import time_to_accuracy as time_to_accuracy
from smallbatch_jax.study.figures.scaling import LEAST_SIZES
from smallbatch_jax.study.figures.scaling import best_learning_rates as best_learning_rates
from smallbatch_jax.study.figures.scaling import examples_to_target as examples_to_target
from smallbatch_jax.study.figures.summary import best_accuracy as best_accuracy
from smallbatch_jax.study.figures.summary import convergent_base_lrs as convergent_base_lrs
from smallbatch_jax.study.study import Study

PathLike = str | os.PathLike[str]


COST_FIGURES = ("accuracy_vs_time", "time_to_accuracy", "accuracy_vs_memory")  # depend on the machine that trained


def draw(df: pd.DataFrame, out_dir: PathLike) -> list[Path]:
    """Writes the figures of results as PNG and PDF; the same results give the same bytes.

    Args:
      df: results, one row per run and epoch. Several experiments go into one folder each, under their names. Runs without a
        row are unknown; with a workdir, `draw_studies` shows them as missing. Where there are no accuracies, losses are drawn.
      out_dir: created if needed. Existing files are replaced atomically.
    Returns:
      The paths written.
    Raises:
      InputError: there is nothing to draw, an experiment's name cannot name a folder, or a file cannot be written.
      ValueError: `df` lacks a column.
    """
    require_columns(df)
    _require_rows(df)
    paths = []
    for name, folder in _folders(sorted(set(df["experiment"])), Path(out_dir)).items():
        rows = df[df["experiment"] == name]
        rows = rows.drop(columns=[axis for axis in axes(rows) if rows[axis].isna().all()])  # of another experiment
        without = rows["test_accuracy"].isna().all() and (rows["status"] == "finished").any()  # of a task without an accuracy
        metric = Metric("test_loss", "min") if without else ACCURACY
        paths += _write_all(_own_figures(rows, known_cells(rows, metric), metric), folder)
    return paths


def draw_studies(studies: Iterable[Study], out_dir: PathLike | None = None) -> list[Path]:
    """Writes the figures of each study, missing cells included, and for several studies those that compare them.

    Where times and memory are known, COST_FIGURES are drawn too; they depend on the machine that trained.

    Args:
      studies: of different names.
      out_dir: the folder of the figures; for several studies it holds their comparison, and a folder for each study under
        its name. None: the folder `figures` of each workdir, and of the first for their comparison.
    Returns:
      The paths written.
    Raises:
      InputError: as `draw`.
    """
    studies = list(studies)
    _require_rows(*(study.rows for study in studies))
    homes = {study.name: study.workdir / "figures" for study in studies}
    folders = homes if out_dir is None else _folders(list(homes), Path(out_dir))
    paths = []
    for study in studies:
        figures = _own_figures(study.rows, study.cells, named_metric(study.experiment), study)
        paths += _write_all(figures, folders[study.name], study.experiment.optimizer.rule)
    if len(studies) > 1:
        paths += draw_summaries(studies, homes[studies[0].name] if out_dir is None else out_dir)
    return paths


def draw_summaries(studies: Sequence[Study], out_dir: PathLike) -> list[Path]:
    """Writes the figures that compare studies, Figs. 15 and 16, and returns their paths. Raises as `draw` does."""
    _require_rows(*(study.rows for study in studies))
    figures = {"best_accuracy": best_accuracy(studies), "convergent_base_lrs": convergent_base_lrs(studies)}
    return _write_all(figures.items(), Path(out_dir))


def _own_figures(
    rows: pd.DataFrame, cells: pd.DataFrame, metric: Metric = ACCURACY, study: Study | None = None
) -> Iterator[tuple[str, Figure]]:
    """Yields the figures that an experiment's grid and results allow, with their file names; some need `study`."""
    rates, bn_varies = own_base_lrs(cells), (cells["bn_batch_size"] != cells["batch_size"]).any()
    own = rates.notna().all()
    if not (bn_varies and own and rates.nunique() > 1):
        yield "accuracy_vs_batch_size", accuracy_against_batch_size(cells, metric)
    if not own:
        yield "accuracy_vs_base_lr", accuracy_against_base_lr(cells, metric)
        yield "heat_map", heat_map(cells, metric)
    if bn_varies:
        yield "accuracy_vs_bn_batch_size", accuracy_against_bn_batch_size(cells, metric)
    yield "convergence", convergence(rows, cells=cells, metric=metric)
    if study and cells["batch_size"].nunique() >= LEAST_SIZES:
        yield "examples_to_target", examples_to_target(study)
        if not own:
            yield "best_learning_rates", best_learning_rates(study)
    for diagnostic, figure in {"noise_scale": noise_scale, "sharpness": sharpness}.items():
        if study and diagnostic in study.experiment.diagnostics:
            yield diagnostic, figure(study)
    if study:
        costs = program_costs(study, one_bn_batch_size(cells, metric)[0])
        if costs["images_per_second"].notna().any():
            yield "accuracy_vs_time", accuracy_against_time(study)
            yield "time_to_accuracy", time_to_accuracy(study)
        if costs["peak_bytes"].notna().any():
            yield "accuracy_vs_memory", accuracy_against_memory(study)


def _write_all(figures: Iterable[tuple[str, Figure]], folder: Path, rule: str = "linear") -> list[Path]:
    return [path for name, figure in figures for path in style.write(style.with_rule(figure, rule), folder / name)]


def _require_rows(*frames: pd.DataFrame) -> None:
    if all(frame.empty for frame in frames):
        raise InputError("figures: the results hold no rows yet; train at least one epoch of one run first.")


def _folders(names: list[str], out_dir: Path) -> dict[str, Path]:
    """Each experiment's folder: `out_dir` itself for one, a folder in it for each of several."""
    if len(names) == 1:
        return {names[0]: out_dir}
    return {name: out_dir / folder_name("experiment", name) for name in names}
