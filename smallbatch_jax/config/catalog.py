"""Models, norms and optimizers: one entry for each, with what config validation, programs, figures and answers know about it.

A new norm is a module and an entry in NORMS; a new model is a module and an entry in MODELS; a new optimizer is a function in
`optim.py` and an entry in OPTIMIZERS. They are named, not imported: `pkgutil.resolve_name` loads "module:attribute".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smallbatch_jax.config import fields
from smallbatch_jax.config.fields import InputError


@dataclass(frozen=True)
class NormEntry:
    """A value of `model.norm`."""

    title: str  # in the legends of figures, as the paper has it
    layer: str | None  # "module:attribute" of the linen module; None for no normalisation
    batch_statistics: bool = False  # whether it normalises over BN groups, which may not be cut, and has running averages
    after_dense: bool = True  # whether it also follows hidden dense layers, not convolutions alone


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
    """A value of `model.name`."""

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
class OptimizerEntry:
    """A value of `optimizer.name`."""

    title: str  # in answers
    make: str  # "module:attribute" of (learning_rate, weight_decay, **scalars) → optax.GradientTransformation
    scalars: Mapping[str, float] = field(default_factory=dict)  # fields of `optimizer` that it takes, and their defaults


ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
OPTIMIZERS = {
    "sgd": OptimizerEntry("SGD without momentum", "smallbatch_jax.optim:sgd"),
    "momentum": OptimizerEntry("SGD with momentum", "smallbatch_jax.optim:heavy_ball", {"momentum": 0.9}),
    "nesterov": OptimizerEntry("SGD with Nesterov momentum", "smallbatch_jax.optim:nesterov", {"momentum": 0.9}),
    "adam": OptimizerEntry("Adam", "smallbatch_jax.optim:adam", ADAM),
    "adamw": OptimizerEntry("AdamW", "smallbatch_jax.optim:adamw", ADAM),
    "lion": OptimizerEntry("Lion", "smallbatch_jax.optim:lion", {"beta1": 0.9, "beta2": 0.99}),
}
# What the learning rate is at batch size m: its text with η̃ = base_lr, and its ratio to η̃.
RULES: dict[str, tuple[str, Callable[[int], float]]] = {
    "linear": ("η̃·m", float),
    "sqrt": ("η̃·√m", math.sqrt),
    "constant": ("η̃", lambda batch_size: 1.0),
}


def require_norm(model: str, norm: str) -> None:
    """Refuses a norm that does not exist or that the model does not accept; a model of the user's own takes any."""
    fields.choice(NORMS, "norm")("model.norm", norm)
    accepted = MODELS[model].norms if model in MODELS else tuple(NORMS)
    if norm not in accepted:
        raise InputError(f"model.norm: {model} has no norm {norm!r}; it accepts {', '.join(accepted)}.")
