"""Reads a command line before absl does: expands flagfiles and takes out the overrides of the config.

ml_collections reads overrides too, but it refuses None, concatenates tuples that are given twice, and needs "=".
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallbatch_jax.config.fields import InputError, expanded_path
from smallbatch_jax.config.overrides import BOOLEANS, require_field, unquoted


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
        path = expanded_path("--flagfile", value)
        if path in within:
            raise InputError(f"--flagfile={path}: names itself")
        try:
            lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(f"--flagfile={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        lines = [_unquoted(line) for line in lines if line and not line.startswith(("#", "//"))]
        found += expanded(lines, (*within, path))
    return found


def _name_and_value(arg: str) -> tuple[str, str | None]:
    """Splits "--name=value" or a flagfile's line "--name value"; the name is empty for anything else."""
    match = re.fullmatch(r"--?([^= \t]+)(?:(?:[ \t]*=[ \t]*|[ \t]+)(.*))?", arg, re.DOTALL)
    return (match[1], match[2]) if match else ("", None)


def _unquoted(line: str) -> str:
    name, value = _name_and_value(line)
    return line if value is None else f"--{name}={unquoted(value)}"


class Split(NamedTuple):
    """A command line, taken apart."""

    others: list[str]  # arguments that do not concern the config
    file: str | None  # value of --config, with what follows a colon
    overrides: dict[str, str]  # text of each --config.FIELD=VALUE, the last one of each field


def split(args: Sequence[str]) -> Split:
    """Separates --config=FILE and --config.FIELD=VALUE from the other arguments, in any order.

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
            negated, path = override.groups()
            field = require_field(path)
            if value is None:
                value = _separate_value(arg, field, bool(negated), waiting)
            elif negated:
                raise InputError(f"{arg}: takes no value; use --config.{path}=False")
            overrides[path] = value
        elif name == "config":
            file = value if value is not None else waiting.pop(0) if waiting else ""
        else:
            others.append(arg)
    return Split(others, None if file is None else _existing_config(file), overrides)


def _separate_value(arg: str, field: Any, negated: bool, waiting: list[str]) -> str:
    """Returns the value of an override without "=": the next argument, or for a boolean field also whether it is negated."""
    if negated and field.type is not bool:
        raise InputError(f"{arg}: no such flag; {field.name} is not True or False")
    if field.type is bool and (negated or not waiting or waiting[0].lower() not in BOOLEANS):
        return str(not negated)
    if not waiting or waiting[0].startswith("--"):
        raise InputError(f"{arg}: has no value; for example {arg}={field.default}")
    return waiting.pop(0)


def _existing_config(given: str) -> str:
    """Checks that the config file exists and returns its path, with any ":argument" for get_config."""
    path, colon, argument = given.partition(":")
    if not path.strip():
        raise InputError("--config: empty; for example --config=configs/quickstart.py")
    path = expanded_path("--config", path)
    if not Path(path).exists():
        raise InputError(f"--config={path}: no such file in {os.getcwd()}; give its path from there, or its full path.")
    return path + colon + argument
