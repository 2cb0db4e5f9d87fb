"""The answer of a study in one sentence: the best batch size and base learning rate, and who never gets there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from smallbatch_jax.study.analysis import format_base_lr
from smallbatch_jax.study.study import Study

RULE = (
    "A batch size reaches the best if its own best is within the noise: less than two standard errors away, those of the "
    "seeds, and with fewer than three seeds at least those of a test set of that size."
)


class Answer(NamedTuple):
    """What a study says, in plain text."""

    sentence: str  # one, with its full stop
    caveats: tuple[str, ...]  # the learning rate as others write it, and what a careful reader would ask
    best: pd.Series | None  # the row of `study.cells` that is best; None until a run has finished


def answer(study: Study) -> Answer:
    """The most accurate cell of a study, by `analysis.final_accuracy`, and the batch sizes that never reach it.

    Of equals the smallest batch size, BN batch size and base learning rate is best. A batch size counts as not reaching the
    best by `RULE`, and only once all its runs have ended.
    """
    cells = study.cells
    ended, runs = study.runs
    so_far = f"So far ({ended:,} of {runs:,} runs ended): " if ended < runs else ""
    if not cells["finished"].any():
        return Answer(f"{so_far}{'none of them has finished.' if so_far else 'Every run diverged.'}", (), None)
    best = _best(cells)
    if best["test_accuracy"] <= study.chance:
        return Answer(f"{so_far}No run is better than chance, {_percent(study.chance)}.", (), best)
    sentence = f"{so_far}{'best' if so_far else 'Best'} at {setting(best)}: {accuracy(best)}"
    rest = _rest(study, best)
    return Answer(f"{sentence}{'; ' * bool(rest)}{rest}.", tuple(_caveats(study, best)), best)


def setting(cell: Mapping[Any, Any] | pd.Series) -> str:
    """A cell as "m = 4, η̃ = 2^-7", with its BN batch size where that is not m."""
    m, b = int(cell["batch_size"]), int(cell["bn_batch_size"])
    return f"m = {m}, " + (f"BN batch size {b}, " if b != m else "") + f"η̃ = {format_base_lr(cell['base_lr'])}"


def accuracy(cell: pd.Series) -> str:
    """The test accuracy of a cell as "91.2 ± 0.2 %"; without a deviation where one seed finished."""
    mean, std = cell["test_accuracy"], cell["test_accuracy_std"]
    return _percent(mean) if math.isnan(std) else f"{100 * mean:.1f} ± {100 * std:.1f} %"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _best(cells: pd.DataFrame) -> pd.Series:
    order = ["test_accuracy", "batch_size", "bn_batch_size", "base_lr"]
    return cells[cells["finished"] > 0].sort_values(order, ascending=[False, True, True, True]).iloc[0]


def _variance(cell: pd.Series, examples: int | None) -> float:
    """Of the mean accuracy of a cell. Two seeds may agree by luck; a test set is drawn by chance as well."""
    seeds = cell["test_accuracy_std"] ** 2 / cell["finished"] if cell["finished"] > 1 else 0.0
    drawn = cell["test_accuracy"] * (1 - cell["test_accuracy"]) / examples if examples else 0.0
    return seeds if cell["finished"] > 2 else max(seeds, drawn)


def _reaches(study: Study, cell: pd.Series, best: pd.Series) -> bool:
    examples = study.examples[1] if study.examples else None
    error = math.sqrt(_variance(cell, examples) + _variance(best, examples))
    return best["test_accuracy"] - cell["test_accuracy"] <= 2 * error


def _rest(study: Study, best: pd.Series) -> str:
    """What the other batch sizes come to, as far as their runs have ended."""
    never, others = [], 0
    sizes = sorted(set(study.cells["batch_size"].tolist()))
    for m in sizes:
        cells = study.cells[study.cells["batch_size"] == m]
        if m == best["batch_size"] or cells["pending"].any():
            continue
        others += 1
        if not cells["finished"].any() or not _reaches(study, _best(cells), best):
            never.append(m)
    if not others:
        return ""
    if not never:
        all_ended = others == len(sizes) - 1
        return ("every other batch size" if all_ended else "every other whose runs have ended") + " is within the noise of it"
    if len(never) == len(sizes) - 1 > 1:
        return "no other batch size reaches it"
    return _never(never, sizes)


def _never(never: Sequence[int], sizes: Sequence[int]) -> str:
    """Batch sizes as "m = 2 and m ≥ 64", those at the upper end of the grid in one."""
    tail = [m for i, m in enumerate(sizes) if all(size in never for size in sizes[i:])]
    single = list(never) if len(tail) < 2 else [m for m in never if m not in tail]
    parts = [f"m = {', '.join(map(str, single))}"] if single else []
    parts += [f"m ≥ {tail[0]}"] if len(tail) > 1 else []
    several = len(single) + (len(tail) > 1) > 1
    return f"{' and '.join(parts)} never {'reach' if several else 'reaches'} it"


def _in_words(study: Study, best: pd.Series) -> str:
    """The best cell as a user of another framework would set it."""
    schedule, eta = study.experiment.schedule, best["base_lr"] * best["batch_size"]
    drops = " and ".join(f"{100 * boundary:.3g} %" for boundary in schedule.boundaries)
    then = f", times {schedule.factor:g} after {drops} of the training" if drops else ""
    warm_up = f", after a warm-up over {100 * schedule.warmup_fraction:g} %" if schedule.warmup_fraction else ""
    return f"As most write it: learning rate η = η̃·m = {eta:.6g} on the mean gradient, SGD without momentum{then}{warm_up}."


def _caveats(study: Study, best: pd.Series) -> list[str]:
    cells, m = study.cells, int(best["batch_size"])
    same = cells[(cells["batch_size"] == m) & (cells["bn_batch_size"] == best["bn_batch_size"])]
    rates = sorted(same["base_lr"].tolist())
    found = [_in_words(study, best)]
    if len(rates) > 1 and best["base_lr"] in (rates[0], rates[-1]):
        end, beyond = ("smallest", "smaller") if best["base_lr"] == rates[0] else ("largest", "larger")
        found.append(f"{format_base_lr(best['base_lr'])} is the {end} η̃ tried at m = {m}: a {beyond} one may be better still.")
    sizes = sorted(set(cells["batch_size"].tolist()))
    if len(sizes) > 1 and m in (sizes[0], sizes[-1]):
        end, beyond = ("smallest", "smaller") if m == sizes[0] else ("largest", "larger")
        found.append(f"{m} is the {end} batch size tried" + (f": a {beyond} one may be better still." if m > 1 else "."))
    if best["diverged"]:
        found.append(
            f"{int(best['diverged'])} of its {int(best['diverged'] + best['finished'] + best['pending'])} seeds diverged."
        )
    if best["finished"] == 1:
        found.append("One seed: how much chance there is in it is not known.")
    others = cells[cells["finished"] > 0].drop(index=best.name)
    near = [int(cell["batch_size"]) for _, cell in others.iterrows() if _reaches(study, cell, best)]
    if near:
        are, sizes = "cell is" if len(near) == 1 else "cells are", ", ".join(map(str, sorted(set(near))))
        found.append(f"{len(near)} other {are} within the noise of it, at m = {sizes}.")
    return found + _edges_of_others(cells, m)


def _edges_of_others(cells: pd.DataFrame, best: int) -> list[str]:
    """The other batch sizes that are best at an end of their base learning rates, so that a wider grid may do them justice."""
    ends: dict[str, list[int]] = {"smallest": [], "largest": []}
    for m, rows in cells[(cells["finished"] > 0) & (cells["batch_size"] != best)].groupby("batch_size"):
        tried = cells.loc[cells["batch_size"] == m, "base_lr"]
        for end, rate in (("smallest", tried.min()), ("largest", tried.max())):
            if tried.nunique() > 1 and _best(rows)["base_lr"] == rate:
                ends[end].append(int(str(m)))
    return [
        f"m = {', '.join(map(str, sizes))} {'is' if len(sizes) == 1 else 'are'} best at the {end} η̃ tried: "
        f"a {'smaller' if end == 'smallest' else 'larger'} one may bring {'it' if len(sizes) == 1 else 'them'} closer."
        for end, sizes in ends.items()
        if sizes
    ]
