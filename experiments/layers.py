"""Times each distinct convolution of a model, forward and both gradients, by every way to compute it; trains nothing.

    python experiments/layers.py --config=configs/fig08_resnet32.py [--batch_sizes=4,32,128] [--lanes=1,13] [--json]

Prints the table of docs/speed.md: microseconds per image of a lane; * is the fastest way, – was left out or failed
(--json says why). Lanes go one after the other (map) or side by side, as vmap∘grad or grad∘vmap. On CPU it is one
core's speed, as a lane has it in training, only under `taskset -c 0`. --limit cuts nothing short that has begun.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import command
import jax
import jax.numpy as jnp
from absl import flags

from smallbatch_jax import data
from smallbatch_jax.config import experiment, fields
from smallbatch_jax.models import conv, create_model
from smallbatch_jax.program.lanes import COMPUTE_DTYPE, MATMUL_PRECISION

CONFIG = command.define_config_flag()
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["4", "32", "128"], "Images per lane, several with commas between.")
LANES = flags.DEFINE_list("lanes", ["1", "13"], "Lanes together, several with commas between.")
SECONDS = flags.DEFINE_float("seconds", 0.2, "About how long one timed call takes.")
LIMIT = flags.DEFINE_float("limit", 540.0, "Seconds after which nothing new is begun.")
JSON = flags.DEFINE_bool("json", False, "Whether the last line is everything as one JSON object.")

IMAGE_SHAPES = {name: entry.size.image_shape for name, entry in data.DATASETS.items() if entry.size}  # read without the data
IMAGE_CHANNELS = 4  # up to as many, a layer is the model's first, whose images need no gradient
WAYS = [f"{how} {mapping}" for how in conv.IMPLEMENTATIONS for mapping in ("map", "vmap∘grad", "grad∘vmap")]
SLOW_SECONDS = 2.0  # a first call longer than this is the measurement
STEP_SIZE = 1e-10  # nothing grows, yet nothing can be taken out of the loop


class Layer(NamedTuple):
    image: tuple[int, int, int]  # H, W, C
    kernel: tuple[int, int, int, int]  # kh, kw, C, O
    strides: tuple[int, int]
    padding: str | conv.Pads


def find_layers(model: Any, image_shape: Sequence[int]) -> dict[Layer, int]:
    """The distinct convolutions on the way of images [H, W, C] through a model, and how often each occurs."""
    found: Counter[Layer] = Counter()

    def collect(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                (x, kernel), how = (v.aval.shape for v in equation.invars), equation.params
                found[Layer(x[1:], kernel, how["window_strides"], how["padding"])] += 1
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    collect(inner.jaxpr)

    with conv.forced("plain"):
        collect(jax.make_jaxpr(model.init)(jax.random.key(0), jnp.zeros((2, *image_shape))).jaxpr)
    return dict(found)


def make_program(layer: Layer, mapping: str, block: int) -> Callable[..., jax.Array]:
    """(blocks, kernels, images, weights), stacked by lane → kernels, after that many blocks of `block` steps each.

    A step takes the gradient of ½ Σ weights · output² and moves kernels and images by it, each a very little.
    """

    def loss(kernel: jax.Array, images: jax.Array, weights: jax.Array) -> jax.Array:
        y = conv.conv(images, kernel.astype(images.dtype), layer.strides, layer.padding)
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

        # XLA:GPU waits for the device at each turn of a loop whose length it does not know; not of a scan.
        start = (kernels, images)
        return jax.lax.fori_loop(0, blocks, lambda _, carry: jax.lax.scan(step, carry, length=block)[0], start)[0]

    return run if mapping != "map" else lambda blocks, *stacked: jax.lax.map(lambda lane: run(blocks, *lane), stacked)


def seconds_per_block(program: Callable[..., Any], arrays: Sequence[jax.Array], seconds: float) -> float:
    """The median of three calls of about `seconds` each; if already the first call is slow, its time."""

    def timed(blocks: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(blocks, *arrays))
        return time.perf_counter() - began

    if (first := timed(1)) > SLOW_SECONDS:
        return first
    blocks, took = 1, min(timed(1), timed(1))  # the first also loaded the program
    while took < seconds / 2:
        blocks = math.ceil(blocks * min(seconds / took, 16))
        took = timed(blocks)
    return sorted(timed(blocks) for _ in range(3))[1] / blocks


def time_layer(layer: Layer, m: int, lanes: int, seconds: float, precision: str, deadline: float) -> dict[str, Any]:
    """A row of the table: microseconds per image by way, without those that were left out, failed, or are not written."""
    kernel = jax.ShapeDtypeStruct(layer.kernel, jnp.float32)
    images = jax.ShapeDtypeStruct((m, *layer.image), COMPUTE_DTYPE[precision])
    y = jax.eval_shape(lambda x, w: conv.conv(x, w.astype(x.dtype), layer.strides, layer.padding), images, kernel)
    name = f"{'×'.join(map(str, layer.image))}→{y.shape[3]} {layer.kernel[0]}×{layer.kernel[1]}/{layer.strides[0]}"
    products = 2 if layer.image[2] <= IMAGE_CHANNELS else 3
    flops = products * 2 * math.prod(y.shape[1:3]) * math.prod(layer.kernel)
    row = {"layer": name, "m": m, "lanes": lanes, "flops": flops, **layer._asdict(), "left_out": 0, "failed": {}}
    draw = jax.jit(lambda: [jax.random.normal(jax.random.key(0), (lanes, *x.shape), x.dtype) for x in (kernel, images, y)])
    arrays, block = [], 1 if jax.default_backend() == "cpu" else 16
    for way in WAYS[:: 1 if lanes > 1 else 3]:  # one lane has no use for vmap
        implementation: Any
        implementation, mapping = way.split()
        if time.monotonic() > deadline:
            row["left_out"] += 1
            continue
        if implementation == "native" and not conv.natively(images, kernel):
            continue
        try:
            arrays = arrays or draw()  # here, where they may not fit
            with conv.forced(implementation), jax.default_matmul_precision(MATMUL_PRECISION[precision]):
                program = jax.jit(make_program(layer, mapping, block)).lower(0, *arrays).compile()
            row[way] = seconds_per_block(program, arrays, seconds) / (block * m * lanes) * 1e6
        except jax.errors.JaxRuntimeError as error:  # one way without enough memory must not end the others
            row["failed"][way] = str(error).splitlines()[0]
    return row


def format_row(row: Mapping[str, Any], ways: Sequence[str]) -> str:
    best = min((way for way in ways if way in row), key=lambda way: row[way], default=None)
    cells = [f"{f'{row[way]:.2f}' if way in row else '–'}{'*' * (way == best)}".rjust(len(way)) for way in ways]
    rate = f"{row['flops'] / row[best] / 1e3:.1f}" if best else "–"
    return f"| {row['layer']:18} | {row['count']:2} | {row['m']:4} | {row['lanes']:5} | {' | '.join(cells)} | {rate:>8} |"


def report(layers: Mapping[Layer, int], batch_sizes: Sequence[int], lane_counts: Sequence[int], **how: Any) -> list[dict]:
    """Prints the table as it grows, then the sums over the model, as far as every layer was measured; returns its rows."""
    rows, sums, ways = [], [], WAYS[:: 1 if max(lane_counts) > 1 else 3]
    print(f"| {'layer':18} |  × | {'m':>4} | lanes | {' | '.join(ways)} | GFLOP/s* |\n|{'---|' * (len(ways) + 5)}")
    for m, lanes in [(m, lanes) for lanes in lane_counts for m in batch_sizes]:
        for layer, count in layers.items():
            rows.append({"count": count, **time_layer(layer, m, lanes, **how)})
            print(format_row(rows[-1], ways), flush=True)
        group = rows[-len(layers) :]
        known = [key for key in ("flops", *ways) if all(key in row for row in group)]
        sums.append({"layer": "all", "count": sum(layers.values()), "m": m, "lanes": lanes})
        sums[-1] |= {key: sum(row["count"] * row[key] for row in group) for key in known}
    print(*(format_row(row, ways) for row in sums), sep="\n")
    if left_out := sum(row["left_out"] for row in rows):
        print(f"{left_out} measurements were left out, for lack of time")
    return rows


def main() -> int:
    batch_sizes, lane_counts = (
        fields.distinct(fields.integer(1, 2**16), least=1)(
            f"--{flag.name}", [int(v) if v.isdecimal() else v for v in flag.value]
        )
        for flag in (BATCH_SIZES, LANES)
    )
    seconds = fields.positive(60)("--seconds", SECONDS.value)
    deadline = time.monotonic() + fields.number(0, 1e6)("--limit", LIMIT.value)
    chosen = experiment.from_config(command.given_config(CONFIG))
    source, precision = chosen.dataset, chosen.precision
    shape = IMAGE_SHAPES.get(source.name) or data.load(source.name, source.data_dir, source.image_size).image_shape
    command.start_jax(cpu_devices=1)  # with the compiler flags of a sweep
    try:
        layers = find_layers(create_model(chosen.model.name, 10, chosen.model.norm), shape)
    except ValueError as error:  # images too small for the model
        raise experiment.InputError(f"model: {error}") from error
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    print(device, f"jax {jax.__version__}", precision, date, sep=", ")
    rows = report(layers, batch_sizes, lane_counts, seconds=seconds, precision=precision, deadline=deadline)
    if JSON.value:
        print(json.dumps({"device": device, "jax": jax.__version__, "precision": precision, "date": date, "rows": rows}))
    return 0


if __name__ == "__main__":
    command.run(main)
