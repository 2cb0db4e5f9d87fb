"""Folders of pictures for the tests: two classes, three training and two test pictures each."""

import pytest

from smallbatch_jax import data
from smallbatch_jax.experiment import InputError

RED, GREEN = (250, 10, 10), (10, 250, 10)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load(root):
    return data.load("folder", data_dir=root)


def error_line(call, *args, **kwargs):
    """The message of the InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message
