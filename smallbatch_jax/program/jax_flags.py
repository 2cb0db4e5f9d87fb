"""JAX and Flax flags: the ones held at their defaults while we train, the ones recorded, and the ones left alone.

A flag that could change a result or end a run early is held at JAX's default, with which every result here is made. A flag that
chooses between implementations inside JAX, and one that this table does not know, is left alone and recorded in
WORKDIR/provenance.jsonl. The others have no effect on results.
"""

import enum
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import flax
import jax

from smallbatch_jax.config.fields import InputError


def _table(*rows: tuple[Any, str]) -> dict[str, Any]:
    """Flags by name, from rows of a value and the flags that have it by default."""
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
    # end the process at a loss that is not finite, which is a result here
    (False, "jax_debug_nans jax_debug_infs"),
    ("ignore", "jax_error_checking_behavior_nan jax_error_checking_behavior_divide jax_error_checking_behavior_oob"),
    # refuse code that is right
    (False, "jax_debug_key_reuse jax_check_tracer_leaks jax_check_static_indices jax_thread_guard jax_no_tracing"),
    (False, "jax_disallow_mesh_context_manager jax_no_execution jax_raise_persistent_cache_errors"),
    (None, "jax_transfer_guard_host_to_device jax_transfer_guard_device_to_device jax_transfer_guard_device_to_host"),
    (None, "jax_transfer_guard"),  # sets the three above, and is restored before them
    (None, "jax_array_garbage_collection_guard jax_default_device"),  # JAX_PLATFORMS chooses the devices
)
HELD_OF_FLAX = _table((False, "flax_return_frozendict flax_preserve_adopted_names flax_fix_rng_separator"))
RECORDED = _table(  # unless at this default
    (False, "check_vma jax_bcoo_cusparse_lowering jax_custom_jvp3 jax_custom_vjp3 jax_disable_bwd_checks jax_mosaic_allow_hlo"),
    (False, "jax_disable_vmap_shmap_error jax_experimental_unsafe_xla_runtime_errors jax_pallas_enable_debug_checks"),
    (False, "jax_pallas_poison_buffers jax_ragged_dot_use_gpu_pallas_triton_lowering jax_refs_to_pins jax_remat3 jax_scan3"),
    (False, "jax_remat_barrier_no_cotangents jax_remove_size_one_mesh_axis_from_type jax_use_cpp_shard_args"),
    (False, "jax_use_emit_pipeline_primitive jax_use_simplified_jaxpr_constants"),
    (True, "jax_auto_pcast jax_pallas_use_mosaic_gpu jax_ragged_dot_use_ragged_dot_instruction"),
    (True, "jax_use_direct_linearize jax_use_rgv3 jax_use_shardy_partitioner"),
    (None, "jax_pjrt_client_create_options"),
    (0, "mock_num_gpu_processes"),
    (25, "jax_pallas_auto_assign_collective_ids_limit"),
    (32, "jax_embedded_constants_max_bytes"),
    ("", "jax_mock_gpu_topology"),
    ("auto", "jax_use_magma"),
    ("gloo", "jax_cpu_collectives_implementation"),
    ("no", "jax_pallas_auto_assign_collective_ids"),
    ("warn", "jax_explicit_x64_dtypes"),
)
WITHOUT_EFFECT = (  # prefixes of names of flags that change no result; provenance records the devices that they choose
    *("jax_platform", "jax_xla_backend", "jax_backend_target", "jax_num_cpu_devices", "jax_cpu_enable_async_dispatch"),
    *("jax_cuda_visible_", "jax_rocm_visible_", "jax_oneapi_visible_", "jax_sort_devices_by_process_index"),
    *("jax_enable_preemption_service", "jax_enable_recoverability", "jax_distributed_", "jax_check_proxy_envs"),
    *("jax_cross_host_", "jax_force_dcn_cross_host_transfers", "jax_mtls_", "jax_share_binary_between_hosts", "jax_cpu_get_"),
    *("jax_enable_compilation_cache", "jax_compilation_cache_", "jax_persistent_cache_", "jax_remove_custom_partitioning_ptr"),
    *("jax_pgle_", "jax_xla_profile_version", "jax_log", "jax_explain_cache_misses", "jax_debug_log_modules"),
    *("jax_debug_leaked_clients", "jax_compiler_detailed_logging", "jax_pprint_use_color", "jax_captured_constants_"),
    *("jax_dump_ir_", "jax_include_", "jax_mosaic_unzip_debug_locations", "jax_hlo_source_file", "jax_source_url_schema"),
    *("jax_traceback_", "jax_tracer_error_", "jax_send_traceback_to_runtime", "jax_pallas_verbose_errors", "jax_enable_checks"),
    *("jax_mutable_array_checks", "jax_numpy_rank_promotion", "jax_raise_on_ppermute_sort_diff", "jax_export_", "jax2tf_"),
    "jax_serialization_version",
)
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")  # recorded if they are set
FAST_MATH = re.compile(r"--xla_\w*(fast_math|fast_min_max)(=(true|t|yes|y|1))?", re.IGNORECASE)  # assume that nothing is NaN
EXTRAS = {"cuda": "cuda12", "gpu": "cuda12", "rocm": "rocm7-local", "tpu": "tpu", "oneapi": "oneapi"}  # of jax, by platform


