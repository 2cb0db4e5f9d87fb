"""A program of many lanes: compile it, put a new run into a lane, run a segment, evaluate.

Each lane holds one run. On CPU the lanes of a device are trained one after the other (`lax.map`), each in a loop that
ends when the lane's share of the segment is done or its loss is not finite: an ended lane costs nothing, and no lane's
arithmetic touches another's. On GPU and TPU they are trained side by side (`vmap`), and ended lanes are masked.

The devices form a mesh of two axes. Along "lane" each row of devices holds lanes of its own; along "data" the devices of a
row share the examples of every batch, and each holds the same state.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.data import Dataset
from smallbatch_jax.data.augment import crop_and_flip
from smallbatch_jax.device_data import DeviceData
from smallbatch_jax.evaluation import make_evaluate, not_evaluated, with_precise_statistics
from smallbatch_jax.experiment import InputError
from smallbatch_jax.memory import keep_freed_memory
from smallbatch_jax.processes import put
from smallbatch_jax.train import (
    Array,
    Batch,
    Metrics,
    Model,
    Program,
    Setting,
    TrainState,
    init_state,
    make_train_step,
)

LANE, DATA = "lane", "data"  # the axes of the mesh
MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
COMPUTE_DTYPE = {"float32": jnp.float32, "tf32": jnp.float32, "bfloat16": jnp.bfloat16}


class LaneState(NamedTuple):
    """One lane; all lanes of a program are stacked along a leading axis."""

    train: TrainState
    loss_sum: Array  # float32[], of the epoch's batches so far
    correct: Array  # int32[], of the epoch's examples so far
    alive: Array  # bool[], False once a training loss was not finite


class Segment(NamedTuple):
    """What each lane does in a segment; all stacked by lane, int32 but for `evaluate`."""

    indices: Array  # int32[S, m], the examples of each step; rows from `steps` on are not read
    steps: Array  # int32[], updates to take, at most S
    evaluate: Array  # bool[], whether the segment ends an epoch


INDICES = P(LANE, None, DATA)  # of the lanes, the steps, and the examples of a step


class Report(NamedTuple):
    """What each lane found in a segment."""

    step: Array  # int32[], updates taken by the run
    alive: Array  # bool[]
    loss_sum: Array  # float32[], of the epoch so far, the loss that was not finite included
    correct: Array  # int32[], of the epoch so far
    test_loss: Array  # float32[], mean over the test set; NaN if not evaluated
    test_correct: Array  # int32[]; 0 if not evaluated


LaneMapping = Literal["map", "vmap"]


def lane_mapping() -> LaneMapping:
    """How this backend trains the lanes of one device."""
    return "map" if jax.default_backend() == "cpu" else "vmap"


def lane_mesh(devices: Sequence[Any] | None = None, data_devices: int = 1) -> Mesh:
    """All devices, `data_devices` consecutive ones of which share each batch; a divisor of their number."""
    return Mesh(np.array(jax.devices() if devices is None else devices).reshape(-1, data_devices), (LANE, DATA))


@dataclass(frozen=True)
class LaneProgram:
    """Many lanes of one program, compiled. Every method is one dispatch; states given to it are used up (donated).

    With several processes all call the same methods with the same arguments.
    """

    lanes: int
    segment_steps: int  # S, the most steps of a segment
    any_length: bool  # whether a shorter segment costs less; side by side, lanes take S masked steps whatever is asked
    sharding: NamedSharding
    compile_seconds: float
    _segment: Callable[..., Any]
    _data: DeviceData
    template: LaneState  # shapes and dtypes of the stacked lanes

    def empty(self) -> LaneState:
        """Lanes that hold no run: not alive."""
        return self.put(self.zeros())

    def zeros(self) -> LaneState:
        """The same on the host."""
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.template)

    def start(self, state: LaneState, fresh: Mapping[int, TrainState]) -> LaneState:
        """Puts a new run, given by its state before the first update, into each lane named; the others are as they were."""
        mask = np.zeros(self.lanes, bool)
        new = self.zeros()
        for lane, train in fresh.items():
            mask[lane] = new.alive[lane] = True
            jax.tree.map(lambda stacked, leaf, at=lane: stacked.__setitem__(at, leaf), new.train, train)
        return _replace_lanes(state, self.put(mask), self.put(new))

    def run(self, state: LaneState, settings: Setting, segment: Segment) -> tuple[LaneState, Report]:
        """One segment of every lane; settings and segment are stacked by lane."""
        shares = NamedSharding(self.mesh, INDICES)
        return self._segment(
            state,
            self.put(settings),
            Segment(put(segment.indices, shares), self.put(segment.steps), self.put(segment.evaluate)),
            self._data,
        )

    def put(self, stacked: Any) -> Any:
        """Arrays stacked by lane, to the devices of their lanes."""
        return put(stacked, self.sharding)

    @property
    def peak_bytes(self) -> int:
        """Memory of this process's devices that the program needs while it runs, its states included, the dataset not."""
        found = self._segment.memory_analysis()
        if found is None:
            return 0
        dataset = sum(x.nbytes for x in jax.tree.leaves(self._data))  # on each device; an argument as the states are
        arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return (arguments + found.temp_size_in_bytes - dataset) * len(self.mesh.local_devices)

    @property
    def mesh(self) -> Mesh:
        return self.sharding.mesh  # pyright: ignore[reportReturnType]

    @property
    def rows(self) -> int:
        """Rows of devices, each with lanes of its own."""
        return self.mesh.shape[LANE]

    def even_steps(self, running: Sequence[bool], pace: int) -> list[int]:
        """Steps for each running lane of a segment: more in a row with fewer of them, so that all devices take as long.

        In the row with the most lanes each gets `pace`; the others share out as many steps. Where any lane costs what all do,
        all get `pace`.
        """
        if not self.any_length:
            return [pace * runs for runs in running]
        lanes_of: dict[int, list[int]] = {}
        for lane, runs in enumerate(running):
            if runs:
                lanes_of.setdefault(self.row_of_lane(lane), []).append(lane)
        steps = [0] * self.lanes
        most = max(map(len, lanes_of.values()), default=0)
        for lanes in lanes_of.values():
            each, more = divmod(pace * most, len(lanes))
            for position, lane in enumerate(lanes):
                steps[lane] = min(self.segment_steps, each + (position < more))
        return steps

    def row_of_lane(self, lane: int) -> int:
        """Position in the mesh of the row of devices that holds a lane."""
        return lane * self.rows // self.lanes


