"""The tables, choices, claims, costs and provenance beside a report's charts, as plain values for page.html."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from smallbatch_jax.config.text import duration, format_base_lr, plural
from smallbatch_jax.store.workdir import read_provenance
from smallbatch_jax.study import claims, cost
from smallbatch_jax.study.figures.points import one_bn_batch_size
from smallbatch_jax.study.study import Study


class Value(NamedTuple):
    """A value, by which a table is sorted and a cell is chosen, and its text."""

    value: Any
    shown: str


class SortableTable(NamedTuple):
    heads: list[str]
    rows: list[list[Value]]


def short_duration(seconds: float) -> str:
    """`duration`, with two digits below ten seconds."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


LABELS = {"batch_size": "batch size m", "bn_batch_size": "BN batch size", "base_lr": "base learning rate η̃"}
SIZES = {"m": ("batch_size", str), "BN batch": ("bn_batch_size", str)}
# Heading → column, and how its values are written.
CELL_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    **SIZES,
    "η̃": ("base_lr", format_base_lr),
    "η = η̃·m": ("eta", "{:.6g}".format),
    "accuracy %": ("test_accuracy", _percent),
    "± %": ("test_accuracy_std", _percent),
    "finished": ("finished", str),
    "diverged": ("diverged", str),
    "pending": ("pending", str),
}
PROGRAM_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    **SIZES,
    "lanes": ("lanes", str),
    "images/s": ("images_per_second", "{:,.0f}".format),
    "training": ("segment_seconds", short_duration),
    "compiling": ("compile_seconds", short_duration),
    "peak MiB": ("peak_bytes", lambda peak: f"{peak / 2**20:,.1f}"),
}


def cell_table(study: Study) -> SortableTable:
    """A row for each cell, in the order of `study.cells`."""
    return _table(study, study.cells.assign(eta=study.cells["batch_size"] * study.cells["base_lr"]), CELL_COLUMNS)


def program_table(study: Study) -> SortableTable | None:
    """A row for each program that was timed; None if there is none."""
    costs = cost.program_costs(study.timings)
    return None if costs.empty else _table(study, costs, PROGRAM_COLUMNS)


def _table(study: Study, frame: pd.DataFrame, columns: dict[str, tuple[str, Callable[[Any], str]]]) -> SortableTable:
    """Writes the columns of a frame; without BN batch sizes if all are m."""
    shown = {head: column for head, column in columns.items() if head != "BN batch" or _bn_varies(study.cells)}

    def write(value: Any, text: Callable[[Any], str]) -> Value:
        return Value("", "–") if value != value else Value(value, text(value))

    return SortableTable(
        list(shown), [[write(row[name], text) for name, text in shown.values()] for row in frame.to_dict("records")]
    )


def _bn_varies(cells: pd.DataFrame) -> bool:
    return not cells["bn_batch_size"].equals(cells["batch_size"])


def choice_of(cell: pd.Series) -> dict[str, str]:
    """The options of the page's form that choose this cell."""
    return {name: _text(cell[name]) for name in LABELS}


def choices(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """The fields of the page's form, one for each setting in which cells differ."""
    found = []
    for name, label in LABELS.items():
        if name != "bn_batch_size" or _bn_varies(cells):
            shown = format_base_lr if name == "base_lr" else str
            options = [Value(_text(value), shown(value)) for value in sorted(set(cells[name].tolist()))]
            found.append({"name": name, "label": label, "options": options})
    return found


def _text(value: float) -> str:
    return f"{value:g}" if value == int(value) else repr(float(value))


def cost_sentence(study: Study) -> str:
    """The time in which the study trained and compiled, in all."""
    costs = cost.program_costs(study.timings)
    trained, compiled = duration(costs["segment_seconds"].sum()), duration(costs["compile_seconds"].sum())
    images = f"{int(costs['images'].sum()):,} images"
    beside = "most of it beside training. A run's own time is its share of its program's."
    return f"{plural(len(costs), 'program')} trained {images} in {trained}; compiling took {compiled}, {beside}"


def cost_caption(study: Study) -> str:
    """The caption of the chart of times."""
    target = cost.target_accuracy(one_bn_batch_size(study.cells)[0], study.chance)
    if math.isnan(target):
        return ""
    share = f"{100 * cost.TARGET:.0f} % of the way from chance to the best"
    return f"Right: the time of a run until it reaches {100 * target:.1f} %, {share}; × marks a batch size that never does."


def claims_of(studies: dict[str, Study]) -> dict[str, Any] | None:
    """The verdicts on the paper's claims about these studies, decided and open; None if there are none."""
    verdicts = claims.judge(studies)
    about = [v for v in verdicts if any(name in studies for check in v.claim.checks for name in check.figures)]
    if not about:
        return None
    judged = [v for v in about if v.holds is not None]
    hold = sum(v.holds is True for v in judged)
    count = f"{plural(len(judged), 'claim')} can be judged here: holding {hold}, not holding {len(judged) - hold}."
    return {"count": count, "judged": judged, "open": [v for v in about if v.holds is None]}


def provenance(workdir: Path) -> list[tuple[str, str]]:
    """When, where and with what the results were made, as names and values."""
    lines = read_provenance(workdir)
    starts = [line for line in lines if line.get("event") == "start"]
    if not starts:
        return [("workdir", workdir.name)]
    ends = [line for line in lines if line.get("event") == "finish"]
    last = starts[-1]
    device, versions = last.get("device") or {}, last.get("versions") or {}
    found = {
        "workdir": workdir.name,
        "begun": str(starts[0].get("time", "")),
        "finished": str(ends[-1].get("time", "")) if ends else "not yet",
        "started": plural(len(starts), "time"),
        "device": f"{device.get('count', '')} × {device.get('kind', '')} ({device.get('platform', '')})" if device else "",
        "precision": str(last.get("precision", "")),
        "machine": " ".join(str(last.get(name, "")) for name in ("host", "machine")).strip(),
        "commit": ", ".join(dict.fromkeys(str(line["commit"]) for line in starts if line.get("commit"))),
        "command": " ".join(map(str, last.get("command") or [])),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, value) for name, value in found.items() if value]
