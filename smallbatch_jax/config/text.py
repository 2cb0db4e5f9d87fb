"""Functions that format numbers and names for people to read."""

import math
from collections.abc import Sequence
from decimal import Decimal

from smallbatch_jax.config.catalog import OWN_SCALAR


def duration(seconds: float) -> str:
    """Formats a time as "12 s", "3 min 05 s" or "2 h 07 min"; "?" if not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def short_duration(seconds: float) -> str:
    """Formats a time like `duration`, but with two significant digits below ten seconds."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def two_digits(value: float) -> str:
    """Formats a number with two significant digits and no exponent, such as 1,400 or 5.5."""
    return f"{Decimal(f'{value:.2g}'):,f}"


def and_list(names: Sequence[str]) -> str:
    """Joins names as "a, b and c"."""
    return " and ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def format_base_lr(base_lr: float) -> str:
    """Formats a base learning rate as in the paper: "2^-7" for an exact power of two, else up to six digits ("0.1")."""
    mantissa, exponent = math.frexp(base_lr)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{base_lr:g}"


def percent(fraction: float, std: float = math.nan, digits: int = 1) -> str:
    """Formats a fraction as "91.2 %", with its standard deviation "91.2 ± 0.2 %"; "-" if it is not known."""
    if math.isnan(fraction):
        return "-"
    deviation = "" if math.isnan(std) else f" ± {100 * std:.{digits}f}"
    return f"{100 * fraction:.{digits}f}{deviation} %"


def axis_title(column: str) -> str:
    """Returns the title of a further grid axis: "weight decay" for its column weight_decay; an own scalar's own name."""
    return column.removeprefix(OWN_SCALAR).replace("_", " ")


def plural(number: int, noun: str) -> str:
    """Formats a number with its noun, "1 seed" or "1,024 seeds"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
