"""Estimates the cost of a program on an accelerator that this machine does not have, from the code that XLA compiles for it.

The compiler comes with JAX's own packages: `jax[cuda12]` compiles for a described GPU, `jax[tpu]` for a TPU topology.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.config.extras import require
from smallbatch_jax.data import Dataset, Photographs, cache
from smallbatch_jax.program import lanes
from smallbatch_jax.runner import hlo
from smallbatch_jax.runner.flops import flops_per_image
from smallbatch_jax.runner.hlo import Cost, Module
from smallbatch_jax.runner.input import input_pipeline
from smallbatch_jax.runner.jobs import GIB, Job, ModelOf, Setup, lacks_memory

ANY_STEPS = 10_000  # steps of a run: a constant with no effect on cost, so that Figs. 8, 17 and 18 share programs
EVALUATED = 1 / 3  # evaluation time per image relative to training: one forward pass instead of three equal passes


@dataclass(frozen=True)
class Target:
    """An accelerator and its vendor's nominal figures."""

    platform: str  # "gpu" or "tpu"
    topology: str  # name of a TPU topology, or XLA's description of a GPU
    memory_gib: float
    gb_per_second: float = 0.0  # memory bandwidth of a GPU
    tflops: tuple[float, float, float] = (0.0, 0.0, 0.0)  # peak rates of a GPU in float32, tf32 and bfloat16
    gigahertz: float = 0.0  # clock of a TPU


