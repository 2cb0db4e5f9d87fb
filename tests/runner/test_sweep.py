"""`sbj.sweep` trains a grid from Python on a user's own model and data."""

import json

import numpy as np
import optax
import pandas as pd
import pytest
import tiny
from flax import linen as nn

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store.workdir import open_workdir

import jax  # isort: skip


class Mlp(nn.Module):
    """A user's own module that has no `train` argument and takes rows of a table."""

    hidden: int = 16

    @nn.compact
    def __call__(self, rows):
        return nn.Dense(3)(nn.tanh(nn.Dense(self.hidden)(rows)))


class Dropped(nn.Module):
    """A module that needs `train`, a dropout key and running statistics, as Flax's own layers do."""

    @nn.compact
    def __call__(self, rows, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(rows))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def table(num_train=200, num_test=60):
    """Returns tabular data of three classes with 5 floats per row."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, num_train + num_test)
    rows = (np.eye(3, 5)[labels] * 3 + rng.normal(0, 1, (len(labels), 5))).astype(np.float32)
    return sbj.data.Dataset(rows[:num_train], labels[:num_train], rows[num_train:], labels[num_train:], 3)


def quiet(*args, **kwargs):
    return sbj.sweep(*args, progress=NoProgress(), **kwargs)


def test_a_users_mlp_trains_as_a_plain_optax_loop_does():
    """Over 50 steps of SGD with η = η̃·m on the same batches, the epochs' mean losses agree to 1e-5."""
    data, m, base_lr, decay, seed = table(), 8, 2**-8, 1e-3, 3
    frame = quiet(Mlp(), data, [m], [base_lr], epochs=2, seeds=[seed], weight_decay=decay)
    model = Mlp()
    params = model.init(jax.random.fold_in(jax.random.key(seed), 0), data.train_images[:1])
    schedule = optax.piecewise_constant_schedule(base_lr * m, {25: 0.1, 38: 0.1})  # from k = 25 and 38 of 50 on
    transform = optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule))
    state, losses = transform.init(params), []

    @jax.jit
    def step(params, state, rows, labels):
        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(p, rows), labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for indices in tiny.batch_indices(seed, 0, 50, m, 200):
        params, state, value = step(params, state, data.train_images[indices], data.train_labels[indices])
        losses.append(float(value))
    np.testing.assert_allclose(frame.train_loss, [np.mean(losses[:25]), np.mean(losses[25:])], rtol=1e-5)
    test_loss = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, data.test_images), data.test_labels)
    np.testing.assert_allclose(frame.test_loss.iloc[-1], test_loss.mean(), rtol=1e-5)


@pytest.mark.long
def test_a_module_with_train_dropout_and_running_statistics_learns():
    frame = quiet(Dropped(), table(), (8,), (2**-6,), epochs=6)
    assert frame.test_accuracy.iloc[-1] > 0.8
    again = quiet(Dropped(), table(), (8,), (2**-6, 2**-9), epochs=6)
    pd.testing.assert_frame_equal(frame, again[again.base_lr == 2**-6].reset_index(drop=True), check_exact=True)


@pytest.mark.long
def test_a_workdir_is_resumed_grown_and_kept_apart_from_other_models_and_data(tmp_path):
    first = quiet(Mlp(), table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "w")
    grown = quiet(Mlp(), table(), np.array([8, 16]), np.array([2**-8, 2**-6]), epochs=1, workdir=tmp_path / "w")
    assert len(grown) == 4
    pd.testing.assert_frame_equal(first, grown.head(1), check_exact=True)
    with pytest.raises(InputError, match=r"model has the same name but other fields or code"):
        quiet(Mlp(32), table(), (8, 16), (2**-8, 2**-6), epochs=1, workdir=tmp_path / "w")
    with pytest.raises(InputError, match=r"dataset.name is 'own:.* there and 'own:.* here"):
        quiet(Mlp(), table(199), (8, 16), (2**-8, 2**-6), epochs=1, workdir=tmp_path / "w")


