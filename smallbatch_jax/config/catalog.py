"""Models and norms: one entry for each, with what config validation, `models`, figures and protocol know about it.

A new norm is a module and an entry in NORMS; a new model is a module and an entry in MODELS. Modules are named, not imported:
`pkgutil.resolve_name` loads "module:attribute".
"""

from collections.abc import Mapping
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


def require_norm(model: str, norm: str) -> None:
    """Refuses a norm that does not exist or that the model does not accept; a model of the user's own takes any."""
    fields.choice(NORMS, "norm")("model.norm", norm)
    accepted = MODELS[model].norms if model in MODELS else tuple(NORMS)
    if norm not in accepted:
        raise InputError(f"model.norm: {model} has no norm {norm!r}; it accepts {', '.join(accepted)}.")
