"""The paper's figures from stored results, complete or partial.

Each figure is a function of the cells of one experiment (`analysis.planned_cells`, or `analysis.final_accuracy`), of
its rows, or of several studies, and returns a matplotlib Figure that no pyplot state knows of, so drawing works without
a display and leaves a notebook's settings alone.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.figures.cost import accuracy_against_memory, accuracy_against_time, cost_figures, time_to_accuracy
from smallbatch_jax.study.figures.curves import accuracy_against_bn_batch_size, convergence, own_base_lrs
from smallbatch_jax.study.figures.grid import accuracy_against_base_lr, accuracy_against_batch_size, heat_map
from smallbatch_jax.study.figures.summary import best_accuracy, convergent_base_lrs, metric_name
from smallbatch_jax.study.figures.table import known_cells
from smallbatch_jax.study.study import Study

__all__ = [
    "accuracy_against_base_lr",
    "accuracy_against_batch_size",
    "accuracy_against_bn_batch_size",
    "accuracy_against_memory",
    "accuracy_against_time",
    "best_accuracy",
    "convergence",
    "convergent_base_lrs",
    "draw",
    "draw_studies",
    "draw_summaries",
    "heat_map",
    "time_to_accuracy",
]

PathLike = str | os.PathLike[str]


def draw(df: pd.DataFrame, out_dir: PathLike) -> list[Path]:
    """Writes the figures of results as PNG and PDF; the same results give the same bytes.

    Args:
      df: results, one row per run and epoch. Several experiments go into one folder each, under their names. Runs that
        have no row yet are not known of: where there is a workdir, `draw_studies` shows them as missing.
      out_dir: created if need be. A file that is there is replaced whole or not at all.
    Returns:
      The paths written.
    Raises:
      InputError: there is nothing to draw, an experiment's name cannot name a folder, or a file cannot be written.
    """
    _require_rows(df)
    by_name = {str(name): rows for name, rows in df.groupby("experiment", observed=True)}
    folders = _folders(list(by_name), Path(out_dir))
    return [path for name, rows in by_name.items() for path in _write_all(_own_figures(rows, known_cells(rows)), folders[name])]


def draw_studies(studies: Iterable[Study], out_dir: PathLike | None = None) -> list[Path]:
    """Writes the figures of each study, missing cells included, and for several studies those that compare them.

    Where times and memory are known, `cost_figures` come with them; what those show depends on the machine that trained.

    Args:
      studies: of different names.
      out_dir: of one study, the folder of its figures; of several, that of their comparison, with a folder for each
        study under its name. None: the folder `figures` of each workdir, and of the first for their comparison.
    Returns:
      The paths written.
    Raises:
      InputError: as `draw`.
    """
    studies = list(studies)
    _require_rows(*(study.rows for study in studies))
    names = [study.name for study in studies]
    homes = {study.name: study.workdir / "figures" for study in studies}
    folders = homes if out_dir is None else _folders(names, Path(out_dir))
    paths = []
    for study in studies:
        own = _own_figures(study.rows, study.cells, metric_name(study.experiment))
        paths += _write_all(chain(own, cost_figures(study)), folders[study.name])
    if len(studies) > 1:
        paths += draw_summaries(studies, homes[names[0]] if out_dir is None else out_dir)
    return paths


def draw_summaries(studies: Sequence[Study], out_dir: PathLike) -> list[Path]:
    """Writes the figures that compare studies, Figs. 15 and 16, and returns their paths. Raises as `draw` does."""
    _require_rows(*(study.rows for study in studies))
    makers = {"best_accuracy": best_accuracy, "convergent_base_lrs": convergent_base_lrs}
    return _write_all(((stem, make(studies)) for stem, make in makers.items()), Path(out_dir))


def _own_figures(rows: pd.DataFrame, cells: pd.DataFrame, metric: str = style.TEST_ACCURACY) -> Iterator[tuple[str, Figure]]:
    """File name and figure of all that one experiment's grid gives rise to."""
    rates = own_base_lrs(cells)
    bn_varies = (cells["bn_batch_size"] != cells["batch_size"]).any()
    if not (bn_varies and rates.notna().all() and rates.nunique() > 1):
        yield "accuracy_vs_batch_size", accuracy_against_batch_size(cells, metric)
    if not rates.notna().all():
        yield "accuracy_vs_base_lr", accuracy_against_base_lr(cells, metric)
        yield "heat_map", heat_map(cells, metric)
    if bn_varies:
        yield "accuracy_vs_bn_batch_size", accuracy_against_bn_batch_size(cells, metric)
    yield "convergence", convergence(rows, cells=cells, metric=metric)


def _write_all(figures: Iterable[tuple[str, Figure]], folder: Path) -> list[Path]:
    return [path for stem, figure in figures for path in style.write(figure, folder / stem)]


def _require_rows(*frames: pd.DataFrame) -> None:
    if all(frame.empty for frame in frames):
        raise InputError("figures: the results hold no rows yet; train at least one epoch of one run first.")


def _folders(names: list[str], out_dir: Path) -> dict[str, Path]:
    """Each experiment's folder: `out_dir` itself for one, a folder in it for each of several."""
    return {name: out_dir / _folder_name(name) if len(names) > 1 else out_dir for name in names}


def _folder_name(experiment: str) -> str:
    if experiment in ("", ".", "..") or Path(experiment).name != experiment:
        raise InputError(f"experiment: {experiment!r} cannot name a folder; use a name without slashes.")
    return experiment
