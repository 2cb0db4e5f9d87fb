"""Communication between processes that run one program together (`jax.distributed`).

All take the same steps in the same order, each with its own devices. Only the first touches the workdir: it reads and writes
results and checkpoints, and sends the others what it read. The processes agree on decisions that depend on a clock or a signal
before they act on them. With one process these functions communicate nothing.
"""

import functools
import pickle
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallbatch_jax.config.fields import InputError
from smallbatch_jax.store.files import WriteError

PyTree = Any
T = TypeVar("T")


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this process is the one that reads and writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Calls `function()` in the first process and returns its value in all.

    Raises:
      InputError, WriteError: in all processes, if `function` does.
    """
    if not several():
        return function()
    value, error = _broadcast(_attempt(function) if is_first() else None)
    if error is not None:
        raise error
    return value


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Calls `function()` and returns its value, or the InputError or WriteError that it raised."""
    try:
        return function(), None
    except InputError as refusal:  # a subclass may need other arguments when it is unpickled
        return None, InputError(str(refusal))
    except WriteError as failure:
        return None, failure


def on_every(function: Callable[[], T]) -> T:
    """Calls `function()` in every process and returns its value in each.

    Raises:
      InputError, WriteError: in all processes, if `function` does in one; an InputError says in which.
    """
    if not several():
        return function()
    value, error = _attempt(function)
    if (failed := _first_where(error is not None)) is not None:
        error = _broadcast(error, failed)
        raise InputError(f"{error} (process {failed})") if isinstance(error, InputError) else error
    return cast(T, value)


def require_same(values: Mapping[str, Any], section: str) -> None:
    """Checks that all processes were given the same values, which must be picklable.

    Raises:
      InputError: names the section, the first value that differs and a process that has another.
    """
    if several():
        firsts = on_first(lambda: dict(values))
        for name, first in firsts.items():
            if (other := _first_where(values.get(name) != first)) is not None:
                raise InputError(
                    f"{section}.{name}: process {other} has another value than process 0; start all of them alike."
                )


def least(value: int) -> int:
    """Returns the smallest value of all processes, to float32 rounding: JAX has no integers beyond int32 here."""
    return int(np.min(multihost_utils.process_allgather(np.float64(value)))) if several() else value


def put(tree: PyTree, mesh: Mesh, spec: P) -> PyTree:
    """Puts arrays on the host, equal in every process, onto the devices of a mesh; each process feeds its own devices."""
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree)


def readable(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the arrays, replicated so that `np.asarray` can read them in every process."""
    return _replicate(mesh)(tree) if several() else tree


def exchange(values: tuple[int, ...], mesh: Mesh) -> Any:
    """Starts an all-gather of integers over this mesh's processes; `np.asarray` waits for int32[rows, values]."""
    if not several():
        return np.array([values], np.int32)
    rows = NamedSharding(Mesh(mesh.devices.reshape(-1), ("device",)), P("device"))
    mine = np.tile(np.array(values, np.int32), (len(mesh.local_devices), 1))
    return _replicate(rows.mesh)(jax.make_array_from_process_local_data(rows, mine))


def leave_together() -> None:
    """Waits for all processes; the first one leaves last, because the others would not outlive it."""
    if several():
        multihost_utils.sync_global_devices("leave")
        if is_first():
            time.sleep(0.5)


@functools.cache
def _replicate(mesh: Any) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def _first_where(condition: bool) -> int | None:
    """Returns the index of the first process in which the condition holds; None if there is none."""
    found = np.flatnonzero(multihost_utils.process_allgather(np.int32(condition)))
    return int(found[0]) if len(found) else None


def _broadcast(value: Any, source: int = 0) -> Any:
    """Returns one process's value in all processes."""
    content, this = np.frombuffer(pickle.dumps(value), np.uint8), jax.process_index() == source
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size), this))
    padded = content if this else np.zeros(size, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded, this)).tobytes())
