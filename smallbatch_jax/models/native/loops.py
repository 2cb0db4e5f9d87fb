"""2-D convolution of float32 images in machine code, by the direct sum: forward, and the gradients of image and kernel.

A few output pixels of a few vectors of features stay in registers while the taps and channels are summed: every number of the
image that is loaded is multiplied by all of these vectors, every vector of the kernel by all of these pixels. Nothing is
copied, padded or transposed, and no product with a zero of a padded or dilated image is taken: what a column meets is known
when the code is written, and columns are written out.
"""

import itertools
from collections.abc import Iterator

from smallbatch_jax.models.native.correlation import Correlation, Pair
from smallbatch_jax.models.native.processor import Processor
from smallbatch_jax.models.native.routine import Index, Routine, Value

CACHE = 1 << 19  # bytes of images that a kernel's gradient passes over several times
SCARCE = 5  # registers that are left for what is added to the sums


def vectors_at_once(vectors: int) -> int:
    """Of features: so few that there are registers for several pixels of them."""
    return max(count for count in (1, 2, 3) if vectors % count == 0)


def correlation(name: str, of: Correlation, processor: Processor) -> Routine:
    """A routine of N, N, and pointers to x, kernel and y."""
    code = Routine(name, 3, processor)
    n, _, x, kernel, y = code.arguments
    (height, width), (out_height, out_width) = of.sizes, of.outputs
    lanes = processor.lanes
    vectors = vectors_at_once(of.features // lanes)
    with code.loop(0, n) as image:
        x = code.at(x, code.product(image, height * width * of.channels))
        y = code.at(y, code.product(image, out_height * out_width * of.features))
        with code.loop(0, of.features, vectors * lanes) as feature:
            for remainder in range(of.dilation[0]):
                _rows(code, of, remainder, vectors, x, code.at(kernel, feature), code.at(y, feature))
    return code


def _rows(code: Routine, of: Correlation, remainder: int, vectors: int, x: Value, kernel: Value, y: Value) -> None:
    """The output rows of one remainder modulo the dilation, which all meet the same taps of the kernel."""
    (height, width), (out_height, out_width), stride, dilation = of.sizes, of.outputs, of.strides[0], of.dilation[0]
    start = (of.lows[0] - remainder * stride) % dilation  # the first tap
    first = (remainder * stride + start - of.lows[0]) // dilation  # the row of x that it meets, from output row `remainder`
    taps = len(range(start, of.window[0], dilation))
    kernel_row = of.window[1] * of.channels * of.features
    with code.loop(0, len(range(remainder, out_height, dilation))) as row:
        top = code.sum(code.product(row, stride), first)
        from_tap, to_tap = code.greatest(0, code.difference(0, top)), code.least(taps, code.difference(height, top))
        out = code.at(y, code.product(code.sum(code.product(row, dilation), remainder), out_width * of.features))
        for columns in _even_parts(out_width, _accumulators(code.processor) // vectors):
            sums = {(a, v): code.accumulator() for a in columns for v in range(vectors)}
            for total in sums.values():
                code.set(total, code.zeros)
            with code.loop(from_tap, to_tap) as tap, code.loop(0, of.channels) as channel:
                pixels = code.at(x, code.product(code.sum(top, tap), width * of.channels), channel)
                weights = code.sum(code.product(tap, dilation * kernel_row), start * kernel_row)
                _add_taps(code, of, sums, vectors, pixels, code.at(kernel, weights, code.product(channel, of.features)))
            for (a, v), total in sums.items():
                code.store(code.get(total), code.at(out, a * of.features + v * code.processor.lanes))


def _add_taps(code: Routine, of: Correlation, sums: dict[Pair, Value], vectors: int, pixels: Value, weights: Value) -> None:
    """Adds to the sums of some columns what the taps of one row give of one channel."""
    for tap in range(of.window[1]):
        meets = {a: of.column(a, tap) for a, v in sums if v == 0}
        if all(column is None for column in meets.values()):
            continue
        offset = tap * of.channels * of.features
        vector = [code.load(code.at(weights, offset + v * code.processor.lanes)) for v in range(vectors)]
        for a, column in meets.items():
            if column is not None:
                pixel = code.spread(code.at(pixels, column * of.channels))
                for v in range(vectors):
                    code.add_product(sums[a, v], pixel, vector[v])


def kernel_gradient(name: str, of: Correlation, processor: Processor) -> Routine:
    """A routine of N, B, and pointers to x, dy and dw: of N images in B blocks of as many, in a correlation without dilation.

    dw[b, i, c, o] = Σ_n,a x[b, n, a·stride + i - low, c] dy[b, n, a, o], float32[B, kh, kw, C, O].
    """
    code = Routine(name, 3, processor)
    images, blocks, x, dy, dw = code.arguments
    n = code.quotient(images, blocks)
    x_size = of.sizes[0] * of.sizes[1] * of.channels
    dy_size = of.outputs[0] * of.outputs[1] * of.features
    dw_size = of.window[0] * of.window[1] * of.channels * of.features
    few = max(1, CACHE // (4 * (x_size + dy_size)))
    with code.loop(0, blocks) as block:
        dw = code.at(dw, code.product(block, dw_size))
        with code.loop(0, dw_size, processor.lanes) as at:
            code.store(code.zeros, code.at(dw, at))
        with code.loop(0, n, few) as image:
            here = code.sum(code.product(block, n), image)
            count = code.least(few, code.difference(n, image))
            few_x, few_dy = code.at(x, code.product(here, x_size)), code.at(dy, code.product(here, dy_size))
            _add_gradients(code, of, count, few_x, few_dy, dw)
    return code


def _add_gradients(code: Routine, of: Correlation, count: Value, x: Value, dy: Value, dw: Value) -> None:
    """Adds the gradients of a few images to dw, a few taps, channels and features at a time, over all pixels."""
    lanes, channels, features = code.processor.lanes, of.channels, of.features
    (height, width), (out_height, out_width), stride, low = of.sizes, of.outputs, of.strides[0], of.lows[0]
    vectors = vectors_at_once(features // lanes)
    room = max(1, (code.processor.registers - SCARCE) // (vectors * of.window[1]))
    together = max(count for count in range(1, min(room, channels) + 1) if channels % count == 0)
    with (
        code.loop(0, of.window[0]) as tap,
        code.loop(0, channels, together) as channel,
        code.loop(0, features, vectors * lanes) as feature,
    ):
        here = code.at(dw, code.product(code.sum(code.product(tap, of.window[1] * channels), channel), features), feature)
        places = [(j, c, v) for j in range(of.window[1]) for c in range(together) for v in range(vectors)]
        sums = {place: code.accumulator() for place in places}
        offsets = {(j, c, v): (j * channels + c) * features + v * lanes for j, c, v in places}
        for total in sums.values():
            code.set(total, code.zeros)
        above = code.difference(low, tap)
        first = code.greatest(0, code.ceiling(above, stride))  # of the output rows whose tap meets a row of x
        end = code.least(out_height, code.ceiling(code.sum(above, height), stride))
        with code.loop(0, count) as image, code.loop(first, end) as row:
            x_row = code.sum(code.product(image, height), code.product(row, stride), code.difference(tap, low))
            pixels = code.at(x, code.product(x_row, width * channels), channel)
            cotangents = code.at(
                dy, code.product(code.sum(code.product(image, out_height), row), out_width * features), feature
            )
            for column, taps in _columns(code, of):
                at = code.at(pixels, code.product(column, of.strides[1] * channels))
                dys = code.at(cotangents, code.product(column, features))
                vector = [code.load(code.at(dys, v * lanes)) for v in range(vectors)]
                for j in taps:
                    for c in range(together):
                        pixel = code.spread(code.at(at, (j - of.lows[1]) * channels + c))
                        for v in range(vectors):
                            code.add_product(sums[j, c, v], pixel, vector[v])
        for place, total in sums.items():  # not summed on from dw, in which the rounding of so many additions would be seen
            so_far = code.at(here, offsets[place])
            code.store(code.add(code.load(so_far), code.get(total)), so_far)


def _columns(code: Routine, of: Correlation) -> Iterator[tuple[Index, list[int]]]:
    """Output columns, and which taps of each meet a column of x: those at the edges one by one, the others in a loop."""
    meets = [[j for j in range(of.window[1]) if of.column(a, j) is not None] for a in range(of.outputs[1])]
    inside = [a for a, taps in enumerate(meets) if len(taps) == of.window[1]]
    start, stop = (inside[0], inside[-1] + 1) if inside else (0, 0)
    for a in range(start):
        yield a, meets[a]
    if start < stop:
        with code.loop(start, stop) as column:
            yield column, list(range(of.window[1]))
    for a in range(stop, of.outputs[1]):
        yield a, meets[a]


def _accumulators(processor: Processor) -> int:
    """Registers that hold sums of a correlation: the others are for vectors of the kernel."""
    return processor.registers * 3 // 4


def _even_parts(count: int, most: int) -> list[range]:
    """The numbers below `count`, in runs of at most so many and as even as may be."""
    parts = -(-count // most)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]
