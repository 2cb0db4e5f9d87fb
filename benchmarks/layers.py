"""Times each distinct convolution of a model, forward and both gradients, ours and XLA's, in every way to map over lanes.

    python benchmarks/layers.py --config=configs/fig08_resnet32.py [--batch_sizes=4,32,128] [--lanes=1,13] [--json]

Prints microseconds per image and lane; * marks the fastest way, – one that failed (--json says why). "ours" is
`models.conv.conv`, "lax" is `lax.conv_general_dilated`; lanes go one after the other (map) or side by side, as vmap∘grad or
grad∘vmap. On CPU, `taskset -c 0` gives the speed of one core, which is what a lane has in training.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn
from jax import lax

from smallbatch_jax.config import experiment, fields
from smallbatch_jax.models import create_model
from smallbatch_jax.models.conv import conv
from smallbatch_jax.models.layers import Conv
from smallbatch_jax.program.lanes import COMPUTE_DTYPE, MATMUL_PRECISION

CONFIG = command.define_config_flag()
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["4", "32", "128"], "Images per lane, several with commas between.")
LANES = flags.DEFINE_list("lanes", ["1", "13"], "Lanes together, several with commas between.")
SECONDS = flags.DEFINE_float("seconds", 0.2, "About how long one timed call takes.")
JSON = flags.DEFINE_bool("json", False, "Whether the last line is everything as one JSON object.")

IMAGE_CHANNELS = 4  # at most, in a model's first layer, whose images need no gradient
CONVOLUTIONS: dict[str, Callable[..., jax.Array]] = {
    "ours": lambda *operands: conv(*operands, platform=jax.default_backend()),
    "lax": lambda *operands: lax.conv_general_dilated(*operands, dimension_numbers=("NHWC", "HWIO", "NHWC")),
}
WAYS = [(how, mapping) for how in CONVOLUTIONS for mapping in ("map", "vmap∘grad", "grad∘vmap")]
STEP_SIZE = 1e-10  # arrays hardly change, yet nothing can be taken out of the loop


class Layer(NamedTuple):
    """A convolution: image (H, W, C), kernel (kh, kw, C, O)."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any


def find_layers(model: nn.Module, image_shape: Sequence[int]) -> dict[Layer, int]:
    """Returns the distinct convolutions that images [H, W, C] pass in a model, and the count of each."""
    found: Counter[Layer] = Counter()

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, Conv):
            kernel = (*layer.kernel_size, args[0].shape[-1], layer.features)
            found[Layer(args[0].shape[1:], kernel, tuple(layer.strides), layer.padding)] += 1
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *image_shape)))
    return dict(found)


def make_program(layer: Layer, how: str, mapping: str, block: int) -> Callable[..., jax.Array]:
    """Returns (blocks, kernels, images, weights), stacked by lane → kernels after that many blocks of `block` steps.

    A step takes the gradient of ½ Σ weights · output² and moves kernels and images by it, each a very little.
    """

    def loss(kernel: jax.Array, images: jax.Array, weights: jax.Array) -> jax.Array:
        y = CONVOLUTIONS[how](images, kernel.astype(images.dtype), layer.strides, layer.padding)
        return 0.5 * (weights * y**2).sum()

    arguments = (0,) if layer.image[2] <= IMAGE_CHANNELS else (0, 1)
    gradient = jax.value_and_grad(loss, arguments)
    if mapping == "vmap∘grad":
        gradient = jax.vmap(gradient)
    elif mapping == "grad∘vmap":
        gradient = jax.value_and_grad(lambda *stacked: jax.vmap(loss)(*stacked).sum(), arguments)

    def run(blocks: jax.Array, kernels: jax.Array, images: jax.Array, weights: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, jax.Array], _: None) -> Any:
            value, changes = gradient(*carry, weights)  # the first layer's images must change too: by the loss
            return tuple(x - STEP_SIZE * dx for x, dx in zip(carry, (*changes, value.sum())[:2], strict=True)), None

        # XLA:GPU waits for the device at each turn of a loop of unknown length, but not of a scan.
        start = (kernels, images)
        return lax.fori_loop(0, blocks, lambda _, carry: lax.scan(step, carry, length=block)[0], start)[0]

    return run if mapping != "map" else lambda blocks, *stacked: lax.map(lambda lane: run(blocks, *lane), stacked)


def seconds_per_block(program: Callable[..., Any], arrays: Sequence[jax.Array], seconds: float) -> float:
    """Returns the median of three calls of about `seconds` each."""

    def timed(blocks: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(blocks, *arrays))
        return time.perf_counter() - began

    timed(1)  # also loads the program
    blocks, took = 1, timed(1)
    while took < seconds / 2:
        blocks = math.ceil(blocks * min(seconds / took, 16))
        took = timed(blocks)
    return sorted(timed(blocks) for _ in range(3))[1] / blocks


