"""The networks: their shapes, parameters, initialisation and precision."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import assert_all_close, normal

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.models import create_model, resnet
from smallbatch_jax.models import layers as layers_module
from smallbatch_jax.models.conv import conv
from smallbatch_jax.models.layers import Conv, Dense


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [(Conv(64, (3, 3)), (1, 8, 8, 16), 144), (Dense(256), (1, 100), 100)],
    ids=["Conv", "Dense"],
)
def test_kernels_start_as_he_gaussians_and_biases_at_zero(layer, shape, fan_in):
    """The deviation is √(2/fan-in), and the Gaussian is not truncated: 1.24 % lies beyond 2.5 deviations."""
    params = layer.init(jax.random.key(0), jnp.zeros(shape))["params"]
    kernel = np.asarray(params["kernel"]) / math.sqrt(2 / fan_in)
    assert abs(kernel.mean()) < 0.03
    assert kernel.std() == pytest.approx(1, abs=0.03)
    assert np.mean(np.abs(kernel) > 2.5) == pytest.approx(0.0124, abs=0.004)
    assert not params["bias"].any()


def shapes_of(model, height=32, width=32, channels=3):
    """Returns the shapes of a model's variables and of its layers' outputs; nothing is computed."""
    images = jax.ShapeDtypeStruct((4, height, width, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    apply = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    logits, state = jax.eval_shape(apply, variables, images)
    layers = {name: layer for name, layer in state["intermediates"].items() if "__call__" in layer}
    outputs = {name: layer["__call__"][0].shape for name, layer in layers.items()}
    return variables, outputs | {"": logits.shape}


def test_alexnet_has_472_794_parameters_and_halves_the_image_three_times():
    """At 32×32×3 with 10 classes and no norm (§3.1), it has 32 → 16 → 8 → 4 pixels, then 256, 256, 10 units."""
    variables, outputs = shapes_of(create_model("alexnet", 10, norm="none"))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == 472_794
    convolved = {"conv1": (4, 32, 32, 16), "conv2": (4, 16, 16, 48), "conv3": (4, 8, 8, 96)}
    convolved |= {"conv4": (4, 8, 8, 64), "conv5": (4, 8, 8, 64)}
    assert outputs == {**convolved, "dense1": (4, 256), "dense2": (4, 256), "logits": (4, 10), "": (4, 10)}
    assert variables["params"]["dense1"]["kernel"].shape == (4 * 4 * 64, 256)
    assert [variables["params"][f"conv{i}"]["kernel"].shape[0] for i in range(1, 6)] == [5, 3, 3, 3, 3]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (11, 8), (8, 13), (33, 31)])
def test_alexnet_takes_images_from_8_by_8(height, width):
    """Odd sizes and other channel counts are accepted too."""
    assert shapes_of(create_model("alexnet", 7, norm="none"), height, width, channels=1)[1][""] == (4, 7)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7), (1, 1)])
def test_alexnet_refuses_smaller_images(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} pixels, needs at least 8x8"):
        shapes_of(create_model("alexnet", 10, norm="none"), height, width)


@pytest.mark.parametrize(
    ("norm", "normalised"),
    [
        ("none", []),
        ("batch", ["conv1", "conv2", "conv3", "conv4", "conv5", "dense1", "dense2"]),
        ("batch_conv_only", ["conv1", "conv2", "conv3", "conv4", "conv5"]),
    ],
)
def test_alexnet_normalises_the_layers_that_its_norm_names(norm, normalised):
    """Those have no bias of their own; the others, which always include the logits, have one and no norm."""
    variables, _ = shapes_of(create_model("alexnet", 10, norm=norm))
    layers = ["conv1", "conv2", "conv3", "conv4", "conv5", "dense1", "dense2", "logits"]
    expected = {layer: {"kernel"} if layer in normalised else {"kernel", "bias"} for layer in layers}
    expected |= {f"{layer}_norm": {"scale", "bias"} for layer in normalised}
    assert {name: set(leaves) for name, leaves in variables["params"].items()} == expected
    assert set(variables.get("batch_stats", {})) == {f"{layer}_norm" for layer in normalised}
    assert set(variables) == ({"params", "batch_stats"} if normalised else {"params"})


@pytest.mark.long
def test_resnet50_has_25_557_032_parameters(monkeypatch):
    """With 1000 classes and batch norm, 53 convolutions have 23,454,912, their norms 53,120 and the logits 2,049,000."""
    convolved = []
    monkeypatch.setattr(layers_module, "conv", lambda *args: convolved.append(y := conv(*args)) or y)
    variables, outputs = shapes_of(create_model("resnet50", 1000), 224, 224)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == 25_557_032
    assert outputs[""] == (4, 1000)
    sides = [y.shape[1] for y in convolved[-53:]]
    assert sides == [112, *[56] * 10, *[28] * 13, *[14] * 19, *[7] * 10]  # the first convolution of a stage has the stride
    kernels = {name: layer["kernel"].shape for name, layer in variables["params"].items() if "kernel" in layer}
    assert len(kernels) == 53 + 1
    assert kernels["stem"] == (7, 7, 3, 64)
    assert [kernels[f"stage3_block1_{name}"] for name in ("conv1", "conv2", "conv3", "shortcut")] == [
        *((1, 1, 512, 256), (3, 3, 256, 256), (1, 1, 256, 1024), (1, 1, 512, 1024)),
    ]
    assert [name for name in kernels if name.endswith("shortcut")] == [
        f"stage{stage}_block1_shortcut" for stage in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("norm", "leaves"),
    [
        ("batch", set()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("none", {"bias"}), ("group", set()), ("batch_renorm", set()))
        ),
    ],
)
def test_resnet50_has_a_norm_or_a_bias_after_each_convolution(norm, leaves):
    """There are 53 of either; the logits have a bias and no norm. In bfloat16, variables and logits are float32 too."""
    model = create_model("resnet50", 10, norm, dtype=jnp.bfloat16)
    variables, _ = shapes_of(model)
    params = variables["params"]
    convolutions = [name for name, layer in params.items() if layer.get("kernel", jnp.zeros(())).ndim == 4]
    assert len(convolutions) == 53
    assert all(set(params[name]) == {"kernel"} | leaves for name in convolutions)
    norms = set() if norm == "none" else {f"{name}_norm" for name in convolutions}
    assert set(params) == {*convolutions, *norms, "logits"}
    assert set(variables.get("batch_stats", {})) == (norms if norm.startswith("batch") else set())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 33, 47, 3), jnp.float32))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_train_defaults_to_false(norm):
    """`apply(variables, images)` equals train=False: nothing is mutable, and any number of images is accepted."""
    model = create_model("alexnet", 10, norm=norm, bn_batch_size=2 if norm == "batch" else None)
    variables, _ = shapes_of(model, 8, 8)
    images = jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.float32)  # b = 2 does not divide it: only training cares
    by_default = jax.make_jaxpr(model.apply)(variables, images)
    evaluation = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert str(by_default) == str(evaluation)
    if norm == "batch":
        with pytest.raises(ValueError, match="does not divide the batch of 3"):
            jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)


def test_bfloat16_model_has_float32_variables_and_logits():
    model = create_model("alexnet", 10, norm="batch", dtype=jnp.bfloat16)
    variables, _ = shapes_of(model, 8, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "alxnet"}, r"^model\.name: unknown model 'alxnet'; did you mean 'alexnet'\? Known: alexnet"),
        ({"name": None}, r"^model\.name: unknown model None\. Known: alexnet"),
        ({"norm": "bach"}, r"^model\.norm: unknown norm 'bach'; did you mean 'batch'\? Known: none, batch, "),
        ({"num_classes": 0}, r"^num_classes: got 0, accepts an integer from 1"),
        ({"bn_batch_size": 0}, r"^bn_batch_size: got 0, accepts an integer from 1"),
        ({"bn_batch_size": 2.0}, r"^bn_batch_size: got 2\.0, accepts an integer from 1"),
        (
            {"norm": "none", "bn_batch_size": 8},
            r"^bn_batch_size: got 8, but the norm 'none' has no batch statistics; leave it None",
        ),
        (
            {"norm": "group", "bn_decay": 0.9},
            r"^bn_decay: got 0\.9, but the norm 'group' has no batch statistics; leave it 0\.99",
        ),
    ],
)
def test_create_model_refuses_what_there_is_not(arguments, message):
    """The message names the field and, where a name is near, suggests it."""
    with pytest.raises(InputError, match=message):
        create_model(**{"name": "alexnet", "num_classes": 10, **arguments})


@pytest.mark.parametrize(("norm", "bn_batch_size"), [("none", None), ("batch", None), ("batch_renorm", 2)])
def test_for_a_tpu_a_resnet_trains_on_rows_of_few_images_as_on_the_images(norm, bn_batch_size, monkeypatch):
    """Logits, gradients, and the logits that the updated running averages give agree to rounding."""
    images, labels = normal(4, 8, 8, 3), jnp.arange(4)
    model = create_model("resnet8", 10, norm, bn_batch_size, platform="tpu")
    variables = create_model("resnet8", 10, norm, bn_batch_size).init(jax.random.key(0), images)

    def loss(params):
        logits, updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[labels, labels].sum(), (logits, updated)

    def step(variables):
        grads, (logits, updated) = jax.grad(loss, has_aux=True)(variables["params"])
        return grads, logits, model.apply(variables | updated, images)

    assert "f32[32,8,9]" in str(jax.make_jaxpr(step)(variables))  # each row with its two neighbours as channels
    of_rows = jax.jit(step)(variables)
    monkeypatch.setattr(resnet, "FEW_IMAGES", 3)
    of_images = jax.jit(lambda variables: step(variables))(variables)
    assert_all_close(*(jax.tree.leaves(found) for found in (of_rows, of_images)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("norm", "size", "images"), [("group", 8, 4), ("batch", 9, 4), ("batch", 8, resnet.FEW_IMAGES + 1)])
def test_for_a_tpu_rows_are_taken_only_where_all_layers_can(norm, size, images):
    model = create_model("resnet8", 10, norm, platform="tpu")
    shape = jax.ShapeDtypeStruct((images, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape)
    assert f"f32[{images},{size},{size},16]" in str(jax.make_jaxpr(model.apply)(variables, shape))