def compile_lanes(
    model: Model,
    program: Program,
    data: DeviceData,
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
      program: what the runs share; its axis_name and the model's are "data" if a row has several devices, else None.
      data: from `to_device`, on the same devices.
      mesh: from `lane_mesh`.
      lanes: L, runs trained side by side.
      segment_steps: S, the most steps between two visits to the host.
      precision: of matrix products and convolutions: "float32", "tf32" or "bfloat16".
      mapping: "map" or "vmap"; None takes `lane_mapping()`.
      statistics_model: the model with bn_decay 0 and its bn_batch_size given, to evaluate by precise statistics; None
        evaluates by running averages.
    """
    if lanes % mesh.shape[LANE]:
        raise ValueError(f"lanes: {lanes} is not a multiple of {mesh.shape[LANE]} devices")
    if program.axis_name != (DATA if mesh.shape[DATA] > 1 else None):
        raise ValueError(f"axis_name: {program.axis_name!r} does not go with {mesh.shape[DATA]} devices that share a batch")
    mapping = mapping or lane_mapping()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sharding = NamedSharding(mesh, P(LANE))
    fresh = jax.eval_shape(lambda: init_state(model, _one_image(data), jnp.int32(0)))
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype, sharding=sharding),
        LaneState(fresh, *(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.bool))),
    )
    segment = jax.shard_map(
        _make_segment(model, program, segment_steps, mapping, statistics_model),
        mesh=mesh,
        in_specs=(P(LANE), P(LANE), Segment(INDICES, P(LANE), P(LANE)), P()),
        out_specs=P(LANE),
        check_vma=False,
    )
    everywhere = NamedSharding(mesh, P())
    abstract_data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), data)
    arguments = _abstract_arguments(program.batch_size, lanes, segment_steps, sharding)
    began = time.monotonic()
    with jax.default_matmul_precision(MATMUL_PRECISION[precision]):
        compiled = jax.jit(segment, donate_argnums=0).lower(template, *arguments, abstract_data).compile()
    seconds = time.monotonic() - began
    return LaneProgram(lanes, segment_steps, mapping == "map", sharding, seconds, compiled, data, template)


def initialiser(model: Model, data: DeviceData) -> Callable[[int], TrainState]:
    """seed → the state before the first update, as NumPy arrays; compiled once, each seed drawn once.

    No program is named: initialisation depends on the seed alone, not on batch sizes or base learning rates.
    """
    init = jax.jit(lambda seed: init_state(model, _one_image(data), seed))
    return functools.cache(lambda seed: jax.tree.map(np.asarray, init(np.int32(seed))))


def require_model(model: Model, dataset: Dataset) -> None:
    """Refuses a model that cannot take the dataset's images or gives other logits than one per class; runs nothing."""
    images = jax.ShapeDtypeStruct((2, *dataset.train_images.shape[1:]), jnp.float32)
    batch = Batch(images, jax.ShapeDtypeStruct((2,), jnp.int32))
    setting = Setting(*(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.float32)))

    def logits(state: TrainState, images: jax.Array) -> Any:
        return model.apply({"params": state.params, "batch_stats": state.batch_stats}, images, train=False)

    try:
        state = jax.eval_shape(lambda images: init_state(model, images, jnp.int32(0)), images)
        shape = jax.eval_shape(logits, state, images).shape[1:]
        trained, _ = jax.eval_shape(make_train_step(model, Program(2, 1)), state, setting, batch)
    except InputError:
        raise
    except Exception as error:  # whatever a model raises for a shape it was not made for
        raise InputError(f"model: cannot take images of shape {images.shape[1:]}: {error}") from error
    if jax.tree.structure(trained) != jax.tree.structure(state):
        raise InputError("model: training makes other variables than init did; make them whatever `train` is.")
    if shape != (dataset.num_classes,):
        raise InputError(f"model: gives {shape} logits per image, the dataset has {dataset.num_classes} classes.")


