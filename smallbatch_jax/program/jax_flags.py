"""JAX's configuration flags: which ones are held at their defaults while we train, which are recorded, which are left alone.

A flag that could change a result or end a run early is held at the value that every result here is made with, which is JAX's
default. A flag that chooses between implementations inside JAX, and one that this list does not know, is left alone and
recorded in WORKDIR/provenance.jsonl. The others change no result.
"""

import enum
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax

from smallbatch_jax.config.fields import InputError

HELD: dict[str, Any] = {
    # the dtypes, precision and random numbers of a result
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,  # `precision` of the experiment decides
    "jax_numpy_dtype_promotion": "standard",
    "jax_allow_f16_reductions": True,
    "jax_softmax_custom_jvp": False,
    "jax_accurate_erf_inv": False,
    "jax_use_hlo_logistic_lowering": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_threefry_gpu_kernel_lowering": False,
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_high_dynamic_range_gumbel": False,
    # how hard the compiler tries, which may move a rounding
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_memory_fitting_effort": 0.0,
    "jax_compiler_enable_remat_pass": True,
    "jax_enable_pgle": False,
    "eager_constant_folding": False,
    # a loss that is not finite is a result, and none of these may end the process that finds it
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    # what refuses code that is right
    "jax_debug_key_reuse": False,
    "jax_check_tracer_leaks": False,
    "jax_check_static_indices": False,
    "jax_thread_guard": False,
    "jax_transfer_guard": None,  # sets the three below
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_array_garbage_collection_guard": None,
    "jax_disallow_mesh_context_manager": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_raise_persistent_cache_errors": False,  # a cache that cannot be written is not used
    # which devices compute: JAX_PLATFORMS says it
    "jax_default_device": None,
}
HELD_OF_FLAX: dict[str, Any] = {
    "flax_return_frozendict": False,
    "flax_fix_rng_separator": False,  # decides the initial parameters
    "flax_preserve_adopted_names": False,
}
RECORDED: dict[str, Any] = {  # implementations inside JAX, at their defaults; another value is written down
    "check_vma": False,
    "jax_auto_pcast": True,
    "jax_bcoo_cusparse_lowering": False,
    "jax_cpu_collectives_implementation": "gloo",
    "jax_custom_jvp3": False,
    "jax_custom_vjp3": False,
    "jax_disable_bwd_checks": False,
    "jax_disable_vmap_shmap_error": False,
    "jax_embedded_constants_max_bytes": 32,
    "jax_experimental_unsafe_xla_runtime_errors": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_mock_gpu_topology": "",
    "jax_mosaic_allow_hlo": False,
    "jax_pallas_auto_assign_collective_ids": "no",
    "jax_pallas_auto_assign_collective_ids_limit": 25,
    "jax_pallas_enable_debug_checks": False,
    "jax_pallas_poison_buffers": False,
    "jax_pallas_use_mosaic_gpu": True,
    "jax_pjrt_client_create_options": None,
    "jax_ragged_dot_use_gpu_pallas_triton_lowering": False,
    "jax_ragged_dot_use_ragged_dot_instruction": True,
    "jax_refs_to_pins": False,
    "jax_remat3": False,
    "jax_remat_barrier_no_cotangents": False,
    "jax_remove_size_one_mesh_axis_from_type": False,
    "jax_scan3": False,
    "jax_use_cpp_shard_args": False,
    "jax_use_direct_linearize": True,
    "jax_use_emit_pipeline_primitive": False,
    "jax_use_magma": "auto",
    "jax_use_rgv3": True,
    "jax_use_shardy_partitioner": True,
    "jax_use_simplified_jaxpr_constants": False,
    "mock_num_gpu_processes": 0,
}
WITHOUT_EFFECT = (  # on results; provenance has the devices that were chosen
    *("jax_platforms", "jax_platform_name", "jax_xla_backend", "jax_backend_target", "jax_num_cpu_devices"),
    *("jax_cuda_visible_devices", "jax_rocm_visible_devices", "jax_oneapi_visible_devices"),
    *("jax_sort_devices_by_process_index", "jax_cpu_enable_async_dispatch"),
    *("jax_enable_preemption_service", "jax_enable_recoverability", "jax_distributed_debug"),
    *("jax_cpu_get_global_topology_timeout_minutes", "jax_cpu_get_local_topology_timeout_minutes", "jax_check_proxy_envs"),
    *("jax_cross_host_transfer_socket_address", "jax_cross_host_transfer_timeout_seconds"),
    *("jax_cross_host_transfer_transfer_size", "jax_cross_host_transport_addresses", "jax_force_dcn_cross_host_transfers"),
    *("jax_mtls_ca_file", "jax_mtls_cert_file", "jax_mtls_key_file", "jax_mtls_peer_uri_prefix"),
    *("jax_distributed_verify_secure_credentials", "jax_debug_leaked_clients_on_clear_backends"),
    *("jax_share_binary_between_hosts", "jax_share_binary_between_hosts_timeout_ms"),
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_check_contents"),
    *("jax_compilation_cache_expect_pgle", "jax_compilation_cache_include_metadata_in_key"),
    *("jax_compilation_cache_max_size", "jax_persistent_cache_enable_xla_caches"),
    *("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"),
    "jax_remove_custom_partitioning_ptr_from_cache_key",
    *("jax_pgle_aggregation_percentile", "jax_pgle_profiling_runs", "jax_xla_profile_version"),
    *("jax_log_compiles", "jax_log_checkpoint_residuals", "jax_explain_cache_misses", "jax_logging_level"),
    *("jax_debug_log_modules", "jax_compiler_detailed_logging_min_ops", "jax_pprint_use_color"),
    *("jax_captured_constants_report_frames", "jax_captured_constants_warn_bytes"),
    *("jax_dump_ir_modes", "jax_dump_ir_to", "jax_include_debug_info_in_dumps", "jax_mosaic_unzip_debug_locations"),
    *("jax_hlo_source_file_canonicalization_regex", "jax_source_url_schema", "jax_include_full_tracebacks_in_locations"),
    *("jax_traceback_filtering", "jax_traceback_in_locations_limit", "jax_tracer_error_num_traceback_frames"),
    *("jax_send_traceback_to_runtime", "jax_pallas_verbose_errors"),
    *("jax_enable_checks", "jax_mutable_array_checks", "jax_numpy_rank_promotion", "jax_raise_on_ppermute_sort_diff"),
    *("jax_export_calling_convention_version", "jax_export_ignore_forward_compatibility"),
    *("jax_export_deserialize_expired_versions", "jax_serialization_version"),
    *("jax2tf_associative_scan_reductions", "jax2tf_default_native_serialization"),
)
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")  # recorded where they are set
FAST_MATH = re.compile(r"--xla_\w*(fast_math|fast_min_max)(=(true|t|yes|y|1))?", re.IGNORECASE)  # assumes that nothing is NaN
EXTRAS = {"cuda": "cuda12", "gpu": "cuda12", "rocm": "rocm7-local", "tpu": "tpu", "oneapi": "oneapi"}  # of jax, by platform


