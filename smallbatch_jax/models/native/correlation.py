"""The shape of a convolution."""

from typing import NamedTuple

Pair = tuple[int, int]


class Correlation(NamedTuple):
    """y[a] = Σ_i x[(a·stride + i - low) / dilation] kernel[i], over the taps i that meet a pixel of x.

    Of images [N, H, W, C] and a kernel [kh, kw, C, O], as outputs [N, H', W', O].
    """

    sizes: Pair  # H, W
    channels: int  # C
    features: int  # O, whole vectors
    window: Pair  # kh, kw
    outputs: Pair  # H', W'
    lows: Pair  # zeros before the first row and column
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)

    def of_image_gradient(self) -> "Correlation":
        """That of the cotangents with the kernel flipped and its channels swapped, if this one has no dilation."""
        lows = self.window[0] - 1 - self.lows[0], self.window[1] - 1 - self.lows[1]
        return Correlation(self.outputs, self.features, self.channels, self.window, self.sizes, lows, dilation=self.strides)

    def column(self, output: int, tap: int) -> int | None:
        """The column of x that an output's tap meets, if it meets one."""
        place, rest = divmod(output * self.strides[1] + tap - self.lows[1], self.dilation[1])
        return place if rest == 0 and 0 <= place < self.sizes[1] else None
