"""Times whole training segments of a program, alternating with a PyTorch peer, for `experiments/benchmark.py`."""

import ctypes
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import jax
import torch_peer

from smallbatch_jax.program import devices
from smallbatch_jax.runner import flops, planning


def time_program(trial: planning.Trial, dataset: Any, seconds: float, repeats: int, peer: bool) -> dict[str, Any]:
    """Trains one program several times for some seconds.

    Returns:
      A row of `benchmark.py --json`: images_per_second is the median over `repeats`, of all lanes together; `rates` has every
      timing by way, "ours" and PyTorch's; measured_bytes is the growth of the process's peak memory.
    """
    job, program, chosen = trial.job, trial.program, trial.job.experiment
    trained = {
        "model": chosen.model.name,
        "norm": chosen.model.norm,
        "augment": chosen.dataset.augment,
        "batch_size": job.batch_size,
    }
    _reset_peak()
    before = devices.peak_bytes_in_use()
    trial.warm_up()
    trial.train(seconds)
    trial.evaluate()
    measured = devices.peak_bytes_in_use() - before
    rates: dict[str, list[float]] = {"ours": []}
    with ExitStack() as stack:
        if peer:
            data = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape}
            step = torch_peer.Step(**trained, **data, weight_decay=chosen.weight_decay)
            measure = stack.enter_context(torch_peer.peer(step, accelerator=jax.default_backend() != "cpu"))
        for _ in range(repeats):
            images, spent = trial.train(seconds)
            rates["ours"].append(images / spent)
            if peer:
                for way, rate in measure(seconds).items():
                    rates.setdefault(way, []).append(rate)
    return {
        **trained,
        "precision": chosen.precision,
        "lanes": program.lanes,
        "images_per_second": median(rates["ours"]),
        "rates": rates,
        "flops_per_image": flops.flops_per_image(job.model_of(None), dataset.image_shape),
        "seconds_to_compile": program.compile_seconds,
        "peak_bytes": program.peak_bytes,
        "measured_bytes": measured,
    }


def _reset_peak() -> None:
    """Resets the peak of this process's memory, where the system allows it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed by compilation is reused and not measured
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def format_row(result: dict[str, Any]) -> str:
    """Returns the table's line of a batch size, and one below it for each way of PyTorch."""
    rates, speed = result["rates"], result["images_per_second"]
    lines = [
        f"{result['batch_size']:>6}{result['lanes']:>7}{speed:>10,.0f}  {_spread(rates['ours']):<18}"
        f"{speed * result['flops_per_image'] / 1e9:>8,.0f}{result['seconds_to_compile']:>7.1f} s"
        f"{result['measured_bytes'] / 2**20:>6,.0f} MiB"
    ]
    for way, found in rates.items():
        if way != "ours":
            rate = median(found)
            lines.append(f"{'':>13}{rate:>10,.0f}  {_spread(found):<18}  {way}: ours is {speed / rate:.2f} x")
    return "\n".join(lines)


def _spread(rates: list[float]) -> str:
    return f"({min(rates):,.0f}-{max(rates):,.0f})"
