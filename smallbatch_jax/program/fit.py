"""Checks from shapes alone that models, losses and metrics fit the data; fingerprints of the caller's own functions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.config.fields import cut
from smallbatch_jax.models import identity
from smallbatch_jax.models.own import abstract_key, batch_of, errors_explained, used_inputs
from smallbatch_jax.optim import Optimizer
from smallbatch_jax.program.device_data import DeviceData
from smallbatch_jax.program.diagnostics import make_diagnose
from smallbatch_jax.program.tasks import Batch, Score, Task, cross_entropy, next_token_cross_entropy, squared_error
from smallbatch_jax.program.train import Model, Program, PyTree, Setting, TrainState, init_state, make_train_step

MOST_CLASSES = 64  # maximum number of classes whose loss weights a fingerprint covers


def require_model(model: Model, task: Task, data: Any, batch_size: int = 2) -> TrainState:
    """Refuses a model or a task's functions that do not fit the shapes and dtypes of a Dataset or Photographs; runs nothing.

    Returns the shapes and dtypes of its state.
    """
    batch = Batch(batch_of(data.example, batch_size), batch_of(data.target, batch_size))
    try:
        state = jax.eval_shape(partial(init_state, model), batch.images, np.int32(0))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        outputs = jax.eval_shape(partial(model.apply, train=False), variables, batch.images)
    except InputError:
        raise
    except Exception as error:  # of any type: a model may raise anything for a shape that it does not expect
        raise InputError(f"model: cannot take images of shape {batch.images.shape[1:]}: {error}") from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or 0 in leaf.shape:
            place = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"model: its parameter {place} is {leaf.dtype}{list(leaf.shape)}, accepts floating point, not empty."
            )
    _require_outputs(outputs, task, batch, data.num_classes)
    for name, score in {"loss": task.loss, **task.metrics}.items():
        _require_score(name, score, outputs, batch)
    train_step = make_train_step(model, Program(batch_size, 1, task=task))
    trained, _ = jax.eval_shape(train_step, state, Setting(0.0, 0, 0.0, 0.0), batch)
    if jax.tree.structure(trained) != jax.tree.structure(state):
        raise InputError("model: training creates other variables than init; create the same ones whatever `train` is.")
    return state


def require_diagnostics(model: Model, program: Program, data: Any, state: TrainState) -> None:
    """Refuses a model that a program's diagnostics cannot differentiate (for the sharpness, twice); runs nothing."""
    if not program.diagnostics:
        return
    channels = jax.ShapeDtypeStruct(data.image_shape[-1:], jnp.float32)
    shuffled = jax.ShapeDtypeStruct((data.num_train,), jnp.int32)
    stored = DeviceData(data.train_images, data.train_labels, shuffled, channels, channels, {})
    try:
        jax.jit(make_diagnose(model, program)).lower(state, stored)  # only lowering reveals a gradient that has no derivative
    except Exception as error:  # of any type: the model may be the caller's own
        reason = cut(" ".join(str(error).split()), 200)
        raise InputError(f"diagnostics: {program.diagnostics} cannot be computed for this model: {reason}") from error


def _require_outputs(outputs: Any, task: Task, batch: Batch, num_classes: int | None) -> None:
    """Refuses outputs of a model that this package's own losses do not take; a caller's own loss takes anything."""
    accepted = {
        cross_entropy: (len(batch.labels), num_classes),
        next_token_cross_entropy: (*batch.labels.shape, num_classes),
        squared_error: batch.labels.shape,
    }.get(task.loss)
    if accepted is None:
        return
    array = isinstance(outputs, jax.ShapeDtypeStruct)
    same = outputs.size == batch.labels.size if array and task.loss is squared_error else array and outputs.shape == accepted
    if not same:
        shape = outputs.shape[1:] if array else f"a {type(outputs).__name__} in place of"
        if task.loss is cross_entropy:
            raise InputError(f"model: gives {shape} logits per image, the dataset has {num_classes} classes.")
        raise InputError(f"model: gives {shape} outputs per example, the dataset needs {accepted[1:]}.")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise InputError(f"model: gives logits of {outputs.dtype}, accepts floating point.")


def _require_score(name: str, score: Score, outputs: Any, batch: Batch) -> None:
    """Refuses a loss or metric that fails, or that does not give one number for each example."""
    field = name if name == "loss" else f"metrics: {name}"
    with errors_explained(f"{field}:", "the outputs and a batch"):
        found = jax.eval_shape(score, outputs, batch)
    kinds = (jnp.floating,) if name == "loss" else (jnp.floating, jnp.bool_, jnp.integer)
    if getattr(found, "shape", None) != (len(batch.labels),) or not any(jnp.issubdtype(found.dtype, k) for k in kinds):
        got = f"{found.dtype}{list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        n = len(batch.labels)
        raise InputError(f"{field}: got {got} for a batch of {n} examples, accepts one number for each, float32[{n}].")


