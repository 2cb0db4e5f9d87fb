"""A program of many lanes: compile it, put a new run into a lane, run a segment, evaluate.

Each lane holds one run. On CPU the lanes of a device are trained one after the other, on GPU and TPU side by side
(`segment.py`). The devices form a mesh (`devices.py`), and the lanes are spread evenly over its rows.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.data.dataset import as_received
from smallbatch_jax.optim import SGD, Optimizer
from smallbatch_jax.program.device_data import POOL, DeviceData, Pool, TestImages
from smallbatch_jax.program.devices import DATA, LANE, keep_compilations, keep_freed_memory, lane_mesh
from smallbatch_jax.program.evaluation import Tested
from smallbatch_jax.program.processes import put
from smallbatch_jax.program.segment import (
    INDICES,
    LaneMapping,
    LaneState,
    Report,
    Segment,
    expand,
    make_segment,
    make_test_lanes,
)
from smallbatch_jax.program.tasks import Array
from smallbatch_jax.program.train import Model, Program, Setting, TrainState, init_state

__all__ = ["LaneMapping", "LaneProgram", "LaneState", "Report", "Segment", "compile_lanes", "initialiser", "lane_mesh"]

MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
COMPUTE_DTYPE = {"float32": jnp.float32, "tf32": jnp.float32, "bfloat16": jnp.bfloat16}


def lane_mapping(platform: str) -> LaneMapping:
    """Returns how the lanes of one device train: one after the other on CPU, side by side on GPU and TPU."""
    return "map" if platform == "cpu" else "vmap"


@dataclass(frozen=True)
class LaneProgram:
    """A compiled program of many lanes. `start` and `run` are one dispatch each, and donate the states they are given.

    If there are several processes, all must call the same methods with the same arguments.
    """

    lanes: int
    segment_steps: int  # S, maximum number of steps in a segment
    any_length: bool  # whether fewer than S steps cost less; resident lanes side by side run S steps and mask the rest
    mesh: Mesh
    compile_seconds: float
    peak_bytes: int  # `needed_bytes` of its segment
    _segment: Callable[..., Any]
    _data: DeviceData | Pool  # a Pool has shapes and dtypes only
    template: LaneState  # shapes and dtypes of the stacked lanes
    _test: Callable[..., Tested] | None = None  # evaluates one batch of a streamed test set

    def empty(self) -> LaneState:
        """Returns lanes without runs: none is alive."""
        return self.put(self.zeros())

    def zeros(self) -> LaneState:
        """Returns lanes without runs, as NumPy arrays."""
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.template)

    def start(self, state: LaneState, entering: Mapping[int, TrainState | LaneState]) -> LaneState:
        """Puts a run into each lane in `entering`, given as its initial state or as the lane that it left earlier."""
        mask = np.zeros(self.lanes, bool)
        new = self.zeros()
        for lane, run in entering.items():
            mask[lane] = new.alive[lane] = True
            place = new if isinstance(run, LaneState) else new.train
            jax.tree.map(lambda stacked, leaf, at=lane: stacked.__setitem__(at, leaf), place, run)
        return _replace_lanes(state, self.put(mask), self.put(new))

    def run(
        self, state: LaneState, settings: Setting, segment: Segment, pool: Pool | None = None, test: Iterable[TestImages] = ()
    ) -> tuple[LaneState, Report]:
        """Runs one segment of every lane.

        Args:
          state: the lanes; donated.
          settings: scalars of their runs, stacked by lane.
          segment: instructions, stacked by lane; its indices refer to the dataset, or to the pool.
          pool: the images of the segment, if the dataset is streamed.
          test: the test set in batches, if the dataset is streamed; read only if a lane evaluates.
        """
        indices = put(segment.indices, self.mesh, INDICES)
        sent = Segment(indices, self.put(segment.steps), self.put(segment.evaluate))
        state, report = self._segment(state, self.put(settings), sent, self._data if pool is None else pool)
        if self._test is None or pool is None or not np.any(segment.evaluate):
            return state, report
        tested = report.tested["test"]  # sums over no examples
        for part in test:
            tested = self._test(state, tested, sent.evaluate, part, pool.mean, pool.deviation)
        return state, report._replace(tested={"test": tested})

    def put(self, stacked: Any) -> Any:
        """Puts arrays stacked by lane onto the devices of their lanes."""
        return put(stacked, self.mesh, P(LANE))

    @property
    def rows(self) -> int:
        """Rows of devices, each with lanes of its own."""
        return self.mesh.shape[LANE]

    def even_steps(self, running: Sequence[bool], pace: int) -> list[int]:
        """Returns the steps of each running lane in a segment, such that all devices need the same time.

        Lanes in the row with the most running lanes get `pace` each. Other rows take as many steps in total, split over fewer
        lanes. If lanes train side by side, all get `pace`, because one lane costs as much as all.
        """
        if not self.any_length:
            return [pace * runs for runs in running]
        by_row = np.reshape(running, (self.rows, -1))
        counts = by_row.sum(1, keepdims=True)
        each, more = np.divmod(pace * counts.max(), np.maximum(counts, 1))
        steps = np.minimum(self.segment_steps, each + (by_row.cumsum(1) <= more))
        return np.where(by_row, steps, 0).ravel().tolist()

    def row_of_lane(self, lane: int) -> int:
        """Returns the index of the row of devices that holds a lane."""
        return lane * self.rows // self.lanes


def needed_bytes(compiled: Any, data: DeviceData | Pool, mesh: Mesh) -> int:
    """Returns the bytes that a compiled segment needs on this process's devices, without a resident dataset; 0 if unknown."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    if isinstance(data, Pool):  # each device holds one, and the next is being transferred
        dataset = -data.images.size // mesh.size
    else:  # an argument, replicated on each device
        dataset = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(data))
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return (arguments + found.temp_size_in_bytes - dataset) * len(mesh.local_devices)


