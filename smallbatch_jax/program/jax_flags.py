"""JAX and Flax flags: some are held at their defaults during training; all others are recorded.

A flag that could change a result or end a run early is held at JAX's default, with which every result here is made. The others,
including any that a later JAX adds, are left alone and recorded in WORKDIR/provenance.jsonl.
"""

import enum
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import flax
import jax

from smallbatch_jax.config.fields import InputError


def _table(*rows: tuple[Any, str]) -> dict[str, Any]:
    """Returns flags by name, from rows of a default value and the flags that have it."""
    return {name: value for value, names in rows for name in names.split()}


HELD = _table(
    # dtypes, precision (which `precision` of the experiment decides) and random numbers
    (False, "jax_enable_x64 jax_softmax_custom_jvp jax_accurate_erf_inv jax_threefry_gpu_kernel_lowering"),
    (False, "jax_enable_custom_prng jax_high_dynamic_range_gumbel"),
    (True, "jax_allow_f16_reductions jax_threefry_partitionable"),
    (None, "jax_default_matmul_precision jax_use_hlo_logistic_lowering"),
    ("standard", "jax_numpy_dtype_promotion"),
    ("threefry2x32", "jax_default_prng_impl"),
    (0, "jax_random_seed_offset"),
    ("allow", "jax_legacy_prng_key"),
    # effort of the compiler, which may change rounding
    (False, "jax_disable_jit jax_disable_most_optimizations jax_enable_pgle eager_constant_folding"),
    (True, "jax_compiler_enable_remat_pass"),
    ("UNKNOWN", "jax_optimization_level"),
    ("O2", "jax_memory_fitting_level"),
    (0.0, "jax_exec_time_optimization_effort jax_memory_fitting_effort"),
    # would end the process at a loss that is not finite, which is a valid result here
    (False, "jax_debug_nans jax_debug_infs"),
    ("ignore", "jax_error_checking_behavior_nan jax_error_checking_behavior_divide jax_error_checking_behavior_oob"),
    # would reject correct code
    (False, "jax_debug_key_reuse jax_check_tracer_leaks jax_check_static_indices jax_thread_guard jax_no_tracing"),
    (False, "jax_disallow_mesh_context_manager jax_no_execution jax_raise_persistent_cache_errors"),
    (None, "jax_transfer_guard_host_to_device jax_transfer_guard_device_to_device jax_transfer_guard_device_to_host"),
    (None, "jax_transfer_guard"),  # sets the three above, and is restored before them
    (None, "jax_array_garbage_collection_guard jax_default_device"),  # JAX_PLATFORMS chooses the devices
)
HELD_OF_FLAX = _table((False, "flax_return_frozendict flax_preserve_adopted_names flax_fix_rng_separator"))
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")  # recorded if they are set
FAST_MATH = re.compile(r"--xla_\w*(fast_math|fast_min_max)(=(true|t|yes|y|1))?", re.IGNORECASE)  # assume that nothing is NaN
EXTRAS = {"cuda": "cuda12", "gpu": "cuda12", "rocm": "rocm7-local", "tpu": "tpu", "oneapi": "oneapi"}  # of jax, by platform


@contextmanager
def held() -> Iterator[None]:
    """Holds the flags in HELD at their defaults, and clears `jax.set_mesh`, in all threads; restores both on exit.

    Issues one warning that names the flags that had another value.
    """
    with ExitStack() as stack:
        hold(stack)
        yield


def hold(stack: ExitStack) -> None:
    """Holds the flags, as `held` does, until a stack unwinds, or for good if it never does."""
    changed = {}
    for name, value in HELD.items():
        if name not in jax.config.values:  # of another version of JAX
            continue
        if _plain(jax.config.values[name]) != value:
            changed[name] = _plain(jax.config.values[name])
        before = _of_all_threads(name)
        if _plain(before) != value:
            stack.callback(jax.config.update, name, before)
            jax.config.update(name, value)
        if _plain(jax.config.values[name]) != value:  # a context manager of the user set it in this thread
            stack.enter_context(_holder(name)(value))
    for name, value in HELD_OF_FLAX.items():
        if (before := getattr(flax.config, name, value)) != value:
            stack.callback(flax.config.update, name, before)
            flax.config.update(name, value)
            changed[name] = before
    if changed:
        named = ", ".join(f"{name}={value}" for name, value in changed.items())
        warnings.warn(f"{named}: ignored here, training uses JAX's defaults", stacklevel=4)
    if not jax.sharding.get_abstract_mesh().empty:
        stack.enter_context(jax.set_mesh(None))  # lanes have a mesh of their own


def _of_all_threads(name: str) -> Any:
    """Returns a flag's value in threads that have not set their own; some flags have a global value only."""
    holder = _holder(name)
    return holder.get_global() if hasattr(holder, "get_global") else jax.config.values[name]


def _holder(name: str) -> Any:
    """Returns JAX's object for a flag, with the value that each thread has set; JAX has no public name for it."""
    return getattr(jax.config, "_value_holders", {}).get(name)


def _plain(value: Any) -> Any:
    """Converts a flag's value to a JSON scalar."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def recorded() -> dict[str, Any]:
    """Returns the flags that are not held and the environment variables that are set, by name, for provenance."""
    flags = {name: _plain(value) for name, value in jax.config.values.items() if name not in HELD}
    return flags | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def xla_flags() -> str:
    """Returns XLA_FLAGS.

    Raises:
      InputError: if it is a file name, or lets the compiler assume that no number is NaN, which marks a diverged run.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):
        raise InputError(f"XLA_FLAGS={given}: cannot be used: give the flags themselves, not a file.")
    for flag in given.split():
        if FAST_MATH.fullmatch(flag):
            raise InputError(
                f"XLA_FLAGS={flag}: lets the compiler assume that there are no NaNs, so no diverged run could be "
                "detected; leave it out."
            )
    return given


def require_devices() -> None:
    """Initialises JAX's devices.

    Raises:
      InputError: if the platform that the environment asks for is not available.
    """
    try:
        jax.devices()
    except Exception as error:  # its type depends on the platform
        variable = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), "JAX_PLATFORMS")
        asked = os.environ.get(variable, "")
        extra = next((EXTRAS[name] for name in asked.lower().split(",") if name in EXTRAS), None)
        install = f'install its plugin with pip install -U "jax[{extra}]", or ' if extra else ""
        reason = " ".join(str(error).split())[:300] or "there is no such device"
        raise InputError(f"{variable}={asked}: cannot be used: {reason}; {install}unset {variable}.") from None