@contextmanager
def held() -> Iterator[None]:
    """Holds the flags that could change a result, in all threads, until the block ends; then they are as they were.

    So is the mesh of `jax.set_mesh`. A line warns of the flags that were at another value.
    """
    with ExitStack() as stack:
        _hold_all(stack)
        yield


def hold_for_good() -> None:
    """The same for the rest of this process, which is a command's."""
    _hold_all(ExitStack())


def recorded() -> dict[str, Any]:
    """What the environment sets that may show in a result, for provenance: names and values."""
    known = {*HELD, *WITHOUT_EFFECT}
    found = {name: _plain(value) for name, value in jax.config.values.items() if name not in known}
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: value for name, value in found.items() if name not in RECORDED or value != RECORDED[name]} | variables


def expand_xla_flags() -> str:
    """XLA_FLAGS, which may name a file that holds them.

    Raises:
      InputError: if they let the compiler assume that no number is NaN, by which a divergence is seen.
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
      InputError: if there are none as the environment asks for them.
    """
    try:
        jax.devices()
    except Exception as error:  # of a type that depends on the platform
        variable = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), "JAX_PLATFORMS")
        asked = os.environ.get(variable, "")
        extra = next((EXTRAS[name] for name in asked.lower().split(",") if name in EXTRAS), None)
        install = f'install its plugin with pip install -U "jax[{extra}]", or ' if extra else ""
        plugins = [d.name for d in importlib.metadata.distributions() if re.match(r"jax[-_](cuda|rocm)|libtpu", d.name or "")]
        reason = " ".join(str(error).split())[:300] or "there is no such device"
        raise InputError(
            f"{variable}={asked}: cannot be used: {reason}; JAX {jax.__version__} is here with "
            f"{', '.join(sorted(plugins)) or 'the CPU alone'}: {install}unset {variable}."
        ) from None


def _hold_all(stack: ExitStack) -> None:
    """Holds the flags until the stack unwinds."""
    changed = [*_hold(jax.config, _existing(HELD), stack), *_hold_flax(stack)]
    if changed:
        named = ", ".join(changed)
        warnings.warn(f"{named}: without effect here, results are made with the defaults of JAX", stacklevel=5)
    if not jax.sharding.get_abstract_mesh().empty:
        stack.enter_context(jax.set_mesh(None))  # lanes have a mesh of their own


def _existing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this version of JAX has."""
    return {name: value for name, value in values.items() if name in jax.config.values}


def _hold(config: Any, values: Mapping[str, Any], stack: ExitStack) -> list[str]:
    """Sets the flags that differ, for all threads and for a context manager of the user's in this one; `name=value` of each."""
    ours = {name: value for name, value in config.values.items() if name in values and _plain(value) != values[name]}
    before = {name: _of_all_threads(config, name) for name in values}
    stack.callback(_restore, config, before)
    for name, value in values.items():
        if _plain(before[name]) != value:
            config.update(name, value)
    for name in ours:
        if _plain(config.values[name]) != values[name]:
            stack.enter_context(_holder(config, name)(values[name]))
    return [f"{name}={_plain(value)}" for name, value in ours.items()]


def _restore(config: Any, before: Mapping[str, Any]) -> None:
    for name, value in before.items():  # jax_transfer_guard before those that it sets
        if _of_all_threads(config, name) != value:
            config.update(name, value)


def _of_all_threads(config: Any, name: str) -> Any:
    """A flag's value where no thread has set its own; some flags are of the process alone."""
    holder = _holder(config, name)
    return holder.get_global() if hasattr(holder, "get_global") else config.values[name]


def _holder(config: Any, name: str) -> Any:
    """JAX's object for a flag, by which alone it is known what a thread has set for itself; no public name leads to it."""
    return getattr(config, "_value_holders", {}).get(name)


def _hold_flax(stack: ExitStack) -> list[str]:
    changed = []
    for name, value in HELD_OF_FLAX.items():
        given = getattr(flax.config, name, value)
        if given != value:
            stack.callback(partial(flax.config.update, name, given))
            flax.config.update(name, value)
            changed.append(f"{name}={given}")
    return changed


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: of an enumeration what it is given by."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
