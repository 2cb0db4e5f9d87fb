"""Configs and command lines as a user gives them, for the tests of what is accepted."""

import sys
from pathlib import Path

import pytest
from absl import flags

from smallbatch_jax.config.experiment import InputError, default_config, from_config

ROOT = Path(__file__).parent.parent


def changed(**values):
    """Returns the default config as nested dicts, with some values changed: `section__field=value`."""
    config = default_config().to_dict()
    for path, value in values.items():
        *sections, name = path.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[name] = value
    return config


def experiment(**values):
    return from_config(changed(**values))


def refusal(make, *arguments):
    """Returns the message of the InputError after checking that it is one line."""
    with pytest.raises(InputError) as error:
        make(*arguments)
    message = str(error.value)
    assert message.splitlines() == [message]
    return message


def from_command_line(*arguments, make=from_config):
    """Returns the experiment that these arguments give with the quickstart config, or the line that refuses them."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import command
    finally:
        sys.path.pop(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", flags.FlagValues())
        config = command.define_config_flag()
        flags.DEFINE_string("other", None, "Any other flag.", flags.FLAGS)
        try:
            rest = command.parse(["sweep.py", f"--config={ROOT}/configs/quickstart.py", *map(str, arguments)])
            assert rest == ["sweep.py"], rest
            return make(command.given_config(config))
        except InputError as error:
            return str(error)


def paths(values, above=()):
    """Yields the path of every section and field of nested dicts, as a tuple of names."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


DEFAULTS = default_config().to_dict()
PATHS = list(paths(DEFAULTS))
SECTIONS = [(), *((name,) for name, value in DEFAULTS.items() if isinstance(value, dict))]
FIELDS = [path for path in PATHS if path not in SECTIONS]
