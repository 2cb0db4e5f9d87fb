"""Models, norms, tasks, metrics, diagnostics and optimizers: an entry for each, with what config, programs and figures need.

A new norm is a module and an entry in NORMS; a new model is a module and an entry in MODELS; a new optimizer is a function in
`optim.py` and an entry in OPTIMIZERS. They are named, not imported: `pkgutil.resolve_name` loads "module:attribute".
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smallbatch_jax.config import fields
from smallbatch_jax.config.fields import InputError


@dataclass(frozen=True)
class NormEntry:
    """Description of a value of `model.norm`."""

    title: str  # in the legends of figures, as in the paper
    layer: str | None  # "module:attribute" of the linen module; None for no normalisation
    batch_statistics: bool = False  # whether it normalises over BN groups, which must not be split, and has running averages
    after_dense: bool = True  # whether it also follows hidden dense layers, not only convolutions


NORMS = {
    "none": NormEntry("noBN", None),
    "batch": NormEntry("BN", "smallbatch_jax.models.norm:BatchNorm", batch_statistics=True),
    "group": NormEntry("GN", "smallbatch_jax.models.norm:GroupNorm"),
    "batch_renorm": NormEntry("BRN", "smallbatch_jax.models.norm:BatchRenorm", batch_statistics=True),
    "batch_conv_only": NormEntry(
        "BN conv only", "smallbatch_jax.models.norm:BatchNorm", batch_statistics=True, after_dense=False
    ),
}
EVERYWHERE = tuple(name for name, norm in NORMS.items() if norm.after_dense)


@dataclass(frozen=True)
class ModelEntry:
    """Description of a value of `model.name`."""

    title: str  # in the legends of figures
    module: str  # "module:attribute" of the linen module
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the module, beyond those of `models.create_model`
    norms: tuple[str, ...] = EVERYWHERE  # names in NORMS that it accepts
    weight_decay: float = 1e-4  # λ of the paper's experiments (§3.1)


MODELS = {
    "alexnet": ModelEntry("AlexNet", "smallbatch_jax.models.alexnet:AlexNet", norms=tuple(NORMS), weight_decay=5e-4),
    **{
        f"resnet{depth}": ModelEntry(f"ResNet-{depth}", "smallbatch_jax.models.resnet:CifarResNet", {"depth": depth})
        for depth in (8, 20, 32)
    },
    "resnet50": ModelEntry("ResNet-50", "smallbatch_jax.models.resnet50:BottleneckResNet", {"blocks": (3, 4, 6, 3)}),
}


@dataclass(frozen=True)
class TaskEntry:
    """Description of a value of `task`."""

    loss: str  # "module:attribute" of (outputs, batch) → float32[n]
    metrics: tuple[str, ...]  # names in METRICS that are always reported
    select: tuple[str, str]  # the results column that ranks runs, and "max" or "min"; `select` overrides it
    smoothing: bool = True  # whether its loss takes label smoothing


TASKS = {
    "classification": TaskEntry("smallbatch_jax.program.tasks:cross_entropy", ("accuracy",), ("test_accuracy", "max")),
    "regression": TaskEntry("smallbatch_jax.program.tasks:squared_error", (), ("test_loss", "min"), smoothing=False),
    "next_token": TaskEntry("smallbatch_jax.program.tasks:next_token_cross_entropy", ("accuracy",), ("test_loss", "min")),
}


@dataclass(frozen=True)
class MetricEntry:
    """Description of a value of `metrics`, reported beside the loss."""

    title: str  # in figures and tables, after "test"
    functions: Mapping[str, str]  # "module:attribute" of (outputs, batch) → [n], by the task that has the metric
    fraction: bool = False  # whether it is shown in percent
    guesses: int = 0  # k of a top-k accuracy, so that chance is k / num_classes; 0: not known


METRICS = {
    "accuracy": MetricEntry(
        "accuracy",
        {
            "classification": "smallbatch_jax.program.tasks:correct",
            "next_token": "smallbatch_jax.program.tasks:correct_tokens",
        },
        fraction=True,
        guesses=1,
    ),
    "top5_accuracy": MetricEntry("top-5 accuracy", {"classification": "smallbatch_jax.program.tasks:in_top5"}, True, 5),
    "absolute_error": MetricEntry("absolute error", {"regression": "smallbatch_jax.program.tasks:absolute_error"}),
}


@dataclass(frozen=True)
class DiagnosticEntry:
    """Description of a value of `diagnostics`, computed at each evaluation from sub-batches of sampled training examples."""

    compute: str  # "module:attribute" of a function from a `program.diagnostics.Sample` to float[] per column
    columns: tuple[str, ...]  # of the results
    share: int  # the sample is one in `share` training examples,
    examples: int  # but at least this many,
    sub_batches: int  # in about this many sub-batches unless BN groups require another size,
    least: int  # and in at least this many sub-batches


DIAGNOSTICS = {
    "noise_scale": DiagnosticEntry(
        "smallbatch_jax.program.noise_scale:noise_scale",
        ("train_noise_scale", "train_noise_scale_error"),
        *(48, 0, 32, 4),
    ),
    "sharpness": DiagnosticEntry(
        "smallbatch_jax.program.sharpness:sharpness",
        ("train_sharpness",),
        *(128, 128, 1, 1),
    ),
}


def diagnostic_columns(names: Iterable[str]) -> list[str]:
    """Returns the results columns of these diagnostics."""
    return [column for name in names for column in DIAGNOSTICS[name].columns]


@dataclass(frozen=True)
class OptimizerEntry:
    """Description of a value of `optimizer.name`."""

    title: str  # in answers
    make: str  # "module:attribute" of (learning_rate, weight_decay, **scalars) → optax.GradientTransformation
    scalars: Mapping[str, float] = field(default_factory=dict)  # fields of `optimizer` that it takes, and their defaults


DECAY_RATES = ("momentum", "beta1", "beta2")  # scalars in [0, 1) that weight an old average, to which `beta_rule` applies
ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
OPTIMIZERS = {
    "sgd": OptimizerEntry("SGD without momentum", "smallbatch_jax.optim:sgd"),
    "momentum": OptimizerEntry("SGD with momentum", "smallbatch_jax.optim:heavy_ball", {"momentum": 0.9}),
    "nesterov": OptimizerEntry("SGD with Nesterov momentum", "smallbatch_jax.optim:nesterov", {"momentum": 0.9}),
    "adam": OptimizerEntry("Adam", "smallbatch_jax.optim:adam", ADAM),
    "adamw": OptimizerEntry("AdamW", "smallbatch_jax.optim:adamw", ADAM),
    "lion": OptimizerEntry("Lion", "smallbatch_jax.optim:lion", {"beta1": 0.9, "beta2": 0.99}),
}
# Scalars of a run that a grid may cross with its other axes, and the field of `grid` that lists their values.
AXES = {
    "weight_decay": "weight_decays",
    "warmup_fraction": "warmup_fractions",
    "momentum": "momenta",
    "beta1": "beta1s",
    "beta2": "beta2s",
    "beta1_half_life": "beta1_half_lives",
    "beta2_half_life": "beta2_half_lives",
    "epsilon": "epsilons",
}
OWN_SCALAR = "scalar_"  # prefix of the column of an own optimizer's scalar (`grid.scalars`)
# Learning rate at batch size m: its formula as text, with η̃ = base_lr, and its ratio to η̃.
RULES: dict[str, tuple[str, Callable[[int], float]]] = {
    "linear": ("η̃·m", float),
    "sqrt": ("η̃·√m", math.sqrt),
    "constant": ("η̃", lambda batch_size: 1.0),
}


def require_norm(model: str, norm: str) -> None:
    """Raises InputError for a norm that does not exist or that the model does not accept; own models accept any."""
    fields.choice(NORMS, "norm")("model.norm", norm)
    accepted = MODELS[model].norms if model in MODELS else tuple(NORMS)
    if norm not in accepted:
        raise InputError(f"model.norm: {model} has no norm {norm!r}; it accepts {', '.join(accepted)}.")
