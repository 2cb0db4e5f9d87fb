"""The residual networks of He et al. (2015a) for CIFAR: 8, 20 and 32 layers (§3.1)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from smallbatch_jax.config.catalog import NORMS
from smallbatch_jax.models.layers import PaperModel, relu

# Largest batch that a TPU processes as rows, in float32 and bfloat16. Whole images cost the same up to 128, rows in proportion
# to the images; the compiler estimates equal costs at 85 images (ResNet-8, float32) and 45 (ResNet-20, bfloat16).
FEW_IMAGES, FEW_IMAGES_ROUNDED = 80, 48


class CifarResNet(PaperModel):
    """ResNet of 6n+2 layers for small images (He et al. 2015a, §4.2); 0.27 M parameters at 20 layers, 0.46 M at 32.

    A 3×3 convolution, then three stages of n blocks with 16, 32 and 64 channels, each stage but the first halving the
    image, then global average pooling and one fully-connected layer. A block is two 3×3 convolutions; its shortcut has
    no parameters (option A): where the shape changes it takes every second pixel and pads the channels with zeros, half
    on either side. Normalisation follows each convolution, before the ReLU and before the sum, in place of a bias;
    without normalisation the convolutions have biases. On a TPU small batches are processed as rows, float[N·H, W, C].

    Attributes:
      depth: number of layers, 6n+2.
    """

    depth: int = 8

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits float32[N, num_classes] of normalised images float32[N, H, W, C]."""
        blocks, remainder = divmod(self.depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth: got {self.depth}, must be 6n+2")
        x, n = images.astype(self.dtype), self._images_of_rows(images)
        if n:
            x = x.reshape(-1, *x.shape[2:])
        x = relu(self.conv(x, 16, 3, 1, train, "stem", self.norm, n))
        for stage, features in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = self.block(x, features, stride, train, f"stage{stage + 1}_block{block + 1}", n)
        return self.logits(x.reshape(len(images), -1, *x.shape[-2:]).mean((1, 2)))

    def _images_of_rows(self, images: jax.Array) -> int | None:
        """Returns N if the rows of N images, all one axis, fill a TPU's tiles better than the images do; else None."""
        n, height, width, _ = images.shape
        fits = not (height % 4 or width % 4) and (self.norm == "none" or NORMS[self.norm].batch_statistics)
        few = FEW_IMAGES_ROUNDED if self.dtype == jnp.bfloat16 else FEW_IMAGES
        return n if self.platform == "tpu" and fits and n <= few else None

    def block(self, x: jax.Array, features: int, stride: int, train: bool, name: str, images: int | None = None) -> jax.Array:
        y = relu(self.conv(x, features, 3, stride, train, f"{name}_conv1", self.norm, images))
        y = self.conv(y, features, 3, 1, train, f"{name}_conv2", self.norm, images)
        new = features - x.shape[-1]
        shortcut = x[..., ::stride, ::stride, :]
        shortcut = jnp.pad(shortcut, (*((0, 0),) * (x.ndim - 1), (new // 2, new - new // 2)))
        return relu(y + shortcut)
