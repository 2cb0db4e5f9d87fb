"""`sbj.sweep` beyond classification: other tasks, own losses, metrics and optimizers, further axes, validation splits."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import linen as nn
from pictures import error_line

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import from_config
from smallbatch_jax.runner.grid import facts
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.study import answer, study


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


class NextToken(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(4)(nn.Embed(4, 8)(tokens))


@functools.cache
def table():
    """Returns a regression whose targets are linear in the features plus noise of variance 0.01."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(140, 3)).astype(np.float32)
    y = x @ [1.0, -2.0, 0.5] + 0.1 * rng.normal(size=140)
    return sbj.data.Dataset(x[:100], y[:100], x[100:], y[100:])


def quiet(*args, **kwargs):
    return sbj.sweep(*args, progress=NoProgress(), **kwargs)


def last(frame, column):
    return frame[frame["epoch"] == frame["epoch"].max()][column].to_numpy()


@functools.cache
def regression(folder):
    axes = {"weight_decays": (0.0, 0.1), "validation_fraction": 0.2, "metrics": ("absolute_error",)}
    return quiet(Linear(), table(), (4,), (2**-9, 2**-6, 2**3), epochs=3, seeds=(0, 1), workdir=folder, **axes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "regression"
    regression(folder)
    return folder


def test_a_regression_is_chosen_by_the_validation_split_and_confirmed_by_the_test_set(workdir):
    found = study.load(workdir)
    assert found.metric.column == "validation_loss"
    assert found.examples == (80, 40)
    answered = answer.answer(found)
    assert answered.sentence.startswith("Best at m = 4, η̃ = 2^-6, weight decay 0: validation loss 0.03")
    assert "The validation split chose it; its test loss is 0.0" in " ".join(answered.caveats)
    assert "weight decay 0 … 0.1" in study.describe(found)


def test_a_run_that_diverged_has_no_losses_and_no_metrics(workdir):
    lost = sbj.results.load(workdir).query("status == 'diverged'")
    assert set(lost["base_lr"]) == {8.0}
    columns = ["test_loss", "validation_loss", "test_absolute_error", "train_absolute_error", "test_accuracy"]
    assert lost[columns].isna().all(axis=None)


def test_a_table_names_the_metric_the_axis_and_the_guess_that_is_to_be_beaten(workdir):
    text = study.summaries([study.load(workdir)])
    assert " best validation loss  at base_lr  at weight_decay" in text
    assert "validation loss is below that of a guess" in text
    assert study.load(workdir).chance == pytest.approx(5.2, abs=1.5)  # the variance of the targets, 1 + 4 + 1/4


@pytest.mark.long
def test_figures_and_a_page_are_made_of_it(workdir, tmp_path):
    drawn = {path.stem for path in sbj.figures.draw_studies([study.load(workdir)], tmp_path)}
    assert {"accuracy_vs_base_lr", "heat_map", "convergence"} <= drawn
    sbj.report.write([study.load(workdir)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "validation loss" in page
    assert "weight decay 0.1" in page


def test_a_workdir_is_resumed_with_another_selection_and_refused_with_other_axes(workdir):
    axes = {"weight_decays": (0.0, 0.1), "validation_fraction": 0.2, "metrics": ("absolute_error",)}
    args = Linear(), table(), (4,), (2**-9, 2**-6, 2**3)
    again = quiet(*args, epochs=3, seeds=(0, 1), workdir=workdir, select=("test_absolute_error", "min"), **axes)
    pd.testing.assert_frame_equal(again, regression(workdir))
    line = error_line(quiet, *args, epochs=3, seeds=(0, 1), workdir=workdir, **axes | {"weight_decays": (0.0,)})
    assert "grid lacks 6 run(s) there" in line


def test_each_value_of_an_axis_trains_as_if_it_were_the_fields(workdir):
    fields = {"weight_decay": 0.1, "validation_fraction": 0.2, "metrics": ("absolute_error",)}
    alone = quiet(Linear(), table(), (4,), (2**-6,), epochs=3, seeds=(1,), **fields)
    rows = regression(workdir).query("base_lr == 2**-6 and weight_decay == 0.1 and seed == 1")
    pd.testing.assert_frame_equal(rows.drop(columns="weight_decay").reset_index(drop=True), alone)


def test_one_program_trains_all_values_of_all_axes(tmp_path):
    axes = {
        "weight_decays": (0.0, 0.1),
        "warmup_fractions": (0.0, 0.5),
        "beta1s": (0.5, 0.9),
        "beta2_half_lives": (64.0, 512.0),
    }
    frame = quiet(Linear(), table(), (4,), (2**-6,), 1, workdir=tmp_path, optimizer="adamw", rule="constant", **axes)
    assert len(frame) == 16
    assert frame["test_loss"].nunique() == 16
    assert (sbj.results.load_timings(tmp_path)["phase"] == "compile").sum() == 1


def huber(outputs, batch):
    return optax.huber_loss(outputs[:, 0], batch.labels)


def bias(outputs, batch):
    return outputs[:, 0] - batch.labels


def heavy_ball(learning_rate, momentum):
    return optax.sgd(learning_rate, momentum)


def own(momentum, workdir=None, **options):
    options = {"loss": huber, "metrics": {"bias": bias}, "optimizer": heavy_ball, **options}
    return quiet(Linear(), table(), (4,), (2**-7,), 2, workdir=workdir, scalars={"momentum": momentum}, **options)


@pytest.mark.long
def test_own_losses_metrics_and_optimizers_train_as_those_of_this_package():
    ours = quiet(Linear(), table(), (4,), (2**-7,), 2, optimizer="momentum", momentum=0.8, loss=huber, metrics={"bias": bias})
    theirs = own(0.8)
    columns = ["train_loss", "test_loss", "train_bias", "test_bias"]
    np.testing.assert_allclose(ours[columns], theirs[columns], rtol=1e-6)
    assert theirs["scalar_momentum"].tolist() == [0.8, 0.8]


def test_an_own_optimizer_may_know_the_parameters_by_name(tmp_path):
    def without(frozen):
        def make(learning_rate, momentum):
            rules = {"kernel": optax.sgd(learning_rate), "bias": optax.sgd(learning_rate, momentum)}
            rules[frozen] = optax.set_to_zero()
            return optax.multi_transform(rules, {"Dense_0": {"kernel": "kernel", "bias": "bias"}})

        return make

    found = own(0.8, tmp_path, optimizer=without("kernel"))
    assert found["test_loss"].nunique() == 2
    pd.testing.assert_frame_equal(own(0.8, tmp_path, optimizer=without("kernel")), found)
    assert "optimizer is another function of the same name" in error_line(own, 0.8, tmp_path, optimizer=without("bias"))


def test_an_own_optimizer_may_have_a_scalar_named_weight_decay():
    frame = quiet(Linear(), table(), (20,), (2**-6,), epochs=1, optimizer=optax.adamw, scalars={"weight_decay": (0.0, 0.9)})
    assert frame["test_loss"].nunique() == 2


def test_sequences_are_divided_as_other_data_are():
    tokens = np.random.default_rng(0).integers(0, 4, (40, 6))
    whole = sbj.data.Dataset(tokens[:30], None, tokens[30:], None, 4)
    part = whole.with_validation(0.2).with_subset(10)
    assert (part.task, part.num_train) == ("next_token", 10)
    np.testing.assert_array_equal(part.train_labels, part.train_images)
    np.testing.assert_array_equal(part.validation_labels, part.validation_images)


def test_scalars_of_an_own_optimizer_are_an_axis():
    both = own((0.5, 0.8))
    np.testing.assert_array_equal(both.query("scalar_momentum == 0.8")["test_loss"], own(0.8)["test_loss"])
    assert both["test_loss"].nunique() == 4


def test_a_workdir_recognises_own_functions_by_what_they_compute(tmp_path):
    own(0.8, tmp_path)

    def other(outputs, batch):
        return 2 * optax.huber_loss(outputs[:, 0], batch.labels)

    other.__name__ = "huber"
    assert "loss is another function of the same name" in error_line(own, 0.8, tmp_path, loss=other)

    def make(learning_rate, momentum):
        return optax.sgd(learning_rate, momentum, nesterov=True)

    make.__name__ = "heavy_ball"
    assert "optimizer is another function of the same name" in error_line(own, 0.8, tmp_path, optimizer=make)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": 3}, "loss: got a int, accepts a function (outputs, batch) → [n]."),
        ({"metrics": {"bias": "x"}}, "metrics: bias: got a str, accepts a function (outputs, batch) → [n]."),
        ({"metrics": {"loss": bias}}, "metrics: 'loss' cannot name a metric of your own"),
        ({"metrics": {"a,b": bias}}, "metrics: 'a,b' cannot name a metric of your own"),
        ({"metrics": 3}, "metrics: got 3, accepts a tuple of values."),
        ({"metrics": "top5_accuracy"}, "metrics: got 'top5_accuracy', accepts a tuple of values such as ('top5_accuracy',)."),
        ({"batch_sizes": 8}, "grid.batch_sizes: got 8, accepts a tuple of values such as (8,)."),
        ({"validation_fraction": "half"}, "dataset.validation_fraction: got 'half', accepts a number from 0 to below 1."),
        ({"select": "test_loss"}, "select: got 'test_loss', accepts a column and"),
        ({"optimizer": optax.adam(1e-3)}, "optimizer: got a GradientTransformationExtraArgs, accepts a name or a function"),
        ({"optimizer": "adma"}, "optimizer.name: unknown optimizer 'adma'; did you mean 'adam'?"),
        ({"momenta": (0.9,)}, "grid.momenta: sgd has no momentum, it has no scalars."),
        (
            {"optimizer": "momentum", "momentum": 0.9, "momenta": (0.8,)},
            "grid.momenta: optimizer.momentum or another",
        ),
        (
            {"weight_decay": 5, "weight_decays": (0.0,)},
            "grid.weight_decays: weight_decay=5 says what weight_decay is; leave one",
        ),
        (
            {"schedule": sbj.experiment.Schedule(warmup_fraction=0.1), "warmup_fractions": (0.2,)},
            "grid.warmup_fractions: warmup_fraction=0.1 says",
        ),
        (
            {"optimizer": "adam", "beta2s": (0.9,), "beta2_half_lives": (9.0,)},
            "grid.beta2_half_lives: optimizer.beta2",
        ),
        (
            {"optimizer": "adam", "beta_rule": "sde", "beta_batch_size": 1, "beta1s": (0.5,)},
            "optimizer.beta_rule: 'sde' makes beta1 -1 at batch size 4",
        ),
        ({"optimizer": heavy_ball, "momenta": (0.9,)}, "grid.momenta: an own optimizer has scalars of its own"),
        ({"optimizer": heavy_ball, "scalars": {"momentum": "high"}}, "grid.scalars.momentum: got 'high', accepts a number"),
        ({"optimizer": heavy_ball}, "optimizer: heavy_ball raised TypeError: "),
        ({"scalars": {"gamma": 0.5}}, "grid.scalars: sgd accepts no custom scalars"),
        ({"optimizer": heavy_ball, "scalars": {"momentum": 0.5}, "weight_decay": 0.1}, "weight_decay: an own optimizer decays"),
        ({"validation_fraction": 0.001}, "dataset.validation_fraction: 0.001 of 100 examples leaves a split empty"),
        ({"subset": 101}, "dataset.subset: got 101, but there are only 100 training examples."),
        ({"subset": 0}, "dataset.subset: got 0, accepts an integer from 1"),
        ({"task": "classification"}, "task: 'classification' does not go with the dataset's labels"),
        ({"task": "next_token"}, "task: 'next_token' does not go with the dataset's labels"),
    ],
)
def test_a_mistake_is_named_in_one_line(options, says, tmp_path):
    folder = tmp_path / "w"
    grid = {"batch_sizes": (4,), "base_lrs": (2**-7,), "epochs": 1}
    assert error_line(quiet, Linear(), table(), workdir=folder, **grid | options).startswith(says)
    assert not folder.exists()


def test_a_named_model_gives_no_real_numbers():
    assert error_line(quiet, "resnet8", table(), (4,), (2**-7,), 1).startswith("model.name: resnet8 gives logits of classes")


def classes(labels, num_classes=3):
    images = np.zeros((len(labels), 2), np.float32)
    return sbj.data.Dataset(images, np.arange(len(labels)) % num_classes, images, np.array(labels), num_classes)


def test_the_guess_to_be_beaten_is_the_best_constant_for_the_test_labels():
    """Shares 3/4 and 1/4 have entropy log 4 − 3/4 log 3; the first token is given, and those after it are half and half."""
    chosen = from_config({"name": "guess", "dataset": {"name": "own:0"}})
    guess = facts(chosen, classes([1, 1, 2, 1]))["guess"]
    assert guess == {"loss": pytest.approx(np.log(4) - 0.75 * np.log(3)), "accuracy": 0.75, "top5_accuracy": 1}
    streamed = sbj.data.Photographs((), (), 32, 3, (), test_labels=np.array([1, 1, 2, 1]))
    assert facts(chosen, streamed)["guess"] == guess
    balanced = facts(chosen, dataclasses.replace(streamed, test_labels=None))["guess"]
    assert balanced == {"loss": pytest.approx(np.log(3)), "accuracy": pytest.approx(1 / 3), "top5_accuracy": 1}
    assert facts(chosen, classes([1, 1]))["guess"] == {"loss": 0, "accuracy": 1, "top5_accuracy": 1}
    assert facts(chosen, classes(range(10), 10))["guess"]["top5_accuracy"] == 0.5
    tokens = np.array([[0, 1, 2], [0, 1, 2]])
    sequences = sbj.data.Dataset(tokens, None, tokens, None, 3)
    assert facts(chosen, sequences)["guess"] == {"loss": pytest.approx(np.log(2)), "accuracy": 0.5, "top5_accuracy": 1}
    assert "guess" not in facts(dataclasses.replace(chosen, task="own:loss"), classes([1, 1, 2, 1]))


def test_a_run_that_names_the_most_frequent_class_has_learnt_nothing(tmp_path):
    """The mistake to detect: half way from 1/3 to the best would count cells that are worse than a constant guess."""
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 200, p=[0.9, 0.05, 0.05])
    data = sbj.data.Dataset(rng.normal(size=(200, 4)).astype(np.float32), labels, np.zeros((20, 4), np.float32), labels[:20], 3)
    quiet(nn.Dense(3), data, (4,), (2**-6,), 1, workdir=tmp_path)
    found = study.load(tmp_path)
    assert found.chance == np.bincount(labels[:20]).max() / 20 > 0.8
    assert not found.converged.any()
    assert answer.answer(found).sentence.startswith("No run is better than chance")


