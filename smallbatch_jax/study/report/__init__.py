"""One HTML page that explains a study: it opens from disk, needs no network, and holds everything it shows.

The charts are Plotly's, made in `charts`; `sections` makes the text and tables; page.html, page.css and page.js lay them out.
"""

import base64
import gzip
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.store.files import write_atomically
from smallbatch_jax.study import equal_time
from smallbatch_jax.study.answer import answer
from smallbatch_jax.study.claims import FAILS, HOLDS
from smallbatch_jax.study.figures.labels import paper_labels
from smallbatch_jax.study.noise import RULE
from smallbatch_jax.study.report import charts, sections
from smallbatch_jax.study.report.scaling import scaling_charts
from smallbatch_jax.study.study import Study, describe

__all__ = ["page", "write"]
JSON: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}


def write(studies: Iterable[Study], path: str | os.PathLike[str], refresh_seconds: int | None = None) -> None:
    """Writes the page of one or several studies, finished or not, atomically.

    Args:
      studies: of different names.
      path: the HTML file; its folder is created if needed.
      refresh_seconds: the interval at which a browser reloads it; None: never.

    Raises:
      InputError: if it cannot be written there.
      WriteError: if the disk is full.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"--out: {target} is a folder; give the name of a file, such as {target / 'report.html'}")
    write_atomically(target, page(studies, refresh_seconds))


def page(studies: Iterable[Study], refresh_seconds: int | None = None) -> str:
    """The page as one string of HTML. Arguments as for `write`."""
    studies = list(studies)
    labels = [label.replace("\\$", "$") for label in paper_labels(studies)]  # escaped for matplotlib
    labelled = dict(zip(labels, studies, strict=True))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.loader = jinja2.PackageLoader(__name__, ".")
    environment.policies["json.dumps_kwargs"] = JSON
    return environment.get_template("page.html").render(
        title=f"{', '.join(study.name for study in studies)}: batch size and learning rate",
        studies=[_section(f"study{i}", study, label) for i, (label, study) in enumerate(labelled.items())],
        lengths=equal_time.sentence(studies) if len(studies) > 1 else "",
        comparison=_chart(charts.best_by_batch_size(labelled)) if len(studies) > 1 else None,
        claims=sections.claims_of({study.name: study for study in studies}),
        RULE=RULE,
        HOLDS=HOLDS,
        FAILS=FAILS,
        refresh_seconds=refresh_seconds,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        version=importlib.metadata.version("smallbatch_jax"),
        plotly=_plotly(),
    )


@cache
def _plotly() -> Markup:
    """Plotly's library for browsers, compressed to a third."""
    return _packed(plotly.offline.get_plotlyjs())


def _section(identity: str, study: Study, label: str) -> dict[str, Any]:
    """The values of page.html for one study."""
    found, curves = answer(study), charts.learning_curves(study)
    hover, maps, costs = charts.cell_labels(study), charts.maps_of(study), charts.cost_charts(study)
    scaling = scaling_charts(study, found.recommendation)
    best = 0 if found.best is None else study.cells.index.tolist().index(found.best.name)
    return {
        "id": identity,
        "name": study.name,
        "label": label,
        "title": label.removesuffix(f" ({study.name})"),
        "answer": found,
        "facts": describe(study),
        "maps": [shown.label for shown in maps],
        "choices": sections.choices(study.cells),
        "chosen": curves[best]["title"],
        "table": sections.cell_table(study),
        "costs": sections.program_table(study),
        "cost_sentence": sections.cost_sentence(study),
        "cost_caption": sections.cost_caption(study),
        "provenance": sections.provenance(study.workdir),
        "config": json.dumps(study.experiment.to_dict(), indent=1, ensure_ascii=False),
        "data": {
            "cells": study.cells[list(sections.LABELS)].astype(str).to_dict("records"),
            "maps": [_map(study, shown, hover) for shown in maps],
            "best": best,
            "scaling": {name: _chart(figure) for name, figure in scaling.items()},
            "costs": {name: _chart(figure) for name, figure in costs.items()},
            **{what: _chart(charts.curves_layout(study, what)) for what in ("accuracy", "loss")},
        },
        "curves": _packed(json.dumps(curves, **JSON)),
    }


def _map(study: Study, shown: charts.CellMap, hover: Sequence[str]) -> dict[str, Any]:
    """A heat map, the place of each of its cells, and the same cells as curves."""
    places = shown.cells[[shown.column, "batch_size"]].rank(method="dense").astype(int) - 1
    return {
        "chart": _chart(charts.heat_map(study, shown, hover)),
        "sizes": _chart(charts.accuracy_by_batch_size(study, shown)),
        "cells": study.cells.index.get_indexer(shown.cells.index).tolist(),
        "places": places.to_numpy().tolist(),
    }


def _chart(figure: Any) -> Any:
    return json.loads(figure.to_json())


def _packed(text: str) -> Markup:
    """Compresses a text deterministically to base64, which needs no escaping."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode())
