"""The look of every figure, its axes and legends, and how it is written."""

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.text import Text

from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.store.files import write_atomically

STYLE = {
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "figure.labelsize": 9,
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
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, unordered
MARKERS = "osD^v"  # a second cue, since the colours of neighbouring curves are close
WIDTH, HEIGHT = 5.4, 3.3  # inches; still legible when shrunk to one column of a two-column page
QUIET = "0.4"  # the grey of notes and of marks in a legend
NOTEBOOK_DPI = 120
MOST_SPREAD = 20  # largest ratio of losses on a linear axis
MOST_TICKS, TICKS_WIDTH = 14, 70  # more labels, or more characters and spaces in all of them, would touch
LEGEND_ROWS, LEGEND_SAMPLE = 20, 12  # a longer legend beside a panel would leave the figure; it then has about 12 entries
NOTE_WIDTH = 110  # characters

# The same marks in every figure: × diverged, hollow for provisional, a dot for what has not finished.
CROSS: dict[str, Any] = {"marker": "x", "linestyle": "", "markersize": 5.5, "markeredgewidth": 1.3, "zorder": 4}
HOLLOW: dict[str, Any] = {"linestyle": "", "markerfacecolor": "white", "zorder": 3}
LOST: dict[str, Any] = {**CROSS, "color": "0.25", "markersize": 4.5}
NOT_YET: dict[str, Any] = {"marker": ".", "linestyle": "", "markersize": 5, "color": "0.6"}


def styled() -> Any:
    """Returns a context manager or decorator that applies matplotlib's defaults and STYLE, then restores the settings."""
    return matplotlib.style.context(["default", STYLE])


class NotebookFigure(Figure):
    """A figure that a notebook shows as the value of a cell, although pyplot did not make it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with styled():
            self.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
        return buffer.getvalue()


def new_figure(height: float = HEIGHT) -> Figure:
    """Returns a figure that pyplot does not register; `height` is in inches."""
    return NotebookFigure(figsize=(WIDTH, height), layout="constrained")


def new_axes(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A new figure with one titled panel."""
    figure = new_figure(height)
    return figure, figure.add_subplot(title=title)


def ordered_colors(count: int) -> np.ndarray:
    """Returns colours of ordered curves; leaves out the light end, which is lost on white."""
    return matplotlib.colormaps[COLORS](np.linspace(0, 0.87, count))


def ordered_looks(count: int) -> list[dict[str, Any]]:
    """Returns colours and markers by place in the whole grid, so that curves keep theirs as results arrive."""
    return [{"color": color, "marker": MARKERS[i % len(MARKERS)]} for i, color in enumerate(ordered_colors(count))]


def math_base_lr(base_lr: float) -> str:
    """`format_base_lr` with a raised exponent, for matplotlib's mathtext."""
    base, caret, exponent = format_base_lr(base_lr).partition("^")
    return f"${base}^{{{exponent}}}$" if caret else base


class Column(NamedTuple):
    """Name of a cell column in figures, and the format of its values."""

    symbol: str
    label: str
    text: Callable[[Any], str]


RULE_TEXTS = {"sqrt": r"$\tilde{\eta}\sqrt{m}$", "constant": r"$\tilde{\eta}$"}  # of `config.catalog.RULES`
COLUMNS = {
    "batch_size": Column("$m$", "batch size $m$", str),
    "base_lr": Column(r"$\tilde{\eta}$", r"base learning rate $\tilde{\eta}$", math_base_lr),
    "bn_batch_size": Column("$b$", "BN batch size", str),
}


def spreads(values: Any, metric: Metric) -> bool:
    """Returns whether values of a metric need a log axis: losses that are far apart, as where some runs nearly diverged."""
    finite = np.asarray(values, float)[np.isfinite(np.asarray(values, float))]
    return not metric.fraction and finite.size > 0 and finite.min() > 0 and finite.max() > MOST_SPREAD * finite.min()


def with_rule(figure: Figure, rule: str) -> Figure:
    """Adds the learning rate to labels of base learning rates, unless it is the paper's η̃·m; returns the figure."""
    label = COLUMNS["base_lr"].label
    for text in figure.findobj(Text) if rule != "linear" else ():
        if text.get_text() == label:
            text.set_text(rf"{label} ($\eta$ = {RULE_TEXTS[rule]})")
    return figure


def grid_axis(axes: Axes, which: str, column: str, values: Iterable[float], most_ticks: int = MOST_TICKS) -> None:
    """Sets up a log2 axis, "x" or "y", with ticks at `values` of a column; y has room for a mark below the lowest."""
    values, (below, above) = sorted(set(values)), {"x": (1.4, 1.4), "y": (4, 2)}[which]
    labels = list(map(COLUMNS[column].text, values))
    step = tick_step(labels, most_ticks)
    getattr(axes, f"set_{which}scale")("log", base=2)
    getattr(axes, f"set_{which}ticks")(values[::step], labels[::step])
    axes.minorticks_off()
    axes.set(**{f"{which}lim": (values[0] / below, values[-1] * above), f"{which}label": COLUMNS[column].label})


_TIMES = (
    ("ms", 1e-3, (1, 2, 5, 10, 20, 50, 100, 200, 500)),
    ("s", 1, (1, 2, 5, 10, 30)),
    ("min", 60, (1, 2, 5, 10, 30)),
    ("h", 3600, (1, 2, 5, 12)),
    ("d", 86400, (1, 2, 5, 10, 20, 50, 100, 200, 500)),
)
SECONDS = {size * count: f"{count} {unit}" for unit, size, counts in _TIMES for count in counts}
BYTES = {1024**n * 2**k: f"{2**k} {unit}" for n, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB")) for k in range(10)}


def unit_axis(axes: Axes, which: str, values: Iterable[float], units: Mapping[float, str]) -> None:
    """Sets up a log axis, "x" or "y", that holds `values`, with at least two ticks from `units`, such as `SECONDS`."""
    below, above, ticks = unit_ticks(values, units)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}ticks")(ticks, [units[tick] for tick in ticks])
    axes.minorticks_off()
    axes.set(**{f"{which}lim": (below, above)})


def unit_ticks(values: Iterable[float], units: Mapping[float, str]) -> tuple[float, float, list[float]]:
    """Returns the ends of an axis that holds `values`, and at least two ticks."""
    values = list(values)
    low, high = min(values), max(values)
    below, above = low / 1.25, high * 1.25
    if sum(below <= tick <= above for tick in units) < 2:
        below = max((tick for tick in units if tick <= low), default=below) / 1.1
        above = min((tick for tick in units if tick >= high and tick > below * 1.2), default=above) * 1.1
    ticks = [tick for tick in sorted(units) if below <= tick <= above]
    return below, above, ticks[:: -(-len(ticks) // 7) or 1]


def tick_step(labels: Sequence[str], most: int = MOST_TICKS) -> int:
    """The step that keeps at most `most` labels, or fewer if they are too long to stand side by side."""
    widest = max(len(label) - 5 * label.startswith("$") for label in labels)  # a power is "$2^{-7}$"
    return -(-len(labels) // max(1, min(most, TICKS_WIDTH // (widest + 1))))


def plain(text: str) -> str:
    """Escapes a user's text for mathtext."""
    return text.replace("$", r"\$")


def mark(**look: Any) -> Artist:
    """A marker for a legend, grey unless a colour is given."""
    return Line2D([], [], **{"color": QUIET, "marker": "o", **look})


def side_legend(axes: Axes, entries: Mapping[str, Any], title: str) -> None:
    """Adds a legend to the right of the panel, if there are entries: artists, or tuples of them, by label; not all of many."""
    if len(entries) > LEGEND_ROWS:
        step = -(-len(entries) // LEGEND_SAMPLE)
        entries, title = dict(list(entries.items())[::step]), f"{title}, 1 in {step}"
    if entries:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(list(entries.values()), list(entries), title=title, labelspacing=0.3, **place)


def say_nothing_finished(axes: Axes, text: str = "no run has finished") -> None:
    """Writes the text of a panel without a curve."""
    axes.set_ylim(0, 100)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)


def foot(figure: Figure, entries: Mapping[str, Any], *notes: str, end: str = "", columns: int = 4) -> None:
    """Adds a legend under all panels, and notes over it, if there are any; `entries` as in `side_legend`.

    Notes are small and grey, joined by semicolons; `end` begins a new line.
    """
    text = "\n".join(textwrap.fill(line, NOTE_WIDTH) for line in ("; ".join(filter(None, notes)), end) if line)
    if not entries and not text:
        return
    spacing = {"columnspacing": 1.2, "labelspacing": 0.3, "handletextpad": 0.5, "borderpad": 0.1, "borderaxespad": 0.2}
    legend = figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, **spacing)
    if text:
        legend.set_title(text, prop=FontProperties(size=6.5))
        legend.get_title().set(color=QUIET, multialignment="center")


def named(what: str, batch_sizes: Iterable[Any]) -> str:
    """Batch sizes as "not timed: $m$ = 2, 8"; empty if there are none."""
    sizes = ", ".join(map(str, batch_sizes))
    return f"{what}: $m$ = {sizes}" if sizes else ""


def write(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.pdf, each atomically and without a date or version."""
    paths = []
    for kind, dated in (("png", "Software"), ("pdf", "CreationDate")):
        buffer = io.BytesIO()
        with styled():
            figure.savefig(buffer, format=kind, metadata={dated: None})
        paths.append(stem.with_suffix(f".{kind}"))
        write_atomically(paths[-1], buffer.getvalue())
    return paths
