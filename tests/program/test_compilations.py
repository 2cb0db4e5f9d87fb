"""Compiled programs of a GPU or TPU are kept on disk; those of a CPU are not."""

import jax
import pytest
import tiny

from smallbatch_jax.program import device_data, devices, lanes, train


@pytest.fixture
def chosen():
    """Yields a function that sets JAX's directory of compiled programs, which the tests share; restores it."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield lambda value: jax.config.update("jax_compilation_cache_dir", value)
    jax.config.update("jax_compilation_cache_dir", before)
    devices.compilation_cache.reset_cache()


@pytest.mark.parametrize(("before", "after"), [(None, "compiled"), ("/mine", "/mine")])
def test_programs_are_kept_where_the_user_or_we_choose(chosen, cache_dir, before, after):
    chosen(before)
    devices.keep_compilations()
    assert jax.config.values["jax_compilation_cache_dir"] == str(cache_dir / after)  # an absolute path stays itself


def test_programs_of_a_cpu_are_not_kept(chosen):
    chosen(None)
    program = train.Program(4, 8)
    mesh = lanes.lane_mesh(jax.devices()[:1])
    data = device_data.to_device(tiny.dataset(), mesh)
    lanes.compile_lanes(tiny.PlainModel(), program, data, mesh, 1, 2)
    assert jax.config.values["jax_compilation_cache_dir"] is None
