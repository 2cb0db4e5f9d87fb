"""Streamed: photographs decoded by worker processes while the devices train on those of the segment before.

Each device is given a pool with the images of one segment, from which its lanes take by index, as from a resident dataset.
Lanes of one seed at the same step follow one stream: its images are decoded once, and sent once to each device.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.streaming.photographs import Source, what_is_wrong
from smallbatch_jax.data.streaming.prefetch import Prefetcher
from smallbatch_jax.data.streaming.sample_index import WHOLE, BatchSlice, Decoded, SampleIndex
from smallbatch_jax.program import processes
from smallbatch_jax.program.device_data import LARGEST_EVAL_BATCH, POOL, Pool, TestImages
from smallbatch_jax.program.devices import DATA, LANE
from smallbatch_jax.program.lanes import LaneProgram
from smallbatch_jax.runner.input import FIXED_SEGMENT_IMAGES, LaneSteps, Resident, SegmentInput, blank_segment

POOL_BYTES = 2**27  # of images, for each device and segment; two or three such pools exist at a time
MOST_SKIPPED = 1000  # undecodable images in a row

Place = tuple[int, int]  # of a device on the mesh: its row of lanes, and its position among those that share a batch


class Stream(NamedTuple):
    """Consecutive steps of a seed, whose images are decoded once."""

    seed: int
    first_step: int
    steps: int


class Streamed:
    """The input pipeline of a streamed dataset."""

    def __init__(
        self, photographs: Photographs, experiment: Experiment, workers: int, skipped: Callable[[str, str], None] | None = None
    ):
        """`skipped` is called with the name of each undecodable picture that is left out, and the reason."""
        self._photographs, self._experiment, self._workers = photographs, experiment, workers
        self._skipped = skipped
        self._statistics = photographs.channel_statistics()
        self._image_bytes = int(np.prod(photographs.image_shape))
        self._prefetchers: list[Prefetcher] = []
        self._set_slices((WHOLE, WHOLE))

    def _set_slices(self, slices: tuple[BatchSlice, BatchSlice]) -> None:
        """Reads these slices of each training and test batch from now on."""
        self.close()
        self._slices = slices
        seeds = tuple(sorted({run.seed for run in self._experiment.runs()}))
        self._index = SampleIndex(self._photographs, seeds, self._experiment.dataset, *slices)

    def data(self, mesh: Mesh, batch_size: int) -> Pool:
        shape = (mesh.shape[LANE], mesh.shape[DATA], self._capacity(mesh, batch_size))
        abstract = (
            ((*shape, *self._photographs.image_shape), np.uint8),
            (shape, np.int32),
            *((values.shape, values.dtype) for values in self._statistics),
        )
        return Pool(*(jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, s)) for x, s in zip(abstract, POOL, strict=True)))

    def _capacity(self, mesh: Mesh, batch_size: int) -> int:
        """Images in the pool of a device, a multiple of its shard of a batch."""
        shard = batch_size // mesh.shape[DATA]
        return max(1, min(FIXED_SEGMENT_IMAGES, POOL_BYTES // self._image_bytes) // shard) * shard

    def _batches(self, mesh: Mesh, batch_size: int) -> int:
        """Batches whose shards fit into a pool."""
        return self._capacity(mesh, batch_size) // (batch_size // mesh.shape[DATA])

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        return min(self._photographs.num_train // batch_size + 1, self._batches(mesh, batch_size))

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[LaneSteps | None], pace: int) -> list[int]:
        """Gives all lanes equal step counts, so that those that share a stream stay aligned; the furthest behind come first."""
        room = self._batches(program.mesh, batch_size)
        streams = dict.fromkeys(sorted((lane.first_step, lane.seed) for lane in wanted if lane))
        taking = list(streams)[:room]
        return [
            min(lane.steps, pace, room // len(taking)) if lane and (lane.first_step, lane.seed) in taking else 0
            for lane in wanted
        ]

    def prepare(self, program: LaneProgram, batch_size: int, lanes: Sequence[LaneSteps | None]) -> SegmentInput:
        mesh, segment = program.mesh, blank_segment(program, batch_size, lanes)
        self._use_slices(mesh, batch_size)
        shard = batch_size // mesh.shape[DATA]
        begins: dict[tuple[int, Stream], int] = {}  # index in a row's pools of the first image of a stream
        used = [0] * program.rows
        for i, lane in enumerate(lanes):
            if lane is None or not lane.steps:
                continue
            row = program.row_of_lane(i)
            stream = row, Stream(*lane[:3])
            if stream not in begins:
                begins[stream], used[row] = used[row], used[row] + lane.steps * shard
            within = np.arange(batch_size) % shard
            segment.indices[i, : lane.steps] = begins[stream] + shard * np.arange(lane.steps)[:, None] + within
        test_batches = -(-self._photographs.num_test // self._test_size(mesh))
        return SegmentInput(segment, self._pool(mesh, batch_size, begins), self._test_set(mesh), test_batches)

    def _pool(self, mesh: Mesh, batch_size: int, begins: Mapping[tuple[int, Stream], int]) -> Pool:
        shapes, places = self.data(mesh, batch_size), _local_places(mesh)
        images = {place: np.empty(shapes.images.shape[2:], np.uint8) for place in places}
        labels = {place: np.zeros(shapes.labels.shape[2:], np.int32) for place in places}
        rows, columns = (sorted({place[axis] for place in places}) for axis in (0, 1))
        streams = list(dict.fromkeys(stream for row, stream in begins if row in rows))
        for stream, prefetcher in zip(streams, self._prefetchers_for(streams, batch_size), strict=True):
            shard = batch_size // mesh.shape[DATA]
            found = self._take(prefetcher, stream, stream.steps * shard * len(columns))
            for row, column in places:
                if (row, stream) not in begins:
                    continue
                first, count = begins[row, stream], stream.steps * shard
                for pool, taken in ((images, found.images), (labels, found.labels)):
                    by_device = taken.reshape(stream.steps, len(columns), shard, *taken.shape[1:])
                    mine = by_device[:, column - columns[0]].reshape(count, *taken.shape[1:])
                    pool[row, column][first : first + count] = mine
        on_mesh = (_from_places(x, pools) for x, pools in ((shapes.images, images), (shapes.labels, labels)))
        return Pool(*on_mesh, *processes.put(self._statistics, NamedSharding(mesh, P())))

    def _prefetchers_for(self, streams: Sequence[Stream], batch_size: int) -> list[Prefetcher]:
        """Returns prefetchers that stand where the streams begin: those that do already, then idle ones, then new ones."""
        numbers = [self._index.training(stream.seed, stream.first_step * batch_size) for stream in streams]
        standing = {prefetcher.number: prefetcher for prefetcher in self._prefetchers}
        idle = [prefetcher for prefetcher in self._prefetchers if prefetcher.number not in numbers]
        found = []
        for number in numbers:
            prefetcher = standing.get(number) or (idle.pop() if idle else self._new_prefetcher())
            prefetcher.seek(number)
            found.append(prefetcher)
        return found

    def _new_prefetcher(self) -> Prefetcher:
        """Adds a prefetcher, with fewer processes of its own than the one before."""
        workers = -(-self._workers // (len(self._prefetchers) + 1))
        self._prefetchers.append(Prefetcher(self._index, self._image_bytes, workers))
        return self._prefetchers[-1]

    def _take(self, prefetcher: Prefetcher, stream: Stream, count: int) -> Decoded:
        """Reads the next images of a stream, undecodable ones replaced by those after them in the training set."""
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
        for step in range(1, min(count, MOST_SKIPPED)):
            found = self._index.decode_training(seed, epoch, (example + step) % count)
            if found.valid:
                return found
        name = self._photographs.train.name(example)
        raise InputError(f"dataset.data_dir: the {min(count, MOST_SKIPPED) - 1} images after {name!r} are broken too.")

    def _report_undecodable(self, source: Source, example: int) -> None:
        """Records a picture as skipped, or raises InputError where the experiment accepts none."""
        name, what = source.name(example), what_is_wrong(source, example)
        if self._experiment.dataset.broken_images == "fail":
            raise InputError(
                f"dataset.data_dir: {name!r} {what}; replace it, or use --config.dataset.broken_images=skip. What was trained "
                "so far is kept."
            )
        if self._skipped is not None:
            self._skipped(name, what)

    def _test_set(self, mesh: Mesh) -> Iterator[TestImages]:
        """Yields the test set in batches, the last one padded."""
        size, part = self._test_size(mesh), _batch_slice(mesh, self._test_size(mesh))
        prefetcher = self._prefetchers[0] if self._prefetchers else self._new_prefetcher()
        prefetcher.seek(self._index.testing(0))
        for begin in range(0, self._photographs.num_test, size):
            found = prefetcher.take(part.count)  # not valid beyond the end of the test set
            there = max(0, min(part.count, self._photographs.num_test - begin - part.first))
            for i in np.flatnonzero(~found.valid[:there]):
                self._report_undecodable(self._photographs.test, int(found.examples[i]))
            arrays = (found.images, found.labels, found.valid)
            yield TestImages(*(_from_local(x, size, part.first, NamedSharding(mesh, P(DATA))) for x in arrays))

    def _test_size(self, mesh: Mesh) -> int:
        """Test images in a batch, equally many on each device that shares it."""
        devices = mesh.shape[DATA]
        return -(-min(LARGEST_EVAL_BATCH, self._photographs.num_test) // devices) * devices

    def _use_slices(self, mesh: Mesh, batch_size: int) -> None:
        """Reads what this process needs of each batch."""
        whole = len({column for _, column in _local_places(mesh)}) == mesh.shape[DATA]
        sizes = batch_size, self._test_size(mesh)
        slices = (WHOLE, WHOLE) if whole else (_batch_slice(mesh, sizes[0]), _batch_slice(mesh, sizes[1]))
        if slices != self._slices:
            self._set_slices(slices)

    def close(self) -> None:
        for prefetcher in self._prefetchers:
            prefetcher.close()
        self._prefetchers = []


def _local_places(mesh: Mesh) -> list[Place]:
    """Lists the places of this process's devices."""
    here = {device.id for device in mesh.local_devices}
    rows, columns = mesh.devices.shape
    return [place for place in itertools.product(range(rows), range(columns)) if mesh.devices[place].id in here]


