"""Memory that there is, that was used, and that is kept."""

import ctypes
import functools
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import jax
from jax.sharding import Mesh

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