def _one_image(data: DeviceData) -> jax.Array:
    return jnp.zeros((1, *data.train_images.shape[1:]), jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def _replace_lanes(state: LaneState, mask: jax.Array, new: LaneState) -> LaneState:
    return jax.tree.map(lambda old, n: jnp.where(_expand(mask, n), n, old), state, new)


def _abstract_arguments(batch_size: int, lanes: int, segment_steps: int, sharding: NamedSharding) -> tuple[Setting, Segment]:
    """Shapes of the settings and segments that a program is called with."""

    def stacked(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((lanes,), dtype, sharding=sharding)

    settings = Setting(*(stacked(np.float32), stacked(np.int32), stacked(np.float32), stacked(np.float32)))
    shares = NamedSharding(sharding.mesh, INDICES)
    indices = jax.ShapeDtypeStruct((lanes, segment_steps, batch_size), np.int32, sharding=shares)
    return settings, Segment(indices, stacked(np.int32), stacked(bool))


def _make_segment(
    model: Model, program: Program, segment_steps: int, mapping: LaneMapping, statistics_model: Model | None
) -> Callable[..., Any]:
    """(lanes, settings, segments, data) → (lanes, reports), for the lanes of one device and its share of their batches."""
    advance, evaluate = _make_advance(model, program), make_evaluate(model, program.axis_name)
    if statistics_model is not None:
        evaluate = with_precise_statistics(evaluate, statistics_model)

    def run_lane(state: LaneState, setting: Setting, segment: Segment, data: DeviceData) -> tuple[LaneState, Report]:
        def unfinished(carry: tuple[jax.Array, LaneState]) -> jax.Array:
            return (carry[0] < segment.steps) & carry[1].alive

        def step(carry: tuple[jax.Array, LaneState]) -> tuple[jax.Array, LaneState]:
            i, state = carry
            return i + 1, advance(state, setting, segment.indices[i], data)

        _, state = lax.while_loop(unfinished, step, (jnp.int32(0), state))
        tested = lax.cond(segment.evaluate & state.alive, lambda: evaluate(state.train, data), not_evaluated)
        return _report(state, segment, tested)

    def run_mapped(states, settings, segments, data):
        return lax.map(lambda lane: run_lane(lane[0], lane[1], lane[2], data), (states, settings, segments))

    def run_vmapped(states, settings, segments, data):
        def step(states: LaneState, i: jax.Array) -> tuple[LaneState, None]:
            new = jax.vmap(advance, (0, 0, 0, None))(states, settings, segments.indices[:, i], data)
            active = (i < segments.steps) & states.alive
            return jax.tree.map(lambda n, o: jnp.where(_expand(active, n), n, o), new, states), None

        states, _ = lax.scan(step, states, jnp.arange(segment_steps))
        # One branch for the device: under vmap a branch per lane would run both.
        tested = lax.cond(
            jnp.any(segments.evaluate),
            lambda: jax.vmap(evaluate, (0, None))(states.train, data),
            lambda: jax.vmap(lambda _: not_evaluated())(segments.steps),
        )
        return jax.vmap(_report)(states, segments, tested)

    return run_mapped if mapping == "map" else run_vmapped


def _make_advance(model: Model, program: Program) -> Callable[..., LaneState]:
    train_step = make_train_step(model, program)

    def advance(state: LaneState, setting: Setting, indices: jax.Array, data: DeviceData) -> LaneState:
        """One update of one lane. If its loss is not finite the lane dies, and the update is not counted."""
        images = data.normalise(data.train_images[indices])
        if program.augment:
            first = 0 if program.axis_name is None else lax.axis_index(program.axis_name) * len(indices)
            positions = state.train.step * program.batch_size + first + jnp.arange(len(indices))
            images = crop_and_flip(images, setting.seed, positions // len(data.train_labels), indices)
        train, metrics = train_step(state.train, setting, Batch(images, data.train_labels[indices]))
        finite = jnp.isfinite(metrics.loss)
        train = train._replace(step=jnp.where(finite, train.step, state.train.step))
        return LaneState(train, state.loss_sum + metrics.loss, state.correct + metrics.correct, finite)

    return advance


def _report(state: LaneState, segment: Segment, tested: Metrics) -> tuple[LaneState, Report]:
    """What a lane found, and the lane with its sums cleared if the segment ended an epoch."""
    report = Report(state.train.step, state.alive, state.loss_sum, state.correct, tested.loss, tested.correct)
    state = state._replace(
        loss_sum=jnp.where(segment.evaluate, 0.0, state.loss_sum), correct=jnp.where(segment.evaluate, 0, state.correct)
    )
    return state, report


def _expand(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))