@pytest.mark.long
def test_sequences_predict_their_next_token_with_adamw(tmp_path):
    """Each token determines the next, so the loss goes to zero; a guess has a loss of about log 4."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 4, (120, 1)) + np.arange(6)) % 4
    data = sbj.data.Dataset(tokens[:100], None, tokens[100:], None, 4)
    assert data.task == "next_token"
    options = {"optimizer": "adamw", "rule": "constant", "beta2_half_lives": (50.0, 500.0), "label_smoothing": 0.05}
    frame = quiet(NextToken(), data, (2, 8), (2**-4,), 4, workdir=tmp_path, **options)
    assert (last(frame, "test_loss") < 0.2).all()
    assert (last(frame, "test_accuracy") == 1).all()
    found = study.load(tmp_path)
    assert (found.metric.column, found.chance) == ("test_loss", pytest.approx(np.log(4), rel=0.02))


def test_a_validation_split_may_be_given_whole():
    x, y = table().train_images, table().train_labels
    split = sbj.data.Dataset(x[:60], y[:60], x[80:], y[80:], validation_images=x[60:80], validation_labels=y[60:80])
    frame = quiet(Linear(), split, (4,), (2**-6,), epochs=1, metrics={})
    assert jnp.isfinite(frame["validation_loss"].iloc[0])
    assert error_line(split.with_validation, 0.1).startswith("dataset.validation_fraction: the dataset has a validation split")


def test_a_validation_split_may_be_nearly_all_examples(tmp_path):
    quiet(Linear(), table(), (2,), (2**-6,), epochs=1, validation_fraction=0.9, subset=34, workdir=tmp_path)  # 31 of 34
    assert study.load(tmp_path).experiment.dataset.validation_fraction == 31 / 34
