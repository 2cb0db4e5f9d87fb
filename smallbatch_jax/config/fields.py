"""How one field of a config is checked: each check takes (field name, value) and returns the value or raises InputError."""

import ast
import dataclasses
import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeVar

T = TypeVar("T")
Check = Callable[[str, Any], Any]

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38
MOST_VALUES = 100_000  # of one field, so that checking them takes no time
MOST_CHARACTERS = 4096  # of a path on Linux


class InputError(ValueError):
    """Something the user gave cannot be used: one line that names it, what it got and what it accepts (exit status 2)."""

    def __init__(self, message: str):
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def config_field(default: Any, check: Check, kind: type | None = None) -> Any:
    """A dataclass field with its check; `kind` is the type of a field whose default is None."""
    return dataclasses.field(default=default, metadata={"check": check, "type": kind})


def plain(value: Any) -> Any:
    """The value as a field holds it: Python's own for NumPy's and JAX's, a fraction and a path; a tuple for a range."""
    if isinstance(value, range):
        return tuple(value[: MOST_VALUES + 1])  # one too many is enough to be refused
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and hasattr(value, "tolist") and not isinstance(value, type):
        return (value[: MOST_VALUES + 1] if getattr(value, "ndim", 0) else value).tolist()
    if isinstance(value, (Decimal, Fraction)):
        with suppress(ValueError, OverflowError):  # a signalling NaN, a number that is too large
            return float(value)
    return value


