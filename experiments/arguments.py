"""Command-line flags, including the fields of a config, parsed with this package's own checks."""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from absl import flags

from smallbatch_jax.config import fields, overrides
from smallbatch_jax.config.fields import InputError

flags.disclaim_key_flags()  # the flags defined here belong to the command that asks for them


class _Parser(flags.ArgumentParser):
    """Flag parser that applies a function to the text."""

    def __init__(self, read: Callable[[str], Any]):
        self._read = read

    def parse(self, argument: str) -> Any:
        return self._read(argument)


def define_config_flag() -> Any:
    """Defines --config, an ml_collections file, with --config.FIELD=VALUE to override its fields."""
    for path, field in overrides.FIELDS.items():
        reader, switch = _Parser(partial(overrides.read, field)), field.type is bool
        flag = flags.Flag(reader, flags.ArgumentSerializer(), f"config.{path}", None, None, boolean=switch)
        flags.DEFINE_flag(flag, flags.FLAGS, __name__)  # registered here, so that --help does not list each
    reader = _Parser(partial(fields.expanded_path, "--config"))
    return flags.DEFINE(reader, "config", None, "Config file; --config.FIELD=VALUE overrides a field.", flags.FLAGS)


def DEFINE_path(name: str, described: str) -> Any:
    """Defines a flag for one path."""
    return flags.DEFINE(_Parser(partial(fields.expanded_path, f"--{name}")), name, None, described)


def DEFINE_paths(name: str, described: str) -> Any:
    """Defines a flag for paths, which may be repeated."""
    reader = _Parser(partial(fields.expanded_path, f"--{name}"))
    return flags.DEFINE_multi(reader, flags.ArgumentSerializer(), name, None, described)


def DEFINE_numbers(name: str, default: str | None, described: str) -> Any:
    """Defines a flag for a comma-separated list of distinct positive integers."""

    def read(text: str) -> tuple[int, ...]:
        values = [int(part) if part.strip().isdecimal() else part for part in text.split(",")]
        return fields.distinct(fields.integer(1))(f"--{name}", values)

    return flags.DEFINE(_Parser(read), name, default, described)


def DEFINE_number(name: str, default: str, described: str, low: float, high: float) -> Any:
    """Defines a flag for a number from low to high."""

    def read(text: str) -> float:
        try:
            value: Any = float(text)
        except ValueError:
            value = text
        return fields.number(low, high)(f"--{name}", value)

    return flags.DEFINE(_Parser(read), name, default, described)


def given(flag: Any, example: str) -> Any:
    """Returns the value of a required flag; `example` completes the error."""
    if flag.value is None or flag.value == "":
        raise InputError(f"--{flag.name}: not given; for example --{flag.name}={example}")
    return flag.value


def given_fields() -> dict[str, Any]:
    """Returns the values of --config.FIELD=VALUE by field; the last one given wins."""
    return {path: flag.value for path in overrides.FIELDS if (flag := flags.FLAGS[f"config.{path}"]).present}


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags as absl does, but --help exits with status 0 and mistakes raise InputError."""
    if any(arg in ("--help", "-h", "-help", "--helpfull", "--helpshort") for arg in argv[1:]):
        shared = flags.FLAGS.module_help("distributed") if "distributed" in sys.modules else ""
        print(f"{sys.modules['__main__'].__doc__}\nflags:\n{flags.FLAGS.main_module_help()}\n{shared}")
        sys.exit(0)
    try:
        args = _with_switches(argv[1:])
        for arg, following in itertools.pairwise(args):
            flag = flags.FLAGS[name] if (name := arg.lstrip("-")) in flags.FLAGS and arg.startswith("-") else None
            if flag is not None and not flag.boolean and following.startswith("--"):  # absl would take `following` as the value
                raise InputError(f"{arg}: has no value, the next argument is {fields.shown(following)}")
        rest = flags.FLAGS([argv[0], *args])
    except (flags.Error, ValueError) as error:
        ours = error.__context__ if isinstance(error.__context__, InputError) else error  # without absl's prefix
        raise InputError(fields.cut(str(ours), 1000)) from None
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is None and (changed := given_fields()):
        raise InputError(f"--config: not given, but --config.{next(iter(changed))} is")
    return rest


def _with_switches(args: Iterable[str]) -> list[str]:
    """Joins a boolean flag and its value with `=`, since absl does not accept a space."""
    found: list[str] = []
    for arg in args:
        if found and arg.lower() in overrides.BOOLEANS and re.fullmatch(r"--?config\.[^=]+", found[-1]):
            found[-1] += f"={arg}"
        else:
            found.append(arg)
    return found
