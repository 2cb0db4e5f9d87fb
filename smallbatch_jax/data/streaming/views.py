"""Cuts images of one size out of photographs of any size (§3.5), after Simonyan & Zisserman (2014) and He et al. (2015a).

For training, the shorter side becomes a random 256 … 480 pixels for images of 224, in proportion for other sizes, and a random
square is cut out and mirrored half the time. For testing, the shorter side becomes 256, and the central square is cut out.

Only the square is resized, from the pixels of the photograph that it covers; a JPEG is decoded at half its size or less
if that leaves enough pixels. Shrinking takes the mean over areas, enlarging interpolates linearly.
"""

import io

import cv2
import numpy as np
import simplejpeg

from smallbatch_jax.data import decode

IMAGE_SIZE, CENTRE, LARGEST = 224, 256, 480  # pixels: of an image, and of the shorter side of what it is cut from
# Principal components of the colours of ImageNet's training pixels in 0 … 1, as columns, times their standard deviations
# (Krizhevsky et al., 2012, §4.1; the numbers of its reimplementations).
COLOR_COMPONENTS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
) * np.array([0.2175, 0.0188, 0.0045], np.float32)
COLOR_DEVIATION = 0.1
EXIF_WITHIN = 2**12  # bytes from the start of a file that has EXIF


def training_view(content: bytes, size: int, rng: np.random.Generator, color_jitter: bool, upright: bool) -> np.ndarray:
    """Cuts a random square out of the photograph in a file at a random scale, mirrored half the time: uint8[size, size, 3].

    `color_jitter` adds a random multiple of each principal component of colour to all pixels; `upright` turns the picture as
    its EXIF says.

    Raises:
      Exception: of any kind, if the file cannot be decoded.
    """
    low, high = (round(side * size / IMAGE_SIZE) for side in (CENTRE, LARGEST))
    shorter = int(rng.integers(low, high, endpoint=True))
    down, right, mirror = rng.random(3)
    square = _square(_decoded(content, shorter, upright), size, shorter, down, right)
    if color_jitter:
        colour = COLOR_COMPONENTS @ rng.normal(0, COLOR_DEVIATION, 3).astype(np.float32)
        square = np.clip(np.rint(square + 255 * colour), 0, 255).astype(np.uint8)
    return cv2.flip(square, 1) if mirror < 0.5 else square


def center_view(content: bytes, size: int, upright: bool) -> np.ndarray:
    """Cuts the central square out of a photograph; arguments, result and errors as in `training_view`."""
    shorter = round(CENTRE * size / IMAGE_SIZE)
    return _square(_decoded(content, shorter, upright), size, shorter, 0.5, 0.5)


def _square(image: np.ndarray, size: int, shorter: int, down: float, right: float) -> np.ndarray:
    """Cuts S × S pixels out of an image resized to a shorter side of `shorter`, at the relative offsets `down` and `right`."""
    height, width = image.shape[:2]
    side = max(1, round(size * min(height, width) / shorter))
    top, left = round(down * (height - side)), round(right * (width - side))
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)


def _decoded(content: bytes, shorter: int, upright: bool) -> np.ndarray:
    """Decodes to uint8[H, W, 3] of at least `shorter` pixels on the shorter side, if the file has as many."""
    try:
        height, width = simplejpeg.decode_jpeg_header(content)[:2]
        if int(height) * int(width) > decode.MOST_PIXELS:
            raise ValueError("too large")
        image = simplejpeg.decode_jpeg(content, "RGB", min_height=shorter, min_width=shorter, min_factor=2)
    except ValueError:  # another kind, CMYK, or damage, which Pillow ignores or describes
        image = decode.decode(io.BytesIO(content), upright)
        return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)
    return decode.turned(image, content) if upright and b"Exif\0\0" in content[:EXIF_WITHIN] else image
