"""A segment of every lane on one device: the steps between two visits to the host, and the evaluation that ends an epoch.

Pure functions of the lanes, their settings, the segments and the images; `lanes.py` compiles them. Lanes train one after the
other ("map") or side by side ("vmap"). With "map" each lane has a loop that ends after its last step or at a loss that is not
finite: an ended lane costs nothing, and no lane's arithmetic touches another's. With "vmap" ended lanes are masked.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config.catalog import diagnostic_columns
from smallbatch_jax.data.augment import crop_and_flip, draw_crops, inside
from smallbatch_jax.program.device_data import DeviceData, TestImages, normalised
from smallbatch_jax.program.devices import DATA, LANE
from smallbatch_jax.program.diagnostics import make_diagnose
from smallbatch_jax.program.evaluation import Tested, make_evaluate, make_test, with_precise_statistics
from smallbatch_jax.program.side_by_side import PackedModel, summed_hessian_product, summed_value_and_grad
from smallbatch_jax.program.tasks import Array, Batch
from smallbatch_jax.program.train import Model, Program, Setting, TrainState, make_train_step

LaneMapping = Literal["map", "vmap"]
Evaluated = tuple[dict[str, Tested], dict[str, Array]]  # the last two fields of `Report`


class LaneState(NamedTuple):
    """One lane; all lanes of a program are stacked along a leading axis."""

    train: TrainState
    loss_sum: Array  # float32[], summed over the epoch's batches so far; rounding reaches 0.1 % at a million batches
    sums: dict[str, Array]  # float32[] each, metrics summed over the epoch's examples so far
    alive: Array  # bool[], False once a training loss was not finite


class Segment(NamedTuple):
    """Instructions for each lane in a segment, stacked by lane."""

    indices: Array  # int32[S, m], the examples of each step; rows from `steps` on are ignored
    steps: Array  # int32[], updates to take, at most S
    evaluate: Array  # bool[], whether the segment ends an epoch


INDICES = P(LANE, None, DATA)  # sharding of Segment.indices: lanes, steps, examples of a step


class Report(NamedTuple):
    """Results of each lane in a segment."""

    step: Array  # int32[], updates taken by the run
    alive: Array  # bool[]
    loss_sum: Array  # float32[], of the epoch so far; includes a loss that is not finite
    sums: dict[str, Array]  # float32[] each, of the epoch so far
    tested: dict[str, Tested]  # by split; sums over no examples if not evaluated
    diagnosed: dict[str, Array]  # float32[] each, columns of `Program.diagnostics`; NaN if not evaluated


class Examples(NamedTuple):
    """The batch of one step in the dataset's dtypes; images are cropped, and their padding becomes zero after normalisation."""

    images: Array  # uint8, float32 or int32 [n, …]
    labels: Array  # [n, …]
    crops: Array | None  # uint32[n] of `draw_crops`, None without augmentation


def make_segment(
    model: Model, program: Program, mapping: LaneMapping, statistics_model: Model | None, streamed: bool
) -> Callable[..., Any]:
    """Returns (lanes, settings, segments, data) → (lanes, reports), for the lanes of one device and its shard of their batches.

    If images are streamed, data is a `Pool`, and `make_test_lanes` evaluates the test set instead.
    """
    evaluate = make_evaluate(model, program.task, program.axis_name)
    if statistics_model is not None:
        evaluate = with_precise_statistics(evaluate, statistics_model)
    summed = () if mapping == "map" else (summed_value_and_grad, summed_hessian_product)
    diagnose = make_diagnose(model, program, *summed)

    def evaluate_all(state: TrainState, data: DeviceData) -> Evaluated:
        return evaluate(state, data), diagnose(state, data)

    make_run = _one_after_the_other if mapping == "map" else _side_by_side
    run = make_run(model, program, None if streamed else evaluate_all)
    if not streamed:
        return run
    return lambda states, settings, segments, pool: run(states, settings, segments, pool.on_this_device())


def _one_after_the_other(model: Model, program: Program, evaluate: Callable[..., Any] | None) -> Callable[..., Any]:
    advance = _make_advance(make_train_step(model, program))

    def run_lane(state: LaneState, setting: Setting, segment: Segment, data: DeviceData) -> tuple[LaneState, Report]:
        def unfinished(carry: tuple[jax.Array, LaneState]) -> jax.Array:
            return (carry[0] < segment.steps) & carry[1].alive

        def step(carry: tuple[jax.Array, LaneState]) -> tuple[jax.Array, LaneState]:
            i, state = carry
            examples = _take(program, setting.seed, state.train.step, segment.indices[i], data)
            return i + 1, advance(state, setting, examples, data)

        _, state = lax.while_loop(unfinished, step, (jnp.int32(0), state))
        evaluated = _not_evaluated(program, data)
        if evaluate is not None:
            evaluated = lax.cond(segment.evaluate & state.alive, evaluate, lambda *_: evaluated, state.train, data)
        return _report(state, segment, evaluated)

    def run(states: LaneState, settings: Setting, segments: Segment, data: DeviceData) -> tuple[LaneState, Report]:
        return lax.map(lambda lane: run_lane(lane[0], lane[1], lane[2], data), (states, settings, segments))

    return run


