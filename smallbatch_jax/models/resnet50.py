"""The bottleneck residual networks of He et al. (2015a) for ImageNet; §3.5 uses 50 layers."""

import jax
from flax import linen as nn

from smallbatch_jax.models.layers import PaperModel, relu
from smallbatch_jax.models.pool import max_pool

WIDTHS = (64, 128, 256, 512)  # channels of the stages' 3×3 convolutions
EXPANSION = 4  # output channels of a block ÷ its width


class BottleneckResNet(PaperModel):
    """ResNet of bottleneck blocks (He et al. 2015a, Table 1 and Fig. 5); at 50 layers and 1000 classes 25,557,032 parameters.

    A 7×7 convolution of stride 2 and 64 channels and a 3×3 max pool of stride 2, then four stages, each but the first
    halving the image, then global average pooling and one fully-connected layer: 224 → 112 → 56, 28, 14, 7 pixels. A block
    is a 1×1, a 3×3 and a 1×1 convolution, the last with four times the channels; where it halves the image the *first* has
    the stride, as in the paper ("v1.5" gives it to the 3×3). Its shortcut is the identity, or where the
    shape changes a 1×1 convolution of that stride (option B). Normalisation follows each convolution, before the ReLU and
    before the sum, in place of a bias; without normalisation the convolutions have biases. All scales of the normalisation
    start at 1.

    Attributes:
      blocks: number of blocks in each stage; (3, 4, 6, 3) is ResNet-50.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits float32[N, num_classes] of normalised images float32[N, H, W, C], of any size."""
        x = relu(self.conv(images.astype(self.dtype), 64, 7, 2, train, "stem", self.norm))
        x = max_pool(x, padding=((1, 1), (1, 1)))  # as in the original: SAME would pad an even image at its end alone
        for stage, (blocks, width) in enumerate(zip(self.blocks, WIDTHS, strict=True)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = self.block(x, width, stride, train, f"stage{stage + 1}_block{block + 1}")
        return self.logits(x.mean((1, 2)))

    def block(self, x: jax.Array, width: int, stride: int, train: bool, name: str) -> jax.Array:
        features = EXPANSION * width
        y = relu(self.conv(x, width, 1, stride, train, f"{name}_conv1", self.norm))
        y = relu(self.conv(y, width, 3, 1, train, f"{name}_conv2", self.norm))
        y = self.conv(y, features, 1, 1, train, f"{name}_conv3", self.norm)
        if x.shape[-1] != features:
            x = self.conv(x, features, 1, stride, train, f"{name}_shortcut", self.norm)
        return relu(y + x)
