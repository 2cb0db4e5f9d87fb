"""One run's training and evaluation steps: pure functions of the state, the run's scalars and one batch.

No I/O and no jit: callers choose `jit`, `scan`, `vmap`, `shard_map` or `pmap`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from smallbatch_jax import optim
from smallbatch_jax.program.tasks import CLASSIFICATION, Array, Batch, Task, summed

PyTree = Any
Model = Any  # a flax.linen.Module whose `apply` takes `train`, or an object with the same init and apply


@dataclass(frozen=True)
class Program:
    """Constants of one compiled program, shared by its runs; the model and the data are passed separately."""

    batch_size: int  # m, over all devices
    total_steps: int  # T of the learning rate's schedule: a run's updates; if batches grow, `BatchSchedule.schedule_steps`
    boundaries: tuple[float | Fraction, ...] = (0.5, 0.75)
    factor: float = 0.1
    axis_name: str | None = None  # mesh axis over which each batch is sharded; None if one device holds all of it
    micro_batch_size: int | None = None  # examples per micro-batch, whole BN groups; None computes the shard at once
    augment: bool = False  # whether training images are cropped and flipped at random (§3.1)
    optimizer: optim.Optimizer = optim.SGD
    task: Task = CLASSIFICATION
    diagnostics: tuple[str, ...] = ()  # names in `config.catalog.DIAGNOSTICS`, computed at each evaluation
    position_of_step_0: int = 0  # in the stream of examples; update k starts at this + k·m


class Setting(NamedTuple):
    """The scalars of a run. They are traced, so that other values need no compilation."""

    base_lr: Array  # float32[], η̃
    seed: Array  # int32[]
    weight_decay: Array  # float32[], λ
    warmup_fraction: Array  # float32[]
    scalars: dict[str, Array] | None = None  # float32[] each, the optimizer's other scalars by name


class TrainState(NamedTuple):
    """Everything that changes during one run, and nothing else."""

    step: Array  # int32[], updates taken
    params: PyTree
    batch_stats: PyTree  # running means and variances; empty without batch norm
    opt_state: optax.OptState


class Metrics(NamedTuple):
    loss: Array  # float32[], mean over the batch, without the penalty
    sums: dict[str, Array]  # float32[] each, sums over the batch of the task's metrics


def init_state(model: Model, images: jax.Array, seed: jax.Array, optimizer: optim.Optimizer = optim.SGD) -> TrainState:
    """Returns the state before the first update; only shape and dtype of `images`, [n, …], matter."""
    variables = dict(model.init(jax.random.fold_in(jax.random.key(seed), 0), images))
    params = variables.pop("params")
    return TrainState(jnp.zeros([], jnp.int32), params, variables.pop("batch_stats", {}), optimizer.init(params))


def make_loss(model: Model, task: Task) -> Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, Any]]:
    """Returns (params, batch_stats, batch, dropout) → (loss, aux); the loss is the mean in training, without the penalty.

    aux is (sums of the metrics, new batch_stats); `dropout` is a random key.
    """

    def loss_fn(params: PyTree, batch_stats: PyTree, batch: Batch, dropout: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = model.apply(variables, batch.images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout})
        sums = summed({name: metric(outputs, batch) for name, metric in task.metrics.items()})
        return (task.train_loss or task.loss)(outputs, batch).mean(), (sums, updated.get("batch_stats", batch_stats))

    return loss_fn


def make_train_step(
    model: Model, program: Program, value_and_grad: Callable[..., Callable[..., Any]] = jax.value_and_grad
) -> Callable[[TrainState, Setting, Batch], tuple[TrainState, Metrics]]:
    """Returns one update, Eq. 5 by default, as a pure function of the state, the run's scalars and one batch.

    `value_and_grad` differentiates the loss, and `program.optimizer` turns the mean gradient into the update.
    With `program.axis_name` the batch is one device's shard: consecutive examples, equally many on each device. The model must
    have the same axis_name. State and metrics are then equal on all devices. Under `shard_map` use ``check_vma=False``: with
    the check on, the gradient of replicated parameters is already summed over the axis.
    """
    axis, optimizer = program.axis_name, program.optimizer
    grad_fn = value_and_grad(make_loss(model, program.task), has_aux=True)

    def train_step(state: TrainState, setting: Setting, batch: Batch) -> tuple[TrainState, Metrics]:
        def means_and_sums(batch: Batch, dropout: jax.Array) -> tuple[PyTree, dict[str, jax.Array]]:
            (loss, (sums, batch_stats)), grads = grad_fn(state.params, state.batch_stats, batch, dropout)
            return (loss, batch_stats, grads), sums

        dropout = jax.random.fold_in(jax.random.fold_in(jax.random.key(setting.seed), 2), state.step)
        if axis is not None:
            dropout = jax.random.fold_in(dropout, lax.axis_index(axis))
        (loss, batch_stats, grads), sums = _over_micro_batches(means_and_sums, batch, dropout, program.micro_batch_size)
        if axis is not None:
            loss, batch_stats, grads = lax.pmean((loss, batch_stats, grads), axis)
            sums = lax.psum(sums, axis)
        schedule = optim.step_schedule(
            program.total_steps, program.boundaries, program.factor, warmup_fraction=setting.warmup_fraction
        )
        learning_rate = schedule(state.step) * setting.base_lr * (optimizer.rule or program.batch_size)
        transform = optimizer.make(learning_rate, setting.weight_decay, **(setting.scalars or {}))
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), Metrics(loss, sums)

    return train_step


def _over_micro_batches(
    function: Callable[[Batch, jax.Array], tuple[PyTree, PyTree]], batch: Batch, key: jax.Array, size: int | None
) -> tuple[PyTree, PyTree]:
    """Returns the (means, sums) of `function` for a whole batch, computed by micro-batches."""
    parts, rest = divmod(len(batch.labels), size or len(batch.labels))
    if rest:
        raise ValueError(f"micro_batch_size: {size} does not divide the {len(batch.labels)} examples of a device")
    if parts == 1:
        return function(batch, key)
    micro_batches = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    keys = jax.random.split(key, parts)

    def add(total: PyTree, part: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro_batches), keys[0])
    (means, sums), _ = lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), (micro_batches, keys))
    return jax.tree.map(lambda x: x / parts, means), sums


def make_eval_step(model: Model, task: Task = CLASSIFICATION) -> Callable[[TrainState, Batch, jax.Array], dict[str, jax.Array]]:
    """Returns (state, batch, counts) → the loss and the task's metrics by name, summed over the examples in counts, bool[n]."""

    def eval_step(state: TrainState, batch: Batch, counts: jax.Array) -> dict[str, jax.Array]:
        outputs = model.apply({"params": state.params, "batch_stats": state.batch_stats}, batch.images, train=False)
        scores = {"loss": task.loss, **task.metrics}
        return summed({name: score(outputs, batch) for name, score in scores.items()}, counts)

    return eval_step
