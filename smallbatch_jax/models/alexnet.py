"""The paper's reduced AlexNet (§3.1)."""

import jax
from flax import linen as nn

from smallbatch_jax.config.catalog import NORMS
from smallbatch_jax.models.layers import PaperModel, relu
from smallbatch_jax.models.pool import max_pool

SMALLEST_IMAGE = 8


class AlexNet(PaperModel):
    """AlexNet (Krizhevsky et al. 2012), reduced for small images as §3.1 says; 472,794 parameters at 32×32×3, 10 classes.

    From the paper: five convolutions of stride 1, kernels 5, 3, 3, 3, 3, channels 16, 48, 96, 64, 64; 3×3 max pools of
    stride 2; two hidden layers of 256 units; He initialisation. Chosen here, where the paper is silent: ReLU; the pools
    follow convolutions 1, 2 and 5 as in the original; SAME padding everywhere (32 → 16 → 8 → 4); no dropout and no
    local response normalisation; biases start at 0; batch norm stands between a layer and its ReLU, in place of the
    layer's bias, and never on the logits.

    `norm` "batch" normalises after every convolution and hidden layer (Fig. 5), "batch_conv_only" after convolutions only
    (Fig. 6). "group" and "batch_renorm" normalise where "batch" does.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits float32[N, num_classes] of normalised images float32[N, H, W, C], H and W at least 8."""
        if min(images.shape[1:3]) < SMALLEST_IMAGE:
            height, width = images.shape[1:3]
            raise ValueError(f"alexnet: got images of {height}x{width} pixels, needs at least 8x8")
        dense_norm = self.norm if NORMS[self.norm].after_dense else "none"
        x = images.astype(self.dtype)
        for index, (size, features) in enumerate(zip((5, 3, 3, 3, 3), (16, 48, 96, 64, 64), strict=True)):
            x = relu(self.conv(x, features, size, 1, train, f"conv{index + 1}", self.norm))
            x = max_pool(x) if index in (0, 1, 4) else x
        x = x.reshape(len(images), -1)
        for name in ("dense1", "dense2"):
            x = self.dense(x, 256, name, bias=dense_norm == "none")
            x = relu(self.normalise(x, dense_norm, train, f"{name}_norm"))
        return self.logits(x)
