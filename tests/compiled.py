"""How tests compile less: once for all of them what is the same program, and quickly what is compared to rounding."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache

# JAX's own cache of compiled programs, of which one is found only by who asks for the same one, to the last flag: two commands
# whose programs differ differ as ever. For tests that train the same programs again and again and are not about compiling.
FOLDER = tempfile.mkdtemp(prefix="smallbatch_compiled_")
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
ONCE = {"JAX_COMPILATION_CACHE_DIR": FOLDER, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # environment of a command


@contextmanager
def once() -> Iterator[None]:
    """The same, for what this process compiles in the block."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    _set(FOLDER, 0.0)
    try:
        yield
    finally:
        _set(None, before)


def _set(folder: str | None, seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


# `jax.jit` in half the time: LLVM leaves XLA's loops as they are. For equations that hold to rounding, by whatever code.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
QUICKLY = "--xla_backend_optimization_level=0"  # the same in XLA_FLAGS