def compile_lanes(
    model: Model,
    program: Program,
    data: DeviceData | Pool,
    mesh: Mesh,
    lanes: int,
    segment_steps: int,
    precision: str = "float32",
    mapping: LaneMapping | None = None,
    statistics_model: Model | None = None,
) -> LaneProgram:
    """Compiles a program of `lanes` lanes, a multiple of the rows of devices in `mesh`, spread evenly over them.

    Args:
      model: linen module, `apply(variables, images, train=…)`.
      program: constants of the runs; its axis_name and the model's are "data" if a row has several devices, else None.
      data: from `to_device`, on the same devices; or the shapes of a streamed dataset's pools, sharded over `mesh`.
      mesh: from `lane_mesh`.
      lanes: L, number of lanes on all devices.
      segment_steps: S, maximum number of steps between two visits to the host.
      precision: precision of matrix products and convolutions, "float32", "tf32" or "bfloat16".
      mapping: "map" or "vmap"; None takes `lane_mapping`.
      statistics_model: the model with bn_decay 0 and its bn_batch_size given, to evaluate by precise statistics; None
        evaluates by running averages.
    """
    if lanes % mesh.shape[LANE]:
        raise ValueError(f"lanes: {lanes} is not a multiple of {mesh.shape[LANE]} devices")
    if program.axis_name != (DATA if mesh.shape[DATA] > 1 else None):
        raise ValueError(f"axis_name: {program.axis_name!r} does not go with {mesh.shape[DATA]} devices that share a batch")
    platform = mesh.devices.flat[0].platform
    mapping = mapping or lane_mapping(platform)
    if platform == "cpu":
        keep_freed_memory()
    else:
        keep_compilations()
    began = time.monotonic()
    traced, template = trace_lanes(model, program, data, mesh, lanes, segment_steps, precision, mapping, statistics_model)
    compiled = traced.lower().compile()
    seconds = time.monotonic() - began
    streamed = isinstance(data, Pool)
    test = _streamed_test(make_test_lanes(model, program, mapping), mesh, precision) if streamed else None
    any_length, needed = streamed or mapping == "map", needed_bytes(compiled, data, mesh)
    return LaneProgram(lanes, segment_steps, any_length, mesh, seconds, needed, compiled, data, template, test)


def trace_lanes(
    model: Model,
    program: Program,
    data: DeviceData | Pool,
    mesh: Mesh,
    lanes: int,
    segment_steps: int,
    precision: str,
    mapping: LaneMapping,
    statistics_model: Model | None = None,
) -> tuple[jax.stages.Traced, LaneState]:
    """Traces a segment; the arguments are those of `compile_lanes`, and the devices of `mesh` need not exist.

    Returns:
      The traced segment, (states, settings, segments, images) → (states, reports), and the shapes of the states.
    """
    sharding, streamed = NamedSharding(mesh, P(LANE)), isinstance(data, Pool)
    stored, leading = (data.images, 3) if isinstance(data, Pool) else (data.train_images, 1)
    example = as_received(stored.shape[leading:], stored.dtype)

    def lane() -> tuple[LaneState, Setting, Array, Array]:
        zero, step = jnp.float32(0), jnp.int32(0)
        fresh = init_state(model, _one(example), step, program.optimizer)
        state = LaneState(fresh, zero, dict.fromkeys(program.task.metrics, zero), jnp.bool(True))
        return state, Setting(zero, step, zero, zero, dict.fromkeys(program.optimizer.scalars, zero) or None), step, state.alive

    template, settings, steps, evaluate = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype, sharding=sharding), jax.eval_shape(lane)
    )
    shape = (lanes, segment_steps, program.batch_size)
    indices = jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, INDICES))
    segment = jax.shard_map(
        make_segment(model, program, mapping, statistics_model, streamed),
        mesh=mesh,
        in_specs=(P(LANE), P(LANE), Segment(INDICES, P(LANE), P(LANE)), POOL if streamed else P()),
        out_specs=P(LANE),
        check_vma=False,
    )
    images: Any = data
    if not streamed:
        everywhere = NamedSharding(mesh, P())
        images = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), data)
    with jax.default_matmul_precision(MATMUL_PRECISION[precision]):
        return jax.jit(segment, donate_argnums=0).trace(template, settings, Segment(indices, steps, evaluate), images), template


def _streamed_test(test_lanes: Callable[..., Tested], mesh: Mesh, precision: str) -> Callable[..., Tested]:
    specs = P(LANE), P(LANE), P(LANE), P(DATA), P(), P()
    sharded = jax.shard_map(test_lanes, mesh=mesh, in_specs=specs, out_specs=P(LANE), check_vma=False)
    compiled = jax.jit(sharded, donate_argnums=1)

    def test(*arguments: Any) -> Tested:
        with jax.default_matmul_precision(MATMUL_PRECISION[precision]):
            return compiled(*arguments)

    return test


def initialiser(model: Model, example: jax.ShapeDtypeStruct, optimizer: Optimizer = SGD) -> Callable[[int], TrainState]:
    """Returns seed → the state before the first update, as NumPy arrays; compiles once and caches the states of eight seeds.

    Initialisation depends on the seed alone, not on batch sizes or base learning rates.
    """
    init = jax.jit(lambda seed: init_state(model, _one(example), seed, optimizer))
    return functools.lru_cache(8)(lambda seed: jax.tree.map(np.asarray, init(np.int32(seed))))


def _one(example: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros((1, *example.shape), example.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _replace_lanes(state: LaneState, mask: jax.Array, new: LaneState) -> LaneState:
    return jax.tree.map(lambda old, n: jnp.where(expand(mask, n), n, old), state, new)
