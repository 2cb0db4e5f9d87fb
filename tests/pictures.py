"""Valid and hostile pictures for the tests, and functions that load them."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from smallbatch_jax import data
from smallbatch_jax.config.experiment import InputError

RED, GREEN = (250, 10, 10), (10, 250, 10)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load(root):
    return data.load("folder", data_dir=root)


def error_line(call, *args, **kwargs):
    """Returns the message of the InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def png(width, height, depth, colour_type, data, *chunks, interlace=0):
    """Builds a PNG file from chunks, for kinds that Pillow reads but does not write; `chunks` come before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlace)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


class Bomb:
    """An object that makes the directory `mark` when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def encoded(image, file_format, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format, **options)
    return stream.getvalue()


def encoded_image(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


UPRIGHT = np.kron([[10, 60, 110], [160, 210, 250]], np.ones((8, 8))).astype(np.uint8)

# By orientation: the sides of the upright picture that the first stored row and column hold (EXIF 2.3, tag 274).
AS_STORED = {
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.T,  # left, top
    6: lambda p: p.T[::-1],  # right, top
    7: lambda p: p.T[::-1, ::-1],  # right, bottom
    8: lambda p: p.T[:, ::-1],  # left, bottom
}
