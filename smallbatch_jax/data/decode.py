"""Decodes JPEG, PNG, WebP, BMP, TIFF and GIF files to one uint8 array.

A picture is turned as its EXIF orientation says; unreadable EXIF is ignored. If every picture is grey (also
with 1 or 16 bits, or 8 and alpha) the array has one channel; if any is not, all become RGB, whatever their order. Palettes
and CMYK are converted to RGB as Pillow does it, which takes every CMYK JPEG for inverted, as Adobe writes them. Alpha is
dropped, and a transparent pixel shows the colour stored under it. The upper eight of 16 bits are kept. A file of several
pictures, e.g. an animated GIF, is refused, but of a camera's JPEG with several the first is taken. A TIFF of numbers other than
integers of 1, 2, 4, 8 or 16 bits is refused.

A truncated file is refused. Damaged pixels are detected in a PNG, which has a checksum of them; in a JPEG only where the
decoder cannot continue, and are accepted otherwise.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from smallbatch_jax.config.experiment import InputError

VERSION = 2  # version of the rules above; arrays cached under another version are decoded again
KINDS = "JPEG, PNG, WebP, BMP, TIFF or GIF"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # a suffix chooses no decoder: some of Pillow's start other programs
MOST_PIXELS = 2**26  # pixel limit of a picture; decoding takes seven bytes a pixel, in each thread
_CHUNK = 64  # files per thread and task
_MAX_THREADS = 8


def version() -> str:
    """Returns the versions that affect decoded pixels, beside the file itself."""
    import PIL

    return f"decode {VERSION}, Pillow {PIL.__version__}"


def decode_images(paths: Sequence[str]) -> np.ndarray:
    """Decodes files to uint8[N, H, W, C], C = 1 if every picture is grey and 3 otherwise.

    Raises:
      InputError: a file cannot be decoded, or is of another size than the others; one line with its path.
    """
    from rich.console import Console
    from rich.progress import track

    images = np.empty((0, 0, 0, 0), np.uint8)
    with quiet_pillow(), contextlib.closing(_decoded_in_order(paths)) as pictures:
        shown = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
        for index, picture in enumerate(track(pictures, "decoding images", len(paths), **shown)):
            if index == 0:
                images = _allocate(len(paths), picture.shape)
            height, width = images.shape[1:3]
            if picture.shape[:2] != (height, width):
                raise InputError(
                    f"dataset.data_dir: {paths[index]!r} is {picture.shape[1]}x{picture.shape[0]} pixels and {paths[0]!r} is "
                    f"{width}x{height}; dataset.image_size=None accepts images of one size"
                )
            if picture.shape[2] > images.shape[3]:
                images = np.repeat(images, 3, axis=3)
            images[index] = picture  # a grey picture fills all three channels
    return images


def _decoded_in_order(paths: Sequence[str]) -> Generator[np.ndarray, None, None]:
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for pictures in pool.map(lambda chunk: [_decode_image(path) for path in chunk], chunks):
            yield from pictures


def _decode_image(path: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return decode(file)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything from within Pillow
        raise InputError(f"dataset.data_dir: {path!r} {what_is_wrong(error)}; replace or remove it") from error


def what_is_wrong(error: Exception) -> str:
    """Describes an error of reading or decoding a file, for a message that begins with its path."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"is not a {KINDS} image"
    system = getattr(error, "strerror", None)  # e.g. the file has gone since the directory was listed
    return f"cannot be read ({system})" if system else f"cannot be decoded ({' '.join(str(error).split())})"


def decode(file: BinaryIO, upright: bool = True) -> np.ndarray:
    """Returns uint8[H, W, 1] of a grey picture, uint8[H, W, 3] of any other; raises whatever Pillow raises."""
    from PIL import Image

    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MOST_PIXELS} are accepted")
    after_header = file.tell()
    if image.format not in ("JPEG", "MPO"):  # MPO: a camera's JPEG with further views
        _require_one_picture(image)
    image.load()
    if image.format == "JPEG":  # where the rest is lost, Pillow decodes zeros to grey pixels
        file.seek(after_header)  # past a thumbnail, which has such a marker of its own
        if b"\xff\xd9" not in file.read():
            raise ValueError("its end is missing")
    pixels = _pixels(image)
    return _turned(pixels, image) if upright else pixels


def turned(pixels: np.ndarray, content: bytes) -> np.ndarray:
    """Returns the pixels uint8[H, W, C] of a file, turned as its EXIF orientation says."""
    from PIL import Image

    with contextlib.suppress(Exception):  # Pillow may refuse what another decoder took
        return _turned(pixels, Image.open(io.BytesIO(content), formats=FORMATS))
    return pixels


def _turned(pixels: np.ndarray, image: Any) -> np.ndarray:
    """Turns pixels as EXIF says; unlike Pillow's own function it reads the orientation alone, whatever else is damaged."""
    from PIL import ExifTags

    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF can raise anything, and turns nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _require_one_picture(image: Any) -> None:
    """Raises ValueError for a file of several pictures, or of samples that `_pixels` would misread."""
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1:
        raise ValueError(f"{pictures} pictures in one file, one is accepted")
    if image.format != "TIFF":
        return
    bits, signs, white_is_zero = (image.tag_v2.get(tag, default) for tag, default in ((258, (1,)), (339, (1,)), (262, 1)))
    if not {*bits} <= {1, 2, 4, 8, 16} or {*signs} != {1} or (16 in bits and white_is_zero == 0):
        raise ValueError(f"samples of {bits[0]} bits, format {signs[0]}; unsigned integers of up to 16 bits are accepted")


def _pixels(image: Any) -> np.ndarray:
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16 bits a pixel, which Pillow would clip rather than scale
        return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


def _allocate(count: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty((count, *shape), np.uint8)
    except MemoryError as error:
        gigabytes = count * np.prod(shape, dtype=float) / 1e9
        raise InputError(
            f"dataset.data_dir: {count} images of shape {shape} take {gigabytes:.0f} GB, more memory than there is; "
            "use fewer or smaller images"
        ) from error


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Suppresses Pillow's warnings about a file's content (EXIF, palette); errors are still raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
