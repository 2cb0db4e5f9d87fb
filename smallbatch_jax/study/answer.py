"""The answer of a study in one sentence: the best batch size and base learning rate, and the sizes that never reach it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from smallbatch_jax.config import catalog
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.study.analysis import axes, best_first, best_of_each_size, final_accuracy, of_cell, score, setting
from smallbatch_jax.study.noise import Noise, comparable, noise_of
from smallbatch_jax.study.recommendation import Recommendation, recommend, tested
from smallbatch_jax.study.study import Study


class Answer(NamedTuple):
    """The answer of a study, in plain text."""

    sentence: str  # one sentence, with its full stop
    caveats: tuple[str, ...]  # the learning rate in other frameworks' terms, and reasons for doubt
    best: pd.Series | None  # the best row of `study.cells`; None until a run has finished
    recommendation: Recommendation  # the uncertainty, equally good cells, and the fits of scaling theory


def answer(study: Study) -> Answer:
    """Returns the best of the cells `analysis.with_most_seeds`, by the study's metric, and the batch sizes that never reach it.

    Ties go to the smallest batch size, BN batch size and base learning rate. Whether a batch size reaches the
    best is decided by `noise.RULE`, once all its runs have ended.
    """
    ended, runs = study.runs
    so_far = f"So far ({ended:,} of {runs:,} runs ended): " if study.unfinished else ""
    found, metric = recommend(study), study.metric
    if (best := found.best) is None:
        if study.cells["finished"].any():
            why = f"{metric.title} is NaN in every finished run."
        elif so_far:
            why = "none of them has finished."
        else:
            why = "Every run diverged." if study.cells["diverged"].all() else "No run has finished within the budget."
        return Answer(f"{so_far}{why}", (), None, found)
    if not found.sentences:
        chance, why = metric.show(study.chance), "better than chance"
        if metric.gain(best[metric.column], study.chance) > 0:
            chance, why = f"{chance}: the best has {score(best, metric)}", "distinguishable from chance"
        return Answer(f"{so_far}No run is {why}, {chance}.", (), best, found)
    named = "" if metric == ACCURACY else f"{metric.title} "
    sentence = f"{so_far}{'best' if so_far else 'Best'} at {setting(best)}: {named}{score(best, metric)}"
    if lost := int(best["diverged"]):
        sentence += f", though {lost} of its {int(lost + best['finished'] + best['pending'])} seeds diverged"
    noise = noise_of(study)
    rest = _rest(study, best, noise)
    return Answer(f"{sentence}{'; ' * bool(rest)}{rest}.", tuple(_caveats(study, best, noise)), best, found)


def _sizes(study: Study) -> tuple[list[int], list[int], list[int]]:
    """Returns all batch sizes, those whose runs have ended, and those that a search has not trained to the last epoch."""
    sizes = sorted({m for m, _ in study.experiment.grid.shapes()} | set(study.cells["batch_size"].tolist()))
    diverged = study.cells["diverged"] > 0
    known = study.cells.assign(lost=diverged).groupby("batch_size").agg({"pending": "sum", "finished": "sum", "lost": "all"})
    ended = known.index[(known["pending"] == 0) & ((known["finished"] > 0) | known["lost"])].tolist()
    return sizes, ended, [m for m in sizes if m not in ended and not known["pending"].get(m)]


def _rest(study: Study, best: pd.Series, noise: Noise) -> str:
    """Compares the other batch sizes whose runs have ended to the best."""
    sizes, of_ended, _ = _sizes(study)
    others = study.cells[study.cells["batch_size"] != best["batch_size"]]
    ended = others[others["batch_size"].isin(of_ended)]
    tops = best_of_each_size(ended[comparable(study, best, noise)[ended.index]], study.metric)
    reached = dict.fromkeys(sorted(set(ended["batch_size"].tolist())), 0.0)
    reached |= dict(zip(tops["batch_size"].tolist(), noise.reaches(tops, best), strict=True))
    if not reached:
        return ""
    never = [m for m, reaches in reached.items() if reaches == 0]
    unknown = [m for m, reaches in reached.items() if math.isnan(reaches)]
    if unknown:
        worse = f"m = {', '.join(map(str, never))} never reach{'es' * (len(never) == 1)} it; " if never else ""
        reach = f"m = {', '.join(map(str, unknown))} reach{'es' * (len(unknown) == 1)} it"
        return f"{worse}whether {reach} cannot be told from single seeds"
    if not never:
        others_named = "other batch size" if len(reached) == len(sizes) - 1 else "other whose runs have ended"
        return f"every {others_named} is within the noise of it"
    if len(never) == len(sizes) - 1 > 1:
        return "no other batch size reaches it"
    tail = [m for i, m in enumerate(sizes) if all(size in never for size in sizes[i:])]
    single = never if len(tail) < 2 else [m for m in never if m not in tail]
    parts = [f"m = {', '.join(map(str, single))}"] if single else []
    parts += [f"m ≥ {tail[0]}"] if len(tail) > 1 else []
    several = len(single) + (len(tail) > 1) > 1
    return f"{' and '.join(parts)} never {'reach' if several else 'reaches'} it"


def _in_words(study: Study, best: pd.Series) -> str:
    """Describes the best cell as a user of another framework would set it."""
    experiment, m, further = study.experiment, int(best["batch_size"]), {name: best[name] for name in axes(best)}
    schedule, optimizer = experiment.schedule, experiment.optimizer
    scalars = "".join(f", {name} {value:.6g}" for name, value in optimizer.scalars(m, further).items())
    rate = f"η = {catalog.RULES[optimizer.rule][0]} = {optimizer.learning_rate(best['base_lr'], m):.6g}"
    drops = " and ".join(f"{100 * boundary:.3g} %" for boundary in schedule.boundaries)
    then = f", η̃ times {schedule.factor:g} and m times {schedule.batch_growth}" if schedule.batch_growth > 1 else ""
    then = f"{then or f', times {schedule.factor:g}'} after {drops} of the training" if drops else ""
    warmed = further.get("warmup_fraction", schedule.warmup_fraction)
    warm_up = f", after a warm-up over {100 * warmed:g} %" if warmed else ""
    weight_decay = further.get("weight_decay", experiment.weight_decay)
    decay = f", weight decay {weight_decay:g}" if weight_decay else ""
    decay += " of kernels alone" if decay and experiment.weight_decay_mask == "kernels" else ""
    return f"In usual terms: learning rate {rate} on the mean gradient, {optimizer.title}{scalars}{decay}{then}{warm_up}."


def _edge(value: float, tried: Sequence[float]) -> tuple[str, str] | None:
    """Returns the end at which a value lies among those tried, and the direction beyond it; None if it lies inside."""
    low, high = min(tried), max(tried)
    if low == high or low < value < high:
        return None
    return ("smallest", "smaller") if value == low else ("largest", "larger")


def _caveats(study: Study, best: pd.Series, noise: Noise) -> list[str]:
    cells, m = study.cells, int(best["batch_size"])
    same = cells[(cells["batch_size"] == m) & (cells["bn_batch_size"] == best["bn_batch_size"])]
    found = [_in_words(study, best)]
    if study.metric.column.startswith("validation_"):
        test = tested(study.metric)
        tested_best = final_accuracy(of_cell(study.choosing, best), test).iloc[0]
        found.append(f"The validation split chose it; its {test.title} is {score(tested_best, test)}.")
    if edge := _edge(best["base_lr"], same["base_lr"].tolist()):
        end, beyond = edge
        found.append(f"{format_base_lr(best['base_lr'])} is the {end} η̃ tried at m = {m}: a {beyond} one may be better still.")
    if edge := _edge(m, cells["batch_size"].tolist()):
        (end, beyond), most = edge, study.examples[0] if study.examples else math.inf
        found.append(f"{m} is the {end} batch size tried" + f": a {beyond} one may be better still" * (1 < m < most) + ".")
    if untrained := _sizes(study)[2]:
        found.append(f"Not trained to the last epoch, so not compared: m = {', '.join(map(str, untrained))}.")
    if best["finished"] + best["diverged"] == 1 and of_cell(study.fresh, best).empty:
        found.append("One seed: the variation between seeds is not known.")
    others = cells[comparable(study, best, noise)].drop(index=best.name, errors="ignore")
    near = others.loc[noise.reaches(others, best) == 1, "batch_size"].tolist()
    if near:
        are, sizes = "cell is" if len(near) == 1 else "cells are", ", ".join(map(str, sorted(set(near))))
        found.append(f"{len(near)} other {are} within the noise of it, at m = {sizes}.")
    return found + _edges_of_others(cells, m, study.metric)


def _edges_of_others(cells: pd.DataFrame, best: int, metric: Metric) -> list[str]:
    """Returns caveats on other batch sizes whose best base_lr is at an end of those tried; a wider grid may improve them."""
    ends: dict[tuple[str, str], list[str]] = {}
    for m, rows in cells[cells["batch_size"] != best].groupby("batch_size"):
        edge = _edge(best_first(rows, metric)["base_lr"].iloc[0], rows["base_lr"].tolist())
        if edge and rows["finished"].any():
            ends.setdefault(edge, []).append(str(m))
    found = []
    for (end, beyond), sizes in sorted(ends.items(), reverse=True):  # the smallest first
        are, them = ("is", "it") if len(sizes) == 1 else ("are", "them")
        found.append(f"m = {', '.join(sizes)} {are} best at the {end} η̃ tried: a {beyond} one may bring {them} closer.")
    return found
