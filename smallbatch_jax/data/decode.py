"""JPEG, PNG, WebP, BMP, TIFF and GIF files to one uint8 array.

A picture is turned as its EXIF orientation says; EXIF that cannot be read turns nothing. If every picture is grey (also
with 1 or 16 bits, or with alpha) the array has one channel; if any is not, all become RGB, whatever their order. Palettes
and CMYK are converted to RGB as Pillow does it, which takes every CMYK JPEG for inverted, as Adobe writes them. Alpha is
dropped: what lies under a transparent pixel is shown as it is stored. Of 16 bits the upper eight are kept. A file of several
pictures, e.g. an animated GIF, is refused, and so is a TIFF of numbers other than integers of 1, 2, 4, 8 or 16 bits.

A file that lacks pixels is refused. Damaged pixels are noticed in a PNG, which has a checksum of them; in a JPEG only where
the decoder cannot go on, and are taken as they come otherwise.
"""

import contextlib
import io
import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from smallbatch_jax.config.experiment import InputError

VERSION = 2  # of the rules above; stored arrays decoded by other rules are not used
KINDS = "JPEG, PNG, WebP, BMP, TIFF or GIF"
_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
)  # a suffix does not choose the decoder, and some of Pillow's start other programs
_CHUNK = 64  # files a thread takes at once
_CHUNKS_AHEAD = 16  # per thread; bounds what is decoded but not yet in its place
# Below this the interpreter's lock is held for most of a file's time, and threads make each other wait.
_THREADS_PAY_ABOVE = 4096  # bytes, mean over the files
_MAX_THREADS = 8
MOST_PIXELS = 2**26  # of one picture; it takes seven bytes a pixel while it is decoded, in each thread


def version() -> str:
    """Returns what else than the file decides the pixels."""
    import PIL

    return f"decode {VERSION}, Pillow {PIL.__version__}"


def decode_images(paths: Sequence[str], total_bytes: int) -> np.ndarray:
    """Decodes the files, in order.

    Args:
      paths: at least one file.
      total_bytes: the size of all files together; it decides how many threads are worth their while.
    Returns:
      uint8[len(paths), H, W, C], C = 1 if every picture is grey and 3 otherwise.
    Raises:
      InputError: a file cannot be decoded, or is of another size than the others; one line with its path.
    """
    small_files = total_bytes < _THREADS_PAY_ABOVE * len(paths)
    threads = 1 if small_files else min(_MAX_THREADS, os.cpu_count() or 1)
    images = np.empty((0, 0, 0, 0), np.uint8)
    pictures = _decode_in_order(paths, threads)
    with _progress(len(paths)) as advance, quiet_pillow(), contextlib.closing(pictures):
        for index, picture in enumerate(pictures):
            if index == 0:
                images = _allocate(len(paths), picture.shape)
            if picture.shape[:2] != images.shape[1:3]:
                raise _size_error(paths, index)
            if picture.shape[2] > images.shape[3]:
                grey, images = images, _allocate(len(paths), picture.shape)
                images[:index] = grey[:index]
            images[index] = picture  # a grey picture fills all three channels
            if (index + 1) % _CHUNK == 0:
                advance(_CHUNK)
    return images


def _decode_in_order(paths: Sequence[str], threads: int) -> Generator[np.ndarray, None, None]:
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    if threads == 1:
        yield from itertools.chain.from_iterable(map(_decode_chunk, chunks))
        return
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(chunks), _CHUNKS_AHEAD * threads):
            some = chunks[start : start + _CHUNKS_AHEAD * threads]
            yield from itertools.chain.from_iterable(pool.map(_decode_chunk, some))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or an interrupt there is nothing to wait for


def _decode_chunk(paths: Sequence[str]) -> list[np.ndarray]:
    return [_decode_image(path) for path in paths]


def _decode_image(path: str) -> np.ndarray:
    size = -1
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return decode(file)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything from within Pillow
        raise InputError(f"dataset.data_dir: {path!r} {what_is_wrong(error, not size)}; replace or remove it") from error


