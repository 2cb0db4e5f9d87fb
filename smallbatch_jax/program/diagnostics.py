"""Diagnostics of a run at its evaluations, such as its gradient noise scale; `config.catalog.DIAGNOSTICS` names them.

They read a fixed sample of the training examples, the same for all runs and not augmented, in sub-batches. The loss is the
training loss without the penalty: the model is in training mode, and a sub-batch holds whole BN groups, so that batch norm has
the statistics that training sees.
"""

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from smallbatch_jax.config.catalog import DIAGNOSTICS, DiagnosticEntry
from smallbatch_jax.program.device_data import DeviceData
from smallbatch_jax.program.tasks import Array, Batch
from smallbatch_jax.program.train import Model, Program, PyTree, TrainState, make_loss

EXAMPLES_AT_ONCE = 32  # most examples of a sub-batch, unless a BN group has more


class SubBatch(NamedTuple):
    """The examples of a sub-batch; all sub-batches of a sample are stacked along a leading axis."""

    indices: Array  # int32[b], of training examples
    number: Array  # int32[], position in the sample, which seeds its dropout


class Sample(NamedTuple):
    """A sample of training examples, and derivatives of a sub-batch's mean loss with respect to the parameters."""

    gradient: Callable[[Any], jax.Array]  # sub-batch → float[P]
    product: Callable[[jax.Array, Any], jax.Array]  # (vector, sub-batch) → the Hessian times the vector, float[P]
    params: Array  # float[P], at which derivatives are taken
    sub_batches: Any  # stacked along a leading axis; those of this device
    count: int  # k, sub-batches on all devices; the padding beyond them has derivatives of 0
    size: int  # b, examples of a sub-batch
    axis_name: str | None = None  # mesh axis whose devices hold equally many sub-batches each

    def mean(self, function: Callable[[Any], jax.Array]) -> jax.Array:
        """Returns the mean over all devices' sub-batches of a function of one, float[P], summed without stacking its values."""
        total, _ = lax.scan(lambda total, one: (total + function(one), None), jnp.zeros_like(self.params), self.sub_batches)
        return (total if self.axis_name is None else lax.psum(total, self.axis_name)) / self.count


def hessian_product(loss_fn: Callable[..., Any]) -> Callable[..., PyTree]:
    """Returns (params, vector, *others) → the Hessian by params times the vector, a tree like params; the loss has an aux."""

    def product(params: PyTree, vector: PyTree, *others: Any) -> PyTree:
        return jax.jvp(lambda params: jax.grad(loss_fn, has_aux=True)(params, *others)[0], (params,), (vector,))[1]

    return product


def make_diagnose(
    model: Model,
    program: Program,
    value_and_grad: Callable[..., Callable[..., Any]] = jax.value_and_grad,
    hessian_product: Callable[..., Callable[..., Any]] = hessian_product,
) -> Callable[[TrainState, DeviceData], dict[str, jax.Array]]:
    """Returns (state, data) → the columns of `program.diagnostics`, float32[] each, by name.

    `value_and_grad` and `hessian_product` differentiate the loss; `side_by_side` has versions for vmapped lanes.
    Along `program.axis_name` each device computes its share of the sub-batches, with batch norm over its own examples.
    """
    if not program.diagnostics:
        return lambda state, data: {}
    if program.axis_name is not None:
        model = model.clone(axis_name=None)
    loss_fn = make_loss(model, program.task)
    grad_fn, product_fn = value_and_grad(loss_fn, has_aux=True), hessian_product(loss_fn)

    def diagnose(state: TrainState, data: DeviceData) -> dict[str, jax.Array]:
        params, unravel = ravel_pytree(state.params)

        def of(sub_batch: SubBatch) -> tuple[PyTree, Batch, jax.Array]:
            images, labels = data.train_images[sub_batch.indices], data.train_labels[sub_batch.indices]
            dropout = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.step), sub_batch.number)
            return state.batch_stats, Batch(data.normalise(images), labels), dropout

        def sample(count: int, size: int) -> Sample:
            def flat(tree: PyTree, sub_batch: SubBatch) -> jax.Array:
                return jnp.where(sub_batch.number < count, ravel_pytree(tree)[0], 0)

            return Sample(
                lambda one: flat(grad_fn(state.params, *of(one))[1], one),
                lambda vector, one: flat(product_fn(state.params, unravel(vector), *of(one)), one),
                params,
                _sub_batches(count, size, data, program.axis_name),
                count,
                size,
                program.axis_name,
            )

        found = {}
        for name in program.diagnostics:
            entry, compute = DIAGNOSTICS[name], pkgutil.resolve_name(DIAGNOSTICS[name].compute)
            shape = sample_shape(entry, model, program, state.batch_stats, data)
            found |= zip(entry.columns, compute(sample(*shape)), strict=True)
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    return diagnose


def sample_shape(
    entry: DiagnosticEntry, model: Model, program: Program, batch_stats: PyTree, data: DeviceData
) -> tuple[int, int]:
    """Returns the number of sub-batches k (0 if none fits) and the size of each, b, a whole number of BN groups.

    Both are independent of how many devices share a batch. `batch_stats` are the state's; without any, every split is valid, as
    with BN groups of one example.
    """
    examples = len(data.shuffled)
    wanted = min(max(entry.examples, examples // entry.share), examples)
    group, several = 1, True
    if jax.tree.leaves(batch_stats):
        given = getattr(model, "bn_batch_size", None)
        group, several = given or program.batch_size, given is not None
    size = group * max(1, several * wanted // max(entry.sub_batches, -(-wanted // EXAMPLES_AT_ONCE)) // group)
    return min(max(entry.least, wanted // size), examples // size), size


def _sub_batches(count: int, size: int, data: DeviceData, axis_name: str | None) -> SubBatch:
    """Returns the sub-batches of this device, stacked; equally many on each."""
    indices = data.shuffled[: count * size].reshape(count, size)
    if axis_name is None:
        return SubBatch(indices, jnp.arange(count))
    mine = -(-count // lax.axis_size(axis_name))
    first = lax.axis_index(axis_name) * mine
    filled = jnp.resize(indices, (mine * lax.axis_size(axis_name), size))
    return SubBatch(lax.dynamic_slice_in_dim(filled, first, mine), first + jnp.arange(mine))
