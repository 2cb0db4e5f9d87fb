"""Checks of config fields: each takes (field name, value) and returns the value to keep, or raises InputError."""

import dataclasses
import difflib
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")
Check = Callable[[str, Any], Any]

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38
MAPPINGS = (Mapping, ConfigDict)
OWN = "own:"  # prefix of the name of a model, dataset, optimizer, loss or metric passed in from Python
MOST_VALUES = 100_000  # per field, so that checking is fast
MOST_CHARACTERS = 4096  # of a path on Linux


class InputError(ValueError):
    """Input that cannot be used: one line with the field, its value and what is accepted (exit status 2)."""

    def __init__(self, message: str):
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def config_field(default: Any, check: Check) -> Any:
    """Returns a dataclass field with its check; a field whose default is None also accepts None."""
    return dataclasses.field(default=default, metadata={"check": check})


def parse(kind: type[T], section: Any, name: str = "") -> T:
    """Returns a dataclass of config fields and sections, from a mapping or ConfigDict, checked in the order of its fields.

    Raises:
      InputError: for the first unknown field or refused value, by its dotted name; `name` is the section's.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if not isinstance(section, MAPPINGS):
        accepts = f"a section with the fields {', '.join(known)}"
        raise InputError(f"{name or 'config'}: got {shown(section)}, accepts {accepts}.")
    prefix = f"{name}." if name else ""
    values = _entries(section, prefix)
    refuse_unknown(values, known, prefix)
    return kind(**{name: _checked(known[name], prefix + name, plain(values[name])) for name in known if name in values})


def _checked(field: dataclasses.Field, name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(field.default):
        return parse(type(field.default), value, name)
    return value if value is None and field.default is None else field.metadata["check"](name, value)


def _entries(section: Any, prefix: str) -> dict[Any, Any]:
    """Returns the entries of a section; one may be a reference without a value, and names may not be sortable."""
    entries, reading = {}, prefix.rstrip(".") or "config"
    try:
        for name in section:
            reading = prefix + label(name)
            entries[name] = section[name]
    except Exception as error:
        raise InputError(f"{reading}: cannot be read: {type(error).__name__}: {cut(str(error))}") from None
    return entries


def plain(value: Any) -> Any:
    """Converts NumPy and JAX values, paths and ranges to Python's own types."""
    if type(value) in (int, float, str, bool):  # nearly all; the checks below take ten times as long
        return value
    if isinstance(value, MAPPINGS):  # a ConfigDict may raise anything when asked for an attribute
        return value
    if isinstance(value, range):
        return tuple(value[: MOST_VALUES + 1])  # one too many is enough to be refused
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and hasattr(value, "tolist") and not isinstance(value, type):
        return (value[: MOST_VALUES + 1] if getattr(value, "ndim", 0) else value).tolist()
    return value


def exact_fraction(value: float | Fraction) -> Fraction:
    """Returns the fraction that a float stands for.

    0.55 is not exact in binary, and 0.55·100 would round up to 56. A float is therefore replaced by the nearest fraction with a
    denominator of at most 10,000, where the two agree to within the rounding of a float.
    """
    near = Fraction(value).limit_denominator(10_000)
    return near if isinstance(value, float) and math.isclose(near, value, rel_tol=1e-12) else Fraction(value)


def refuse_unknown(values: Iterable[Any], known: Iterable[str], prefix: str) -> None:
    """Raises InputError for the first name that is not a known field, and suggests the nearest one."""
    for name in values:
        if name not in known:
            raise InputError(f"{prefix}{label(name)}: unknown field{nearest(name, known)} Known: {', '.join(known)}.")


def label(name: Any) -> str:
    """Returns a field's name to begin an error with; quoted if no field can have this name."""
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 100 else shown(name)


