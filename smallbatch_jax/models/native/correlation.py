"""The shapes of a convolution."""

from typing import NamedTuple

Pair = tuple[int, int]  # rows, columns


class Correlation(NamedTuple):
    """The shapes of y[a] = Σ_i x[(a·stride + i − low) / dilation] · kernel[i], in each of the two axes.

    The sum runs over the taps i for which the index of x is an integer inside the image. x is [N, H, W, C], kernel
    [kh, kw, C, O] and y [N, H', W', O].
    """

    sizes: Pair  # H, W
    channels: int  # C
    features: int  # O, a multiple of the vector's lanes
    window: Pair  # kh, kw
    outputs: Pair  # H', W'
    lows: Pair  # padding before the first row and column
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)  # of x

    def of_image_gradient(self) -> "Correlation":
        """Returns the correlation of dy with the flipped kernel, channels swapped, that gives dx; self has no dilation."""
        lows = self.window[0] - 1 - self.lows[0], self.window[1] - 1 - self.lows[1]
        return Correlation(self.outputs, self.features, self.channels, self.window, self.sizes, lows, dilation=self.strides)

    def column(self, output: int, tap: int) -> int | None:
        """Returns the column of x that a tap of an output column reads; None if it reads padding."""
        column, remainder = divmod(output * self.strides[1] + tap - self.lows[1], self.dilation[1])
        return column if remainder == 0 and 0 <= column < self.sizes[1] else None