def parse(kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """A dataclass of `config_field`s from plain values, checked in the order of its fields."""
    known = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    refuse_unknown(values, [field.name for field in known], prefix)
    checked = {f.name: f.metadata["check"](prefix + f.name, plain(values[f.name])) for f in known if f.name in values}
    return kind(**checked)


YES, NO = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
BOOLEANS: dict[str, bool] = {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}


def read(field: dataclasses.Field, given: str) -> Any:
    """The value that a text stands for, by the type of a field, for its check to judge; what makes no sense stays text."""
    given, kind = given.strip(), field.metadata["type"] or type(field.default)
    if given == "None" or (field.default is None and given.lower() in ("none", "null")):
        return None
    if kind is bool:
        return BOOLEANS.get(given.lower(), given)
    if kind is str:
        return unquoted(given)
    if kind is tuple:
        return _read_tuple(given)
    for number in (int, float):
        try:
            return number(given)
        except ValueError:
            pass
    value = _read_literal(given)
    return given if isinstance(value, bool) else value  # ml_collections would take True for 1.0


def unquoted(given: str) -> str:
    """Without the quotes around it, which a shell takes away and a file does not."""
    inner = given[1:-1]
    return inner if given[:1] in ("'", '"') and given == given[0] + inner + given[0] and given[0] not in inner else given


def _read_tuple(given: str) -> Any:
    """A tuple, with or without brackets, or a single value; of texts also without quotes."""
    value = _read_literal(given)
    if value != given:
        return value if isinstance(value, (tuple, dict)) else (value,)
    inner = given[1:-1] if given[:1] + given[-1:] in ("()", "[]") else given
    parts = tuple(unquoted(part.strip()) for part in inner.split(",") if part.strip())
    as_texts = parts and all(part[0] not in "([{" and isinstance(_read_literal(part), str) for part in parts)
    return parts if as_texts else given


def _read_literal(given: str) -> Any:
    """A Python literal, in which 2^-7 and 2**-7 are powers; the text itself if it is none."""
    for written in (given, given.replace("\u2212", "-")):  # the minus sign of a typeset table
        try:
            with warnings.catch_warnings(action="ignore"):
                return _value(ast.parse(written, mode="eval").body)
        except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
            pass
    return given


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Tuple() | ast.List():
            return tuple(map(_value, node.elts))
        case ast.Dict() if None not in node.keys:
            return dict(zip(map(_value, node.keys), map(_value, node.values), strict=True))  # pyright: ignore[reportArgumentType]
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            return -_value(operand) if isinstance(sign, ast.USub) else +_value(operand)
        case ast.BinOp(base, ast.Pow() | ast.BitXor(), exponent):
            return _power(_value(base), _value(exponent))
        case ast.Name("nan" | "inf" as name):
            return float(name)
    raise ValueError


def _power(base: Any, exponent: Any) -> Any:
    power = float(base) ** float(exponent)
    exact = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0 and abs(power) < 2**53
    return int(power) if exact else power


def refuse_unknown(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    """Raises InputError for the first name that is no field, with the nearest one that is."""
    for name in values:
        if name not in known:
            hint = nearest(name, known) if isinstance(name, str) else "."
            raise InputError(f"{prefix}{label(name)}: unknown field{hint} Known: {', '.join(known)}.")


def label(name: Any) -> str:
    """The name of a field as an error begins with it; in quotes if no field could be called that."""
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 100 else shown(name)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or a full stop."""
    close = difflib.get_close_matches(name[:100], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def shown(value: Any) -> str:
    """A value as an error shows it: in one short line."""
    try:
        return cut(repr(value))
    except Exception:  # an integer of more than 4300 digits, lists a thousand deep, a __repr__ that raises
        return f"a value of type {type(value).__name__} that cannot be printed"


def cut(text: str) -> str:
    """A text as an error shows it: its beginning, if it is long."""
    return text if len(text) <= 120 else text[:117] + "..."


def text(name: str, value: Any) -> str:
    """A printable string that is not empty, and no longer than a path may be."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > MOST_CHARACTERS:
        raise InputError(f"{name}: got {shown(value)}, accepts text that can be printed, of 1 to {MOST_CHARACTERS} characters.")
    return value


def expanded_path(name: str, given: str | os.PathLike[str]) -> str:
    """A path in which ~ and ~user are the home folders that they stand for; refuses what no file can be called."""
    path = os.path.expanduser(os.fsdecode(given))
    if not path.strip():
        raise InputError(f"{name}: empty; for example {name}=runs/fig01")
    if "\0" in path:
        raise InputError(f"{name}: got {shown(path)}, accepts a path.")
    if path.startswith("~"):
        raise InputError(f"{name}: got {shown(path)}, there is no such user; for a folder of that name give ./{path}")
    return path


def folder_name(name: str, value: Any) -> str:
    """A text that can also name a folder: that of the figures of an experiment."""
    if text(name, value) in (".", "..") or "/" in value or len(value.encode()) > 255:
        raise InputError(f"{name}: got {shown(value)}, accepts the name of a folder: without slashes, at most 255 bytes.")
    return value


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: got {shown(value)}, accepts True or False.")
    return value


def choice(known: Sequence[str], what: str, prefix: str | None = None) -> Check:
    """One of `known`, or if given something that begins with `prefix`."""

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and prefix and value.startswith(prefix):
            return text(name, value)
        if not isinstance(value, str) or value not in known:
            hint = nearest(value, known) if isinstance(value, str) else "."
            raise InputError(f"{name}: unknown {what} {shown(value)}{hint} Known: {', '.join(known)}.")
        return value

    return check


def integer(low: int, high: int = 2**31 - 1) -> Check:
    """An integer from low to high."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{name}: got {shown(value)}, accepts an integer from {low} to {high}.")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A number from low to high, as a float."""

    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not low <= value <= high:
            raise InputError(f"{name}: got {shown(value)}, accepts a number from {low:g} to {high:g}.")
        return float(value)

    return check


def positive(high: float = FLOAT32_MAX) -> Check:
    """A number above 0 that float32 can hold, up to `high`."""

    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not FLOAT32_TINY <= value <= high:
            upto = "finite" if high == FLOAT32_MAX else f"at most {high:g}"
            raise InputError(f"{name}: got {shown(value)}, accepts a number above 0 and {upto} (in float32).")
        return float(value)

    return check


def decay(name: str, value: Any) -> float:
    """The weight of the old value in a running average: from 0, which forgets at once, to below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise InputError(f"{name}: got {shown(value)}, accepts a number from 0 to below 1.")
    return float(value)


def optional(inner: Check) -> Check:
    """None, or what `inner` accepts."""
    return lambda name, value: None if value is None else inner(name, value)


def distinct(element: Check, least: int = 0, most: int = MOST_VALUES) -> Check:
    """A tuple or list of different values that each pass `element`, from `least` to `most` of them."""

    def check(name: str, value: Any) -> tuple:
        if not isinstance(value, (tuple, list)):
            raise InputError(f"{name}: got {shown(value)}, accepts a tuple of values such as (2, 8).")
        if len(value) < least:
            raise InputError(f"{name}: got {shown(value)}, accepts a tuple of at least {least} value(s).")
        if len(value) > most:
            raise InputError(f"{name}: got {len(value)} values, accepts a tuple of at most {most}.")
        checked = tuple(element(name, plain(item)) for item in value)
        before = set()
        for item in checked:
            if item in before:
                raise InputError(f"{name}: {shown(item)} stands twice in {shown(value)}; give every value once.")
            before.add(item)
        return checked

    return check


def by_batch_size(value_check: Check) -> Check:
    """A tuple of (batch size, value) pairs, each batch size once, or a mapping; as a tuple of pairs."""

    def check(name: str, value: Any) -> tuple:
        pairs = tuple(value.items()) if isinstance(value, Mapping) else value
        pairs = [plain(pair) for pair in pairs] if isinstance(pairs, (tuple, list)) else pairs
        if not isinstance(pairs, (tuple, list)) or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
            raise InputError(
                f"{name}: got {shown(value)}, accepts pairs of batch size and value such as ((2, 0.01), (8, 0.002))."
            )
        sizes = distinct(integer(1))(name, [size for size, _ in pairs])
        return tuple((size, value_check(name, plain(item))) for size, (_, item) in zip(sizes, pairs, strict=True))

    return check


def nested(kind: type) -> Check:
    """A section of the config: a mapping with the fields of the dataclass `kind`."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: got {shown(value)}, accepts a section with the fields {_names(kind)}.")
        return parse(kind, value, name + ".")

    return check


def _names(kind: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))  # pyright: ignore[reportArgumentType]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
