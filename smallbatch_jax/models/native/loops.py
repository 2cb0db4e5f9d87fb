"""The loops of a direct 2-D convolution of float32 images: forward, and the gradients of image and kernel.

A few output pixels × a few vectors of features stay in registers while taps and channels are summed: each element of the image
that is loaded is multiplied by all of these vectors, each vector of the kernel by all of these pixels. Columns are unrolled, so
that products with the zeros of a padded or dilated image are left out when the code is generated.
"""

from collections.abc import Iterator

from smallbatch_jax.models.native.correlation import Correlation, Pair
from smallbatch_jax.models.native.processor import Processor
from smallbatch_jax.models.native.routine import Accumulator, Index, Integer, Pointer, Routine

CACHE = 1 << 19  # bytes of images that the kernel's gradient reads for all its tiles before it takes more images
WORKING_REGISTERS = 5  # vector registers that the kernel's gradient keeps free for operands


def correlation(name: str, shape: Correlation, processor: Processor) -> Routine:
    """Returns the routine (N, x, kernel, y) that stores the correlation of x with the kernel in y."""
    code = Routine(name, processor)
    x, kernel, y = code.arrays
    (height, width), (out_height, out_width) = shape.sizes, shape.outputs
    vectors = _vectors_at_once(shape, processor)
    with code.loop(0, code.images) as image:
        x = x + image * (height * width * shape.channels)
        y = y + image * (out_height * out_width * shape.features)
        with code.loop(0, shape.features, vectors * processor.lanes) as feature:
            for remainder in range(shape.dilation[0]):
                _rows(code, shape, remainder, x, kernel + feature, y + feature)
    return code


