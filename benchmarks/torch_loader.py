"""The same photographs by torch's DataLoader, as torchvision's examples read them: PIL decodes, crops, resizes and mirrors."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch.utils.data import DataLoader, Dataset  # pyright: ignore[reportMissingImports]

from smallbatch_jax.data import Photographs
from smallbatch_jax.data.streaming import views
from smallbatch_jax.data.streaming.sample_index import SampleIndex


class Pictures(Dataset):
    """Item k: the image at position k of the training stream, its scale and place drawn by a generator of its own."""

    def __init__(self, index: SampleIndex, photographs: Photographs):
        self._index, self._photographs = index, photographs

    def __len__(self) -> int:
        return 1000 * self._photographs.num_train

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        source, size = self._photographs.train, self._photographs.image_size
        _, _, example = self._index.training_image(position)
        content, label = source.read(example)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        rng = np.random.default_rng(position)
        low, high = (round(side * size / views.IMAGE_SIZE) for side in (views.CENTRE, views.LARGEST))
        shorter = rng.integers(low, high)
        side = size * min(image.size) / shorter
        left, top = (rng.random() * (length - side) for length in image.size)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), label


def batches(index: SampleIndex, photographs: Photographs, workers: int, size: int) -> Iterator[Any]:
    """Returns batches of images uint8[size, S, S, 3] and labels, without end."""
    return iter(DataLoader(Pictures(index, photographs), size, num_workers=workers, multiprocessing_context="spawn"))