def _gpu(name: str, memory_gib: float, gb_per_second: float, tflops: tuple[float, float, float], core: str) -> Target:
    described = f"""
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gb_per_second * 1e9:.0f} device_memory_size: {memory_gib * GIB:.0f}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 {core} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
    return Target("gpu", described, memory_gib, gb_per_second, tflops)


_HOPPER = (
    "core_count: 132 fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98 shared_memory_per_core: 233472 "
    "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }"
)
_AMPERE = (
    "core_count: 108 fpus_per_core: 64 l2_cache_size: 41943040 clock_rate_ghz: 1.41 shared_memory_per_core: 167936 "
    "shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 }"
)
TARGETS = {
    "h100": _gpu("NVIDIA H100 80GB HBM3", 79.1, 3352, (67, 494, 989), _HOPPER),
    "h200": _gpu("NVIDIA H200", 139.0, 4800, (67, 494, 989), _HOPPER),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 79.1, 2039, (19.5, 156, 312), _AMPERE),
    "v5e": Target("tpu", "v5e:2x2", 16, gigahertz=1.5),
    "v6e": Target("tpu", "v6e:2x2", 32, gigahertz=1.75),
    "v5p": Target("tpu", "v5p:2x2x1", 95, gigahertz=1.75),
}
LAUNCH_SECONDS = 2.5e-6  # launch latency of a GPU kernel
# Share of a GPU's peak that convolutions of few channels reach in float32, tf32 and bfloat16 on one H200 (2026-11-26). In
# float32 it is fitted to ResNet-20: the step of 13 lanes is then within -25 % and +15 % of the measured one from m = 2 to 512.
# For the others it is measured on single layers.
REACHED = (0.24, 0.10, 0.12)
ASSUMPTIONS = {  # by platform
    "gpu": "each kernel takes its bytes ÷ bandwidth, at least 2.5 µs, and the FLOPs the time at a share of the peak rate that "
    "ResNet-20 reached on an H200",
    "tpu": "the compiler's cycles at the nominal clock",
}


@dataclass(frozen=True)
class Compiled:
    """Measures of one compiled program, read from its text and memory analysis."""

    lanes: int
    peak_bytes: int  # without the dataset; the target's whole memory if the compiler ran out of it
    kernels: int  # per step of all lanes
    launches_or_bytes: float  # sum over kernels of max(bytes moved, launch seconds × bandwidth)
    moved: float  # bytes, read and written by the kernels
    written: float
    cycles: float


class Estimate(NamedTuple):
    """The estimated cost of one program of a grid."""

    batch_size: int
    bn_batch_size: int
    runs: int
    compiled: Compiled
    mib_per_step: float  # read and written by its kernels on GPU; written on TPU
    step_seconds: float
    seconds: float  # of all runs, training and evaluation, if none diverges


def devices(name: str) -> Sequence[Any]:
    """Returns one device of the target, for which programs can be compiled but not run.

    Raises:
      InputError: if the extra that brings its compiler is not installed, or the compiler fails.
    """
    from jax.experimental import topologies

    target = TARGETS[name]
    require(f"target-{target.platform}", f"--target={name}")
    try:
        if target.platform == "gpu":
            return topologies.get_topology_desc(platform="cuda", target_config=target.topology, topology="1x1x1").devices[:1]
        # Without these libtpu looks for the machine's own TPU.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices[:1]
    except Exception as error:  # the plugins raise errors of many types
        raise InputError(f"--target={name}: its compiler cannot be used: {error}") from None


def estimate(
    experiment: Experiment,
    dataset: Dataset | Photographs,
    name: str,
    batch_sizes: Sequence[int] = (),
    model_of: ModelOf | None = None,
) -> Iterator[Estimate]:
    """Compiles each program of an experiment, or of some batch sizes, for a target of `TARGETS`.

    The dataset may be any of the same shape. The measures of a compiled program are kept in the cache directory.
    """
    target = TARGETS[name]
    setup = Setup(experiment, dataset, model_of, target=devices(name))
    memory = int(0.9 * target.memory_gib * GIB)
    if isinstance(dataset, Dataset):
        memory -= dataset.train_images.nbytes + dataset.test_images.nbytes
    per_image = flops_per_image(setup.model_of(None), dataset.image_shape)
    with closing(input_pipeline(dataset, experiment)) as pipeline:
        for m, b in setup.programs:
            if batch_sizes and m not in batch_sizes:
                continue
            job = Job(setup, m, b, memory_bytes=memory)
            compiled: Compiled = job.compile(pipeline, partial(_compiled, name))
            step = _step_seconds(target, compiled, per_image * m * compiled.lanes, experiment.precision)
            rounds = -(-len(job.runs) // compiled.lanes)
            tested = EVALUATED * experiment.epochs * dataset.num_test / m
            yield Estimate(
                m,
                b,
                len(job.runs),
                compiled,
                (compiled.moved if target.platform == "gpu" else compiled.written) / 2**20,
                step,
                rounds * (job.total_steps + tested) * step,
            )


def _compiled(name: str, **arguments: Any) -> Compiled:
    """Compiles a program for a target, or reads its measures from the cache directory."""
    program = replace(arguments["program"], total_steps=ANY_STEPS)
    traced, _ = lanes.trace_lanes(**arguments | {"program": program})
    lowered = traced.lower()
    read_by = f"{name} {TARGETS[name]} {jax.__version__} {inspect.getsource(hlo)}"
    key = hashlib.sha256(f"{read_by}\n{lowered.as_text()}".encode()).hexdigest()[:32]
    kept = cache.directory() / f"target-{key}.json"
    with suppress(OSError, ValueError, TypeError):
        return Compiled(**json.loads(kept.read_text()))
    target = TARGETS[name]
    options: Any = {"xla_gpu_autotune_level": "0"} if target.platform == "gpu" else {}  # there is no device to time kernels on
    step = Cost()
    try:
        executable = lowered.compile(compiler_options=options)
        step = Module(executable.as_text() or "").step()
        peak_bytes = lanes.needed_bytes(executable, arguments["data"], arguments["mesh"])
    except jax.errors.JaxRuntimeError as error:
        if not lacks_memory(error):
            raise
        peak_bytes = int(target.memory_gib * GIB)
    launch = LAUNCH_SECONDS * target.gb_per_second * 1e9
    found = Compiled(
        arguments["lanes"],
        peak_bytes,
        kernels=len(step.kernels),
        launches_or_bytes=sum(max(launch, moved) for moved in step.kernels),
        moved=sum(step.kernels),
        written=step.written,
        cycles=step.cycles,
    )
    with suppress(OSError):  # a cache that cannot be written costs only time
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(found)))
    return found


def _step_seconds(target: Target, compiled: Compiled, flops: float, precision: str) -> float:
    """Returns a step's seconds, on TPU from the compiler's cycles, on GPU from kernel launches, bytes and arithmetic."""
    if target.platform == "tpu":
        return compiled.cycles / (target.gigahertz * 1e9)
    kind = ("float32", "tf32", "bfloat16").index(precision)
    return compiled.launches_or_bytes / (target.gb_per_second * 1e9) + flops / (REACHED[kind] * target.tflops[kind] * 1e12)