def test_an_own_batch_norm_takes_the_bn_batch_sizes_of_the_grid():
    frame = quiet(tiny.TinyModel(), tiny.dataset(), (4,), (2**-7,), epochs=1, bn_batch_sizes=(2, 4))
    assert list(frame.bn_batch_size) == [2, 4]
    assert frame.train_loss[0] != frame.train_loss[1]


def test_a_schedule_is_given_whole_or_by_its_fields():
    schedule = sbj.experiment.Schedule(boundaries=(0.25,), factor=0.5)
    whole = quiet(Mlp(), table(), (8,), (2**-6,), epochs=2, schedule=schedule)
    by_fields = quiet(Mlp(), table(), (8,), (2**-6,), epochs=2, factor=0.5, boundaries=(0.25,))
    pd.testing.assert_frame_equal(whole, by_fields, check_exact=True)
    assert not whole.equals(quiet(Mlp(), table(), (8,), (2**-6,), epochs=2))


@pytest.mark.long
def test_an_optimizer_is_given_by_name_and_fields_or_whole():
    whole = sbj.experiment.Optimizer("momentum", rule="sqrt", momentum=0.5)
    by_fields = quiet(Mlp(), table(), (8,), (2**-6,), epochs=1, optimizer="momentum", rule="sqrt", momentum=0.5)
    pd.testing.assert_frame_equal(by_fields, quiet(Mlp(), table(), (8,), (2**-6,), epochs=1, optimizer=whole), check_exact=True)
    assert not by_fields.equals(quiet(Mlp(), table(), (8,), (2**-6,), epochs=1))


def test_each_batch_size_may_have_its_own_rate():
    frame = quiet(tiny.TinyModel(), tiny.dataset(), np.array([4, 2]), {np.int64(2): 2**-6, 4: np.float64(2**-7)}, epochs=1)
    assert list(zip(frame.batch_size, frame.base_lr, strict=True)) == [(2, 2**-6), (4, 2**-7)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_lrs": (0.0,)}, "grid.base_lrs: got 0.0"),
        ({"batch_sizes": (4, 201)}, "201 is larger than the training set of 200"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"model": "alexnt"}, "model.name: unknown model 'alexnt'; did you mean 'alexnet'?"),
        ({"model": 3}, "model: got int"),
        ({"model": "alexnet"}, "model.name: alexnet takes images [N, H, W, C]"),
        ({"model": nn.Dense(4)}, "model: gives (4,) logits per image, the dataset has 3 classes"),
        ({"bn_batch_sizes": (2,)}, "bn_batch_sizes: Mlp has no field bn_batch_size"),
        (
            {"model": "resnet8", "dataset": "digits", "norm": "group", "bn_batch_sizes": (2, 4)},
            "bn_batch_size: got 2, but the norm 'group' has no batch statistics; leave it None.",
        ),
        ({"base_lrs": {8: 0.1}}, "grid.base_lr_by_batch_size: has no base_lr for batch size 4"),
        ({"bn_statistics": "precise"}, "norm, bn_decay, bn_statistics: belong to the named models"),
        ({"norm": "batch"}, "norm, bn_decay, bn_statistics: belong to the named models"),
        ({"dataset": "digts"}, "dataset.name: unknown dataset 'digts'"),
        (
            {"boundary": (0.5,)},
            "boundary: unknown field; did you mean 'boundaries'? Known: name, weight_decay, ",
        ),
        ({"drawn_from": ("w",)}, "drawn_from: unknown field"),
        ({"factor": 0.0}, "schedule.factor: got 0.0"),
        ({"micro_batch_size": 2}, "micro_batch_size: the batches of an own model"),
    ],
)
def test_a_mistake_is_named_in_one_line_and_nothing_is_written(tmp_path, change, says):
    asked = {"model": Mlp(), "dataset": table(), "batch_sizes": (4,), "base_lrs": (2**-8,), "epochs": 1} | change
    with pytest.raises(InputError) as caught:
        quiet(**asked, workdir=tmp_path / "w")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_a_command_cannot_ask_for_an_own_model():
    config = sbj.experiment.default_config()
    config.model.name = "own:Mlp-123"
    experiment = sbj.experiment.from_config(config)
    with pytest.raises(InputError, match="unknown model"):
        sbj.driver.train_grid(experiment, "unused", sbj.data.load("digits"), NoProgress())