def _rows(code: Routine, shape: Correlation, remainder: int, x: Pointer, kernel: Pointer, y: Pointer) -> None:
    """Computes a few features of the output rows with this remainder modulo the dilation, which use the same taps."""
    (height, width), (out_height, out_width), stride, dilation = shape.sizes, shape.outputs, shape.strides[0], shape.dilation[0]
    vectors = _vectors_at_once(shape, code.processor)
    first_tap = (shape.lows[0] - remainder * stride) % dilation
    first_top = (remainder * stride + first_tap - shape.lows[0]) // dilation  # row of x that this tap reads for row 0
    taps = len(range(first_tap, shape.window[0], dilation))
    kernel_row = shape.window[1] * shape.channels * shape.features
    tiles = -(-out_width // (code.processor.accumulators // vectors))
    with code.loop(0, len(range(remainder, out_height, dilation))) as row:
        top = row * stride + first_top
        y_row = y + (row * dilation + remainder) * (out_width * shape.features)
        from_tap, to_tap = (0 - top).at_least(0), (height - top).at_most(taps)
        for tile in range(tiles):
            columns = range(out_width * tile // tiles, out_width * (tile + 1) // tiles)
            sums = {(column, v): code.accumulator() for column in columns for v in range(vectors)}
            with code.loop(from_tap, to_tap) as tap, code.loop(0, shape.channels) as channel:
                pixels = x + ((top + tap) * (width * shape.channels) + channel)
                weights = kernel + (tap * (dilation * kernel_row) + first_tap * kernel_row + channel * shape.features)
                _add_taps(code, shape, sums, pixels, weights)
            for (column, v), total in sums.items():
                code.store(code.get(total), y_row + (column * shape.features + v * code.processor.lanes))


def _add_taps(code: Routine, shape: Correlation, sums: dict[Pair, Accumulator], pixels: Pointer, weights: Pointer) -> None:
    """Adds the products of one channel with one row of the kernel to the sums of some output columns."""
    columns, vectors = (sorted({key[axis] for key in sums}) for axis in (0, 1))
    for tap in range(shape.window[1]):
        read = {output: column for output in columns if (column := shape.column(output, tap)) is not None}
        if not read:
            continue
        offset = tap * shape.channels * shape.features
        weight = [code.load(weights + (offset + v * code.processor.lanes)) for v in vectors]
        for output, column in read.items():
            pixel = code.broadcast(pixels + column * shape.channels)
            for v in vectors:
                code.add_product(sums[output, v], pixel, weight[v])


def kernel_gradient(name: str, shape: Correlation, processor: Processor) -> Routine:
    """Returns the routine (N, x, dy, dw) that stores the gradient of the kernel in dw, for a correlation without dilation.

    dw[i, c, o] = Σ_n,a x[n, a·stride + i − low, c] dy[n, a, o].
    """
    code = Routine(name, processor)
    x, dy, dw = code.arrays
    x_size = shape.sizes[0] * shape.sizes[1] * shape.channels
    dy_size = shape.outputs[0] * shape.outputs[1] * shape.features
    cached = max(1, CACHE // (4 * (x_size + dy_size)))
    with code.loop(0, shape.window[0] * shape.window[1] * shape.channels * shape.features, processor.lanes) as element:
        code.store(code.zeros, dw + element)
    with code.loop(0, code.images, cached) as image:
        _add_gradients(code, shape, (code.images - image).at_most(cached), x + image * x_size, dy + image * dy_size, dw)
    return code


def _add_gradients(code: Routine, shape: Correlation, images: Integer, x: Pointer, dy: Pointer, dw: Pointer) -> None:
    """Adds the gradients of a few images to dw, tile by tile: all columns of the kernel × a few channels × a few features."""
    lanes, channels, features = code.processor.lanes, shape.channels, shape.features
    vectors = _vectors_at_once(shape, code.processor)
    room = max(1, (code.processor.registers - WORKING_REGISTERS) // (vectors * shape.window[1]))
    together = max(count for count in range(1, min(room, channels) + 1) if channels % count == 0)
    with (
        code.loop(0, shape.window[0]) as tap,
        code.loop(0, channels, together) as channel,
        code.loop(0, features, vectors * lanes) as feature,
    ):
        keys = [(j, c, v) for j in range(shape.window[1]) for c in range(together) for v in range(vectors)]
        sums = {key: code.accumulator() for key in keys}
        for pixel, cotangents, taps in _output_pixels(code, shape, images, tap, x + channel, dy + feature):
            dys = [code.load(cotangents + v * lanes) for v in range(vectors)]
            for j in taps:
                for c in range(together):
                    image = code.broadcast(pixel + ((j - shape.lows[1]) * channels + c))
                    for v in range(vectors):
                        code.add_product(sums[j, c, v], image, dys[v])
        tile = dw + ((tap * (shape.window[1] * channels) + channel) * features + feature)
        for (j, c, v), total in sums.items():  # a single running sum in dw would round off more
            target = tile + ((j * channels + c) * features + v * lanes)
            code.store(code.build.fadd(code.load(target), code.get(total)), target)


def _output_pixels(
    code: Routine, shape: Correlation, images: Integer, tap: Integer, x: Pointer, dy: Pointer
) -> Iterator[tuple[Pointer, Pointer, list[int]]]:
    """Loops over the output pixels of some images that a row of the kernel contributes to.

    Yields for each output pixel the pixel of x at column tap `low`, the cotangents, and the column taps inside the image; the
    caller's code is generated once per yield.
    """
    (height, width), (out_height, out_width), stride, low = shape.sizes, shape.outputs, shape.strides[0], shape.lows[0]
    first = (low - tap).ceil_div(stride).at_least(0)
    stop = (low - tap + height).ceil_div(stride).at_most(out_height)
    with code.loop(0, images) as image, code.loop(first, stop) as row:
        x_row = x + (image * height + row * stride + (tap - low)) * (width * shape.channels)
        dy_row = dy + (image * out_height + row) * (out_width * shape.features)
        for column, taps in _columns(code, shape):
            yield x_row + column * (shape.strides[1] * shape.channels), dy_row + column * shape.features, taps


def _columns(code: Routine, shape: Correlation) -> Iterator[tuple[Index, list[int]]]:
    """Yields output columns, each with its taps inside the image: those near an edge one by one, the others in a loop."""
    inside = [[j for j in range(shape.window[1]) if shape.column(a, j) is not None] for a in range(shape.outputs[1])]
    whole = [column for column, taps in enumerate(inside) if len(taps) == shape.window[1]]
    start, stop = (whole[0], whole[-1] + 1) if whole else (0, 0)
    for column in range(start):
        yield column, inside[column]
    if start < stop:
        with code.loop(start, stop) as column:
            yield column, list(range(shape.window[1]))
    for column in range(stop, shape.outputs[1]):
        yield column, inside[column]


def _vectors_at_once(shape: Correlation, processor: Processor) -> int:
    """Returns the feature vectors per tile: a divisor of their number, small enough to leave registers for several pixels."""
    return max(count for count in (1, 2, 3) if shape.features // processor.lanes % count == 0)
