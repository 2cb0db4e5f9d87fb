"""The devices a program runs on: their mesh, their memory, and one CPU device per core.

The mesh has two axes. Along "lane" each row of devices holds lanes of its own; along "data" the devices of a row share the
examples of every batch, and each holds the same state.
"""

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from smallbatch_jax.data import cache
from smallbatch_jax.program import jax_flags

LANE, DATA = "lane", "data"


def lane_mesh(devices: Sequence[Any] | None = None, data_devices: int = 1) -> Mesh:
    """Returns a mesh of all devices in rows of `data_devices`, which share each batch and must divide their number."""
    return Mesh(np.array(jax.devices() if devices is None else devices).reshape(-1, data_devices), (LANE, DATA))


def use_all_cores(devices: int | None = None) -> None:
    """Gives JAX one device per CPU core of this process, or `devices` of them, and turns XLA's loop unrolling off.

    Call it before JAX does anything. Choices that XLA_FLAGS already makes are kept.

    XLA:CPU gains little from running one small operation on many cores, and much from running many lanes at once. With loop
    unrolling it turns a loop over 32 channels or fewer into scalar instructions; vector instructions are six times as fast.

    Raises:
      InputError: if XLA_FLAGS names a file or would hide that a run diverged.
    """
    chosen = jax_flags.xla_flags()
    if "xla_backend_extra_options" not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} --xla_backend_extra_options=xla_cpu_disable_loop_unrolling".lstrip()
    if "xla_force_host_platform_device_count" in chosen:
        return  # the user's choice
    with suppress(RuntimeError):  # a notebook may have started JAX already, and keeps its devices
        jax.config.update("jax_num_cpu_devices", devices or cores())


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_compilations() -> None:
    """Stores compiled programs in the cache directory, unless the user has chosen another with JAX's own flag.

    Meant for GPUs and TPUs, where a compilation takes half a minute to several minutes. On CPU it takes seconds, and a program
    compiled for another CPU could crash.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache.directory() / "compiled"))
        compilation_cache.reset_cache()  # JAX decides at the first compilation whether there is a cache


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def memory_bytes(mesh: Mesh) -> int:
    """Returns nine tenths of the memory of this process's devices in a mesh; on CPU, of the machine's memory or its limits."""
    statistics = mesh.local_devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(0.9 * statistics["bytes_limit"]) * len(mesh.local_devices)
    return int(0.9 * min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()))


def _limits() -> list[int]:
    """Returns the limits on this process's memory, in bytes: of `ulimit -v`, and of each control group (container, job)."""
    limits = [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = Path("/sys/fs/cgroup", controllers)
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            within = root / group.lstrip("/")
            for folder in (within, *within.parents[: len(within.parts) - len(root.parts)]):
                with suppress(OSError, ValueError):  # a container hides its outer groups; "max" means no limit
                    limits.append(int((folder / name).read_text()))
    return limits or [sys.maxsize]


@functools.cache
def keep_freed_memory() -> None:
    """Makes malloc keep freed memory instead of returning it to the system; GNU's malloc only.

    XLA:CPU allocates a program's temporary arrays at every call. By default malloc returns large ones to the system, which
    then zeroes every page again: a fifth of the time at m = 512.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def peak_bytes_in_use() -> int:
    """Returns the peak memory use so far in bytes, of the accelerators or, on CPU, of this process; 0 if unknown."""
    statistics = [device.memory_stats() for device in jax.devices()]
    if all(statistics):
        return sum(found["peak_bytes_in_use"] for found in statistics if found)
    status = Path("/proc/self/status")
    lines = status.read_text().split("\n") if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
