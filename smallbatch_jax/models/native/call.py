"""Routines as functions of JAX: XLA's foreign function interface, in machine code too.

XLA calls a function of C with one pointer, to a frame that tells where the arrays are. Offsets here are those of version 0.3 of
that interface (`xla/ffi/api/c_api.h` in jaxlib 0.10), to which XLA promises to add only.
"""

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from smallbatch_jax.models.native.correlation import Correlation
from smallbatch_jax.models.native.loops import correlation, kernel_gradient
from smallbatch_jax.models.native.processor import Processor
from smallbatch_jax.models.native.routine import FLAG, INTEGER, POINTER, Compiled, Routine, compiled, integer

VERSION = (0, 3)

# Bytes from the beginning of XLA_FFI_CallFrame, of XLA_FFI_Extension_Base, of XLA_FFI_Metadata and of XLA_FFI_Buffer.
EXTENSION, ARGUMENTS, RESULTS = 8, 72, 112
TYPE, METADATA = 8, 24
MAJOR, MINOR = 24, 28
DATA, DIMENSIONS = 24, 40
ASKS_FOR_VERSION = 1  # type of the extension that a frame has once, when XLA is told of the function, and never later

ROUTINES = {"correlation": correlation, "kernel_gradient": kernel_gradient}

_one_at_a_time = threading.Lock()  # programs are traced in several threads, and a name can be registered once
_kept: list[Compiled] = []  # which XLA may call until the process ends


def call(routine: str, of: Correlation, here: Processor, result: Sequence[int], *arrays: jax.Array) -> jax.Array:
    """What a routine of `ROUTINES` puts into an array of float32 of the shape `result`, from arrays of float32."""
    target = registered(routine, of, here)
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(tuple(result), jnp.float32), vmap_method="sequential")(*arrays)


def registered(routine: str, of: Correlation, here: Processor) -> str:
    """The name by which XLA knows a routine of `ROUTINES`, which says all that it depends on."""
    with _one_at_a_time:
        return _made(routine, of, here)


@cache
def _made(routine: str, of: Correlation, here: Processor) -> str:
    numbers = "_".join(str(number) for number in jax.tree.leaves((*of, here.lanes)))
    name = f"smallbatch_jax_{routine}_{numbers}"
    code = ROUTINES[routine](f"{name}_loops", of, here)
    _write_handler(code, name)
    made = compiled(code, name)
    _kept.append(made)
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(made.address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def _write_handler(code: Routine, name: str) -> None:
    """Writes the function of C that calls a routine, beside it."""
    function = ir.Function(code.module, ir.FunctionType(POINTER, [POINTER]), name)
    build = ir.IRBuilder(function.append_basic_block())
    succeeded = ir.Constant(POINTER, None)

    def load(base: Any, offset: int, type_: Any) -> Any:
        return build.load(_beyond(build, base, offset), typ=type_)

    frame = function.args[0]
    extension = load(frame, EXTENSION, POINTER)
    with build.if_then(build.icmp_unsigned("!=", extension, succeeded)):
        asks = build.icmp_signed("==", load(extension, TYPE, FLAG), ir.Constant(FLAG, ASKS_FOR_VERSION))
        with build.if_then(asks):
            metadata = load(extension, METADATA, POINTER)
            for offset, number in zip((MAJOR, MINOR), VERSION, strict=True):
                build.store(ir.Constant(FLAG, number), _beyond(build, metadata, offset))
            build.ret(succeeded)
    arguments, results = load(frame, ARGUMENTS, POINTER), load(frame, RESULTS, POINTER)
    count = len(code.arguments) - 3  # of the arrays beside the result
    buffers = [*(load(arguments, 8 * i, POINTER) for i in range(count)), load(results, 0, POINTER)]
    leading = [load(load(buffer, DIMENSIONS, POINTER), 0, INTEGER) for buffer in (buffers[0], buffers[-1])]
    build.call(code.function, [*leading, *(load(buffer, DATA, POINTER) for buffer in buffers)])
    build.ret(succeeded)


def _beyond(build: ir.IRBuilder, base: Any, offset: int) -> Any:
    return build.gep(base, [integer(offset)], source_etype=ir.IntType(8))
