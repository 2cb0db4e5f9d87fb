"""Tasks: the per-example loss that a run minimises, and the metrics reported with it.

Losses and metrics are functions (outputs, batch) → [n], one value for each example of the batch, so that sums over padded,
sharded and micro-batched examples stay exact. `config.catalog` lists the ones in this module.
"""

import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from smallbatch_jax.config import catalog
from smallbatch_jax.config.experiment import OWN, Experiment, InputError

Array = Any  # a jax.Array; on the host an np.ndarray, and only a shape and dtype where a program is compiled ahead


class Batch(NamedTuple):
    images: Array  # float32[n, …], normalised; tokens int32[n, T]
    labels: Array  # int32[n] classes, float32[n, …] targets, or the tokens


Score = Callable[[Any, Batch], jax.Array]  # (outputs, batch) → [n]


class Task(NamedTuple):
    """The loss that training minimises, and the metrics that are reported with it."""

    loss: Score  # float32[n]
    metrics: Mapping[str, Score]  # bool[n] or floating point [n], by column name without the split
    train_loss: Score | None = None  # with label smoothing; None is `loss`


def cross_entropy(outputs: Any, batch: Batch, smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy of each example, float32[n], for logits float[n, classes] and labels int32[n].

    With `smoothing` s the target is 1 - s + s/C for the label and s/C for other classes (Szegedy et al. 2016).
    """
    logits = outputs.astype(jnp.float32)
    # Compares instead of indexing, for which a GPU would need a separate kernel.
    classes = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    own = jnp.where(batch.labels[..., None] == classes, logits, 0.0).sum(-1)
    if smoothing:
        own = (1 - smoothing) * own + smoothing * logits.mean(-1)
    return jax.nn.logsumexp(logits, -1) - own


def squared_error(outputs: Any, batch: Batch) -> jax.Array:
    """Returns the squared error of each example, float32[n], the mean over the components of its target."""
    return jnp.square(_errors(outputs, batch)).mean(-1)


def absolute_error(outputs: Any, batch: Batch) -> jax.Array:
    """Returns the absolute error of each example, float32[n], the mean over the components of its target."""
    return jnp.abs(_errors(outputs, batch)).mean(-1)


def _errors(outputs: Any, batch: Batch) -> jax.Array:
    """Returns outputs minus targets, float32[n, components]; outputs [n, 1] go with targets [n]."""
    return (outputs.astype(jnp.float32).reshape(batch.labels.shape) - batch.labels).reshape(len(batch.labels), -1)


def next_token_cross_entropy(outputs: Any, batch: Batch, smoothing: float = 0.0) -> jax.Array:
    """Returns the mean cross-entropy in nats of tokens 1 … T-1 of each example, float32[n].

    The logits float[n, T, vocabulary] at position t predict the token at t + 1; the last position predicts nothing.
    """
    return cross_entropy(outputs[:, :-1], Batch(None, batch.labels[:, 1:]), smoothing).mean(-1)


def correct(outputs: Any, batch: Batch) -> jax.Array:
    """Returns whether each example's class is predicted, bool[n]; logits that are not finite count as wrong."""
    return (jnp.argmax(outputs, -1) == batch.labels) & jnp.isfinite(outputs).all(-1)


def in_top5(outputs: Any, batch: Batch) -> jax.Array:
    """Returns whether fewer than five logits exceed that of each example's class, bool[n]."""
    own = jnp.take_along_axis(outputs, batch.labels[:, None], -1)
    return ((outputs > own).sum(-1) < 5) & jnp.isfinite(outputs).all(-1)


def correct_tokens(outputs: Any, batch: Batch) -> jax.Array:
    """Returns the fraction of tokens 1 … T-1 of each example that are predicted, float32[n]."""
    return correct(outputs[:, :-1], Batch(None, batch.labels[:, 1:])).mean(-1, dtype=jnp.float32)


CLASSIFICATION = Task(cross_entropy, {"accuracy": correct})


def task_of(experiment: Experiment, loss: Any = None, metrics: Mapping[str, Score] | None = None) -> Task:
    """Returns the task of an experiment; `loss` and `metrics` are the caller's own functions, which its config names."""
    smoothing, functions = experiment.label_smoothing, dict(metrics or {})
    if not experiment.task.startswith(OWN):
        loss = pkgutil.resolve_name(catalog.TASKS[experiment.task].loss)
    if loss is None:
        raise InputError(f"task: {experiment.task!r} is the loss of a Python caller, which `sweep` takes as loss.")
    for name in experiment.metric_names():
        if f"{OWN}{name}" not in experiment.metrics:
            functions[name] = pkgutil.resolve_name(catalog.METRICS[name].functions[experiment.task])
        elif name not in functions:
            raise InputError(f"metrics: '{OWN}{name}' is a function of a Python caller, which `sweep` takes in metrics.")
    ordered = {name: functions[name] for name in experiment.metric_names()}
    return Task(loss, ordered, functools.partial(loss, smoothing=smoothing) if smoothing else None)


def summed(scores: Mapping[str, jax.Array], counts: jax.Array | None = None) -> dict[str, jax.Array]:
    """Returns the sum of each score [n] over the examples in `counts`, bool[n], as float32[]: exact for up to 2^24 examples."""
    return {
        name: jnp.sum(values if counts is None else jnp.where(counts, values, 0), dtype=jnp.float32)
        for name, values in scores.items()
    }
