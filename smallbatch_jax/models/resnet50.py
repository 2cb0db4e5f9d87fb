"""The residual networks of bottleneck blocks of He et al. (2015a) for ImageNet; of 50 layers in §3.5."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.models.layers import Conv, Dense, relu
from smallbatch_jax.models.norm import make_norm
from smallbatch_jax.models.pool import max_pool, mean_pool

WIDTHS = (64, 128, 256, 512)  # of the stages' 3×3 convolutions
EXPANSION = 4  # channels that a block puts out, for each of its width


class BottleneckResNet(nn.Module):
    """ResNet of bottleneck blocks (He et al. 2015a, Table 1 and Fig. 5); 50 layers of 3, 4, 6 and 3 blocks.

    A 7×7 convolution of stride 2 and 64 channels and a 3×3 max pool of stride 2, then four stages, each but the first
    halving the image, then global average pooling and one fully-connected layer: 224 → 112 → 56, 28, 14, 7 pixels. A block
    is a 1×1, a 3×3 and a 1×1 convolution, the last of four times the channels; where it halves the image the *first* has
    the stride, as in the paper (later variants, "v1.5", give it to the 3×3). Its shortcut is the identity, or where the
    shape changes a 1×1 convolution of that stride (option B). Normalisation follows each convolution, before the ReLU and
    before the sum, in place of a bias; without normalisation the convolutions have biases. All scales of the normalisation
    start at 1. At 50 layers and 1000 classes 25,557,032 parameters.

    Attributes:
      blocks: of each stage.
      num_classes: logits per image.
      norm: "none", "batch", "group" or "batch_renorm"; see `models.norm`.
      bn_batch_size: examples per batch of the batch norm; None takes the whole batch.
      bn_decay: weight of the old running average at each step.
      axis_name: mesh axis over which a batch is spread.
      dtype: of the computation; parameters and statistics are float32.
    """

    blocks: tuple[int, int, int, int]
    num_classes: int
    norm: str = "batch"
    bn_batch_size: int | None = None
    bn_decay: float = 0.99
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits float32[N, num_classes] of normalised images float32[N, H, W, C], of any size."""
        x = relu(self._conv(images.astype(self.dtype), 64, 7, 2, train, "stem"))
        x = max_pool(x, padding=((1, 1), (1, 1)))  # as in the original: SAME would pad an even image at its end alone
        for stage, (blocks, width) in enumerate(zip(self.blocks, WIDTHS, strict=True)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = self._block(x, width, stride, train, f"stage{stage + 1}_block{block + 1}")
        return Dense(self.num_classes, dtype=self.dtype, name="logits")(mean_pool(x)).astype(jnp.float32)

    def _block(self, x: jax.Array, width: int, stride: int, train: bool, name: str) -> jax.Array:
        features = EXPANSION * width
        y = relu(self._conv(x, width, 1, stride, train, f"{name}_conv1"))
        y = relu(self._conv(y, width, 3, 1, train, f"{name}_conv2"))
        y = self._conv(y, features, 1, 1, train, f"{name}_conv3")
        if x.shape[-1] != features:
            x = self._conv(x, features, 1, stride, train, f"{name}_shortcut")
        return relu(y + x)

    def _conv(self, x: jax.Array, features: int, size: int, stride: int, train: bool, name: str) -> jax.Array:
        """Convolution of an odd size, padded by half of it on all sides, as in the original, and its normalisation."""
        pads = ((size // 2, size // 2), (size // 2, size // 2))
        bias = self.norm == "none"
        y = Conv(features, (size, size), (stride, stride), pads, use_bias=bias, dtype=self.dtype, name=name)(x)
        norm = make_norm(self.norm, self.bn_batch_size, self.bn_decay, self.axis_name, self.dtype, f"{name}_norm")
        return y if norm is None else norm(y, train)
