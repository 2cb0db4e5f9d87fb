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
from jax.sharding import Mesh

from smallbatch_jax.program import jax_flags

LANE, DATA = "lane", "data"


def lane_mesh(devices: Sequence[Any] | None = None, data_devices: int = 1) -> Mesh:
    """All devices, `data_devices` consecutive ones of which share each batch; a divisor of their number."""
    return Mesh(np.array(jax.devices() if devices is None else devices).reshape(-1, data_devices), (LANE, DATA))


def use_all_cores(devices: int | None = None) -> None:
    """One JAX device per CPU core this process may use, or as many as given, and loops that use its vectors.

    To be called before JAX does anything.

    XLA:CPU gains little from running one small operation on many cores, much from running many lanes at once. And it
    unrolls a loop over 32 channels or fewer into scalar instructions, unless told to unroll none: a vector's are six times
    as fast. A choice of the user's in XLA_FLAGS stays.

    Raises:
      InputError: if XLA_FLAGS would make a diverged run look like any other.
    """
    chosen = jax_flags.expand_xla_flags()
    if "xla_backend_extra_options" not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} --xla_backend_extra_options=xla_cpu_disable_loop_unrolling".lstrip()
    if "xla_force_host_platform_device_count" in chosen:
        return  # the user's choice
    with suppress(RuntimeError):  # a notebook may have begun already; then with the devices it has
        jax.config.update("jax_num_cpu_devices", devices or len(os.sched_getaffinity(0)))


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def memory_bytes(mesh: Mesh) -> int:
    """Memory that programs may use on this process's devices of a mesh, on CPU what the machine has; less a tenth."""
    statistics = mesh.local_devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(0.9 * statistics["bytes_limit"]) * len(mesh.local_devices)
    return int(0.9 * min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()))


def _limits() -> list[int]:
    """Bytes that this process may use at most: by `ulimit -v`, and by each control group it is in, of a container or a job."""
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
                with suppress(OSError, ValueError):  # a container does not show its outer groups; "max" is no limit
                    limits.append(int((folder / name).read_text()))
    return limits or [sys.maxsize]


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep what it frees, so that each segment need not ask for its temporary memory anew.

    XLA:CPU allocates a program's temporary arrays at every call. Handed back to the system in between, as malloc does with
    large ones, they come back as pages to be zeroed one by one: a fifth of the time at m = 512. Only for GNU's malloc.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def peak_bytes_in_use() -> int:
    """The most memory in use so far: on the accelerators, or on CPU by this process; 0 where it cannot be known."""
    statistics = [device.memory_stats() for device in jax.devices()]
    if all(statistics):
        return sum(found["peak_bytes_in_use"] for found in statistics if found)
    status = Path("/proc/self/status")
    lines = status.read_text().split("\n") if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