def time_layer(layer: Layer, m: int, lanes: int, seconds: float, precision: str) -> dict[str, Any]:
    """Returns a row of the table: microseconds per image by way, without the ways that failed."""
    shapes = (layer.kernel, (m, *layer.image))
    x, w = jnp.zeros(shapes[1], COMPUTE_DTYPE[precision]), jnp.zeros(shapes[0])
    y = jax.eval_shape(lambda: CONVOLUTIONS["lax"](x, w.astype(x.dtype), layer.strides, layer.padding))
    name = f"{'×'.join(map(str, layer.image))}→{y.shape[3]} {layer.kernel[0]}×{layer.kernel[1]}/{layer.strides[0]}"
    products = 2 if layer.image[2] <= IMAGE_CHANNELS else 3
    flops = products * 2 * math.prod(y.shape[1:3]) * math.prod(layer.kernel)
    row = {"layer": name, "m": m, "lanes": lanes, "flops": flops, **layer._asdict(), "failed": {}}
    block = 1 if jax.default_backend() == "cpu" else 16
    for how, mapping in WAYS[:: 1 if lanes > 1 else 3]:  # one lane has no use for vmap
        way = f"{how} {mapping}"
        try:
            arrays = [jax.random.normal(jax.random.key(0), (lanes, *a.shape), a.dtype) for a in (w, x, y)]
            with jax.default_matmul_precision(MATMUL_PRECISION[precision]):
                program = jax.jit(make_program(layer, how, mapping, block)).lower(0, *arrays).compile()
            row[way] = seconds_per_block(program, arrays, seconds) / (block * m * lanes) * 1e6
        except jax.errors.JaxRuntimeError as error:  # too little memory for one way must not end the others
            row["failed"][way] = str(error).splitlines()[0]
    return row


def format_row(row: Mapping[str, Any], ways: Sequence[str]) -> str:
    best = min((way for way in ways if way in row), key=lambda way: row[way], default=None)
    cells = [f"{f'{row[way]:.2f}' if way in row else '–'}{'*' * (way == best)}".rjust(len(way)) for way in ways]
    rate = f"{row['flops'] / row[best] / 1e3:.1f}" if best else "–"
    return f"| {row['layer']:18} | {row['count']:2} | {row['m']:4} | {row['lanes']:5} | {' | '.join(cells)} | {rate:>8} |"


def report(layers: Mapping[Layer, int], batch_sizes: Sequence[int], lane_counts: Sequence[int], **how: Any) -> list[dict]:
    """Prints the table as it grows, then the sums over the model for ways that worked in every layer; returns the rows."""
    rows, sums, ways = [], [], [" ".join(way) for way in WAYS[:: 1 if max(lane_counts) > 1 else 3]]
    print(f"| {'layer':18} |  × | {'m':>4} | lanes | {' | '.join(ways)} | GFLOP/s* |\n|{'---|' * (len(ways) + 5)}")
    for m, lanes in [(m, lanes) for lanes in lane_counts for m in batch_sizes]:
        group = []
        for layer, count in layers.items():
            group.append({"count": count, **time_layer(layer, m, lanes, **how)})
            print(format_row(group[-1], ways), flush=True)
        known = [key for key in ("flops", *ways) if all(key in row for row in group)]
        totals = {key: sum(row["count"] * row[key] for row in group) for key in known}
        sums.append({"layer": "all", "count": sum(layers.values()), "m": m, "lanes": lanes, **totals})
        rows += group
    print(*(format_row(row, ways) for row in sums), sep="\n")
    return rows


def main() -> int:
    batch_sizes, lane_counts = (command.whole_numbers(f"--{flag.name}", flag.value) for flag in (BATCH_SIZES, LANES))
    seconds = fields.positive(60)("--seconds", SECONDS.value)
    chosen = experiment.from_config(command.given_config(CONFIG))
    shape, precision = command.load_data(chosen.dataset, random=True).image_shape, chosen.precision
    command.start_jax(cpu_devices=1)  # with the compiler flags of a sweep
    try:
        layers = find_layers(create_model(chosen.model.name, 10, chosen.model.norm), shape)
    except ValueError as error:  # images too small for the model
        raise experiment.InputError(f"model: {error}") from error
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    print(device, f"jax {jax.__version__}", precision, date, sep=", ")
    rows = report(layers, batch_sizes, lane_counts, seconds=seconds, precision=precision)
    if JSON.value:
        print(json.dumps({"device": device, "jax": jax.__version__, "precision": precision, "date": date, "rows": rows}))
    return 0


if __name__ == "__main__":
    command.run(main)