def require_optimizer(optimizer: Optimizer, params: PyTree, name: str) -> None:
    """Refuses an optimizer that cannot update such parameters with its scalars; `name` is for the message, and nothing runs."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    scalars = scalar, scalar, dict.fromkeys(optimizer.scalars, scalar)

    def update(params: PyTree, learning_rate: Any, weight_decay: Any, others: dict[str, Any]) -> Any:
        transform = optimizer.make(learning_rate, weight_decay, **others)
        state = transform.init(params)
        return *transform.update(params, state, params), state

    called = ", ".join(("learning_rate", *["weight_decay"] * optimizer.elementwise, *optimizer.scalars))
    with errors_explained(f"optimizer: {name}", f"{called}; its update with gradients, state and parameters"):
        traced, (updates, new_state, state) = jax.make_jaxpr(update, return_shape=True)(params, *scalars)
    if _shapes(updates, False) != _shapes(params, False):
        raise InputError(f"optimizer: the updates of {name} do not have the tree structure and shapes of the parameters.")
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(state)):
        raise InputError(
            f"optimizer: {name} keeps a typed random key in its state, which is not stored; use jax.random.PRNGKey."
        )
    if _shapes(new_state) != _shapes(state):
        raise InputError(f"optimizer: an update of {name} changes the tree, a shape or a dtype of its state.")
    rate, first = len(jax.tree.leaves(params)), len(jax.tree.leaves((updates, new_state)))  # input and output indices
    if any(used_inputs(traced.jaxpr, first)[rate:]):
        raise InputError(
            f"optimizer: {name} keeps its learning rate or another scalar in its state, as inject_hyperparams does, so a run's "
            "own value has no effect; build the transformation from the arguments themselves."
        )
    if not used_inputs(traced.jaxpr)[rate]:
        raise InputError(f"optimizer: {name} does not use its learning rate, so all runs of a batch size would be the same.")


def _shapes(tree: PyTree, dtypes: bool = True) -> Any:
    """Returns a tree's structure and the shapes, and by default dtypes, of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype if dtypes else None) for leaf in leaves]


def fingerprint(model: Model, task: Task, data: Any, optimizer: Optimizer) -> dict[str, Any]:
    """Summarises a task's functions and an optimizer on fixed inputs, as `models.identity.fingerprint` summarises a model."""
    draw = partial(identity.drawn, np.random.RandomState(0))
    variables = jax.eval_shape(model.init, abstract_key(), batch_of(data.example, 1))

    def drawn(count: int) -> tuple[Any, Batch]:
        batch = Batch(*(draw((count, *x.shape), x.dtype) for x in (data.example, data.target)))
        outputs = jax.eval_shape(lambda v: model.apply(v, batch.images, train=False), variables)
        return jax.tree.map(lambda x: draw(x.shape, x.dtype), outputs), batch

    def scores(outputs: Any, batch: Batch) -> dict[str, Any]:
        return {name: score(outputs, batch) for name, score in {"loss": task.loss, **task.metrics}.items()}

    def updates(params: PyTree) -> jax.Array:
        transform = optimizer.make(0.5, 0.25, **dict.fromkeys(optimizer.scalars, 0.5))
        state, found = transform.init(params), []
        for factor in (1, -2, 1):
            update, state = transform.update(jax.tree.map(lambda x, factor=factor: factor * x, params), state, params)
            found += map(jnp.ravel, jax.tree.leaves(update))
        return jnp.concatenate(found)

    def compute(few: Any, every: Any, vector: PyTree, arrays: PyTree) -> dict[str, Any]:
        found = {**scores(*few), "optimizer": updates(vector), "arrays optimizer": updates(arrays)}
        if every is not None:
            found |= {f"classes {name}": value for name, value in scores(*every).items()}
        return jax.tree.map(identity.summary, found)

    few, vector, every = drawn(identity.EXAMPLES), draw((8,), np.float32), None
    arrays = jax.tree.map(lambda x: draw([min(size, 2) for size in x.shape], x.dtype), variables["params"])
    try:
        jax.eval_shape(updates, vector)
    except Exception:  # of any type: the optimizer may know the model's parameters by name
        vector = arrays
    if data.num_classes and not data.target.shape:  # a loss may weight its classes
        outputs, batch = drawn(min(data.num_classes, MOST_CLASSES))
        every = outputs, batch._replace(labels=np.arange(len(batch.labels), dtype=np.int32))
    return identity.compiled_summaries(compute, few, every, vector, arrays)
