"""The tables, choices, claims, costs and provenance beside a report's charts, as plain values for page.html."""

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from smallbatch_jax.config import catalog
from smallbatch_jax.config.text import axis_title, duration, format_base_lr, plural, short_duration
from smallbatch_jax.store.workdir import read_provenance
from smallbatch_jax.study import claims, cost
from smallbatch_jax.study.analysis import axes
from smallbatch_jax.study.figures.points import marked, one_bn_batch_size
from smallbatch_jax.study.study import Study


class Value(NamedTuple):
    """A value, used to sort a table or choose a cell, and its text."""

    value: Any
    shown: str


class SortableTable(NamedTuple):
    heads: list[str]
    rows: list[list[Value]]


LABELS = {"batch_size": "batch size m", "bn_batch_size": "BN batch size", "base_lr": "base learning rate η̃"}
# Column → heading, and how its values are written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "batch_size": ("m", str),
    "bn_batch_size": ("BN batch", str),
    "base_lr": ("η̃", format_base_lr),
    "eta": ("η", "{:.6g}".format),
    "y": ("accuracy %", "{:.2f}".format),
    "std": ("± %", "{:.2f}".format),
    **{name: (axis_title(name), "{:g}".format) for name in catalog.AXES},
    "finished": ("finished", str),
    "diverged": ("diverged", str),
    "pending": ("pending", str),
    "lanes": ("lanes", str),
    "images_per_second": ("images/s", "{:,.0f}".format),
    "segment_seconds": ("training", short_duration),
    "compile_seconds": ("compiling", short_duration),
    "peak_bytes": ("peak MiB", lambda peak: f"{peak / 2**20:,.1f}"),
}


def axis_label(study: Study, column: str) -> str:
    """Returns the title of a column's axis; that of η̃ defines the learning rate, unless it is the paper's η̃·m."""
    rule = study.experiment.optimizer.rule
    said = f" (η = {catalog.RULES[rule][0]})" if column == "base_lr" and rule != "linear" else ""
    return LABELS[column] + said


def cell_table(study: Study) -> SortableTable:
    """A row for each cell, in the order of `study.cells`."""
    rates = map(study.experiment.optimizer.learning_rate, study.cells["base_lr"], study.cells["batch_size"])
    return _table(study, marked(study.cells, study.metric).assign(eta=list(rates)))


def program_table(study: Study) -> SortableTable | None:
    """A row for each program that was timed; None if there is none."""
    costs = cost.program_costs(study.timings)
    return None if costs.empty else _table(study, costs)


def _table(study: Study, frame: pd.DataFrame) -> SortableTable:
    """Writes the `COLUMNS` that a frame has; without BN batch sizes if all are m."""
    columns = COLUMNS | {name: (axis_title(name), "{:g}".format) for name in axes(frame) if name not in COLUMNS}
    columns["eta"] = (f"η = {catalog.RULES[study.experiment.optimizer.rule][0]}", COLUMNS["eta"][1])
    if not study.metric.fraction:
        columns |= {"y": (study.metric.title, "{:.4g}".format), "std": ("±", "{:.2g}".format)}
    names = [name for name in columns if name in frame and (name != "bn_batch_size" or _bn_varies(study.cells))]

    def write(name: str, value: Any) -> Value:
        return Value("", "–") if value != value else Value(value, columns[name][1](value))

    rows = [[write(name, row[name]) for name in names] for row in frame.to_dict("records")]
    return SortableTable([columns[name][0] for name in names], rows)


def _bn_varies(cells: pd.DataFrame) -> bool:
    return not cells["bn_batch_size"].equals(cells["batch_size"])


def choices(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """The fields of the page's form, one for each setting in which cells differ."""
    found = []
    for name, label in LABELS.items():
        if name != "bn_batch_size" or _bn_varies(cells):
            options = [Value(value, COLUMNS[name][1](value)) for value in sorted(set(cells[name].tolist()))]
            found.append({"name": name, "label": label, "options": options})
    return found


def cost_sentence(study: Study) -> str:
    """Returns a sentence on the study's total training and compilation time."""
    costs = cost.program_costs(study.timings)
    trained, compiled = duration(costs["segment_seconds"].sum()), duration(costs["compile_seconds"].sum())
    images = f"{plural(len(costs), 'program')} trained {costs['images'].sum():,} images in {trained}"
    return f"{images}; compiling took {compiled}, most of it beside training. A run's own time is its share of its program's."


def cost_caption(study: Study) -> str:
    """The caption of the chart of times."""
    target = cost.target_accuracy(one_bn_batch_size(study.cells, study.metric)[0], study.chance, metric=study.metric)
    if math.isnan(target):
        return ""
    reached = f"{study.metric.show(target)}, {100 * cost.TARGET:.0f} % of the way from chance to the best"
    return f"Right: the time of a run until it reaches {reached}; × marks a batch size that never does."


def claims_of(studies: dict[str, Study]) -> dict[str, Any] | None:
    """Returns the verdicts on the paper's claims about these studies, judged or lacking data; None if there are none."""
    verdicts = claims.judge(studies)
    about = [v for v in verdicts if any(name in studies for check in v.claim.checks for name in check.figures)]
    if not about:
        return None
    judged = [v for v in about if v.answer != claims.LACKS]
    hold, fail, untold = (sum(v.answer == answer for v in judged) for answer in (claims.HOLDS, claims.FAILS, claims.OPEN))
    count = f"{plural(len(judged), 'claim')} can be judged here: holding {hold}, not holding {fail}, within the noise {untold}."
    return {"count": count, "judged": judged, "open": [v for v in about if v.answer == claims.LACKS]}


def provenance(workdir: Path) -> list[tuple[str, str]]:
    """When, where and with what the results were made, as names and values."""
    lines = read_provenance(workdir)
    starts = [line for line in lines if line.get("event") == "start"]
    if not starts:
        return [("workdir", workdir.name)]
    ends = [line for line in lines if line.get("event") == "finish"]
    last = starts[-1]
    device, versions = (last[name] if isinstance(last.get(name), dict) else {} for name in ("device", "versions"))
    found = {
        "workdir": workdir.name,
        "begun": str(starts[0].get("time", "")),
        "finished": str(ends[-1].get("time", "")) if ends else "not yet",
        "started": plural(len(starts), "time"),
        "device": f"{device.get('count', '')} × {device.get('kind', '')} ({device.get('platform', '')})" if device else "",
        "precision": str(last.get("precision", "")),
        "machine": " ".join(str(last.get(name, "")) for name in ("host", "machine")).strip(),
        "commit": ", ".join(dict.fromkeys(str(line["commit"]) for line in starts if line.get("commit"))),
        "command": shlex.join(map(str, last["command"])) if isinstance(last.get("command"), list) else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, value) for name, value in found.items() if value]
