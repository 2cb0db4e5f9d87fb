"""Several processes that run one program together (`jax.distributed`): how what one of them knows reaches all.

All take the same steps in the same order, each with its own devices. The first alone touches the workdir: it reads and writes
results and checkpoints, and tells the others. What depends on a clock or on a signal is agreed on before it is acted on.
With one process every function here is as if it were not there.
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
    """Whether this process is the one that reads and writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """What `function()` gives in the first process, in all of them; only there is it called.

    Raises:
      InputError, WriteError: everywhere, if it does there.
    """
    if not several():
        return function()
    outcome: Any = None
    if is_first():
        try:
            outcome = (function(), None, "")
        except (InputError, WriteError) as error:
            outcome = (None, type(error), str(error))
    value, kind, message = pickle.loads(_broadcast(pickle.dumps(outcome)))
    if kind is not None:
        error = kind.__new__(kind)
        error.args = (message,)
        raise error
    return value


def require_same(value: Any, field: str) -> None:
    """Refuses to go on if the processes were not given the same; `value` can be pickled."""
    if not several():
        return
    differs = on_first(lambda: value) != value
    others = np.flatnonzero(np.asarray(multihost_utils.process_allgather(np.int32(differs))))
    if len(others):
        raise InputError(f"{field}: process {others[0]} was given another than process 0; start all of them alike.")


def least(value: int) -> int:
    """The smallest of what the processes give."""
    if not several():
        return value
    return int(np.min(np.asarray(multihost_utils.process_allgather(np.float64(value)))))


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays on the host, the same in every process, to devices, of which each process feeds its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree)


def readable(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays such that `np.asarray` takes them in every process, whichever devices they lie on."""
    return _replicate(mesh)(tree) if several() else tree


def exchange(values: tuple[int, ...], mesh: Mesh) -> Any:
    """Begins to tell the other processes of this mesh a few integers; `np.asarray` waits for int32[processes, values]."""
    if not several():
        return np.array([values], np.int32)
    rows = NamedSharding(Mesh(mesh.devices.reshape(-1), ("device",)), P("device"))
    mine = np.tile(np.array(values, np.int32), (len(mesh.local_devices), 1))
    return _replicate(rows.mesh)(jax.make_array_from_process_local_data(rows, mine))


def leave_together() -> None:
    """Waits for the others, and in the first process until they have gone: they would not outlive it."""
    if several():
        multihost_utils.sync_global_devices("leave")
        if is_first():
            time.sleep(0.5)


@functools.cache
def _replicate(mesh: Any) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def _broadcast(content: bytes) -> bytes:
    """The content that the first process gives."""
    size = int(np.asarray(multihost_utils.broadcast_one_to_all(np.int32(len(content)))))
    padded = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
