"""How every figure looks, and how it is written: one style, colours that colour-blind readers can tell apart, log2 axes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from smallbatch_jax.store.files import write_atomically
from smallbatch_jax.study.analysis import format_base_lr

STYLE = {
    "figure.figsize": (5.4, 3.3),  # inches; still legible when shrunk to one column of a two-column page
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType: text stays text in an editor, and journals accept it
}
COLORS = "viridis"  # perceptually uniform, ordered, and safe for colour-blind readers
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for no order
MARKERS = "osD^v"  # a second cue, since the colours of neighbouring curves are close
QUIET = "0.4"  # the grey of what is said about a figure, not shown in it
BATCH_SIZE_LABEL = "batch size $m$"
BASE_LR_LABEL = r"base learning rate $\tilde{\eta}$"
TEST_ACCURACY = "test accuracy"  # what a figure shows in percent, where its data have no other name for it
NOTEBOOK_DPI = 120
MOST_TICKS = 14  # more labels than this would touch

# One language in every figure: × diverged, a hollow marker for less than all that is planned.
CROSS: dict[str, Any] = {"marker": "x", "linestyle": "", "markersize": 5.5, "markeredgewidth": 1.3, "zorder": 4}
HOLLOW: dict[str, Any] = {"linestyle": "", "markerfacecolor": "white", "zorder": 3}
DOT: dict[str, Any] = {"marker": ".", "linestyle": "", "markersize": 5}  # what is not there yet


def styled() -> Any:
    """A context or decorator: matplotlib's defaults and STYLE inside, the caller's settings again afterwards."""
    return matplotlib.style.context(["default", STYLE])


class NotebookFigure(Figure):
    """A figure that a notebook shows as the value of a cell: IPython draws those that pyplot made, and asks others for this."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with styled():
            self.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
        return buffer.getvalue()


def new_figure(height: float | None = None) -> Figure:
    """A figure that no pyplot state knows of; `height` in inches."""
    figure = NotebookFigure(layout="constrained")
    FigureCanvasAgg(figure)
    if height is not None:
        figure.set_figheight(height)
    return figure


def new_axes(title: str, height: float | None = None) -> tuple[Figure, Axes]:
    """A new figure with one titled panel."""
    figure = new_figure(height)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def ordered_colors(count: int) -> np.ndarray:
    """Colours of ordered curves, which stop short of the light end: it is lost on white."""
    return matplotlib.colormaps[COLORS](np.linspace(0, 0.87, count))


def log2_axis(axes: Axes, values: Sequence[float], labels: Sequence[str], most_ticks: int = MOST_TICKS) -> None:
    """A log2 x axis that is as wide as `values` and has its ticks at them."""
    step = tick_step(len(values), most_ticks)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values[::step], labels[::step])
    axes.minorticks_off()
    axes.set_xlim(values[0] / 1.4, values[-1] * 1.4)


def log2_y_axis(axes: Axes, values: Sequence[float], labels: Sequence[str], most_ticks: int = MOST_TICKS) -> None:
    """A log2 y axis with its ticks at `values`, and room for a mark below the lowest."""
    step = tick_step(len(values), most_ticks)
    axes.set_yscale("log", base=2)
    axes.set_yticks(values[::step], labels[::step])
    axes.minorticks_off()
    axes.set_ylim(values[0] / 4, values[-1] * 2)


def _units(steps: Mapping[str, tuple[float, Sequence[int]]]) -> dict[float, str]:
    """Label by value of so many of each unit, given by its size."""
    return {size * count: f"{count} {unit}" for unit, (size, counts) in steps.items() for count in counts}


_DECADES = [k * 10**n for n in range(3) for k in (1, 2, 5)]
_OCTAVES = [2**n for n in range(10)]
SECONDS = _units(
    {
        **{unit: (size, _DECADES) for unit, size in (("µs", 1e-6), ("ms", 1e-3))},
        **{unit: (size, (1, 2, 5, 10, 30)) for unit, size in (("s", 1), ("min", 60))},
        "h": (3600, (1, 2, 5, 12)),
        "d": (86400, [*_DECADES, 1000, 2000, 5000, 10000]),
    }
)
BYTES = _units({unit: (1024**n, _OCTAVES) for n, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))})


