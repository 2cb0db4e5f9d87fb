"""The metric that ranks runs, a column of the results: its direction, name and display format."""

import math
from typing import Any, NamedTuple

from smallbatch_jax.config import catalog
from smallbatch_jax.config.text import percent


class Metric(NamedTuple):
    """A column of the results by which runs are compared."""

    column: str = "test_accuracy"
    best: str = "max"  # or "min"
    called: str = ""  # title, if the dataset has its own name for the metric

    @property
    def name(self) -> str:
        """Name without the split, as in `config.catalog.METRICS`, or "loss"."""
        return self.column.partition("_")[2]

    @property
    def title(self) -> str:
        """Name in figures and tables, such as "test accuracy"."""
        return self.called or f"{self.column.partition('_')[0]} {self.noun}"

    @property
    def noun(self) -> str:
        """Name without the split, such as "accuracy" or "loss"."""
        return catalog.METRICS[self.name].title if self.name in catalog.METRICS else self.name.replace("_", " ")

    @property
    def fraction(self) -> bool:
        """Whether it is a fraction, shown in percent."""
        return self.name in catalog.METRICS and catalog.METRICS[self.name].fraction

    @property
    def scale(self) -> float:
        """Factor from stored to shown values."""
        return 100.0 if self.fraction else 1.0

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.title} (%)" if self.fraction else self.title

    def gain(self, value: Any, over: Any) -> Any:
        """Returns how much better a value, or each of a column, is than another; negative if worse, NaN if either is."""
        return value - over if self.best == "max" else over - value

    def show(self, value: float, std: float = math.nan, digits: int = 1) -> str:
        """Formats a value as "91.2 %" or "0.3124", with its standard deviation "91.2 ± 0.2 %"; "-" if it is not known."""
        if self.fraction or math.isnan(value):
            return percent(value, std, digits)
        return f"{value:.4g}" + ("" if math.isnan(std) else f" ± {std:.2g}")


ACCURACY = Metric()
