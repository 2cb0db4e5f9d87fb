"""What stands beside the charts of a report: tables, choices, claims, provenance, as plain values for page.html."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from smallbatch_jax.config.text import format_base_lr, plural
from smallbatch_jax.store.workdir import read_provenance
from smallbatch_jax.study import claims
from smallbatch_jax.study.claims import VERDICTS, Verdict
from smallbatch_jax.study.study import Study

CHOICES = {"batch_size": "batch size m", "bn_batch_size": "BN batch size", "base_lr": "base learning rate η̃"}


class Value(NamedTuple):
    """A value as it is shown, and as it is sorted or chosen by."""

    value: Any
    shown: str


class Table(NamedTuple):
    heads: list[str]
    rows: list[list[Value]]


def choice_of(cell: pd.Series) -> dict[str, str]:
    """What the page's form says where this cell is chosen; the values of its options."""
    return {name: _text(cell[name]) for name in CHOICES}


def choices(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """The fields of the page's form, one for each setting in which cells differ."""
    found = []
    for name, label in CHOICES.items():
        if name == "bn_batch_size" and cells["bn_batch_size"].equals(cells["batch_size"]):
            continue
        shown = format_base_lr if name == "base_lr" else str
        options = [Value(_text(value), shown(value)) for value in sorted(set(cells[name].tolist()))]
        found.append({"name": name, "label": label, "options": options})
    return found


def _text(value: float) -> str:
    return f"{value:g}" if value == int(value) else repr(float(value))


def cell_table(cells: pd.DataFrame) -> Table:
    """All that is known of each cell, a row each, in the order of `cells`."""
    shows_bn = not cells["bn_batch_size"].equals(cells["batch_size"])
    heads = ["m", *["BN batch"] * shows_bn, "η̃", "η = η̃·m", "accuracy %", "± %", "finished", "diverged", "pending"]
    rows = []
    for cell in cells.to_dict("records"):
        m, b, base_lr = cell["batch_size"], cell["bn_batch_size"], cell["base_lr"]
        setting = [Value(m, str(m)), *[Value(b, str(b))] * shows_bn, Value(base_lr, format_base_lr(base_lr))]
        accuracies = [_percent(cell["test_accuracy"]), _percent(cell["test_accuracy_std"])]
        counts = [Value(cell[name], str(cell[name])) for name in ("finished", "diverged", "pending")]
        rows.append([*setting, Value(m * base_lr, f"{m * base_lr:.6g}"), *accuracies, *counts])
    return Table(heads, rows)


def _percent(fraction: float) -> Value:
    return Value("", "–") if fraction != fraction else Value(fraction, f"{100 * fraction:.2f}")


def claims_of(studies: dict[str, Study]) -> dict[str, Any] | None:
    """The paper's claims that these studies speak of, those that they decide first; None if there are none."""
    verdicts = claims.judge(studies)
    about = [v for v in verdicts if any(name in studies for check in v.claim.checks for name in check.figures)]
    if not about:
        return None
    judged = [v for v in about if v.holds is not None]
    hold = sum(v.holds is True for v in judged)
    count = f"{plural(len(judged), 'claim')} can be judged here: holding {hold}, not holding {len(judged) - hold}."
    return {"count": count, "judged": [_claim(v) for v in judged], "open": [_claim(v) for v in about if v.holds is None]}


def _claim(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "id": claim.id,
        "where": claim.where,
        "sentence": claim.sentence,
        "verdict": VERDICTS[verdict.holds],
        "kind": {True: "holds", False: "fails", None: "open"}[verdict.holds],
        "findings": [f"{finding.text}: {VERDICTS[finding.holds]}" for finding in verdict.findings],
    }


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
        "commit": _distinct(starts, "commit"),
        "command": " ".join(map(str, last.get("command") or [])),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, value) for name, value in found.items() if value]


def _distinct(lines: list[dict[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(line[name]) for line in lines if line.get(name)))
