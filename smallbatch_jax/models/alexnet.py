"""The paper's reduced AlexNet (§3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.models.layers import Conv, Dense, relu
from smallbatch_jax.models.norm import make_norm
from smallbatch_jax.models.pool import max_pool

SMALLEST_IMAGE = 8


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky et al. 2012), reduced for small images as §3.1 says; 472,794 parameters at 32×32×3, 10 classes.

    From the paper: five convolutions of stride 1, kernels 5, 3, 3, 3, 3, channels 16, 48, 96, 64, 64; 3×3 max pools of
    stride 2; two hidden layers of 256 units; He initialisation. Chosen here, where the paper is silent: ReLU; the pools
    follow convolutions 1, 2 and 5 as in the original; SAME padding everywhere (32 → 16 → 8 → 4); no dropout and no
    local response normalisation; biases start at 0; batch norm stands between a layer and its ReLU, in place of the
    layer's bias, and never on the logits.

    Attributes:
      num_classes: logits per image.
      norm: "none"; "batch" after every convolution and hidden layer (Fig. 5); "batch_conv_only" after convolutions only
        (Fig. 6); "group" or "batch_renorm" in the places of "batch".
      bn_batch_size: examples per batch of the batch norm; None takes the whole batch.
      bn_decay: weight of the old running average at each step.
      axis_name: mesh axis over which a batch is spread.
      dtype: of the computation; parameters and statistics are float32.
    """

    num_classes: int
    norm: str = "batch"
    bn_batch_size: int | None = None
    bn_decay: float = 0.99
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits float32[N, num_classes] of normalised images float32[N, H, W, C], H and W at least 8."""
        if min(images.shape[1:3]) < SMALLEST_IMAGE:
            height, width = images.shape[1:3]
            raise ValueError(f"alexnet: got images of {height}x{width} pixels, needs at least 8x8")
        norm_conv, norm_dense = self.norm != "none", self.norm not in ("none", "batch_conv_only")
        x = images.astype(self.dtype)
        for index, (kernel, features) in enumerate(zip((5, 3, 3, 3, 3), (16, 48, 96, 64, 64), strict=True)):
            name = f"conv{index + 1}"
            x = Conv(features, (kernel, kernel), use_bias=not norm_conv, dtype=self.dtype, name=name)(x)
            x = relu(self._norm(f"{name}_norm")(x, train) if norm_conv else x)
            x = max_pool(x) if index in (0, 1, 4) else x
        x = x.reshape(len(images), -1)
        for index in range(2):
            x = Dense(256, use_bias=not norm_dense, dtype=self.dtype, name=f"dense{index + 1}")(x)
            x = relu(self._norm(f"dense{index + 1}_norm")(x, train) if norm_dense else x)
        return Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)

    def _norm(self, name: str) -> Any:
        kind = "batch" if self.norm == "batch_conv_only" else self.norm
        return make_norm(kind, self.bn_batch_size, self.bn_decay, self.axis_name, self.dtype, name)
