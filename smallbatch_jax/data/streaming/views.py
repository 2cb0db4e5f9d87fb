"""Photographs of any size to images of one size, as §3.5 has it: Simonyan & Zisserman (2014) and He et al. (2015a).

For training the shorter side becomes 256 … 480 pixels at random for images of 224, in proportion for others, and a square is
cut out at random and mirrored half the time. For testing the shorter side becomes 256, and the square is the one in the middle.

Only the square is resized, from as many pixels of the photograph as it comes from; a JPEG is decoded at a half
of its size or less where that still has pixels enough. Shrinking takes the mean over areas, enlarging interpolates linearly.
"""

import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

from smallbatch_jax.data import decode

IMAGE_SIZE, CENTRE, LARGEST = 224, 256, 480  # pixels: of an image, and of the shorter side of what it is cut from
# Principal components of the colours of ImageNet's training pixels in 0 … 1, as columns, by their standard deviations
# (Krizhevsky et al., 2012, §4.1; the numbers of its reimplementations).
COLOR_COMPONENTS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
) * np.array([0.2175, 0.0188, 0.0045], np.float32)
COLOR_DEVIATION = 0.1

Decode = Callable[[bytes, int], np.ndarray]


def training_view(
    content: bytes, size: int, draw: np.random.Generator, color_jitter: bool, upright: bool, out: np.ndarray | None = None
) -> np.ndarray:
    """A random square of a photograph at a random scale, mirrored half the time.

    Args:
      content: of a file, JPEG or another kind (`decode.py`).
      size: S, pixels.
      draw: what is random; five numbers are taken, or eight.
      color_jitter: whether multiples of the colours' principal components are added, the same for all pixels.
      upright: whether the picture is turned as its EXIF says.
      out: where to put the image, uint8[S, S, 3]; None for a new array.

    Returns:
      uint8[S, S, 3], `out` if that is given.

    Raises:
      Exception: of any kind, if the file cannot be decoded.
    """
    low, high = (round(side * size / IMAGE_SIZE) for side in (CENTRE, LARGEST))
    shorter = int(draw.integers(low, high, endpoint=True))
    down, right, mirror = draw.random(3)
    image = _decoded(content, shorter, upright)
    if mirror >= 0.5 and not color_jitter:
        return _square(image, size, shorter, down, right, out)
    square = _square(image, size, shorter, down, right)
    if color_jitter:
        square = _shifted(square, COLOR_COMPONENTS @ draw.normal(0, COLOR_DEVIATION, 3).astype(np.float32))
    return cv2.flip(square, 1, out) if mirror < 0.5 else _copied(square, out)


def center_view(content: bytes, size: int, upright: bool, out: np.ndarray | None = None) -> np.ndarray:
    """The square in the middle of a photograph; as `training_view`."""
    shorter = round(CENTRE * size / IMAGE_SIZE)
    return _square(_decoded(content, shorter, upright), size, shorter, 0.5, 0.5, out)


def _copied(square: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return square
    out[:] = square
    return out


def _square(image: np.ndarray, size: int, shorter: int, down: float, right: float, out: np.ndarray | None = None) -> np.ndarray:
    """A square of `size` pixels of an image resized to a shorter side of `shorter`; `down` and `right` of 0 … 1 of the way."""
    height, width = image.shape[:2]
    side = max(1, round(size * min(height, width) / shorter))
    top, left = round(down * (height - side)), round(right * (width - side))
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (size, size), out, interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)


def _decoded(content: bytes, shorter: int, upright: bool) -> np.ndarray:
    """uint8[H, W, 3] of at least `shorter` pixels on its shorter side, if there are as many."""
    try:
        height, width = simplejpeg.decode_jpeg_header(content)[:2]
        if int(height) * int(width) > decode.MOST_PIXELS:
            raise ValueError("too large")
        image = simplejpeg.decode_jpeg(content, "RGB", min_height=shorter, min_width=shorter, min_factor=2)
    except ValueError:  # another kind, CMYK, a remark that Pillow passes over; or damage, which it says in its own words
        image = decode.decode(io.BytesIO(content), upright)
        return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)
    return decode.turned(image, content) if upright and b"Exif\0\0" in content[:_EXIF_WITHIN] else image


_EXIF_WITHIN = 2**12  # bytes from the start in which a file that has EXIF says so


def _shifted(image: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The image with a colour, in 0 … 1, added to every pixel."""
    return np.clip(np.rint(image + 255 * colour), 0, 255).astype(np.uint8)
