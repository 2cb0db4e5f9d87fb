"""Compiled programs of a GPU or TPU are kept on disk; those of a CPU are not."""

import jax
import pytest

from smallbatch_jax.program import devices


@pytest.fixture
def chosen():
    """Sets JAX's own directory of compiled programs, which the tests share, and restores it."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield lambda value: jax.config.update("jax_compilation_cache_dir", value)
    jax.config.update("jax_compilation_cache_dir", before)
    devices.compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("platform", "before", "after"), [("cpu", None, None), ("gpu", None, "compiled"), ("tpu", "/mine", "/mine")]
)
def test_programs_are_kept_where_the_user_or_we_choose(chosen, cache_dir, platform, before, after):
    chosen(before)
    devices.keep_compilations(platform)
    expected = str(cache_dir / after) if after == "compiled" else after
    assert jax.config.values["jax_compilation_cache_dir"] == expected