def nearest(name: Any, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?`, or a full stop."""
    close = difflib.get_close_matches(name[:100], list(known), n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else "."


def shown(value: Any) -> str:
    """Formats a value as one short line for an error."""
    try:
        return cut(repr(value))
    except Exception:  # an integer of more than 4300 digits, lists a thousand deep, a __repr__ that raises
        return f"a value of type {type(value).__name__} that cannot be printed"


def cut(text: str, most: int = 120) -> str:
    """Truncates a text, with "..." for the rest."""
    return text if len(text) <= most else text[: most - 3] + "..."


def expanded_path(name: str, given: str | os.PathLike[str]) -> str:
    """Expands ~ and ~user to home folders; raises InputError for anything that cannot be a path."""
    if not isinstance(given, (str, bytes, os.PathLike)):
        raise InputError(f"{name}: got {shown(given)}, accepts a path.")
    path = os.path.expanduser(os.fsdecode(given))
    if not path.strip():
        raise InputError(f"{name}: empty; give a path.")
    if "\0" in path:
        raise InputError(f"{name}: got {shown(path)}, accepts a path.")
    if path.startswith("~"):
        raise InputError(f"{name}: got {shown(path)}, there is no such user; for a folder of that name give ./{path}")
    return path


def where(test: Callable[[Any], bool], accepts: str, convert: Callable[[Any], Any] = lambda value: value) -> Check:
    """Accepts the values that pass `test`, converted; `accepts` describes them."""

    def check(name: str, value: Any) -> Any:
        if not test(value):
            raise InputError(f"{name}: got {shown(value)}, accepts {accepts}.")
        return convert(value)

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable() and len(value) <= MOST_CHARACTERS


text = where(_is_text, f"text that can be printed, of 1 to {MOST_CHARACTERS} characters")
folder_name = where(
    lambda value: _is_text(value) and value not in (".", "..") and "/" not in value and len(value.encode()) <= 255,
    "text that can name a folder: printable, without slashes, 1 to 255 bytes",
)
boolean = where(lambda value: isinstance(value, bool), "True or False")
selection = where(
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and _is_text(value[0]) and value[1] in ("min", "max"),
    'a column and "min" or "max" such as ("test_loss", "min")',
    tuple,
)
below_one = where(lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1", float)


def integer(low: int, high: int = 2**31 - 1) -> Check:
    """Accepts an integer from low to high."""
    return where(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"an integer from {low} to {high}",
    )


def number(low: float, high: float) -> Check:
    """Accepts a number from low to high, as a float."""
    return where(lambda value: _is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}", float)


def positive(high: float = FLOAT32_MAX) -> Check:
    """Accepts a number above 0 that float32 can hold, up to high, as a float."""
    limit = "finite" if high == FLOAT32_MAX else f"at most {high:g}"
    accepts = f"a number above 0 and {limit} (in float32)"
    return where(lambda value: _is_number(value) and FLOAT32_TINY <= value <= high, accepts, float)


def choice(known: Iterable[str], what: str, prefix: str | None = None) -> Check:
    """Accepts one of the known names, and any text that begins with `prefix`."""

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and prefix and value.startswith(prefix):
            return text(name, value)
        if not isinstance(value, str) or value not in known:
            raise InputError(f"{name}: unknown {what} {shown(value)}{nearest(value, known)} Known: {', '.join(known)}.")
        return value

    return check


def distinct(element: Check, least: int = 0, most: int = MOST_VALUES) -> Check:
    """Accepts a tuple or list of `least` to `most` values that each pass `element` and differ in float32, as a tuple."""

    def check(name: str, value: Any) -> tuple:
        if not isinstance(value, (tuple, list)):
            try:
                example = f" such as {shown((element(name, plain(value)),))}"
            except InputError:
                example = ""
            raise InputError(f"{name}: got {shown(value)}, accepts a tuple of values{example}.")
        if len(value) < least:
            raise InputError(f"{name}: got {shown(value)}, accepts a tuple of at least {least} value(s).")
        if len(value) > most:
            raise InputError(f"{name}: got {len(value)} values, accepts a tuple of at most {most}.")
        seen: dict[Any, Any] = {}
        for item in (element(name, plain(item)) for item in value):
            rounded = struct.unpack("f", struct.pack("f", item))[0] if isinstance(item, float) else item
            if rounded in seen:
                precisely = "" if item in seen.values() else " in float32"
                raise InputError(f"{name}: {shown(item)} appears twice in {shown(value)}{precisely}; give every value once.")
            seen[rounded] = item
        return tuple(seen.values())

    return check


def by_batch_size(element: Check) -> Check:
    """Accepts pairs (batch size, value) or a mapping, each batch size once; returns a tuple of pairs."""

    def check(name: str, value: Any) -> tuple:
        given, values = _pairs(name, value, "pairs of batch size and value such as ((2, 0.01), (8, 0.002))")
        sizes = distinct(integer(1))(name, given)
        return tuple((size, element(name, value)) for size, value in zip(sizes, values, strict=True))

    return check


def by_name(element: Check) -> Check:
    """Accepts pairs (name, values) or a mapping, each name once; returns a tuple of pairs (name, tuple of values)."""
    identifier = where(lambda value: isinstance(value, str) and value.isidentifier(), "a name of a scalar")

    def check(name: str, value: Any) -> tuple:
        given, values = _pairs(name, value, 'names and values such as {"momentum": (0.8, 0.9)}')
        several = [value if isinstance(value, (tuple, list)) else (value,) for value in values]
        checked = distinct(element, least=1)
        names = distinct(identifier)(name, given)
        return tuple((n, checked(f"{name}.{n}", values)) for n, values in zip(names, several, strict=True))

    return check


def _pairs(name: str, value: Any, accepts: str) -> tuple[list[Any], list[Any]]:
    """Returns the first and the second values of pairs, or the keys and values of a mapping."""
    given = tuple(_entries(value, f"{name}.").items()) if isinstance(value, MAPPINGS) else value
    pairs: list[Any] = [plain(pair) for pair in given] if isinstance(given, (tuple, list)) else [None]
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{name}: got {shown(value)}, accepts {accepts}.")
    return [pair[0] for pair in pairs], [plain(pair[1]) for pair in pairs]
