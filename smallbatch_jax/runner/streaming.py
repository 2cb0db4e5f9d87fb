"""Photographs streamed to the devices that train on them, decoded by worker processes in the meantime.

Each device is given a pool with the images of one segment, from which its lanes take by index, as from a whole dataset. Lanes
of one seed at the same step see the same images: those are decoded once, and sent once to each device.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.numbered import WHOLE, Block, Decoded, SampleIndex
from smallbatch_jax.data.photographs import Source, what_is_wrong
from smallbatch_jax.data.stream import Ahead
from smallbatch_jax.program import processes
from smallbatch_jax.program.device_data import LARGEST_EVAL_BATCH, POOL, Pool, TestImages
from smallbatch_jax.program.devices import DATA, LANE
from smallbatch_jax.program.lanes import LaneProgram
from smallbatch_jax.runner.input import FIXED_SEGMENT_IMAGES, Load, Resident, Span, blank_segment

POOL_BYTES = 2**27  # of images, for each device and segment; two or three such pools are there at a time
MOST_SKIPPED = 1000  # broken images in a row


class Streamed:
    """Photographs, decoded by worker processes while the devices train on those of the segment before."""

    def __init__(
        self, photographs: Photographs, experiment: Experiment, workers: int, skipped: Callable[[str, str], None] | None = None
    ):
        """`skipped` is told the name of each broken picture that is left out, and what is the matter with it."""
        self._photographs, self._experiment, self._workers = photographs, experiment, workers
        self._skipped = skipped
        self._statistics = photographs.channel_statistics()
        self._image_bytes = int(np.prod(photographs.image_shape))
        self._blocks: tuple[Block, Block] = (WHOLE, WHOLE)
        self._aheads: list[Ahead] = []
        self._numbered = self._number()

    def data(self, mesh: Mesh, batch_size: int) -> Pool:
        share = batch_size // mesh.shape[DATA]
        shape = (mesh.shape[LANE], mesh.shape[DATA], self._capacity(share))
        images = ((*shape, *self._photographs.image_shape), np.uint8), (shape, np.int32)
        abstract = (*images, *((x.shape, x.dtype) for x in self._statistics))
        return Pool(*(jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, s)) for x, s in zip(abstract, POOL, strict=True)))

    def _capacity(self, share: int) -> int:
        """Images in the pool of a device that takes `share` of each batch."""
        return max(1, min(FIXED_SEGMENT_IMAGES, POOL_BYTES // self._image_bytes) // share) * share

    def most_steps(self, mesh: Mesh, batch_size: int, any_length: bool) -> int:
        share = batch_size // mesh.shape[DATA]
        return min(self._photographs.num_train // batch_size + 1, self._capacity(share) // share)

    def steps(self, program: LaneProgram, batch_size: int, wanted: Sequence[Span | None], pace: int) -> list[int]:
        """As many in all lanes, so that those that see the same images go on doing so. Those furthest behind come first."""
        share = batch_size // program.mesh.shape[DATA]
        room = self._capacity(share) // share  # for so many batches
        steps = [0] * program.lanes
        in_order = sorted((span.first_step, span.seed) for span in wanted if span)
        streams = list(dict.fromkeys(in_order))
        taking = set(streams[:room])
        for lane, span in enumerate(wanted):
            if span and (span.first_step, span.seed) in taking:
                steps[lane] = min(span.steps, pace, room // len(taking))
        return steps

    def load(self, program: LaneProgram, batch_size: int, spans: Sequence[Span | None]) -> Load:
        mesh, segment = program.mesh, blank_segment(program, batch_size, spans)
        self._use_blocks(mesh, batch_size)
        share = batch_size // mesh.shape[DATA]
        # In each row's pools, stream by stream, where the share of a device is found.
        begins: dict[tuple[int, Span], int] = {}
        used = [0] * program.rows
        for lane, span in enumerate(spans):
            if span is None or not span.steps:
                continue
            row = program.row_of_lane(lane)
            stream = row, span._replace(evaluate=False)
            if stream not in begins:
                begins[stream], used[row] = used[row], used[row] + span.steps * share
            within = np.arange(batch_size) % share
            segment.indices[lane, : span.steps] = begins[stream] + share * np.arange(span.steps)[:, None] + within
        pool = self._pool(program, batch_size, begins)
        parts = -(-self._photographs.num_test // self._test_size(mesh))
        return Load(segment, pool, self._test_set(mesh), parts)

    def _pool(self, program: LaneProgram, batch_size: int, begins: dict[tuple[int, Span], int]) -> Pool:
        mesh, share = program.mesh, batch_size // program.mesh.shape[DATA]
        shapes = self.data(mesh, batch_size)
        places = _local_places(mesh)
        images = {place: np.empty(shapes.images.shape[2:], np.uint8) for place in places}
        labels = {place: np.zeros(shapes.labels.shape[2:], np.int32) for place in places}
        rows, columns = ({place[axis] for place in places} for axis in (0, 1))
        spans = list(dict.fromkeys(span for row, span in begins if row in rows))
        for span, ahead in zip(spans, self._streams(spans, batch_size), strict=True):
            count = span.steps * share
            parts = {
                place: slice(begins[place[0], span], begins[place[0], span] + count)
                for place in places
                if (place[0], span) in begins
            }
            found = self._numbered.empty(count * len(columns), with_images=len(columns) > 1)
            first = next(iter(parts))
            if len(columns) == 1:  # what is read lies as it does in the pool of the first device that needs it
                found = found._replace(images=images[first][parts[first]], labels=labels[first][parts[first]])
            self._take(ahead, found, span)
            for place, part in parts.items():
                if place == first and len(columns) == 1:
                    continue
                for pools, taken in ((images, found.images), (labels, found.labels)):
                    by_device = taken.reshape(span.steps, len(columns), share, *taken.shape[1:])
                    mine = by_device[:, place[1] - min(columns)]
                    pools[place][part] = mine.reshape(count, *taken.shape[1:])
        on_mesh = (_from_places(x, pools) for x, pools in ((shapes.images, images), (shapes.labels, labels)))
        return Pool(*on_mesh, *processes.put(self._statistics, NamedSharding(mesh, P())))

    def _streams(self, spans: Sequence[Span], batch_size: int) -> list[Ahead]:
        """Readers that stand where the spans begin: those that are there already, then idle ones, then new ones."""
        numbers = [self._numbered.training(span.seed, span.first_step * batch_size) for span in spans]
        standing = {ahead.number: ahead for ahead in self._aheads}
        idle = [ahead for ahead in self._aheads if ahead.number not in numbers]
        found = []
        for number in numbers:
            ahead = standing.get(number) or (idle.pop() if idle else self._new())
            ahead.seek(number)
            found.append(ahead)
        return found

    def _new(self) -> Ahead:
        """Another reader; each has fewer processes of its own than the one before."""
        workers = -(-self._workers // (len(self._aheads) + 1))
        self._aheads.append(Ahead(self._numbered, self._image_bytes, workers))
        return self._aheads[-1]

    def _take(self, ahead: Ahead, found: Decoded, span: Span) -> None:
        """Reads the next images of a stream, the broken ones replaced by those after them in the training set."""
        first = ahead.number
        ahead.take(found)
        for i in np.flatnonzero(~found.sound):
            self._broken(self._photographs.train, int(found.examples[i]))
            epoch = self._numbered.position(first + int(i)) // self._photographs.num_train
            for x, whole in zip(self._next_sound(span.seed, epoch, int(found.examples[i])), found, strict=True):
                whole[i] = x

    def _next_sound(self, seed: int, epoch: int, example: int) -> Decoded:
        count = self._photographs.num_train
        for step in range(1, min(count, MOST_SKIPPED)):
            found = self._numbered.train_image(seed, epoch, (example + step) % count)
            if found.sound:
                return found
        name = self._photographs.train.name(example)
        raise InputError(f"dataset.data_dir: the {min(count, MOST_SKIPPED) - 1} images after {name!r} are broken too.")

    def _broken(self, source: Source, example: int) -> None:
        """Tells of a picture that is skipped.

        Raises:
          InputError: if the experiment would have it so.
        """
        name, what = source.name(example), what_is_wrong(source, example)
        if self._experiment.dataset.broken_images == "fail":
            raise InputError(
                f"dataset.data_dir: {name!r} {what}; replace it, or use --config.dataset.broken_images=skip. What was trained "
                "so far is kept."
            )
        if self._skipped is not None:
            self._skipped(name, what)

    def _test_set(self, mesh: Mesh) -> Iterator[TestImages]:
        size, devices = self._test_size(mesh), mesh.shape[DATA]
        sharding = NamedSharding(mesh, P(DATA))
        places = sorted({data for _, data in _local_places(mesh)})
        first, local = places[0] * size // devices, len(places) * size // devices
        ahead = self._aheads[0] if self._aheads else self._new()
        ahead.seek(self._numbered.testing(0))
        for begin in range(0, self._photographs.num_test, size):
            found = self._numbered.empty(max(0, min(local, self._photographs.num_test - begin - first)))
            ahead.take(found)
            for i in np.flatnonzero(~found.sound):
                self._broken(self._photographs.test, int(found.examples[i]))
            missing = local - len(found.labels)  # of the last part
            part = (np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in (found.images, found.labels, found.sound))
            yield TestImages(*(_from_local(x, size, first, sharding) for x in part))

    def _test_size(self, mesh: Mesh) -> int:
        """Test images at a time, as many on each device that shares a batch."""
        devices = mesh.shape[DATA]
        return -(-min(LARGEST_EVAL_BATCH, self._photographs.num_test) // devices) * devices

    def _use_blocks(self, mesh: Mesh, batch_size: int) -> None:
        """Reads what this process needs of each batch: all, or from now on another part."""
        places, devices = sorted({data for _, data in _local_places(mesh)}), mesh.shape[DATA]
        if len(places) == devices:
            blocks = WHOLE, WHOLE
        else:
            sizes = batch_size, self._test_size(mesh)
            blocks = tuple(Block(n, places[0] * n // devices, len(places) * n // devices) for n in sizes)
        if blocks != self._blocks:
            self.close()
            self._blocks = blocks  # pyright: ignore[reportAttributeAccessIssue]
            self._numbered = self._number()

    def _number(self) -> SampleIndex:
        chosen = self._experiment
        seeds = tuple(sorted({run.seed for run in chosen.runs()}))
        return SampleIndex(
            self._photographs, seeds, chosen.epochs, chosen.dataset.augment, chosen.dataset.color_jitter, *self._blocks
        )

    def close(self) -> None:
        for ahead in self._aheads:
            ahead.close()
        self._aheads = []


def _local_places(mesh: Mesh) -> list[tuple[int, int]]:
    """(row, position along it) of each device of this process."""
    here = {device.id for device in mesh.local_devices}
    rows, columns = mesh.devices.shape
    return [place for place in itertools.product(range(rows), range(columns)) if mesh.devices[place].id in here]


def _from_places(like: Any, parts: dict[tuple[int, int], np.ndarray]) -> jax.Array:
    """An array of a mesh's rows and columns, of which this process has parts."""

    def part(index: Any) -> np.ndarray:
        return parts[index[0].start or 0, index[1].start or 0][None, None]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _from_local(local: np.ndarray, size: int, first: int, sharding: NamedSharding) -> jax.Array:
    """An array of `size` along its first axis, of which this process has the part from `first` on."""

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        return local[start - first : stop - first]

    return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)


def supply_of(
    dataset: Dataset | Photographs, experiment: Experiment, skipped: Callable[[str, str], None] | None = None
) -> Resident | Streamed:
    """The supply of an experiment's programs; see `Streamed` for `skipped`."""
    if isinstance(dataset, Dataset):
        return Resident(dataset)
    workers = experiment.dataset.workers
    return Streamed(dataset, experiment, len(os.sched_getaffinity(0)) if workers is None else workers, skipped)
