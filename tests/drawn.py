"""Tables of cells to draw, and functions that read lines, points and texts from a figure."""

import math

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection

from smallbatch_jax.study.analysis import CELL, RUN

COLUMNS = [*CELL, "test_accuracy", "test_accuracy_std", "finished", "diverged", "pending"]


def cell(batch_size, base_lr, accuracy, std=math.nan, finished=1, diverged=0, pending=0, bn_batch_size=None):
    return ("exp", batch_size, bn_batch_size or batch_size, base_lr, accuracy, std, finished, diverged, pending)


def missing(batch_size, base_lr, pending=1, bn_batch_size=None):
    """Returns a planned cell without a finished or diverged seed."""
    return cell(batch_size, base_lr, math.nan, finished=0, pending=pending, bn_batch_size=bn_batch_size)


def table(*rows):
    return pd.DataFrame(rows, columns=COLUMNS)


def results(cells):
    """Returns one-epoch results with the finished and diverged seeds of `cells`; a cell with neither has one running seed."""
    rows = []
    for c in cells.itertuples():
        statuses = ["finished"] * c.finished + ["diverged"] * c.diverged or ["running"]
        for seed, status in enumerate(statuses):
            accuracy = math.nan if status == "diverged" else c.test_accuracy
            key = (c.experiment, c.batch_size, c.bn_batch_size, c.base_lr, seed)
            rows.append((*key, 1, 10, 0.1, accuracy, 0.1, accuracy, status))
    measures = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    return pd.DataFrame(rows, columns=[*RUN, "epoch", "step", *measures, "status"])


def curves(figure):
    """Returns the labelled lines of a figure's first panel, as label → (x, y)."""
    lines = figure.axes[0].get_lines()
    return {
        line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in lines
        if not str(line.get_label()).startswith("_")
    }


def placed(figure, panel=0, **look):
    """Returns the finite points of all lines in a panel that have the given properties, such as marker="x"."""
    lines = [
        line for line in figure.axes[panel].get_lines() if all(str(getattr(line, f"get_{k}")()) == v for k, v in look.items())
    ]
    points = np.concatenate([np.asarray(line.get_xydata(), float) for line in lines] or [np.empty((0, 2))])
    return points[~np.isnan(points[:, 1])]


def bars(figure, panel=0):
    """Returns the ends of a panel's error bars and vertical lines, as x → (low, high)."""
    groups = [lines.get_segments() for lines in figure.axes[panel].collections if isinstance(lines, LineCollection)]
    return {line[0, 0]: tuple(np.round(line[:, 1], 6)) for lines in groups for line in lines if len(line)}


def foot(figure):
    """Returns the note of a figure (the titles of its legends), and the labels of those legends."""
    legends = figure.legends
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    return "".join(legend.get_title().get_text() for legend in legends), texts


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]
