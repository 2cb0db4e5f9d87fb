"""The same photographs by torch's DataLoader, as torchvision's examples read them: PIL decodes, crops, resizes and mirrors."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch.utils.data import DataLoader, Dataset  # pyright: ignore[reportMissingImports]

from smallbatch_jax.data import Photographs, views
from smallbatch_jax.data.numbered import SampleIndex


class Pictures(Dataset):
    """Item k: the image that training sees at position k of its stream, at a scale and place of its own drawing."""

    def __init__(self, numbered: SampleIndex, photographs: Photographs):
        self._numbered, self._photographs = numbered, photographs

    def __len__(self) -> int:
        return 1000 * self._photographs.num_train

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        source, size = self._photographs.train, self._photographs.image_size
        example = self._numbered.example(position)
        content, label = source.read(example)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        draw = np.random.default_rng(position)
        low, high = (round(side * size / views.IMAGE_SIZE) for side in (views.CENTRE, views.LARGEST))
        shorter = draw.integers(low, high)
        side = size * min(image.size) / shorter
        left, top = (draw.random() * (length - side) for length in image.size)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), label


def batches(numbered: SampleIndex, photographs: Photographs, workers: int, size: int) -> Iterator[Any]:
    """Images uint8[size, S, S, 3] and labels, without end."""
    return iter(DataLoader(Pictures(numbered, photographs), size, num_workers=workers, multiprocessing_context="spawn"))