def refused(**given):
    with pytest.raises(InputError) as caught:
        quiet(**({"model": Mlp(), "dataset": table(), "batch_sizes": (4,), "base_lrs": (2**-8,), "epochs": 1} | given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_place_is_refused_for_a_dataset_that_is_loaded():
    assert refused(image_size=32).startswith("data_dir, image_size: belong to a dataset's name")
    assert refused(data_dir="/nowhere").startswith("data_dir, image_size: belong to a dataset's name")


def written(line):
    """Returns a module of the given code; name and fields are always the same."""
    scope = {"nn": nn}
    exec(f"class Own(nn.Module):\n    @nn.compact\n    def __call__(self, x):\n        return nn.Dense(3)({line})", scope)
    return scope["Own"]()


@pytest.mark.long
def test_other_code_or_fields_never_get_a_workdirs_results(tmp_path):
    """This holds even if class, fields and function names are the same."""
    quiet(written("x"), table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "w")
    quiet(written("x"), table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "w")
    line = refused(model=written("2 * x"), batch_sizes=(8,), workdir=tmp_path / "w")
    assert "holds a different experiment: model has the same name but other fields or code" in line
    drawn = [nn.Dense(3, kernel_init=nn.initializers.normal(scale)) for scale in (0.01, 10.0)]
    quiet(drawn[0], table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "d")
    assert "other fields or code" in refused(model=drawn[1], batch_sizes=(8,), workdir=tmp_path / "d")


def test_a_workdir_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    quiet(Mlp(), table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "w")
    stored = json.loads((tmp_path / "w" / "experiment.json").read_text())
    stored["experiment"]["model"]["name"] = "own:Mlp-0123456789ab"
    stored["experiment"]["dataset"]["name"] = "own:0123456789ab"
    del stored["facts"]["model"]
    (tmp_path / "w" / "experiment.json").write_text(json.dumps(stored))
    line = refused(batch_sizes=(8,), workdir=tmp_path / "w")
    assert " here; model.name is 'own:Mlp-0123456789ab' there and 'own:Mlp' here (an earlier version made this" in line


def test_a_workdir_that_has_a_digest_in_its_models_name_is_resumed(tmp_path):
    """Versions before December 2026 wrote such names; the fingerprint tells whether the model is the same."""
    first = quiet(Mlp(), table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "w")
    file = tmp_path / "w" / "experiment.json"
    stored = json.loads(file.read_text())
    stored["experiment"]["model"]["name"] += "-0123456789ab"
    file.write_text(json.dumps(stored))
    assert "other fields or code" in refused(model=Mlp(32), batch_sizes=(8,), workdir=tmp_path / "w")
    pd.testing.assert_frame_equal(first, quiet(Mlp(), table(), (8,), (2**-8,), epochs=1, workdir=tmp_path / "w"))


def test_other_numbers_of_examples_are_another_dataset(tmp_path):
    """A folder is identified by its name alone; otherwise added pictures would train beside results without them."""
    with open_workdir(tmp_path / "w", tiny.grid(), {"num_classes": 3, "examples": [50, 20]}):
        pass
    changed = {"num_classes": 3, "examples": [51, 20]}
    with pytest.raises(InputError, match=r"the dataset has examples \[50, 20\] there and \[51, 20\] here"):
        open_workdir(tmp_path / "w", tiny.grid(), changed).__enter__()


def pictures(shape, num_classes=3, dtype=np.uint8):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, *shape)).astype(dtype) / (1 if dtype == np.uint8 else 255)
    labels = np.arange(24) % num_classes
    return sbj.data.Dataset(images.astype(dtype)[:16], labels[:16], images.astype(dtype)[16:], labels[16:], num_classes)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((3, 32, 32), "looks"),
        ((1, 28, 28), "use images.transpose(0, 2, 3, 1)"),
        ((32, 3, 32), "use images.transpose(0, 1, 3, 2)"),
        ((28, 28), "add the axis of channels, images[..., None]"),
        ((3072,), "takes images [N, H, W, C], but the dataset's have shape [3072]; reshape them"),
        ((2, 8, 8, 3), "takes images [N, H, W, C]"),
    ],
)
@pytest.mark.parametrize("model", ["alexnet", "resnet8"])
def test_named_models_take_pictures_alone(tmp_path, model, shape, dtype, says):
    line = refused(model=model, dataset=pictures(shape, dtype=dtype), workdir=tmp_path / "w")
    assert line.startswith(f"model.name: {model} takes images [N, H, W, C]")
    assert says.replace("looks", "32 channels") in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("shape", [(5,), (28, 28), (3, 32, 32), (2, 8, 8, 3)])
