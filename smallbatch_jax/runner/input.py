"""Where a program's images come from: a dataset that lies on the devices; or one that is streamed to them (`streamed.py`).

A supply is told what each lane wants to do next, its `Span`; it says for how many of these steps it has images, and brings
them. From a dataset on the devices lanes take by index, as much as they want.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from smallbatch_jax.data import Dataset, order
from smallbatch_jax.program.device_data import DeviceData, Pool, TestImages, to_device
from smallbatch_jax.program.devices import lane_mesh
from smallbatch_jax.program.lanes import LaneProgram, Segment

FIXED_SEGMENT_IMAGES = 16384  # per lane, where a segment's length is compiled in


class Span(NamedTuple):
    """The updates that a lane takes in a segment."""

    seed: int
    first_step: int
    steps: int  # asked for, or taken: at most to the end of the epoch
    evaluate: bool = False  # whether they end it


class Load(NamedTuple):
    """What `LaneProgram.run` takes beside states and settings."""

    segment: Segment
    pool: Pool | None = None
    test: Iterable[TestImages] = ()
    test_parts: int = 0  # how many of them there are


class Supply(Protocol):
    """The images of all programs of an experiment."""

    def data(self, mesh: Mesh, batch_size: int) -> DeviceData | Pool:
        """What a program is compiled for."""
        ...

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        """The most steps of a segment."""
        ...

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[Span | None], pace: int) -> list[int]:
        """How many of the steps that lanes want each takes, about `pace`; 0 for one that has to wait."""
        ...

    def load(self, program: LaneProgram, batch_size: int, spans: Sequence[Span | None]) -> Load:
        """The segment in which lanes take their spans; to be run before the next is loaded."""
        ...

    def close(self) -> None: ...


def blank_segment(program: LaneProgram, batch_size: int, spans: Sequence[Span | None]) -> Segment:
    """The spans, with indices to be filled in."""
    indices = np.zeros((program.lanes, program.segment_steps, batch_size), np.int32)
    steps, evaluate = (np.array([span[i] if span else 0 for span in spans]) for i in (2, 3))
    return Segment(indices, steps.astype(np.int32), evaluate.astype(bool))


class Resident:
    """A dataset that lies whole on every device."""

    def __init__(self, dataset: Dataset):
        self._num_train = dataset.num_train
        self._data = to_device(dataset, lane_mesh())

    def data(self, mesh: Mesh, batch_size: int) -> DeviceData:
        return self._data

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        """An epoch's, or an even part of them where a segment's length is compiled in."""
        longest_epoch = self._num_train // batch_size + 1
        if any_length:
            return longest_epoch
        parts = -(-longest_epoch * batch_size // FIXED_SEGMENT_IMAGES)
        return -(-longest_epoch // parts)

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[Span | None], pace: int) -> list[int]:
        even = program.even_steps([span is not None for span in wanted], pace)
        return [min(span.steps, steps) if span else 0 for span, steps in zip(wanted, even, strict=True)]

    def load(self, program: LaneProgram, batch_size: int, spans: Sequence[Span | None]) -> Load:
        segment = blank_segment(program, batch_size, spans)
        for lane, span in enumerate(spans):
            if span is not None and span.steps:
                taken = order.batch_indices(span.seed, span.first_step, span.steps, batch_size, self._num_train)
                segment.indices[lane, : span.steps] = taken
        return Load(segment)

    def close(self) -> None:
        pass