def what_is_wrong(error: Exception, empty: bool) -> str:
    """What reading or decoding a file that is empty, or is not, says of it."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "is empty" if empty else f"is not a {KINDS} image"
    system = getattr(error, "strerror", None)  # the file is gone, say, since the directory was listed
    return f"cannot be read ({system})" if system else f"cannot be decoded ({' '.join(str(error).split())})"


def decode(file: BinaryIO, upright: bool = True) -> np.ndarray:
    """Returns uint8[H, W, 1] of a grey picture, uint8[H, W, 3] of any other; raises whatever Pillow raises."""
    from PIL import Image

    image = Image.open(file, formats=_FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MOST_PIXELS} are accepted")
    after_header = file.tell()
    if image.format in ("WEBP", "TIFF", "GIF"):
        _require_one_picture(image)
    image.load()
    if image.format == "JPEG":
        _require_end(file, after_header)
    pixels = _pixels(_upright(image) if upright else image)
    return pixels[..., :1] if image.format == "PNG" and image.mode == "RGBA" and _is_grey_png(file) else pixels


def _is_grey_png(file: BinaryIO) -> bool:
    """Grey with alpha, that is, which of 16 bits Pillow gives as RGBA."""
    file.seek(25)  # the colour type, in a header of fixed length
    return file.read(1) == b"\4"


def _require_one_picture(image: Any) -> None:
    """Raises ValueError for a file of several pictures, or of numbers that `_pixels` would take for others."""
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1:
        raise ValueError(f"{pictures} pictures in one file, one is accepted")
    if image.format != "TIFF":
        return
    bits, signs, white_is_zero = (image.tag_v2.get(tag, default) for tag, default in ((258, (1,)), (339, (1,)), (262, 1)))
    if not {*bits} <= {1, 2, 4, 8, 16} or {*signs} != {1} or (16 in bits and white_is_zero == 0):
        raise ValueError(f"samples of {bits[0]} bits, format {signs[0]}; unsigned integers of up to 16 bits are accepted")


def _require_end(file: BinaryIO, after_header: int) -> None:
    """Raises ValueError for a JPEG without its last marker: Pillow takes zeros, where the rest was lost, for grey pixels."""
    file.seek(after_header)  # past a thumbnail, which has such a marker of its own
    if b"\xff\xd9" not in file.read():
        raise ValueError("its end is missing")


def turned(pixels: np.ndarray, content: bytes) -> np.ndarray:
    """The pixels uint8[H, W, C] of a file, turned as its EXIF says they are to be seen."""
    from PIL import Image

    turn = None
    with contextlib.suppress(Exception):  # what another decoder took need not be to Pillow's liking
        turn = _turn(Image.open(io.BytesIO(content), formats=_FORMATS))
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _upright(image: Any) -> Any:
    """The picture as its EXIF says it is to be seen; unlike Pillow's own, this needs no EXIF that is sound."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Any) -> Any:
    from PIL import ExifTags, Image

    turns = Image.Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    with contextlib.suppress(Exception):  # damaged EXIF can raise anything, and says nothing
        return turn.get(image.getexif().get(ExifTags.Base.Orientation))
    return None


def _pixels(image) -> np.ndarray:
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


def _size_error(paths: Sequence[str], index: int) -> InputError:
    """Says which of two pictures is the odd one: the first, or paths[index], the first that differs from it."""
    sample = [paths[0], paths[index], *paths[:: max(1, len(paths) // 256)]]
    sizes = [_decode_image(path).shape[1::-1] for path in sample]
    (usual, _), *_ = Counter(sizes[2:]).most_common(1)
    odd = 0 if sizes[1] == usual else 1
    other = usual if sizes[odd] != usual else sizes[1 - odd]
    return InputError(
        f"dataset.data_dir: {sample[odd]!r} is {'x'.join(map(str, sizes[odd]))} pixels and others are "
        f"{'x'.join(map(str, other))}; dataset.image_size=None accepts images of one size"
    )


@contextlib.contextmanager
def quiet_pillow():
    """Keeps remarks about the inside of a file (its EXIF, its palette) off the screen; errors still come through."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that moves a bar on stderr by so many files; where stderr is no terminal, it does nothing."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("decoding images", total=total)
        yield lambda count: bar.advance(task, count)
