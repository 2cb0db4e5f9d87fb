"""The paper's models as Flax linen modules: pure `init(key, images)` and `apply(variables, images, train=…)`."""

import pkgutil
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.config import fields
from smallbatch_jax.config.catalog import MODELS, NORMS, require_norm
from smallbatch_jax.config.experiment import InputError, Model

EXAMPLES_AT_ONCE = 32  # on CPU; the activations of so few examples stay in the cache


def micro_batch_size(
    norm: str, examples: int, bn_batch_size: int, most: int | None = None, platform: str = "cpu"
) -> int | None:
    """Returns the number of examples per micro-batch of a shard; None to compute the whole shard at once.

    A step averages the gradients of the micro-batches, which changes rounding only. A micro-batch holds whole BN groups, so
    ordinary batch norm (b = m) cannot use micro-batches.

    Args:
      norm: the model's norm, as in `create_model`.
      examples: examples in a shard.
      bn_batch_size: b.
      most: upper limit on the size, unless a BN group is larger; None chooses the fastest size, about 32 on CPU.
      platform: "cpu", "gpu" or "tpu".
    """
    if most is None and platform != "cpu":
        return None
    group = min(bn_batch_size, examples) if NORMS[norm].batch_statistics else 1
    limit = most or EXAMPLES_AT_ONCE
    size = max((n for n in range(group, max(limit, group) + 1, group) if examples % n == 0), default=examples)
    too_small = most is None and size < EXAMPLES_AT_ONCE // 2
    return None if size == examples or too_small else size


def create_model(
    name: str,
    num_classes: int,
    norm: str = "batch",
    bn_batch_size: int | None = None,
    *,
    bn_decay: float = 0.99,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    platform: str | None = None,
) -> nn.Module:
    """Returns a model of the paper, by name.

    Args:
      name: an entry of `config.catalog.MODELS`: "alexnet", the reduced AlexNet of §3.1; "resnet8", "resnet20" or "resnet32"
        of He et al. (2015a) for CIFAR; "resnet50" of the same paper for ImageNet (§3.5).
      num_classes: logits per image.
      norm: "none", "batch", "group" (Wu & He 2018), "batch_renorm" (Ioffe 2017), or for alexnet alone "batch_conv_only"
        (Fig. 6).
      bn_batch_size: b, examples per BN group (§3.6), which must divide the batch; None takes the whole batch.
      bn_decay: weight of the old running average of batch-norm statistics at each step.
      axis_name: mesh axis over which a batch is sharded; None if it is not.
      dtype: computation dtype; parameters and statistics are float32.
      platform: "cpu", "gpu" or "tpu", the target of compilation; None decides at compile time.

    Returns:
      A linen Module: `init(key, images)` gives the variables, `apply(variables, images, train=False)` the logits
      float32[N, num_classes]. Images are float32[N, H, W, C], normalised by the training set's channel mean and deviation.
      Gradients and second derivatives are supported; forward mode (`jax.jvp` of the model itself) is not.

    Raises:
      InputError: if there is no such model, the model has no such norm, or bn_batch_size or bn_decay is given for a norm
        without batch statistics.
    """
    fields.choice(MODELS, "model")("model.name", name)
    require_norm(name, norm)
    fields.integer(1)("num_classes", num_classes)
    if bn_batch_size is not None:
        fields.integer(1)("bn_batch_size", bn_batch_size)
    for field, value, default in (("bn_batch_size", bn_batch_size, None), ("bn_decay", bn_decay, Model.bn_decay)):
        if value != default and not NORMS[norm].batch_statistics:
            raise InputError(f"{field}: got {value}, but the norm {norm!r} has no batch statistics; leave it {default}.")
    entry = MODELS[name]
    return pkgutil.resolve_name(entry.module)(
        **entry.arguments,
        num_classes=num_classes,
        norm=norm,
        bn_batch_size=bn_batch_size,
        bn_decay=fields.below_one("bn_decay", bn_decay),
        axis_name=axis_name,
        dtype=dtype,
        platform=platform,
    )
