"""One run's training and evaluation steps: pure functions of the state, the run's scalars and one batch.

No I/O and no jit: callers choose `jit`, `scan`, `vmap`, `shard_map` or `pmap`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from smallbatch_jax import optim
from smallbatch_jax.models import blocks, norm
from smallbatch_jax.models.blocks import Blocks

PyTree = Any
Model = Any  # a flax.linen.Module whose `apply` takes `train`, or an object with the same init and apply
Array = Any  # a jax.Array; on the host an np.ndarray, and only a shape and dtype where a program is compiled ahead


@dataclass(frozen=True)
class Program:
    """What the runs of one compiled program share, beside the model and the data."""

    batch_size: int  # m, over all devices
    total_steps: int  # T, updates in a run
    boundaries: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    axis_name: str | None = None  # mesh axis over which each batch is spread; None if a device holds all of it
    # Examples at a time, of a device's share, a multiple of the BN batch; None takes all of them at once.
    micro_batch_size: int | None = None
    augment: bool = False  # whether training images are cropped and flipped at random (§3.1)
    # How sums over a batch are taken, on CPU, so that they do not depend on the number of devices; None for as is fastest.
    blocks: Blocks | None = None


class Setting(NamedTuple):
    """The scalars of a run, traced: no value of theirs compiles anything anew."""

    base_lr: Array  # float32[], η̃
    seed: Array  # int32[]
    weight_decay: Array  # float32[], λ
    warmup_fraction: Array  # float32[]


class TrainState(NamedTuple):
    """Everything that changes during one run, and nothing else."""

    step: Array  # int32[], updates taken
    params: PyTree
    batch_stats: PyTree  # running means and variances; empty without batch norm
    opt_state: optax.OptState


class Batch(NamedTuple):
    images: Array  # float32[n, …], normalised
    labels: Array  # int32[n]


class Metrics(NamedTuple):
    loss: Array  # float32[], mean cross-entropy over the batch, without the penalty
    correct: Array  # int32[], images classified rightly


def init_state(model: Model, images: jax.Array, seed: jax.Array) -> TrainState:
    """The state before the first update; `images`, float32[n, …], only gives the shape."""
    variables = dict(model.init(jax.random.fold_in(jax.random.key(seed), 0), images))
    params = variables.pop("params")
    opt_state = optim.summed_sgd(1.0, 1).init(params)
    return TrainState(jnp.zeros([], jnp.int32), params, variables.pop("batch_stats", {}), opt_state)


def make_train_step(model: Model, program: Program) -> Callable[[TrainState, Setting, Batch], tuple[TrainState, Metrics]]:
    """Eq. 5 as a pure function of the state, the run's scalars and one batch.

    With `program.axis_name` the batch it is given is one device's share, consecutive examples, as many on each, and the
    model must have been made with the same axis_name; state and metrics are then equal on all devices. Under `shard_map`
    use ``check_vma=False``: with the check on, the gradient of replicated parameters is already summed over the axis.
    """
    gradient = _make_gradient(model, program)

    def train_step(state: TrainState, setting: Setting, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout = jax.random.fold_in(jax.random.fold_in(jax.random.key(setting.seed), 2), state.step)
        if program.axis_name is not None:
            dropout = jax.random.fold_in(dropout, lax.axis_index(program.axis_name))
        metrics, grads, batch_stats = gradient(state, batch, dropout)
        schedule = optim.step_schedule(
            program.total_steps, program.boundaries, program.factor, warmup_fraction=setting.warmup_fraction
        )
        transform = optim.summed_sgd(setting.base_lr, program.batch_size, schedule, setting.weight_decay)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def _make_gradient(model: Model, program: Program) -> Callable[[TrainState, Batch, jax.Array], tuple[Metrics, PyTree, PyTree]]:
    """(state, batch, dropout key) → metrics, mean gradient and new running averages, of the whole batch on every device.

    Nothing is averaged before it is summed over the parts of a batch and the devices: each example's share of the mean loss is
    divided by m at once, so that no sum is scaled by what depends on the number of either.
    """
    axis = program.axis_name

    def gradient(state: TrainState, batch: Batch, dropout: jax.Array) -> tuple[Metrics, PyTree, PyTree]:
        devices = 1 if axis is None else lax.axis_size(axis)
        size = program.micro_batch_size or len(batch.labels)
        parts = len(batch.labels) // size

        def share_of_loss(params: PyTree, part: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, PyTree, PyTree]]:
            """What a part adds to the loss; its images right, what moves running averages, and the averages that moved."""
            logits, changed = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                part.images,
                train=True,
                mutable=["batch_stats", norm.MOVES],
                rngs={"dropout": key},
            )
            losses = cross_entropy(logits, part.labels)
            loss = blocks.total(losses, len(losses)) / (len(batch.labels) * devices)
            moves, batch_stats = changed.get(norm.MOVES, {}), changed.get("batch_stats", state.batch_stats)
            return loss, (count_correct(logits, part.labels), moves, batch_stats)

        def of_part(part: Batch, keys: jax.Array) -> PyTree:
            return jax.value_and_grad(share_of_loss, has_aux=True)(state.params, part, keys[0])

        keys = jax.random.split(dropout, parts) if parts > 1 else dropout[None]
        with blocks.of(program.blocks):
            sums = blocks.summed(of_part, size, batch, jnp.repeat(keys, size, 0))
            if axis is not None:
                sums = _over_devices(sums, axis)
        (loss, (correct, *averages)), grads = sums
        # All parts begin with the same running averages, which then move by the mean of what each would do.
        if parts * devices > 1:
            averages = jax.tree.map(lambda total: total / (parts * devices), averages)
        moves, batch_stats = averages
        return Metrics(loss, correct), grads, norm.move(batch_stats, moves)

    return gradient


def _over_devices(sums: PyTree, axis: str) -> PyTree:
    """Their sums over the devices, in one exchange."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float32), sums))  # counts up to 2^24 are exact
    return jax.tree.map(lambda total, x: total.astype(x.dtype), unravel(blocks.over_devices(flat, axis)), sums)


def make_eval_step(model: Model) -> Callable[[TrainState, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """(state, batch, counts) → cross-entropies float32[n] and the number right, of the images that bool[n] counts.

    The others, padding, have a cross-entropy of 0.
    """

    def eval_step(state: TrainState, batch: Batch, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": state.params, "batch_stats": state.batch_stats}, batch.images, train=False)
        losses = jnp.where(counts, cross_entropy(logits, batch.labels), 0.0)
        return losses, count_correct(logits, jnp.where(counts, batch.labels, -1))

    return eval_step


def cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    """float32[n] of logits float[n, classes] and labels int32[n]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def count_correct(logits: Any, labels: jax.Array) -> jax.Array:
    """int32[]; a logit that is NaN is never right."""
    return jnp.sum((jnp.argmax(logits, -1) == labels) & jnp.isfinite(logits).all(-1), dtype=jnp.int32)
