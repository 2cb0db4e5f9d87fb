"""A folder of small photographs to stream, and the same images as a dataset in memory."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from pictures import save
from PIL import Image

from smallbatch_jax import data
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.streaming.views import center_view

CLASSES = ("cat", "dog", "eel")
SIZE = 8  # of the images in pixels; the photographs are 15 × 12


def write(root: Path, num_train: int = 50, num_test: int = 20) -> Path:
    """Writes photographs of three classes of unequal sizes, each with its own colour and noise; returns `root`."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    for split, count in (("train", num_train), ("test", num_test)):
        for i, label in enumerate(rng.integers(0, 3, count)):
            coarse = np.clip(colours[label] + rng.normal(0, 40, (4, 5, 3)), 0, 255).astype(np.uint8)
            save(root / split / CLASSES[label] / f"{i:03}.jpg", Image.fromarray(coarse).resize((15, 12)), quality=95)
    return root


def load(root: Path, **given: Any) -> Photographs:
    found = data.load("folder", root, SIZE)
    assert isinstance(found, Photographs)
    return found


@functools.cache
def in_memory(root: Path) -> Dataset:
    """Returns a dataset of the images as they are without augmentation."""
    streamed = load(root)

    def arrays(source: Any) -> tuple[np.ndarray, np.ndarray]:
        contents, labels = zip(*(source.read(i) for i in range(len(source))), strict=True)
        return np.stack([center_view(content, SIZE, source.upright) for content in contents]), np.array(labels)

    return Dataset(*arrays(streamed.train), *arrays(streamed.test), 3)
