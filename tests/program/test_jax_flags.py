"""JAX's and Flax's flags either change no row of a sweep or are recorded with it."""

import gc
import json
import os
import subprocess
import sys
from contextlib import ExitStack

import flax
import jax
import pandas as pd
import pytest
import tiny

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.program import jax_flags
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.runner.sweep import sweep

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(autouse=True)
def as_before():
    """Restores every flag after the test."""
    before = {name: jax_flags._of_all_threads(name) for name in jax.config.values}
    yield
    for name, value in before.items():  # jax_transfer_guard before those that it sets
        if jax_flags._of_all_threads(name) != value:
            jax.config.update(name, value)


def swept(workdir):
    """Returns the rows of two rates, of which the higher diverges."""
    rates = {"batch_sizes": (10,), "base_lrs": (2**-9, 1e30)}
    frame = sweep(tiny.PlainModel(), tiny.dataset(), **rates, epochs=2, workdir=workdir, progress=NoProgress())
    assert set(frame.status) == {"finished", "diverged"}
    return frame


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return swept(tmp_path_factory.mktemp("plain") / "w")


def others(values):
    """Returns another value for each flag that this version of JAX has."""
    special = {
        "jax_default_matmul_precision": "bfloat16",
        "jax_numpy_dtype_promotion": "strict",
        "jax_default_prng_impl": "rbg",
        "jax_legacy_prng_key": "error",
        "jax_optimization_level": "O1",
        "jax_memory_fitting_level": "O0",
        "jax_exec_time_optimization_effort": -1.0,
        "jax_memory_fitting_effort": -1.0,
        "jax_random_seed_offset": 7,
        "jax_array_garbage_collection_guard": "fatal",
        "jax_default_device": jax.devices()[-1],
        "jax_use_hlo_logistic_lowering": True,
        **{f"jax_error_checking_behavior_{kind}": "raise" for kind in ("nan", "divide", "oob")},
        **{f"jax_transfer_guard{way}": "disallow" for way in ("", "_host_to_device", "_device_to_device", "_device_to_host")},
    }
    return {name: special.get(name, not value) for name, value in values.items() if name in jax.config.values}


def test_held_flags_are_at_the_defaults_of_this_jax():
    values = "{name: jax_flags._plain(value) for name, value in jax.config.values.items()}"
    asked = f"import jax; from smallbatch_jax.program import jax_flags; print({values})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    line = [sys.executable, "-c", asked]
    defaults = eval(subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout)
    held = {name: value for name, value in jax_flags.HELD.items() if name in defaults}
    assert {name: defaults[name] for name in held} == held


def test_no_held_flag_changes_a_bit_and_all_are_the_users_again(plain, tmp_path):
    changed = others(jax_flags.HELD)
    for name, value in changed.items():
        jax.config.update(name, value)
    for name, value in jax_flags.HELD_OF_FLAX.items():
        flax.config.update(name, not value)
    try:
        with pytest.warns(UserWarning, match=r"jax_debug_nans=True.*flax_fix_rng_separator=True.*: ignored here"):
            frame = swept(tmp_path / "w")
        assert {name: getattr(flax.config, name) for name in jax_flags.HELD_OF_FLAX} != jax_flags.HELD_OF_FLAX
        found = {name: jax_flags._of_all_threads(name) for name in changed}
    finally:
        for name, value in jax_flags.HELD_OF_FLAX.items():
            flax.config.update(name, value)
    pd.testing.assert_frame_equal(frame, plain, check_exact=True)
    assert {n: jax_flags._plain(v) for n, v in found.items()} == {n: jax_flags._plain(v) for n, v in changed.items()}


def test_nor_does_a_context_manager_around_the_call(plain, tmp_path):
    with ExitStack() as stack:
        for name, value in others(jax_flags.HELD).items():
            if callable(jax_flags._holder(name)):
                stack.enter_context(jax_flags._holder(name)(value))
        stack.enter_context(jax.set_mesh(jax.make_mesh((len(jax.devices()),), ("mine",))))
        before = jax.config.values
        with pytest.warns(UserWarning, match="jax_enable_x64=True.*: ignored here"):
            frame = swept(tmp_path / "w")
        assert jax.config.values == before
        assert jax.sharding.get_abstract_mesh().axis_names == ("mine",)
    pd.testing.assert_frame_equal(frame, plain, check_exact=True)


def test_a_command_holds_them_for_good():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    with pytest.warns(UserWarning, match="jax_numpy_dtype_promotion=strict: ignored here"):
        jax_flags.hold(ExitStack())
    gc.collect()
    assert jax_flags._plain(jax.config.values["jax_numpy_dtype_promotion"]) == "standard"


def test_every_flag_that_is_not_held_is_in_the_provenance(monkeypatch):
    jax.config.update("jax_use_direct_linearize", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    found = jax_flags.recorded()
    assert {"jax_use_direct_linearize": False, "NVIDIA_TF32_OVERRIDE": "1"}.items() <= found.items()
    assert set(jax.config.values) - set(found) == set(jax_flags.HELD) & set(jax.config.values)
    assert json.loads(json.dumps(found)) == found


def test_the_provenance_of_a_sweep_has_the_flags(plain, tmp_path):
    swept(tmp_path / "w")
    start = json.loads((tmp_path / "w/provenance.jsonl").read_text().splitlines()[0])
    assert start["flags"] == jax_flags.recorded()
    assert "xla_cpu_disable_loop_unrolling" in start["flags"]["XLA_FLAGS"]


@pytest.mark.parametrize(
    "given",
    ["--xla_cpu_enable_fast_math", "--xla_cpu_enable_fast_math=true", "--xla_dump_to=x --xla_cpu_enable_fast_min_max=1"],
)
def test_flags_that_take_no_number_to_be_nan_are_refused(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", given)
    with pytest.raises(InputError, match=r"XLA_FLAGS=--xla_cpu_enable_fast_.*lets the compiler assume that there are no NaNs"):
        jax_flags.xla_flags()


def test_xla_flags_in_a_file_are_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags")
    with pytest.raises(InputError, match="XLA_FLAGS=flags: cannot be used: give the flags themselves"):
        jax_flags.xla_flags()
