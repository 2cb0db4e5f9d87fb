"""Communication between processes that run one program together (`jax.distributed`).

All take the same steps in the same order, each with its own devices. Only the first touches the workdir: it reads and writes
results and checkpoints, and sends the others what it read. The processes agree on decisions that depend on a clock or a signal
before they act on them. With one process these functions communicate nothing.
"""

import functools
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

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
    value, error = None, None
    if is_first():
        try:
            value = function()
        except InputError as refusal:  # a subclass may need other arguments when it is unpickled
            error = InputError(str(refusal))
        except WriteError as failure:
            error = failure
    value, error = _broadcast((value, error))
    if error is not None:
        raise error
    return value


def require_same(value: Any, field: str) -> None:
    """Checks that all processes were given the same value, which must be picklable.

    Raises:
      InputError: names the field and the first process that differs.
    """
    if several():
        differs = on_first(lambda: value) != value
        others = np.flatnonzero(multihost_utils.process_allgather(np.int32(differs)))
        if len(others):
            raise InputError(f"{field}: process {others[0]} has another value than process 0; start all of them alike.")


def least(value: int) -> int:
    """Returns the smallest value of all processes."""
    return int(np.min(multihost_utils.process_allgather(np.float64(value)))) if several() else value


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Puts arrays on the host, equal in every process, onto devices; each process feeds its own devices."""
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


def _broadcast(value: Any) -> Any:
    """Returns the first process's value in all processes."""
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    padded = content if is_first() else np.zeros(size, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