def unit_axis(axes: Axes, which: str, low: float, high: float, units: Mapping[float, str], most_ticks: int = 7) -> None:
    """A log axis, "x" or "y", from `low` to `high` with ticks at round values, of `SECONDS` or `BYTES`; two at least."""
    below, above, ticks = unit_ticks(low, high, units, most_ticks)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (below, above), f"{which}ticks": ticks})
    axes.set(**{f"{which}ticklabels": [units[tick] for tick in ticks]})
    getattr(axes, f"{which}axis").set_minor_locator(NullLocator())


def unit_ticks(low: float, high: float, units: Mapping[float, str], most: int = 7) -> tuple[float, float, list[float]]:
    """The ends of an axis that holds `low` to `high`, and its ticks, two at least."""
    below, above = low / 1.25, high * 1.25
    if sum(below <= tick <= above for tick in units) < 2:
        below = max((tick for tick in units if tick <= low), default=below) / 1.1
        above = min((tick for tick in units if tick >= high and tick > below * 1.2), default=above) * 1.1
    ticks = [tick for tick in sorted(units) if below <= tick <= above]
    return below, above, ticks[:: tick_step(max(1, len(ticks)), most)]


def tick_step(count: int, most: int = MOST_TICKS) -> int:
    """Label every so manieth of `count` values, for at most `most` labels."""
    return -(-count // most)


def math_base_lr(base_lr: float) -> str:
    """`format_base_lr` with a raised exponent, for matplotlib's mathtext."""
    base, caret, exponent = format_base_lr(base_lr).partition("^")
    return f"${base}^{{{exponent}}}$" if caret else base


def plain(text: str) -> str:
    """Text of a user's, in which mathtext finds nothing to set."""
    return text.replace("$", r"\$")


def mark(**look: Any) -> Artist:
    """A legend's picture of a kind of marker, whatever its curve."""
    return Line2D([], [], **{"color": QUIET, "marker": "o", **look})


def side_legend(axes: Axes, entries: Mapping[str, Any], title: str) -> None:
    """A legend to the right of the panel, where no curve can be; `entries` are artists, or tuples of them, by label."""
    artists, labels = list(entries.values()), list(entries)
    axes.legend(artists, labels, title=title, loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=0.3)


def say_nothing_finished(axes: Axes, text: str = "no run has finished") -> None:
    """What a panel without a curve says."""
    axes.set_ylim(0, 100)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)


def foot(figure: Figure, entries: Mapping[str, Any], text: str = "", columns: int = 4) -> None:
    """A legend under all panels and over it a small grey text; nothing if there is neither. `entries` as in `side_legend`."""
    if not entries and not text:
        return
    spacing = {"columnspacing": 1.2, "labelspacing": 0.3, "handletextpad": 0.5, "borderpad": 0.1, "borderaxespad": 0.2}
    artists, labels = list(entries.values()), list(entries)
    legend = figure.legend(artists, labels, loc="outside lower center", ncols=columns, **spacing)
    if text:
        legend.set_title(text, prop=FontProperties(size=6.5))
        legend.get_title().set(color=QUIET, multialignment="center")


def count_note(unit: str, total: int, unfinished: int, diverged: int) -> str:
    """What curves alone do not show, such as "12 of 143 cells not finished, 40 diverged"; empty if there is nothing."""
    counts = {"not finished": unfinished, "diverged": diverged}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    if not parts:
        return ""
    return ", ".join([parts[0].replace(" ", f" of {total} {unit} ", 1), *parts[1:]])


def write(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.pdf, each complete under a temporary name first; no date or version goes in."""
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    paths = []
    for suffix, values in metadata.items():
        path = stem.with_suffix(suffix)
        buffer = io.BytesIO()
        with styled():
            figure.savefig(buffer, format=suffix[1:], metadata=values)
        write_atomically(path, buffer.getvalue())
        paths.append(path)
    return paths
