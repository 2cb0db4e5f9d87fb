"""Reads a command line before absl does: it expands flagfiles and takes out the overrides of the config.

ml_collections reads overrides too, but it refuses None, concatenates tuples that are given twice, and needs "=".
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallbatch_jax.config import experiment, fields
from smallbatch_jax.config.experiment import InputError


def expanded(args: Sequence[str], within: tuple[str, ...] = ()) -> list[str]:
    """Returns the arguments with each --flagfile replaced by its lines, as --name=value, without comments and quotes."""
    found, waiting = [], list(args)
    while waiting:
        arg = waiting.pop(0)
        if arg == "--":
            return [*found, arg, *waiting]
        name, value = _name_and_value(arg)
        if name != "flagfile":
            found.append(arg)
            continue
        value = value if value is not None else waiting.pop(0) if waiting else ""
        if not value:
            raise InputError("--flagfile: empty; give the path of a file of arguments")
        path = fields.expanded_path("--flagfile", value)
        if path in within:
            raise InputError(f"--flagfile={path}: names itself")
        try:
            lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(f"--flagfile={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        lines = [line for line in lines if line and not line.startswith(("#", "//"))]
        found += expanded([_unquoted(line) for line in lines], (*within, path))
    return found


def _name_and_value(arg: str) -> tuple[str, str | None]:
    """Returns (name, value) of "--name=value" or of a flagfile's line "--name value"; an empty name for anything else."""
    match = re.fullmatch(r"--?([^= \t]+)(?:(?:[ \t]*=[ \t]*|[ \t]+)(.*))?", arg, re.DOTALL)
    return (match[1], match[2]) if match else ("", None)


def _unquoted(line: str) -> str:
    name, value = _name_and_value(line)
    return line if value is None else f"--{name}={fields.unquoted(value)}"


class Split(NamedTuple):
    """A command line, taken apart."""

    others: list[str]  # the arguments that are not about the config
    file: str | None  # of --config, with what follows a colon
    overrides: dict[str, str]  # the text of each --config.FIELD=VALUE, the last of each field


def split(args: Sequence[str]) -> Split:
    """Takes arguments apart, wherever --config=FILE stands.

    Raises:
      InputError: if a field does not exist or has no value, or the file does not exist.
    """
    others, overrides, waiting, file = [], {}, list(args), None
    while waiting:
        arg = waiting.pop(0)
        if arg == "--":
            others += [arg, *waiting]
            break
        name, value = _name_and_value(arg)
        override = re.fullmatch(r"(no)?config\.(.*)", name, re.DOTALL)
        if override:
            path = override[2]
            field = experiment.require_field(path)
            if value is None:
                value = _value_of(arg, field, bool(override[1]), waiting)
            elif override[1]:
                raise InputError(f"{arg}: takes no value; use --config.{path}=False")
            overrides.pop(path, None)
            overrides[path] = value
        elif name == "config":
            file = value if value is not None else waiting.pop(0) if waiting else ""
        else:
            others.append(arg)
    return Split(others, None if file is None else _config_file(file), overrides)


def _value_of(arg: str, field: Any, negated: bool, waiting: list[str]) -> str:
    """Returns the value of an override without "=": the next argument, or for a boolean field whether it is negated."""
    if negated and field.type is not bool:
        raise InputError(f"{arg}: no such flag; {field.name} is not True or False")
    if field.type is bool and (negated or not waiting or waiting[0].lower() not in fields.BOOLEANS):
        return str(not negated)
    if not waiting or waiting[0].startswith("--"):
        raise InputError(f"{arg}: has no value; for example {arg}={field.default}")
    return waiting.pop(0)


def _config_file(given: str) -> str:
    """Checks that the config file exists and returns its path, with any ":argument" for get_config."""
    path, colon, argument = given.partition(":")
    if not path.strip():
        raise InputError("--config: empty; for example --config=configs/quickstart.py")
    path = fields.expanded_path("--config", path)
    if not Path(path).exists():
        raise InputError(f"--config={path}: no such file in {os.getcwd()}; give its path from there, or its full path.")
    return path + colon + argument