def _batch_slice(mesh: Mesh, batch: int) -> BatchSlice:
    """Returns this process's slice of each batch of this size."""
    columns = sorted({column for _, column in _local_places(mesh)})
    shard = batch // mesh.shape[DATA]
    return BatchSlice(batch, columns[0] * shard, len(columns) * shard)


def _from_places(like: Any, parts: Mapping[Place, np.ndarray]) -> jax.Array:
    """Returns an array of shape [rows, columns, …], of which this process has the parts of its devices."""

    def part(index: Any) -> np.ndarray:
        return parts[index[0].start or 0, index[1].start or 0][None, None]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _from_local(local: np.ndarray, size: int, first: int, sharding: NamedSharding) -> jax.Array:
    """Returns an array of `size` along its first axis, of which this process has the part from `first` on."""

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        return local[start - first : stop - first]

    return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)


def input_pipeline(
    dataset: Dataset | Photographs, experiment: Experiment, skipped: Callable[[str, str], None] | None = None
) -> Resident | Streamed:
    """Returns the input pipeline of an experiment's programs; see `Streamed` for `skipped`."""
    if isinstance(dataset, Dataset):
        return Resident(dataset)
    workers = experiment.dataset.workers
    return Streamed(dataset, experiment, len(os.sched_getaffinity(0)) if workers is None else workers, skipped)
