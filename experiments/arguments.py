"""Reads a command line before absl does: expands flagfiles and takes out the overrides of the config.

ml_collections reads overrides too, but it refuses None, concatenates tuples that are given twice, and needs "=".
"""

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from smallbatch_jax.config.fields import InputError, expanded_path
from smallbatch_jax.config.overrides import BOOLEANS, require_field, unquoted


def expanded(args: Iterable[str], within: tuple[str, ...] = ()) -> list[str]:
    """Returns the arguments with each --flagfile replaced by its lines, as --name=value, without comments and quotes."""
    found, waiting = [], iter(args)
    for arg in waiting:
        if arg == "--":
            return [*found, arg, *waiting]
        name, value = _name_and_value(arg)
        if name == "flagfile":
            found += _read_flagfile(next(waiting, "") if value is None else value, within)
        else:
            found.append(arg)
    return found


def _read_flagfile(given: str, within: tuple[str, ...]) -> list[str]:
    if not given:
        raise InputError("--flagfile: empty; give the path of a file of arguments")
    path = expanded_path("--flagfile", given)
    if path in within:
        raise InputError(f"--flagfile={path}: names itself")
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"--flagfile={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    read = [(line, *_name_and_value(line)) for line in lines if line and not line.startswith(("#", "//"))]
    return expanded([line if value is None else f"--{name}={unquoted(value)}" for line, name, value in read], (*within, path))


def _name_and_value(arg: str) -> tuple[str, str | None]:
    """Splits "--name=value" or a flagfile's line "--name value"; the name is empty for anything else."""
    match = re.fullmatch(r"--?([^= \t]+)(?:(?:[ \t]*=[ \t]*|[ \t]+)(.*))?", arg, re.DOTALL)
    return (match[1], match[2]) if match else ("", None)


def without_overrides(args: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Takes --config.FIELD=VALUE out of the arguments; returns the others and the last text of each field.

    Raises:
      InputError: if a field does not exist or has no value, or the config file does not exist.
    """
    others, overrides, waiting, file = [], {}, deque(args), None
    while waiting and waiting[0] != "--":
        arg = waiting.popleft()
        name, value = _name_and_value(arg)
        if override := re.fullmatch(r"(no)?config\.(.*)", name, re.DOTALL):
            negated, path = override.groups()
            overrides[path] = _text(arg, path, value, bool(negated), waiting)
        elif name == "config":
            file = value if value is not None else waiting.popleft() if waiting else ""
        else:
            others.append(arg)
    if file is not None:
        return [_existing_config(file), *others, *waiting], overrides
    if overrides:
        raise InputError(f"--config: not given, of which --config.{next(iter(overrides))} is a field")
    return [*others, *waiting], {}


def _text(arg: str, path: str, value: str | None, negated: bool, waiting: deque[str]) -> str:
    """Returns the text of an override: after "=", the next argument, or whether a boolean field is negated."""
    field = require_field(path)
    if value is not None:
        if negated:
            raise InputError(f"{arg}: takes no value; use --config.{path}=False")
        return value
    if negated and field.type is not bool:
        raise InputError(f"{arg}: no such flag; {field.name} is not True or False")
    if field.type is bool and (negated or not waiting or waiting[0].lower() not in BOOLEANS):
        return str(not negated)
    if not waiting or waiting[0].startswith("--"):
        raise InputError(f"{arg}: has no value; for example {arg}={field.default}")
    return waiting.popleft()


def _existing_config(given: str) -> str:
    path, colon, argument = given.partition(":")
    if not path.strip():
        raise InputError("--config: empty; for example --config=configs/quickstart.py")
    path = expanded_path("--config", path)
    if not Path(path).exists():
        raise InputError(f"--config={path}: no such file in {os.getcwd()}; give its path from there, or its full path.")
    return f"--config={path}{colon}{argument}"
