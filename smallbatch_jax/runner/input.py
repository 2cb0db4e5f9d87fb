"""Where a program's images come from: a dataset on the devices, or one streamed to them (`streaming.py`).

A pipeline is given the steps that each lane wants to take next, returns how many of them it has images for, and supplies those.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.data import Dataset, order
from smallbatch_jax.program.device_data import DeviceData, Pool, TestImages, to_device
from smallbatch_jax.program.devices import lane_mesh
from smallbatch_jax.program.lanes import LaneProgram, Segment

FIXED_SEGMENT_IMAGES = 16384  # per lane, where a segment's length is compiled in


class LaneSteps(NamedTuple):
    """The updates that a lane takes in a segment, all of one epoch."""

    run: Run
    epoch: int
    first_step: int
    steps: int  # wanted or taken
    evaluate: bool = False  # whether an evaluation follows them


class SegmentInput(NamedTuple):
    """The arguments of `LaneProgram.run` beside states and settings."""

    segment: Segment
    pool: Pool | None = None
    test: Iterable[TestImages] = ()
    test_batches: int = 0


def blank_segment(program: LaneProgram, batch_size: int, lanes: Sequence[LaneSteps | None]) -> Segment:
    """Returns a segment of these steps, with indices to be filled in."""
    indices = np.zeros((program.lanes, program.segment_steps, batch_size), np.int32)
    steps = np.array([lane.steps if lane else 0 for lane in lanes], np.int32)
    return Segment(indices, steps, np.array([bool(lane and lane.evaluate) for lane in lanes]))


class Resident:
    """The pipeline of a dataset that lies whole on every device; lanes take from it by index, as much as they want.

    Any pipeline has these methods.
    """

    def __init__(self, dataset: Dataset):
        self._num_train = dataset.num_train
        self._data = to_device(dataset, lane_mesh())

    def data(self, mesh: Mesh, batch_size: int) -> DeviceData:
        """Returns the data that a program is compiled for, or their shapes."""
        return self._data

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        """Returns the most steps of a segment: an epoch, or an even fraction of it where a segment's length is compiled in."""
        longest_epoch = self._num_train // batch_size + 1
        if any_length:
            return longest_epoch
        segments = -(-longest_epoch * batch_size // FIXED_SEGMENT_IMAGES)
        return -(-longest_epoch // segments)

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[LaneSteps | None], pace: int) -> list[int]:
        """Returns how many of its wanted steps each lane takes, about `pace`; 0 for one that has to wait."""
        even = program.even_steps([lane is not None for lane in wanted], pace)
        return [min(lane.steps, steps) if lane else 0 for lane, steps in zip(wanted, even, strict=True)]

    def prepare(self, program: LaneProgram, batch_size: int, lanes: Sequence[LaneSteps | None]) -> SegmentInput:
        """Returns the input of a segment in which the lanes take these steps; it is run before the next is prepared."""
        segment = blank_segment(program, batch_size, lanes)
        for indices, lane in zip(segment.indices, lanes, strict=True):
            if lane is not None:
                taken = order.batch_indices(lane.run.seed, lane.first_step, lane.steps, batch_size, self._num_train)
                indices[: lane.steps] = taken
        return SegmentInput(segment)

    def close(self) -> None:
        """Ends what the pipeline started."""
