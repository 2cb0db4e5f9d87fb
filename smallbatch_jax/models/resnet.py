"""The residual networks of He et al. (2015a) for CIFAR: 8, 20 and 32 layers (§3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.models.fusion import computed_once
from smallbatch_jax.models.layers import Conv, Dense, relu
from smallbatch_jax.models.norm import make_norm
from smallbatch_jax.models.pool import max_pool, mean_pool


class CifarResNet(nn.Module):
    """ResNet of 6n+2 layers for small images (He et al. 2015a, §4.2).

    A 3×3 convolution, then three stages of n blocks with 16, 32 and 64 channels, each stage but the first halving the
    image, then global average pooling and one fully-connected layer. A block is two 3×3 convolutions; its shortcut has
    no parameters (option A): where the shape changes it takes every second pixel and pads the channels with zeros, half
    on either side. Normalisation follows each convolution, before the ReLU and before the sum, in place of a bias;
    without normalisation the convolutions have biases. 0.27 M parameters at 20 layers, 0.46 M at 32.

    Attributes:
      depth: 6n+2.
      num_classes: logits per image.
      norm: "none", "batch", "group" or "batch_renorm"; see `models.norm`.
      bn_batch_size: examples per batch of the batch norm; None takes the whole batch.
      bn_decay: weight of the old running average at each step.
      axis_name: mesh axis over which a batch is spread.
      dtype: of the computation; parameters and statistics are float32.
    """

    depth: int
    num_classes: int
    norm: str = "batch"
    bn_batch_size: int | None = None
    bn_decay: float = 0.99
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits float32[N, num_classes] of normalised images float32[N, H, W, C]."""
        blocks, remainder = divmod(self.depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth: got {self.depth}, must be 6n+2")
        x = relu(self._conv(images.astype(self.dtype), 16, 1, train, "stem"))
        for stage, features in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = self._block(x, features, stride, train, f"stage{stage + 1}_block{block + 1}")
        return Dense(self.num_classes, dtype=self.dtype, name="logits")(mean_pool(x)).astype(jnp.float32)

    def _block(self, x: jax.Array, features: int, stride: int, train: bool, name: str) -> jax.Array:
        y = relu(self._conv(x, features, stride, train, f"{name}_conv1"))
        y = self._conv(y, features, 1, train, f"{name}_conv2")
        return relu(y + _shortcut(x, features, stride))

    def _conv(self, x: jax.Array, features: int, stride: int, train: bool, name: str) -> jax.Array:
        """3×3 convolution with padding 1 on all sides, as in the original, and its normalisation."""
        pads = ((1, 1), (1, 1))
        y = Conv(features, (3, 3), (stride, stride), pads, use_bias=self.norm == "none", dtype=self.dtype, name=name)(x)
        norm = make_norm(self.norm, self.bn_batch_size, self.bn_decay, self.axis_name, self.dtype, f"{name}_norm")
        return y if norm is None else norm(y, train)


def _shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """The identity, or every `stride`-th pixel with zeros for the channels that are new (He et al. 2015a, option A)."""
    new = features - x.shape[-1]
    if stride == 1 and new == 0:
        return x
    # Windows of one pixel each: every stride-th, with a gradient faster than a slice's.
    x = computed_once(max_pool(x, (1, 1), (stride, stride)))
    before, after = (jnp.zeros((*x.shape[:-1], zeros), x.dtype) for zeros in (new // 2, new - new // 2))
    return computed_once(jnp.concatenate([before, x, after], -1))