@contextmanager
def held() -> Iterator[None]:
    """Holds the flags in HELD, and no mesh of `jax.set_mesh`, in all threads; restores them when the block ends.

    Warns in one line that names the flags that had another value.
    """
    with ExitStack() as stack:
        _hold(stack)
        yield


def hold_for_good() -> None:
    """Holds the flags for the rest of this process."""
    _hold(ExitStack())


def _hold(stack: ExitStack) -> None:
    flags = {name: value for name, value in HELD.items() if name in jax.config.values}  # of this version of JAX
    given = {name: _plain(jax.config.values[name]) for name in flags}
    changed = {name: value for name, value in given.items() if value != flags[name]}
    for name, value in flags.items():
        before = _of_all_threads(name)
        if _plain(before) != value:
            stack.callback(jax.config.update, name, before)
            jax.config.update(name, value)
    for name in changed:
        if _plain(jax.config.values[name]) != flags[name]:  # a context manager of the user set it in this thread
            stack.enter_context(_holder(name)(flags[name]))
    for name, value in HELD_OF_FLAX.items():
        if (before := getattr(flax.config, name, value)) != value:
            stack.callback(flax.config.update, name, before)
            flax.config.update(name, value)
            changed[name] = before
    if changed:
        named = ", ".join(f"{name}={value}" for name, value in changed.items())
        warnings.warn(f"{named}: without effect here, results are made with the defaults of JAX", stacklevel=4)
    if not jax.sharding.get_abstract_mesh().empty:
        stack.enter_context(jax.set_mesh(None))  # lanes have a mesh of their own


def _of_all_threads(name: str) -> Any:
    """A flag's value where no thread has set its own; some flags belong to the process alone."""
    holder = _holder(name)
    return holder.get_global() if hasattr(holder, "get_global") else jax.config.values[name]


def _holder(name: str) -> Any:
    """JAX's object for a flag, which knows what each thread has set; JAX has no public name for it."""
    return getattr(jax.config, "_value_holders", {}).get(name)


def _plain(value: Any) -> Any:
    """Converts a flag's value to what JSON can hold."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def recorded() -> dict[str, Any]:
    """Returns name and value of the flags and variables that may show in a result, for provenance."""
    values = {name: _plain(value) for name, value in jax.config.values.items()}
    ours = {name for name in values if name in HELD or name.startswith(WITHOUT_EFFECT)}
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    others = {name: value for name, value in values.items() if name not in ours}
    return {name: value for name, value in others.items() if name not in RECORDED or value != RECORDED[name]} | variables


def expand_xla_flags() -> str:
    """Returns XLA_FLAGS, after replacing the name of a file by the flags in it.

    Raises:
      InputError: if they let the compiler assume that no number is NaN, by which a diverged run is known.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):
        try:
            given = " ".join(Path(given).read_text().split())
        except (OSError, ValueError) as error:
            raise InputError(f"XLA_FLAGS={given}: cannot be used: {getattr(error, 'strerror', None) or error}") from None
        os.environ["XLA_FLAGS"] = given
    for flag in given.split():
        if FAST_MATH.fullmatch(flag):
            raise InputError(
                f"XLA_FLAGS={flag}: lets the compiler assume that no number is NaN, by which a diverged run is known; "
                "leave it out."
            )
    return given


def require_devices() -> None:
    """Makes JAX's devices.

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
