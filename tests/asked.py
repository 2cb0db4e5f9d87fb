"""Experiments as a user asks for them, for the tests of what is accepted."""

import pytest

from smallbatch_jax.experiment import InputError, default_config, from_config


def changed(**values):
    """The default config as plain nested values, with some changed: `section__field=value`."""
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
    """The message of the InputError, seen to be one line."""
    with pytest.raises(InputError) as error:
        make(*arguments)
    message = str(error.value)
    assert message.splitlines() == [message]
    return message