def test_only_pictures_are_augmented(shape):
    line = refused(model=Flat(), dataset=pictures(shape, dtype=np.float32), augment=True)
    assert line.startswith("dataset.augment: crops and flips images [H, W, C]")


class Flat(nn.Module):
    bn_batch_size: int | None = None
    normed: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4)(x.reshape(len(x), -1))
        return nn.Dense(3)(sbj.models.norm.BatchNorm(self.bn_batch_size, name="hidden")(x, train) if self.normed else x)


@pytest.mark.parametrize(
    ("given", "layer"),
    [
        ({"model": "alexnet", "norm": "batch", "batch_sizes": (4, 1)}, "dense1_norm"),
        ({"model": "alexnet", "norm": "batch", "bn_batch_sizes": (2, 1)}, "dense1_norm"),
        ({"model": "alexnet", "norm": "batch_renorm", "bn_batch_sizes": (1,)}, "dense1_norm"),
        ({"model": "resnet8", "norm": "batch", "bn_batch_sizes": (1,), "dataset": pictures((4, 4, 3))}, "stage3_block1_conv1"),
        ({"model": Flat(normed=True), "batch_sizes": (4, 1)}, "hidden"),
        ({"model": Flat(normed=True), "bn_batch_sizes": (2, 1)}, "hidden"),
    ],
)
def test_a_batch_norm_over_a_single_value_is_refused(tmp_path, given, layer):
    line = refused(**({"dataset": pictures((8, 8, 3))} | given), workdir=tmp_path / "w")
    assert f"the batch norm {layer}" in line
    assert "batch_conv_only" in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("norm", ["none", "group", "batch_conv_only"])
def test_a_single_example_is_trained_on_without_such_a_norm(norm):
    experiment = sbj.experiment.from_config(
        {"model": {"name": "alexnet", "norm": norm}, "grid": {"batch_sizes": (1,), "base_lrs": (2**-8,)}}
    )
    sbj.driver.require_trainable(experiment, pictures((8, 8, 3)))


def test_what_a_users_model_raises_is_its_own(tmp_path):
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            raise ZeroDivisionError("of the user's")

    line = refused(model=Broken(), workdir=tmp_path / "w")
    assert line.startswith("model: Broken raised ZeroDivisionError: of the user's")
    assert "images of shape" not in line


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((3, 8, 8), "images.transpose(0, 2, 3, 1)"),
        ((6, 8, 8), "if they are [C, H, W]"),
        ((8, 8), "give images[..., None]"),
        ((8, 8, 3), None),
        ((64,), None),
    ],
)
def test_an_own_model_is_warned_of_axes_that_may_not_be_meant(capsys, monkeypatch, shape, says):
    """The model may transpose its images itself, but uint8 is normalised over the last axis."""
    monkeypatch.setattr("smallbatch_jax.runner.grid._train", lambda *given: (_ for _ in ()).throw(InputError("enough")))
    assert refused(model=Flat(), dataset=pictures(shape)) == "enough"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (says is not None)
    assert all(line.startswith("warning: dataset: ") and says in line for line in warnings)


def test_home_and_an_empty_workdir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    frame = quiet(Mlp(), table(), np.array([8]), [np.float64(2**-8)], epochs=np.int64(1), seeds=range(1), workdir="~/w")
    assert (tmp_path / "w/experiment.json").exists()
    pd.testing.assert_frame_equal(sbj.results.load("~/w"), frame)
    assert len(sbj.results.load_timings("~/w"))
    for workdir in ("", "~nobody_here/w"):
        with pytest.raises(InputError, match=r"workdir: (empty|.* no such user)"):
            quiet(Mlp(), table(), [8], [2**-8], epochs=1, workdir=workdir)