def _side_by_side(model: Model, program: Program, evaluate: Callable[..., Any] | None) -> Callable[..., Any]:
    def run(states: LaneState, settings: Setting, segments: Segment, data: DeviceData) -> tuple[LaneState, Report]:
        packed = PackedModel.of(model, states.train, program.optimizer.elementwise)
        advance = jax.vmap(_make_advance(make_train_step(packed, program, summed_value_and_grad)), (0, 0, 0, None))
        first_steps = states.train.step

        def take(i: jax.Array, indices: jax.Array) -> Examples:
            return jax.vmap(partial(_take, program), (0, 0, 0, None))(settings.seed, first_steps + i, indices, data)

        def step(states: LaneState, i: jax.Array, examples: Examples) -> LaneState:
            active = (i < segments.steps) & states.alive
            new = advance(states, settings, examples, data)
            return jax.tree.map(lambda n, o: jnp.where(expand(active, n), n, o), new, states)

        states = states._replace(train=jax.vmap(packed.pack)(states.train))
        if evaluate is None:  # streamed: such steps are long, and checking whether another follows costs little
            last = jnp.max(segments.steps)
            states = lax.fori_loop(0, last, lambda i, states: step(states, i, take(i, segments.indices[:, i])), states)
        else:  # all batches of the segment at once: within a step a TPU would gather them in a loop
            steps = jnp.arange(segments.indices.shape[1])
            batches = jax.vmap(take, (0, 1))(steps, segments.indices)
            states, _ = lax.scan(lambda states, xs: (step(states, *xs), None), states, (steps, batches))
        states = states._replace(train=jax.vmap(packed.unpack)(states.train))
        evaluated = nothing = jax.vmap(lambda _: _not_evaluated(program, data))(segments.steps)
        if evaluate is not None:  # all lanes if any ends an epoch: under vmap a branch for each lane would always run
            evaluate_all, ends = jax.vmap(evaluate, (0, None)), segments.evaluate & states.alive
            evaluated = lax.cond(jnp.any(ends), lambda: evaluate_all(states.train, data), lambda: nothing)
            evaluated = jax.tree.map(lambda found, none: jnp.where(expand(ends, found), found, none), evaluated, nothing)
        return jax.vmap(_report)(states, segments, evaluated)

    return run


def _not_evaluated(program: Program, data: DeviceData) -> Evaluated:
    tested = {name: Tested.zeros(program.task) for name in data.splits or ("test",)}
    return tested, {name: jnp.float32(jnp.nan) for name in diagnostic_columns(program.diagnostics)}


def make_test_lanes(model: Model, program: Program, mapping: LaneMapping) -> Callable[..., Tested]:
    """Returns (lanes, tested, which, images, mean, deviation) → tested, plus the scores of the lanes in `which`, bool[L]."""
    test = make_test(model, program.task, program.axis_name)

    def test_lane(state: LaneState, tested: Tested, named: jax.Array, images: jax.Array, part: TestImages) -> Tested:
        def added() -> Tested:
            return jax.tree.map(jnp.add, tested, test(state.train, images, part))

        return lax.cond(named & state.alive, added, lambda: tested)

    def run(states, tested, which, part, mean, deviation):
        images = normalised(part.images, mean, deviation)
        if mapping == "map":
            return lax.map(lambda lane: test_lane(lane[0], lane[1], lane[2], images, part), (states, tested, which))
        return jax.vmap(test_lane, (0, 0, 0, None, None))(states, tested, which, images, part)

    return run


def _make_advance(train_step: Callable[..., Any]) -> Callable[..., LaneState]:
    def advance(state: LaneState, setting: Setting, examples: Examples, data: DeviceData) -> LaneState:
        """Applies one update to one lane; if its loss is not finite, the lane dies and the update is not counted."""
        images = data.normalise(examples.images)
        if examples.crops is not None:
            images = jnp.where(inside(examples.crops, *images.shape[1:3]), images, 0.0)
        train, metrics = train_step(state.train, setting, Batch(images, examples.labels))
        finite = jnp.isfinite(metrics.loss)
        train = train._replace(step=jnp.where(finite, train.step, state.train.step))
        return LaneState(train, state.loss_sum + metrics.loss, jax.tree.map(jnp.add, state.sums, metrics.sums), finite)

    return advance


def _take(program: Program, seed: jax.Array, step: jax.Array, indices: jax.Array, data: DeviceData) -> Examples:
    """Takes the examples of update `step` from the dataset."""
    images, labels = data.train_images[indices], data.train_labels[indices]
    if not program.augment:
        return Examples(images, labels, None)
    first = program.position_of_step_0
    if program.axis_name is not None:
        first += lax.axis_index(program.axis_name) * len(indices)
    positions = step * program.batch_size + first + jnp.arange(len(indices))
    crops = draw_crops(seed, positions // len(data.train_labels), indices)
    return Examples(crop_and_flip(images, crops), labels, crops)


def _report(state: LaneState, segment: Segment, evaluated: Evaluated) -> tuple[LaneState, Report]:
    """Returns a lane, its sums cleared if the segment ended an epoch, and its report."""
    report = Report(state.train.step, state.alive, state.loss_sum, state.sums, *evaluated)
    loss_sum, sums = jax.tree.map(lambda x: jnp.where(segment.evaluate, 0.0, x), (state.loss_sum, state.sums))
    return state._replace(loss_sum=loss_sum, sums=sums), report


def expand(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))
