"""Tasks: losses and metrics computed by hand, label smoothing, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from pictures import error_line

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.data import Dataset
from smallbatch_jax.program import fit, tasks, train
from smallbatch_jax.program.tasks import Batch

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 8, 6), jnp.int32)


def test_smoothed_cross_entropy_is_that_of_optax():
    expected = optax.softmax_cross_entropy(LOGITS, optax.smooth_labels(jax.nn.one_hot(LABELS, 8), 0.1))
    np.testing.assert_allclose(tasks.cross_entropy(LOGITS, Batch(None, LABELS), 0.1), expected, rtol=1e-6)


def test_top5_counts_the_label_among_the_five_largest_logits():
    ranks = (-np.asarray(LOGITS)).argsort(1).argsort(1)[np.arange(6), LABELS]
    np.testing.assert_array_equal(tasks.in_top5(LOGITS, Batch(None, LABELS)), ranks < 5)
    assert set((ranks < 5).tolist()) == {True, False}
    assert not tasks.in_top5(LOGITS.at[:, 0].set(jnp.nan), Batch(None, LABELS)).any()


def test_errors_of_a_regression_are_means_over_the_components_of_a_target():
    targets = jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)
    outputs = targets + jnp.asarray([1.0, -3.0])[None]
    np.testing.assert_allclose(tasks.squared_error(outputs, Batch(None, targets)), np.full(6, 5.0), rtol=1e-5)
    np.testing.assert_allclose(tasks.absolute_error(outputs, Batch(None, targets)), np.full(6, 2.0), rtol=1e-5)


def test_outputs_of_one_column_are_compared_to_targets_without_it():
    """Broadcasting [n, 1] against [n] would compare every output to every target."""
    targets = jnp.arange(4.0)
    np.testing.assert_array_equal(tasks.squared_error(targets[:, None], Batch(None, targets)), np.zeros(4))


def test_each_position_predicts_the_next_token():
    tokens = jnp.asarray(RNG.integers(0, 8, (3, 5)), jnp.int32)
    outputs = jnp.asarray(RNG.normal(size=(3, 5, 8)), jnp.float32)
    expected = optax.softmax_cross_entropy_with_integer_labels(outputs[:, :4], tokens[:, 1:]).mean(1)
    batch = Batch(None, tokens)
    np.testing.assert_allclose(tasks.next_token_cross_entropy(outputs, batch), expected, rtol=1e-6)
    right = 20.0 * jax.nn.one_hot(jnp.roll(tokens, -1, 1), 8)
    np.testing.assert_array_equal(tasks.correct_tokens(right, batch), np.ones(3))
    assert tasks.next_token_cross_entropy(right, batch).max() < 1e-6


@pytest.mark.long
def test_a_step_trains_on_smoothed_labels_and_an_evaluation_does_not():
    task = tasks.task_of(Experiment(label_smoothing=0.1, metrics=("top5_accuracy",)))
    images, labels = jnp.ones((4, 2, 2, 1)), jnp.asarray([0, 1, 2, 0], jnp.int32)
    state = train.init_state(tiny.PlainModel(), images, jnp.int32(0))
    setting = train.Setting(jnp.float32(0.1), jnp.int32(0), jnp.float32(0), jnp.float32(0))
    batch, model = Batch(images, labels), tiny.PlainModel()
    _, metrics = train.make_train_step(model, train.Program(4, 10, task=task))(state, setting, batch)
    logits = model.apply({"params": state.params}, images)
    np.testing.assert_allclose(metrics.loss, tasks.cross_entropy(logits, batch, 0.1).mean(), rtol=1e-6)
    found = train.make_eval_step(tiny.PlainModel(), task)(state, batch, jnp.ones(4, bool))
    np.testing.assert_allclose(found["loss"], tasks.cross_entropy(logits, batch).sum(), rtol=1e-6)
    assert set(metrics.sums) == {"accuracy", "top5_accuracy"} == set(found) - {"loss"}


class Outputs(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.width)(x.reshape(len(x), -1).astype(jnp.float32))


TABLE = Dataset(np.ones((6, 3), np.float32), np.ones((6, 2), np.float32), np.ones((4, 3), np.float32), np.ones((4, 2)))
TOKENS = Dataset(np.zeros((6, 3), int), None, np.zeros((4, 3), int), None, 5)
REGRESSION, NEXT_TOKEN = (tasks.task_of(Experiment(task=name)) for name in ("regression", "next_token"))


@pytest.mark.parametrize(
    ("width", "task", "data", "says"),
    [
        (2, REGRESSION, TABLE, None),
        (3, REGRESSION, TABLE, "model: gives (3,) outputs per example, the dataset needs (2,)."),
        (5, NEXT_TOKEN, TOKENS, "model: gives (5,) outputs per example, the dataset needs (3, 5)."),
        (
            2,
            tasks.Task(lambda outputs, batch: outputs.mean(), {}),
            TABLE,
            "loss: got float32[] for a batch of 2 examples, accepts",
        ),
        (2, tasks.Task(lambda outputs, batch: outputs[:, 7, 0], {}), TABLE, "loss: raised "),
        (
            2,
            tasks.Task(tasks.squared_error, {"own": lambda outputs, batch: 1.0}),
            TABLE,
            "metrics: own: got float32[] for",
        ),
    ],
)
def test_models_losses_and_metrics_that_do_not_fit_are_refused_in_one_line(width, task, data, says):
    if says is None:
        fit.require_model(Outputs(width), task, data)
    else:
        assert error_line(fit.require_model, Outputs(width), task, data).startswith(says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"task": "regression", "metrics": ("top5_accuracy",)},
            "metrics: 'top5_accuracy' is no further metric of the task ",
        ),
        ({"metrics": ("accuracy",)}, "metrics: 'accuracy' is no further metric of the task 'classification'; it has ['top5_"),
        ({"task": "regression", "label_smoothing": 0.1}, "label_smoothing: 0.1 needs a task with classes, not 'regression'"),
        (
            {"select": ("test_top5_accuracy", "max")},
            "select: 'test_top5_accuracy' is no column of the results; use ",
        ),
        ({"select": ("test_loss", "max")}, "select: got ('test_loss', 'max'), accepts ('test_loss', 'min')."),
        ({"select": ("test_accuracy", "min")}, "select: got ('test_accuracy', 'min'), accepts ('test_accuracy', 'max')."),
        ({"select": ("validation_loss", "min")}, "select: 'validation_loss' is no column of the results; use "),
    ],
)
def test_metrics_smoothing_and_selections_that_a_task_does_not_have_are_refused(fields, says):
    assert error_line(Experiment, **fields).startswith(says)


@pytest.mark.parametrize(("field", "value"), [("task", "own:huber"), ("metrics", ("own:bias",))])
def test_no_command_can_name_a_function_of_a_python_caller(field, value):
    with pytest.raises(InputError, match=f"^{field}: '{value if field == 'task' else value[0]}' is "):
        tasks.task_of(Experiment(**{field: value}))
