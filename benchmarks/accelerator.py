"""Measures our and PyTorch's images/s on a GPU in under ten minutes, beside the planner's estimate.

    python benchmarks/accelerator.py --config=configs/fig08_resnet32.py --config.model.name=resnet20 --target=h100

The table has a line for each run of `experiments/benchmark.py`: all lanes at once, beside PyTorch's eager and compiled steps;
one lane; and all lanes without command buffers (CUDA graphs) at the two smallest batch sizes. The estimate is that of `plan.py
--target`. The output of each run is shown as it comes, and the table at the end.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
from absl import flags

from smallbatch_jax.config import experiment

CONFIG = command.define_config_flag()
BATCH_SIZES = command.DEFINE_numbers("batch_sizes", "2,8,32,128,512", "Batch sizes.")
TARGET = flags.DEFINE_enum("target", None, ["h100", "h200", "a100"], "This GPU's name, for the planner's estimate.")
PEER = flags.DEFINE_bool("peer", True, "Also time PyTorch.")
SECONDS = flags.DEFINE_float("seconds", 1.0, "Seconds of one timing.", lower_bound=0.05)
REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of each kind; the median is printed.", lower_bound=1)

BENCHMARK = Path(__file__).parents[1] / "experiments" / "benchmark.py"
Rates = dict[int, float]  # images/s by batch size


def main() -> int:
    sizes = BATCH_SIZES.value
    columns = _measure("all lanes", sizes, ["--peer"] if PEER.value else [])
    columns |= _measure("one lane", sizes, ["--config.lanes=1"])
    columns |= _measure("without command buffers", sorted(sizes)[:2], xla_flags="--xla_gpu_enable_command_buffer=")
    if TARGET.value:
        columns |= {f"estimate for {TARGET.value}": _estimates(TARGET.value, sizes)}
    print("\n| images/s at m = |" + "".join(f" {m} |" for m in sizes) + "\n|---|" + "---|" * len(sizes))
    for name, rates in columns.items():
        print(f"| {name} |" + "".join(f" {rates[m]:,.0f} |" if m in rates else " |" for m in sizes))
    return 0 if columns["all lanes"] else 1


def _measure(name: str, sizes: Sequence[int], options: Sequence[str] = (), xla_flags: str = "") -> dict[str, Rates]:
    """Runs `benchmark.py`, shows its output, and returns the rates by way, ours as `name`; no rates if it fails."""
    print(f"\n{name}", flush=True)
    # `benchmark.py` has all our flags except --target; if a flag is given twice, the last one wins.
    given = [*sys.argv[1:], "--undefok=target", "--nopeer", "--random_images", "--json"]
    timing = [f"--batch_sizes={','.join(map(str, sizes))}", f"--seconds={SECONDS.value}", f"--repeats={REPEATS.value}"]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()}
    line, columns = "", {name: {}}
    words = [sys.executable, str(BENCHMARK), *given, *timing, *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            print("" if line.startswith("{") else line, end="", flush=True)
    if process.returncode == 0:
        for row in json.loads(line)["results"]:
            for way, rates in row["rates"].items():
                column = columns.setdefault(name if way == "ours" else f"PyTorch, {way}", {})
                column[row["batch_size"]] = statistics.median(rates)
    return columns


def _estimates(name: str, sizes: Sequence[int]) -> Rates:
    os.environ["JAX_PLATFORMS"] = "cpu"  # compiles without a device
    command.start_jax()
    from smallbatch_jax.runner import target

    chosen = experiment.from_config(command.given_config(CONFIG))
    grid = experiment.Grid(batch_sizes=tuple(sizes), base_lrs=chosen.grid.base_lrs)
    chosen = dataclasses.replace(chosen, grid=grid, drawn_from=())
    dataset = command.load_data(chosen.dataset, random=True)
    return {x.batch_size: x.batch_size * x.compiled.lanes / x.step_seconds for x in target.estimate(chosen, dataset, name)}


if __name__ == "__main__":
    command.run(main)
