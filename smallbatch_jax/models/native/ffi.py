"""Registers routines with XLA, through its foreign function interface.

XLA calls a C function with a pointer to the struct XLA_FFI_CallFrame; that function is generated too. It depends on the C ABI
alone, and offsets are the same on all 64-bit platforms, x86-64 and ARM: 8 bytes for pointers, size_t and int64_t, 4 for enums.
The offsets are of version 0.3 of the interface (`xla/ffi/api/c_api.h` of jaxlib 0.10), to which XLA only adds fields.
"""

import ctypes
import threading
from typing import Any

import jax
from llvmlite import ir

from smallbatch_jax.models.native.correlation import Correlation
from smallbatch_jax.models.native.loops import correlation, kernel_gradient
from smallbatch_jax.models.native.processor import Processor
from smallbatch_jax.models.native.routine import INT32, INT64, POINTER, Routine, machine_code

ROUTINES = {"correlation": correlation, "kernel_gradient": kernel_gradient}

VERSION = (0, 3)  # interface version, (major, minor)

# Offsets in bytes in the structs XLA_FFI_CallFrame, _Metadata_Extension, _Metadata and _Buffer.
FRAME_EXTENSION, FRAME_ARGUMENTS, FRAME_RESULTS = 8, 72, 112
EXTENSION_TYPE, EXTENSION_METADATA = 8, 24
METADATA_VERSION = (24, 28)
BUFFER_DATA, BUFFER_DIMENSIONS = 24, 40
METADATA = 1  # XLA_FFI_Extension_Metadata: at registration XLA calls the function once to ask for its version

_names: set[str] = set()  # names of the routines registered with XLA
_lock = threading.Lock()  # programs are traced in several threads, and a name can be registered once


def registered(routine: str, shape: Correlation, processor: Processor) -> str:
    """Returns the name under which `jax.ffi` calls a routine of `ROUTINES`; compiles and registers it the first time."""
    name = "_".join(map(str, ["smallbatch_jax", routine, *jax.tree.leaves(tuple(shape)), processor.lanes]))
    with _lock:
        if name not in _names:
            code = ROUTINES[routine](f"{name}_loops", shape, processor)
            write_handler(code, name)
            handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(machine_code(code, name))
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
            _names.add(name)
    return name


def write_handler(code: Routine, name: str) -> None:
    """Adds to a routine's module the C function that XLA calls: it reads the frame and calls the routine."""
    function = ir.Function(code.module, ir.FunctionType(POINTER, [POINTER]), name)
    build = ir.IRBuilder(function.append_basic_block())
    success = ir.Constant(POINTER, None)  # XLA_FFI_Error*

    def field(struct: Any, offset: int) -> Any:
        return build.gep(struct, [ir.Constant(INT64, offset)], source_etype=ir.IntType(8))

    def load(struct: Any, offset: int, kind: ir.Type = POINTER) -> Any:
        return build.load(field(struct, offset), typ=kind)

    (frame,) = function.args
    extension = load(frame, FRAME_EXTENSION)
    with build.if_then(build.icmp_unsigned("!=", extension, success)):
        asked = build.icmp_signed("==", load(extension, EXTENSION_TYPE, INT32), ir.Constant(INT32, METADATA))
        with build.if_then(asked):
            metadata = load(extension, EXTENSION_METADATA)
            for offset, number in zip(METADATA_VERSION, VERSION, strict=True):
                build.store(ir.Constant(INT32, number), field(metadata, offset))
            build.ret(success)
    arguments, results = load(frame, FRAME_ARGUMENTS), load(frame, FRAME_RESULTS)
    buffers = [load(arguments, 0), load(arguments, 8), load(results, 0)]
    images = load(load(buffers[0], BUFFER_DIMENSIONS), 0, INT64)
    build.call(code.function, [images, *(load(buffer, BUFFER_DATA) for buffer in buffers)])
    build.ret(success)
