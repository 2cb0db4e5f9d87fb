"""The paper's models as Flax linen modules: pure `init(key, images)` and `apply(variables, images, train=…)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.config import fields
from smallbatch_jax.config.experiment import ALL_NORMS, MODEL_NORMS, InputError
from smallbatch_jax.models import blocks
from smallbatch_jax.models.alexnet import AlexNet
from smallbatch_jax.models.resnet import CifarResNet
from smallbatch_jax.models.resnet50 import BottleneckResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "resnet8": partial(CifarResNet, 8),
    "resnet20": partial(CifarResNet, 20),
    "resnet32": partial(CifarResNet, 32),
    "resnet50": partial(BottleneckResNet, (3, 4, 6, 3)),
}


EXAMPLES_AT_ONCE = 32  # on CPU, so that a network's activations stay in the cache


def micro_batch_size(
    norm: str, examples: int, bn_batch_size: int, most: int | None = None, platform: str = "cpu", block: int | None = None
) -> int | None:
    """How many of a device's examples a step should take at a time, their gradients summed; None for all of them at once.

    A part must hold whole batches of the batch norm; with an ordinary batch norm there are no parts. Which examples are
    together changes nothing but rounding, and not that where sums are taken by blocks.

    Args:
      norm: of the model, as for `create_model`.
      examples: of the batch that are on one device.
      bn_batch_size: b.
      most: examples in a part, if whole batches of the batch norm can be so few; None takes what is fastest on this backend,
        on CPU 32 examples.
      block: examples of a block (`models.blocks`), of which a part is then a divisor, or so many as a power of two; None for
        no blocks.
    """
    unit = 1 if norm in ("none", "group") else min(bn_batch_size, examples)
    limit = EXAMPLES_AT_ONCE if most is None else most

    def fits(size: int) -> bool:
        nested = block is None or block % size == 0 or (size % block == 0 and (size // block).bit_count() == 1)
        return examples % size == 0 and nested

    largest = max(filter(fits, range(unit, max(limit, unit) + 1, unit)), default=examples)
    faster = platform == "cpu" and largest >= EXAMPLES_AT_ONCE // 2
    return largest if largest < examples and (faster or most is not None) else None


def blocks_of(norm: str, batch_size: int, bn_batch_size: int) -> blocks.Blocks:
    """How a batch of one of these models is cut so that its sums come out the same on any number of devices.

    Args:
      norm: of the model, as for `create_model`.
      batch_size: m, over all devices.
      bn_batch_size: b.
    """
    size = blocks.block_size(batch_size, bn_batch_size if norm in ("batch", "batch_conv_only", "batch_renorm") else batch_size)
    return blocks.Blocks(size, micro_batch_size(norm, batch_size, bn_batch_size, block=size) or batch_size)


def create_model(
    name: str,
    num_classes: int,
    norm: str = "batch",
    bn_batch_size: int | None = None,
    *,
    bn_decay: float = 0.99,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
) -> nn.Module:
    """A model of the paper, by name.

    Args:
      name: "alexnet", the reduced AlexNet of §3.1; "resnet8", "resnet20" or "resnet32" of He et al. (2015a) for CIFAR;
        "resnet50" of the same for ImageNet (§3.5).
      num_classes: logits per image.
      norm: "none", "batch", "group" (Wu & He 2018), "batch_renorm" (Ioffe 2017), or for alexnet alone "batch_conv_only"
        (Fig. 6).
      bn_batch_size: b, examples per batch of the batch norm (§3.6), which must divide the batch; None takes it whole.
      bn_decay: weight of the old running average of the batch norm's statistics at each step.
      axis_name: mesh axis over which a batch is spread, if it is.
      dtype: of the computation; parameters and statistics are float32.

    Returns:
      A linen Module: `init(key, images)` gives the variables, `apply(variables, images, train=False)` the logits
      float32[N, num_classes]. Images are float32[N, H, W, C], normalised by the training set's channel mean and deviation.

    Raises:
      InputError: if there is no such model, or the model has no such norm.
    """
    fields.choice(tuple(MODEL_NORMS), "model")("model.name", name)
    fields.choice(ALL_NORMS, "norm")("model.norm", norm)
    if norm not in MODEL_NORMS[name]:
        raise InputError(f"model.norm: {name} has no norm {norm!r}; it accepts {', '.join(MODEL_NORMS[name])}.")
    fields.integer(1)("num_classes", num_classes)
    fields.optional(fields.integer(1))("bn_batch_size", bn_batch_size)
    return MODELS[name](
        num_classes=num_classes,
        norm=norm,
        bn_batch_size=bn_batch_size,
        bn_decay=fields.decay("bn_decay", bn_decay),
        axis_name=axis_name,
        dtype=dtype,
    )
