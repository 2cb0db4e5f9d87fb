"""Input pipelines of programs: a dataset on the devices (`Resident`), or photographs streamed to them (`Streamed`).

Given the steps that each lane wants to take next, a pipeline returns how many it has images for, and supplies those images.
Worker processes decode photographs while the devices train on the previous segment. Each device holds a pool with the images
of one segment, which its lanes index like a resident dataset. Lanes with the same seed and step share one stream, whose images
are decoded once and sent once to each device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config.experiment import Experiment, InputError, Run
from smallbatch_jax.data import Dataset, Photographs, order
from smallbatch_jax.data.streaming.photographs import Source, what_is_wrong
from smallbatch_jax.data.streaming.prefetch import Prefetcher
from smallbatch_jax.data.streaming.sample_index import WHOLE, BatchSlice, Decoded, SampleIndex
from smallbatch_jax.program import processes
from smallbatch_jax.program.device_data import LARGEST_EVAL_BATCH, POOL, DeviceData, Pool, TestImages, to_device
from smallbatch_jax.program.devices import DATA, LANE, cores, lane_mesh
from smallbatch_jax.program.lanes import LaneProgram, Segment

FIXED_SEGMENT_IMAGES = 4096  # per lane, where a segment's length is compiled in: about a second of 13 lanes
# Limits of one segment's images, in bytes: per device if streamed (a device holds up to three segments), otherwise per lane.
POOL_BYTES = 2**27
MOST_SKIPPED = 1000  # undecodable images in a row


class LaneSteps(NamedTuple):
    """The updates that a lane takes in a segment."""

    run: Run
    epoch: int  # epoch of the first step
    first_step: int
    position: int  # index of the first example in the stream of the run's seed
    steps: int  # number wanted or taken
    evaluate: bool = False  # whether an evaluation follows the steps


class SegmentInput(NamedTuple):
    """Arguments of `LaneProgram.run` other than states and settings."""

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
    """Input pipeline of a dataset that is replicated on every device; lanes index into it and never wait.

    Every input pipeline has these methods.
    """

    def __init__(self, dataset: Dataset):
        self._num_train = dataset.num_train
        self._image_bytes = dataset.train_images[0].nbytes
        self._data = to_device(dataset, lane_mesh())

    def data(self, mesh: Mesh, batch_size: int) -> DeviceData:
        """Returns the data that a program is compiled for, or their shapes."""
        return self._data

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        """Returns the most steps in a segment: an epoch, divided into equal segments if their length is compiled in."""
        longest_epoch = self._num_train // batch_size + 1
        if any_length:
            return longest_epoch
        images = min(FIXED_SEGMENT_IMAGES, max(1, POOL_BYTES // self._image_bytes))
        return -(-longest_epoch // -(-longest_epoch * batch_size // images))

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[LaneSteps | None], pace: int) -> list[int]:
        """Returns how many of its wanted steps each lane takes, about `pace`; 0 for a lane that has to wait."""
        even = program.even_steps([lane is not None for lane in wanted], pace)
        return [min(lane.steps, steps) if lane else 0 for lane, steps in zip(wanted, even, strict=True)]

    def prepare(self, program: LaneProgram, batch_size: int, lanes: Sequence[LaneSteps | None]) -> SegmentInput:
        """Returns the input of a segment in which the lanes take these steps; run that segment before preparing the next."""
        segment = blank_segment(program, batch_size, lanes)
        for indices, lane in zip(segment.indices, lanes, strict=True):
            if lane is not None:
                taken = order.stream(lane.run.seed, lane.position, lane.steps * batch_size, self._num_train)
                indices[: lane.steps] = taken.reshape(-1, batch_size)
        return SegmentInput(segment)

    def close(self) -> None:
        """Stops worker processes, if there are any."""


class Stream(NamedTuple):
    """Consecutive steps of a seed, whose images are decoded once."""

    seed: int
    position: int  # index of the first example
    steps: int


class Streamed:
    """Input pipeline of a streamed dataset; it has the methods of `Resident`."""

    def __init__(self, photographs: Photographs, experiment: Experiment, skipped: Callable[[str, str], object]):
        """`skipped` is called with the name of each undecodable picture that is left out, and the reason."""
        self._photographs, self._experiment, self._skipped = photographs, experiment, skipped
        workers = experiment.dataset.workers
        self._workers = cores() if workers is None else workers
        self._statistics = photographs.channel_statistics()
        self._image_bytes = int(np.prod(photographs.image_shape))
        self._prefetchers: list[Prefetcher] = []
        self._slices: tuple[BatchSlice, BatchSlice] | None = None  # this process's slice of each training and test batch

    def data(self, mesh: Mesh, batch_size: int) -> Pool:
        shard = batch_size // mesh.shape[DATA]
        shape = (mesh.shape[LANE], mesh.shape[DATA], self._batches(mesh, batch_size) * shard)
        abstract = (
            ((*shape, *self._photographs.image_shape), np.uint8),
            (shape, np.int32),
            *((values.shape, values.dtype) for values in self._statistics),
        )
        return Pool(*(jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, s)) for x, s in zip(abstract, POOL, strict=True)))

    def _batches(self, mesh: Mesh, batch_size: int) -> int:
        """Returns the number of batches whose shards fit into the pool of a device."""
        shard = batch_size // mesh.shape[DATA]
        return max(1, min(FIXED_SEGMENT_IMAGES, POOL_BYTES // self._image_bytes) // shard)

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        return min(self._photographs.num_train // batch_size + 1, self._batches(mesh, batch_size))

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[LaneSteps | None], pace: int) -> list[int]:
        """Gives all lanes equal step counts, so that lanes that share a stream stay aligned; the furthest behind go first."""
        room = self._batches(program.mesh, batch_size)
        taking = sorted({(lane.position, lane.run.seed) for lane in wanted if lane})[:room]
        return [
            min(lane.steps, pace, room // len(taking)) if lane and (lane.position, lane.run.seed) in taking else 0
            for lane in wanted
        ]

    def prepare(self, program: LaneProgram, batch_size: int, lanes: Sequence[LaneSteps | None]) -> SegmentInput:
        mesh, segment = program.mesh, blank_segment(program, batch_size, lanes)
        self._use_slices(mesh, batch_size)
        rows, shard = _local_block(mesh)[0], batch_size // mesh.shape[DATA]
        begins: dict[Stream, int] = {}  # index of the first image of a stream in each pool of this process
        used = 0
        for i, lane in enumerate(lanes):
            if lane is None or program.row_of_lane(i) not in rows:
                continue
            stream = Stream(lane.run.seed, lane.position, lane.steps)
            if stream not in begins:
                begins[stream], used = used, used + lane.steps * shard
            within = np.arange(batch_size) % shard
            segment.indices[i, : lane.steps] = begins[stream] + shard * np.arange(lane.steps)[:, None] + within
        test_batches = -(-self._photographs.num_test // self._test_size(mesh))
        return SegmentInput(segment, self._pool(mesh, batch_size, begins), self._test_set(mesh), test_batches)

    def _pool(self, mesh: Mesh, batch_size: int, begins: Mapping[Stream, int]) -> Pool:
        shapes, columns = self.data(mesh, batch_size), len(_local_block(mesh)[1])
        images, labels = (np.zeros((columns, *x.shape[2:]), x.dtype) for x in (shapes.images, shapes.labels))
        for stream, prefetcher in zip(begins, self._prefetchers_for(list(begins)), strict=True):
            first, count = begins[stream], stream.steps * batch_size // mesh.shape[DATA]
            found = self._take(prefetcher, stream, count * columns)
            for pool, taken in ((images, found.images), (labels, found.labels)):
                by_step = taken.reshape(stream.steps, columns, -1, *taken.shape[1:])
                pool[:, first : first + count] = by_step.swapaxes(0, 1).reshape(columns, count, *taken.shape[1:])
        arrays = (
            jax.make_array_from_process_local_data(like.sharding, np.broadcast_to(x, (like.shape[0], *x.shape)), like.shape)
            for x, like in ((images, shapes.images), (labels, shapes.labels))
        )
        return Pool(*arrays, *processes.put(self._statistics, mesh, P()))

    def _prefetchers_for(self, streams: Sequence[Stream]) -> list[Prefetcher]:
        """Returns a prefetcher at the start of each stream: one that is already there, else an idle one, else a new one."""
        numbers = [self._index.training(stream.seed, stream.position) for stream in streams]
        standing = {prefetcher.number: prefetcher for prefetcher in self._prefetchers}
        idle = [prefetcher for prefetcher in self._prefetchers if prefetcher.number not in numbers]
        found = [standing.get(number) or (idle.pop() if idle else self._new_prefetcher()) for number in numbers]
        for prefetcher, number in zip(found, numbers, strict=True):
            prefetcher.seek(number)
        return found

    def _new_prefetcher(self) -> Prefetcher:
        """Adds a prefetcher with fewer worker processes than the previous one."""
        workers = -(-self._workers // (len(self._prefetchers) + 1))
        self._prefetchers.append(Prefetcher(self._index, self._image_bytes, workers))
        return self._prefetchers[-1]

    def _take(self, prefetcher: Prefetcher, stream: Stream, count: int) -> Decoded:
        """Reads the next images of a stream; replaces an undecodable image by the next valid one in the training set."""
        first = prefetcher.number or 0
        found = prefetcher.take(count)
        for i in np.flatnonzero(~found.valid):
            example = int(found.examples[i])
            self._report_undecodable(self._photographs.train, example)
            _, epoch, _ = self._index.training_image(first + int(i))
            for values, value in zip(found, self._next_valid(stream.seed, epoch, example), strict=True):
                values[i] = value
        return found

    def _next_valid(self, seed: int, epoch: int, example: int) -> Decoded:
        count = self._photographs.num_train
        following = range(example + 1, example + min(count, MOST_SKIPPED))
        for place in following:
            found = self._index.decode_training(seed, epoch, place % count)
            if found.valid:
                return found
        name = self._photographs.train.name(example)
        raise InputError(f"dataset.data_dir: the {len(following)} images after {name!r} are broken too.")

    def _report_undecodable(self, source: Source, example: int) -> None:
        """Records a picture as skipped, or raises InputError if the experiment does not allow skipping."""
        name, what = source.name(example), what_is_wrong(source, example)
        if self._experiment.dataset.broken_images == "fail":
            raise InputError(
                f"dataset.data_dir: {name!r} {what}; replace it, or use --config.dataset.broken_images=skip. What was trained "
                "so far is kept."
            )
        self._skipped(name, what)

    def _test_set(self, mesh: Mesh) -> Iterator[TestImages]:
        """Yields the test set in batches, the last one padded."""
        size, part = self._test_size(mesh), _batch_slice(mesh, self._test_size(mesh))
        prefetcher = self._prefetchers[0] if self._prefetchers else self._new_prefetcher()
        prefetcher.seek(self._index.testing(0))
        valid = 0
        for begin in range(0, self._photographs.num_test, size):
            found = prefetcher.take(part.count)  # not valid beyond the end of the test set
            there = max(0, min(part.count, self._photographs.num_test - begin - part.first))
            for i in np.flatnonzero(~found.valid[:there]):
                self._report_undecodable(self._photographs.test, int(found.examples[i]))
            valid += np.count_nonzero(found.valid[:there])
            if not valid and begin + size >= self._photographs.num_test and not processes.several():
                raise InputError(f"dataset.data_dir: none of the {self._photographs.num_test} test images can be decoded.")
            local = found.images, found.labels, found.valid
            yield TestImages(*jax.make_array_from_process_local_data(NamedSharding(mesh, P(DATA)), local))

    def _test_size(self, mesh: Mesh) -> int:
        """Returns the number of test images in a batch, a multiple of the number of devices that share it."""
        devices = mesh.shape[DATA]
        return -(-min(LARGEST_EVAL_BATCH, self._photographs.num_test) // devices) * devices

    def _use_slices(self, mesh: Mesh, batch_size: int) -> None:
        """Restricts reading to this process's slice of each batch."""
        whole = len(_local_block(mesh)[1]) == mesh.shape[DATA]
        sizes = batch_size, self._test_size(mesh)
        slices = (WHOLE, WHOLE) if whole else (_batch_slice(mesh, sizes[0]), _batch_slice(mesh, sizes[1]))
        if slices != self._slices:
            self.close()
            self._slices = slices
            seeds = tuple(sorted({run.seed for run in self._experiment.runs()}))
            self._index = SampleIndex(self._photographs, seeds, self._experiment.dataset, *slices)

    def close(self) -> None:
        for prefetcher in self._prefetchers:
            prefetcher.close()
        self._prefetchers = []


def _local_block(mesh: Mesh) -> tuple[range, range]:
    """Returns the rows and the columns of the mesh in which this process has devices."""
    here = [place for place, device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()]
    rows, columns = zip(*here, strict=True)
    return range(min(rows), max(rows) + 1), range(min(columns), max(columns) + 1)


def _batch_slice(mesh: Mesh, batch: int) -> BatchSlice:
    """Returns this process's slice of each batch of this size."""
    columns, shard = _local_block(mesh)[1], batch // mesh.shape[DATA]
    return BatchSlice(batch, columns[0] * shard, len(columns) * shard)


InputPipeline = Resident | Streamed


def input_pipeline(
    dataset: Dataset | Photographs, experiment: Experiment, skipped: Callable[[str, str], object] = lambda name, reason: None
) -> InputPipeline:
    """Returns the input pipeline of an experiment's programs; see `Streamed` for `skipped`."""
    return Resident(dataset) if isinstance(dataset, Dataset) else Streamed(dataset, experiment, skipped)
