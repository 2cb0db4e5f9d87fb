"""JPEG and PNG files to one uint8 array.

A picture is turned as its EXIF orientation says. If every picture is grey (also with 1 or 16 bits, or with alpha) the
array has one channel; if any is not, all become RGB, whatever their order. Palettes and CMYK are converted to RGB as
Pillow does it, alpha is dropped, and of 16 bits the upper eight are kept.
"""

import contextlib
import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from smallbatch_jax.experiment import InputError

VERSION = 1  # of the rules above; stored arrays decoded by other rules are not used
_FORMATS = ("JPEG", "PNG")  # a suffix does not choose the decoder, and some of Pillow's start other programs
_CHUNK = 64  # files a thread takes at once
_CHUNKS_AHEAD = 16  # per thread; bounds what is decoded but not yet in its place
# Below this the interpreter's lock is held for most of a file's time, and threads make each other wait.
_THREADS_PAY_ABOVE = 4096  # bytes, mean over the files
_MAX_THREADS = 8


def version() -> str:
    """Returns what else than the file decides the pixels."""
    import PIL

    return f"decode {VERSION}, Pillow {PIL.__version__}"


def decode_images(paths: Sequence[str], total_bytes: int) -> np.ndarray:
    """Decodes the files, in order.

    Args:
      paths: at least one JPEG or PNG file.
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
    with _progress(len(paths)) as advance, _quiet_pillow(), contextlib.closing(pictures):
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
    """Returns uint8[H, W, 1] of a grey picture, uint8[H, W, 3] of any other."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=_FORMATS)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        found = "is not a JPEG or PNG image" if os.path.getsize(path) else "is empty"
        raise InputError(f"dataset.data_dir: {path!r} {found}; replace or remove it") from error
    except Exception as error:  # a damaged file can raise anything from within Pillow
        reason = " ".join(str(error).split())
        raise InputError(f"dataset.data_dir: {path!r} cannot be decoded ({reason}); replace or remove it") from error


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
def _quiet_pillow():
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
