"""Overrides of a config: parses the text of --config.FIELD=VALUE by the type of the field.

`experiment.from_config` checks the values later; text that cannot be parsed stays text.
"""

import ast
import dataclasses
import re
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from smallbatch_jax.config.experiment import Config

YES, NO = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
BOOLEANS: dict[str, bool] = {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for field in dataclasses.fields(kind):
        yield prefix + field.name, field
        if dataclasses.is_dataclass(field.default):
            yield from _fields(field.default, f"{prefix}{field.name}.")


FIELDS = dict(_fields(Config))  # all fields of a config and its sections, and the sections themselves, by dotted name


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets fields of a config by dotted name; sections are set before their fields, which keep their values."""
    for path in sorted(values, key=lambda path: path.count(".")):
        section, _, name = path.rpartition(".")
        with config.unlocked(), config.ignore_type():
            if section or isinstance(values[path], dict):
                config.update({section: {name: values[path]}} if section else {name: values[path]})
            else:
                config[name] = values[path]


def read(field: dataclasses.Field, text: str) -> Any:
    """Parses a text into a value by the type of the field."""
    text = text.strip()
    if text == "None" or (field.default is None and text.lower() in ("none", "null")):
        return None
    kind = type(field.default) if field.default is not None else typing.get_args(field.type)[0]  # of `int | None`
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if kind is str:
        return unquoted(text)
    if (typing.get_origin(kind) or kind) is tuple:
        return _read_tuple(text)
    for number in (int, float):  # int() also takes "08"
        try:
            return number(text)
        except ValueError:
            pass
    value = _read_literal(text)
    return text if isinstance(value, bool) else value  # ml_collections would take True for 1.0


def unquoted(text: str) -> str:
    """Removes the quotes around a text, which a shell removes and a file does not."""
    inner = text[1:-1]
    return inner if text[:1] in ("'", '"') and text == text[0] + inner + text[0] and text[0] not in inner else text


def _read_tuple(text: str) -> Any:
    """Reads a tuple with or without brackets, or a single value; strings may be unquoted."""
    value = _read_literal(text)
    if value != text:
        return value if isinstance(value, (tuple, dict)) else (value,)
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    parts = tuple(unquoted(part.strip()) for part in inner.split(",") if part.strip())
    strings = parts and all(part[0] not in "([{" and isinstance(_read_literal(part), str) for part in parts)
    return parts if strings else text


def _read_literal(text: str) -> Any:
    """Evaluates a Python literal in which 2^-7 and 2**-7 are powers; returns the text itself if it is not one."""
    for written in (text, text.replace("\u2212", "-")):  # the minus sign of a typeset table
        try:
            with warnings.catch_warnings(action="ignore"):
                # Python's ^ binds less tightly than a sign. A text in quotes keeps its own.
                powers = written if re.search("[\"']", written) else written.replace("^", "**")
                return _value(ast.parse(powers, mode="eval").body)
        except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
            pass
    return text


def _value(node: Any) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Tuple() | ast.List():
            return tuple(map(_value, node.elts))
        case ast.Dict() if None not in node.keys:
            return dict(zip(map(_value, node.keys), map(_value, node.values), strict=True))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.UnaryOp(ast.UAdd(), operand):
            return +_value(operand)
        case ast.BinOp(base, ast.Pow(), exponent):
            base, exponent = _value(base), _value(exponent)
            power = float(base) ** float(exponent)
            exact = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0 and abs(power) < 2**53
            return int(power) if exact else power
        case ast.Name("nan" | "inf" as name):
            return float(name)
    raise ValueError
